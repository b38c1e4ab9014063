"""The rewards that `NormBTTrainer` trains are those that the saved model gives, fused with the head or not."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification

from normbt_kernels import LinearNormBTLoss, NormBTLoss
from normbt_kernels.integrations.head import Head, find_head
from normbt_kernels.integrations.transformers import PreferenceCollator
from tests.bradley_terry import LinearBTLoss
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import EOS, make_rows
from tests.tiny_trainer import make_trainer, pooled_rows


@pytest.fixture
def model():
    return make_model()


# --- what is read --------------------------------------------------------------------------------------------------


def test_head_is_the_last_linear_with_one_output(model):
    model.model.layers[0].gate = nn.Linear(16, 1)
    assert find_head(model).module is model.score
    with pytest.raises(ValueError, match="one output"):
        find_head(nn.Sequential(nn.Linear(4, 2)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rewards_do_not_depend_on_the_padding_side(model, tokenizer, tmp_path, side):
    tokenizer.padding_side = side
    rows = make_rows(6)
    trainer = make_trainer(model, tokenizer, tmp_path)
    chosen_rewards, rejected_rewards, distance = trainer.predict(rows).predictions
    with torch.no_grad():  # one sequence at a time: no padding at all
        alone = [[model.model(torch.tensor([row[name]])).last_hidden_state[0, -1] for row in rows]
                 for name in ("chosen_ids", "rejected_ids")]  # fmt: skip
        chosen, rejected = (torch.stack(hidden) for hidden in alone)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(torch.tensor(chosen_rewards), model.score(chosen)[:, 0], **close)
        torch.testing.assert_close(torch.tensor(rejected_rewards), model.score(rejected)[:, 0], **close)
        torch.testing.assert_close(torch.tensor(distance), (chosen - rejected).norm(dim=1), **close)


@pytest.mark.parametrize("loss", [LinearNormBTLoss, NormBTLoss])
def test_pad_equal_to_eos_reads_the_token_that_the_saved_model_scores(tokenizer, tmp_path, loss):
    tokenizer.pad_token = "<eos>"  # transformers' classifiers then score the token before it
    model = make_model(pad_token_id=EOS)
    rows = make_rows(4)
    chosen_rewards, _, _ = make_trainer(model, tokenizer, tmp_path, loss()).predict(rows).predictions
    with torch.no_grad():
        last = [model.model(torch.tensor([row["chosen_ids"]])).last_hidden_state[0, -2] for row in rows]
    expected = torch.stack(last) @ model.score.weight[0].detach()
    torch.testing.assert_close(torch.tensor(chosen_rewards), expected, rtol=1e-4, atol=1e-4)


def test_model_without_a_pad_token_gets_the_tokenizers(tokenizer, tmp_path):
    for model in (make_model(pad_token_id=None), make_model("gpt2", pad_token_id=None)):
        trainer = make_trainer(model, tokenizer, tmp_path, eval_dataset=make_rows(4))
        assert math.isfinite(trainer.evaluate()["eval_loss"])  # before any training
        assert model.config.pad_token_id == tokenizer.pad_token_id


def test_saved_checkpoint_gives_the_rewards_that_were_trained(model, tokenizer, tmp_path):
    rows = make_rows(8)
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows, max_steps=2)
    trainer.train()
    trainer.save_model()
    chosen_rewards, rejected_rewards, _ = trainer.predict(rows[:4]).predictions
    batch = PreferenceCollator(tokenizer)(rows[:4])
    logits = AutoModelForSequenceClassification.from_pretrained(tmp_path)(**batch).logits[:, 0]
    torch.testing.assert_close(logits, torch.tensor([*chosen_rewards, *rejected_rewards]), rtol=1e-5, atol=1e-5)


def test_encoders_are_read_where_their_head_reads(tokenizer, tmp_path):
    model = make_model("bert")
    rows = make_rows(4)
    chosen_rewards, rejected_rewards, _ = make_trainer(model, tokenizer, tmp_path).predict(rows).predictions
    with torch.no_grad():
        logits = model.eval()(**PreferenceCollator(tokenizer)(rows)).logits[:, 0]
    torch.testing.assert_close(logits, torch.tensor([*chosen_rewards, *rejected_rewards]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [LinearNormBTLoss, NormBTLoss])
def test_rewards_of_a_bf16_model_keep_what_bf16_logits_round_away(tokenizer, tmp_path, loss):
    model = make_model().to(torch.bfloat16)
    rows = make_rows(4)
    chosen_rewards, _, _ = make_trainer(model, tokenizer, tmp_path, loss()).predict(rows).predictions
    with torch.no_grad():
        hidden = pooled_rows(model.eval(), PreferenceCollator(tokenizer)(rows))
    exact = F.linear(hidden.double(), model.score.weight.double())[:4, 0].float()
    torch.testing.assert_close(torch.tensor(chosen_rewards), exact, rtol=1e-5, atol=1e-5)
    assert not torch.equal(exact.bfloat16().float(), exact)


# --- fused head or reward form -------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """A quantised head: integers and one scale in place of the weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        return F.linear(hidden, self.scale * self.weight)


