"""NormBTTrainer: the real `Trainer` around the fused loss, against hand-written eager steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import reference

pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from normbt_kernels import LinearNormBTLoss, NormBTLoss, linear_normbt_loss
from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.commands.losses import make_loss
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from tests.bradley_terry import LinearBTLoss
from tests.tiny_classifiers import gradients, make_model
from tests.tiny_pairs import make_rows
from tests.tiny_trainer import make_trainer, pooled_rows


@pytest.fixture
def model():
    return make_model()


# --- the loss in the trainer ---------------------------------------------------------------------------------------


def test_bt_step_equals_a_hand_written_eager_step(model, tokenizer, tmp_path):
    rows = make_rows(4)
    eager = copy.deepcopy(model)
    trainer = make_trainer(model, tokenizer, tmp_path, make_loss("bt", TrainOptions()), train_dataset=rows, max_steps=1)
    trainer.train()

    rewards = eager.score(pooled_rows(eager, PreferenceCollator(tokenizer)(rows)))[:, 0]
    loss = -F.logsigmoid(rewards[:4] - rewards[4:]).mean()
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, seen), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("columns", [[], ["margin"]], ids=["plain", "margin"])
def test_normbt_gradients_equal_the_eager_reference(model, tokenizer, tmp_path, columns):
    trainer = make_trainer(model, tokenizer, tmp_path)
    ema = reference.DistanceEMA(beta=0.9)
    for seed in range(3):  # the first batch is weighed by its own mean, the others by the EMA
        batch = PreferenceCollator(tokenizer)(make_rows(4, columns, seed))
        model.train()
        trainer.compute_loss(model, batch).backward()
        seen = gradients(model)

        rows = pooled_rows(model, batch)
        distance = reference.pair_distance(rows)
        mu = ema.weight_mean(distance)
        reference.linear_normbt_loss(rows, model.score.weight, mu, margin=batch.get("margin")).backward()
        ema.update(distance)
        for name, expected in gradients(model).items():
            torch.testing.assert_close(seen[name], expected, rtol=1e-3, atol=1e-5, msg=f"{name}, batch {seed}")
        torch.testing.assert_close(trainer.pair_loss.mu, ema.mu.detach())


def test_accumulated_micro_batches_average(tokenizer, tmp_path):
    rows = make_rows(4)
    models = []
    for size, steps in ((4, 1), (1, 4)):
        model = make_model()
        batching = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(model, tokenizer, tmp_path, LinearBTLoss(), None, rows, max_steps=1, **batching)
        trainer.train()
        models.append((model, trainer.state.log_history[-1]["train_loss"]))
    (whole, whole_loss), (parts, parts_loss) = models
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    for (name, seen), expected in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_trainer_adds_no_host_synchronisation_to_those_of_model_and_loss(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    batch = PreferenceCollator(tokenizer)(make_rows(4))
    model.train()
    trainer.compute_loss(model, batch)  # whatever happens only once
    trainer.head_reader.expect(batch["input_ids"])
    with HostReads() as of_model:
        logits = model(**batch).logits
    rows = trainer.head_reader.take(logits)
    with HostReads() as of_loss:
        trainer.pair_loss(rows, model.score.weight, return_stats=True)
    with HostReads() as of_trainer:
        trainer.compute_loss(model, batch)
    assert of_trainer.count == of_model.count + of_loss.count


def test_forward_passes_of_others_leave_nothing_behind(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    batch = PreferenceCollator(tokenizer)(make_rows(2))
    trainer.compute_loss(model, batch)
    model(**batch)
    copy.deepcopy(model)  # would refuse to copy activations that a hook has kept
    model.score(input=torch.zeros(1, model.config.hidden_size))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_head_that_lora_has_frozen_is_warned_about(model, tokenizer, tmp_path, messages, task_type):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type))
    make_trainer(adapted, tokenizer, tmp_path)
    warned = "the scalar head is frozen" in messages.text and "modules_to_save=['score']" in messages.text
    assert warned == (task_type is None)


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, each of which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


# --- logging, evaluation, checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("others_log", [False, True])
def test_logs_are_means_over_all_pairs_since_the_last_log(model, tokenizer, tmp_path, others_log):
    """Whatever a subclass or a callback logs in between, be it called "loss" too."""
    rows = make_rows(6)  # a batch of 4 and one of 2
    trainer = make_trainer(
        model,
        tokenizer,
        tmp_path,
        train_dataset=rows,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
    )
    if others_log:
        computed = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: (computed(*args, **kwargs), trainer.log({"loss": 1.0}))[0]
    trainer.train()
    *of_others, logged, _ = trainer.state.log_history
    assert [entry["loss"] for entry in of_others] == [1.0, 1.0] * others_log
    trainer.log({"loss": 2.0})
    assert trainer.state.log_history[-1].keys() == {"loss", "epoch", "step"}
    with torch.no_grad():
        hidden = pooled_rows(model, PreferenceCollator(tokenizer)(rows))
        rewards = model.score(hidden)[:, 0]
    difference = rewards[:6] - rewards[6:]
    distance = (hidden[:6] - hidden[6:]).norm(dim=1)
    assert logged["mean_distance"] == pytest.approx(distance.mean().item(), rel=1e-4)
    assert logged["margin"] == pytest.approx(difference.mean().item(), rel=1e-3, abs=1e-5)
    assert logged["bt_loss"] == pytest.approx(-F.logsigmoid(difference).mean().item(), rel=1e-4)
    assert logged["accuracy"] == pytest.approx((difference > 0).float().mean().item())
    assert logged["mu"] == pytest.approx(trainer.pair_loss.mu.item())
    weight = reference.normbt_weight(distance, distance[:4].mean())  # mu of the second batch: the mean of the first
    assert logged["mean_weight"] == pytest.approx(weight.mean().item(), rel=1e-4)
    assert logged["min_weight"] == pytest.approx(weight.min().item(), rel=1e-4)
    assert logged["max_weight"] == pytest.approx(weight.max().item(), rel=1e-4)


def test_loss_that_is_not_finite_shows_once_and_spoils_no_later_log(model, tokenizer, tmp_path):
    rows = [row | {"margin": margin} for margin in (0.0, 1.0, 0.0) for row in make_rows(4)]
    arguments = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows, **arguments)
    collate = trainer.data_collator

    def collate_wrong_beyond_measure(rows):  # whose gradient is finite
        batch = collate(rows)
        return batch | {"margin": batch["margin"] / (batch["margin"] != 1)}

    trainer.data_collator = collate_wrong_beyond_measure
    trainer.train()
    first, second, third = (entry for entry in trainer.state.log_history if "mu" in entry)
    assert not math.isfinite(second["bt_loss"])
    assert second["loss"] == first["loss"]
    for name in first.keys() - {"step", "epoch"}:
        assert third[name] == pytest.approx(first[name]), name


def test_one_copy_to_the_host_per_log_and_none_between(model, tokenizer, tmp_path, monkeypatch):
    """Beside those of the plain Trainer, whose isnan(loss) at each step is turned off."""

    class Plain(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.mean()

    copies = 0
    tolist = torch.Tensor.tolist

    def counted_tolist(tensor):
        nonlocal copies
        copies += tensor.is_floating_point()
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    rows = make_rows(24)
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows, max_steps=6, logging_steps=3)
    with HostReads() as ours:
        trainer.train()
    assert copies == 2
    plain = Plain(make_model(), trainer.args, PreferenceCollator(tokenizer), rows)
    plain.args.remove_unused_columns = False
    with HostReads() as of_plain:
        plain.train()
    assert copies == 2
    assert ours.count == of_plain.count
    plain.args.logging_nan_inf_filter = True
    with HostReads() as with_filter:
        plain.train()
    assert with_filter.count >= of_plain.count + 6


def test_evaluation_uses_mu_and_leaves_it(model, tokenizer, tmp_path):
    rows = make_rows(10)
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows, eval_dataset=rows, max_steps=2)
    trainer.train()
    before = copy.deepcopy(trainer.pair_loss.state_dict())
    metrics = trainer.evaluate()
    assert trainer.pair_loss.state_dict() == before
    with torch.no_grad():
        hidden = pooled_rows(model.eval(), PreferenceCollator(tokenizer)(rows))
        rewards = model.score(hidden)[:, 0]
        # 10 pairs in batches of 4: Trainer weighs the last batch by its 2 pairs
        expected = reference.linear_normbt_loss(hidden, model.score.weight, before["mu"])
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx((rewards[:10] > rewards[10:]).float().mean().item())


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(tokenizer, tmp_path, gradient_accumulation_steps):
    rows = make_rows(24)
    arguments = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    whole = make_trainer(make_model(), tokenizer, tmp_path, train_dataset=rows, **arguments)
    whole.train()
    resumed = make_trainer(make_model(), tokenizer, tmp_path, train_dataset=rows, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert whole.pair_loss.num_updates.item() == 6
    for name, state in whole.pair_loss.state_dict().items():
        assert torch.equal(resumed.pair_loss.state_dict()[name], state), name
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], parameter), name


def test_best_model_is_loaded_at_the_end(model, tokenizer, tmp_path):
    rows = make_rows(8)
    trainer = make_trainer(
        model,
        tokenizer,
        tmp_path,
        train_dataset=rows,
        eval_dataset=make_rows(8, seed=1),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=1.0,
    )
    trainer.train()
    best = AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), trainer.model.parameters(), strict=True))


def test_checkpoint_without_the_state_of_the_loss_starts_mu_anew(tokenizer, tmp_path):
    rows = make_rows(8)
    arguments = {"train_dataset": rows, "save_strategy": "steps", "save_steps": 2}
    make_trainer(make_model(), tokenizer, tmp_path, LinearBTLoss(), max_steps=2, **arguments).train()
    assert not (tmp_path / "checkpoint-2" / "normbt.pt").exists()
    trainer = make_trainer(make_model(), tokenizer, tmp_path, LinearNormBTLoss(), max_steps=3, **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.pair_loss.num_updates.item() == 1


# --- misuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LinearNormBTLoss, r"a module called like LinearNormBTLoss\(\).*: got <class '.*LinearNormBTLoss'>"),
        (linear_normbt_loss, r"a module called like .*: got <function linear_normbt_loss"),
        (nn.BCEWithLogitsLoss(), r"a module called like .*: got BCEWithLogitsLoss\(\)"),
        (LinearNormBTLoss(reduction="none"), "one number: the loss needs reduction='mean'"),
    ],
)
def test_what_cannot_be_the_loss_is_refused_before_the_model_is_loaded(loss, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NormBTTrainer("no/such/model", loss=loss)


@pytest.mark.parametrize("loss", [LinearNormBTLoss, NormBTLoss])
def test_odd_batch_is_refused_before_mu_moves(model, tokenizer, tmp_path, loss):
    trainer = make_trainer(model, tokenizer, tmp_path, loss())
    batch = {name: column[:3] for name, column in PreferenceCollator(tokenizer)(make_rows(2)).items()}
    with pytest.raises(ValueError, match="all chosen sequences, then as many rejected: got 3 sequences"):
        trainer.compute_loss(model.train(), batch)
    assert trainer.pair_loss.num_updates == 0


def test_several_labels_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="num_labels=1"):
        make_trainer(make_model(num_labels=2), tokenizer, tmp_path)


def test_head_that_does_not_give_the_rewards_is_refused(model, tokenizer, tmp_path):
    model.other = nn.Linear(16, 1)  # registered last, and never called
    trainer = make_trainer(model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"did not call its scalar head"):
        trainer.compute_loss(model, PreferenceCollator(tokenizer)(make_rows(2)))
    assert trainer.pair_loss.num_updates == 0


def test_the_model_can_be_called_after_a_forward_that_was_interrupted(model, tokenizer, tmp_path):
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    expected = model.eval()(**batch).logits
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=make_rows(4))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hook.remove()
    torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=0)


def test_ligers_forward_is_refused_and_its_other_kernels_are_not(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"liger_kernel_config={'fused_linear_cross_entropy': False}"):
        make_trainer(model, tokenizer, tmp_path, use_liger_kernel=True)
    kept = {"fused_linear_cross_entropy": False}
    make_trainer(model, tokenizer, tmp_path, use_liger_kernel=True, liger_kernel_config=kept)


def test_several_gpus_in_one_process_are_refused(model, tokenizer, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        NormBTTrainer(model, args, processing_class=tokenizer)
