"""The row that is trained is the row that the saved model scores, in every classifier of transformers; or a refusal."""

from contextlib import nullcontext

import pytest
import torch

import reference
from normbt_kernels import apply_normbt, remove_normbt
from normbt_kernels.integrations.head import HeadReader, find_head
from tests.tiny_classifiers import TinyDecoder, make_batch, make_model
from tests.tiny_pairs import EOS, make_rows, make_tokenizer

pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification, TrainingArguments

from normbt_kernels.diagnostics import diagnose
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from tests.every_classifier import make_classifier, make_pairs

NOT_THE_ROW = "the model's own rewards are not those of the last token"


def make_trainer(model, tokenizer, output_dir, rows=None, **arguments):
    defaults = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    args = TrainingArguments(str(output_dir), learning_rate=0.05, **defaults | arguments)
    return NormBTTrainer(model, args, train_dataset=rows or make_rows(8), processing_class=tokenizer)


def trained_and_own_rewards(trainer, folder, rows):
    """What the trainer evaluates, and what the saved model gives for the same padded batch."""
    trainer.train()
    trainer.save_model(folder)
    chosen_rewards, rejected_rewards, _ = trainer.predict(rows).predictions
    saved = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        own = saved(**PreferenceCollator(trainer.processing_class)(rows)).logits.flatten()
    return torch.tensor([*chosen_rewards, *rejected_rewards]), own


def late_pooling_model():
    return make_classifier("eurobert")


def test_pooling_over_all_tokens_is_refused_before_anything_moves(tmp_path):
    model = late_pooling_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, make_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=f"{NOT_THE_ROW}.*classifier_pooling='mean'"):
        trainer.train()
    assert trainer.pair_loss.num_updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=NOT_THE_ROW):
        diagnose(model, make_tokenizer(), make_rows(4))


def test_pooling_over_all_tokens_before_the_head_is_trained(tmp_path):
    model = late_pooling_model()
    model.config.classifier_pooling = model.classifier_pooling = "mean"
    trained, own = trained_and_own_rewards(make_trainer(model, make_tokenizer(), tmp_path), tmp_path, make_rows(4))
    torch.testing.assert_close(trained, own, rtol=1e-4, atol=1e-5)


def test_pooling_over_all_tokens_is_refused_under_apply_normbt():
    model = late_pooling_model()
    apply_normbt(model)
    chosen, rejected = model(**make_pairs()).logits.chunk(2)
    with pytest.raises(ValueError, match="the loss depends on other tokens"):
        (chosen - rejected).sum().backward()


def test_pooling_that_shows_only_under_padding_is_refused_once_there_is_some():
    """A model that scores the last position, padding or not: two sequences of the same length do not tell."""

    class LastPosition(TinyDecoder):
        def forward(self, input_ids):
            return self.score(torch.tanh(self.mix(self.embed(input_ids).cumsum(dim=1))))[:, -1]

    model = LastPosition()
    reader = HeadReader(find_head(model))
    for lengths, refused in (([4, 4], False), ([4, 4], False), ([4, 3], True)):
        input_ids = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]]) * (torch.arange(4) < torch.tensor(lengths)[:, None])
        reader.expect(input_ids)
        with pytest.raises(ValueError, match=NOT_THE_ROW) if refused else nullcontext():
            reader.take(model(input_ids))


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_pad_token_that_is_also_the_end_of_sequence_is_no_other_reward_once_saved(architecture, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = make_model(architecture, pad_token_id=None)
    trained, own = trained_and_own_rewards(make_trainer(model, tokenizer, tmp_path), tmp_path, make_rows(4))
    torch.testing.assert_close(trained, own, rtol=1e-4, atol=1e-5)
    assert model.config.pad_token_id == EOS


@pytest.mark.parametrize("side", ["left", "right"])
def test_virtual_tokens_are_refused(side, tmp_path):
    """Under prompt tuning they stand before the padding, and the model scores the last position, padding or not."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    trainer = make_trainer(peft.get_peft_model(make_model(), config), make_tokenizer(side), tmp_path)
    with pytest.raises(ValueError, match=r"'score' sees \(\d+, \d+, 16\) for tokens .*prompt tuning"):
        trainer.train()
    assert trainer.pair_loss.num_updates == 0


# --- two adapters, each with a head of its own ---------------------------------------------------------------------


@pytest.fixture
def two_adapters():
    """A peft model whose first adapter is active, the second one registered last."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(make_model(), config)
    model.add_adapter("second", config)
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["second"].weight)
    model.set_adapter("default")
    return model


def test_apply_normbt_weighs_the_head_of_the_active_adapter(two_adapters):
    apply_normbt(two_adapters)
    copies = two_adapters.base_model.model.score.modules_to_save
    assert hasattr(copies["default"], "normbt")
    assert not hasattr(copies["second"], "normbt")
    chosen, rejected = two_adapters.train()(**make_batch()).logits.chunk(2)
    (chosen - rejected).sum().backward()
    assert copies["default"].normbt.num_updates == 1


def make_trl_trainer(model, output_dir, rows):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from normbt_kernels.integrations.trl import NormBTRewardTrainer

    off = {"report_to": "none", "save_strategy": "no", "bf16": False, "gradient_checkpointing": False}
    args = trl.RewardConfig(str(output_dir), use_cpu=True, max_steps=1, learning_rate=0.0, logging_steps=1, **off)
    return NormBTRewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())


def test_trl_mixin_reads_the_head_of_the_active_adapter(two_adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL then reports no usage
    rows = make_rows(4)
    trainer = make_trl_trainer(two_adapters, tmp_path, rows)
    trainer.train()
    seen = []
    head = two_adapters.base_model.model.score.modules_to_save["default"]
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = PreferenceCollator(make_tokenizer())(rows)
    with torch.no_grad():
        two_adapters(**batch)
    distance = reference.pair_distance(reference.pool(seen[0], batch["attention_mask"].sum(dim=1) - 1))
    assert trainer.state.log_history[0]["mean_distance"] == pytest.approx(distance.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda model, folder: make_trainer(model, make_tokenizer(), folder),
        lambda model, folder: make_trl_trainer(model, folder, make_rows(4)),
    ],
    ids=["NormBTTrainer", "NormBTRewardTrainer"],
)
def test_a_trainer_of_ours_and_apply_normbt_do_not_both_weigh_the_pairs(make, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")
    trainer = make(make_model(), tmp_path)
    apply_normbt(trainer.model)
    with pytest.raises(ValueError, match=r"apply_normbt is on its model too: call remove_normbt\(model\)"):
        trainer.train()
    remove_normbt(trainer.model)
    trainer.train()


def test_trl_mixin_refuses_a_model_that_pools_over_all_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")
    trainer = make_trl_trainer(late_pooling_model(), tmp_path, make_rows(4))
    with pytest.raises(ValueError, match=NOT_THE_ROW):
        trainer.train()
    assert trainer.pair_loss.num_updates == 0