def test_quantised_head_gives_its_own_rewards(model, tokenizer, tmp_path, messages):
    model.score = Int8Linear(model.score)
    trainer = make_trainer(model, tokenizer, tmp_path)
    assert not trainer.fused
    assert "NormBT takes the model's own rewards: the head is a Int8Linear" in messages.text
    chosen_rewards, rejected_rewards, _ = trainer.predict(make_rows(4)).predictions
    with torch.no_grad():
        logits = model.eval()(**PreferenceCollator(tokenizer)(make_rows(4))).logits[:, 0]
    torch.testing.assert_close(torch.tensor([*chosen_rewards, *rejected_rewards]), logits)
    assert trainer.compute_loss(model.train(), PreferenceCollator(tokenizer)(make_rows(4))).requires_grad


def test_form_that_was_picked_is_logged(model, tokenizer, tmp_path, messages):
    assert make_trainer(model, tokenizer, tmp_path).fused
    assert "NormBT is fused with the head 'score', whose weight is a plain, whole tensor" in messages.text
    assert not make_trainer(model, tokenizer, tmp_path, NormBTLoss()).fused
    assert "NormBT takes the model's own rewards: the loss given does not take the weight" in messages.text


def test_loss_keeps_its_options_and_state_where_the_head_cannot_be_fused(model, tokenizer, tmp_path):
    model.score = Int8Linear(model.score)
    options = {"eps": 1e-3, "max_weight": 7.0, "label_smoothing": 0.1, "center_coef": 0.2, "process_group": None}
    given = LinearNormBTLoss(beta=0.5, **options)
    given(torch.randn(4, 3), torch.ones(3))
    used = make_trainer(model, tokenizer, tmp_path, given).pair_loss
    assert type(used) is NormBTLoss
    assert used.extra_repr() == given.extra_repr()
    assert used.process_group is None
    assert used.state_dict() == given.state_dict()
    with pytest.raises(ValueError, match=r"LinearBTLoss needs the head's weight, but .*: pass a NormBTLoss"):
        make_trainer(model, tokenizer, tmp_path, LinearBTLoss())


def test_head_under_peft_is_the_one_that_is_called(model):
    peft = pytest.importorskip("peft")
    config = {"r": 1, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    adapted.add_adapter("second", peft.LoraConfig(**config))
    for adapter in ("default", "second"):
        adapted.set_adapter(adapter)
        found = find_head(adapted)
        head = found.module
        assert (found.name, head) == ("score", adapted.base_model.model.score.modules_to_save[adapter])
        seen = []
        hook = head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(module))
        adapted(torch.tensor([[2, 3]]))
        hook.remove()
        assert seen == [head]
    on_head = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=1, target_modules=["q_proj", "score"]))
    assert find_head(on_head) == Head("score", on_head.base_model.model.score, on_head.base_model.model)
    assert find_head(model) == Head("score", model.score, model)


def test_head_inside_a_module_that_peft_copies_is_the_copys(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model("roberta", max_position_embeddings=32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    classifier = model.base_model.model.classifier.modules_to_save["default"]
    assert find_head(model) == Head("out_proj", classifier.out_proj, model.base_model.model)
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=make_rows(4), max_steps=1)
    trainer.train()
    assert trainer.fused
    assert trainer.pair_loss.num_updates == 1
