"""Our trainer does all that TRL's `RewardTrainer` does: logs, evaluation, checkpoints, several processes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import reference

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer
from trl import RewardTrainer

from normbt_kernels.integrations.trl import METRICS, NormBTRewardMixin, NormBTRewardTrainer
from normbt_kernels.ops import closed_form, ema, pair_loss
from tests.processes import run_ranks
from tests.tiny_pairs import make_tokenizer
from tests.tiny_trl import (
    FULL,
    LORA,
    applied,
    lora,
    losses_of,
    make_dataset,
    make_model,
    make_trainer,
    parameters_of,
)

# --- what TRL's trainer does, ours does ----------------------------------------------------------------------------


def test_metrics_are_those_that_trl_logs(tokenizer, tmp_path):
    """Two logs with an evaluation between them, each over unequal batches, and what is left at the end."""
    dataset = make_dataset(22)
    histories = []
    for cls in (RewardTrainer, NormBTRewardTrainer):
        trainer = make_trainer(
            cls,
            make_model(),
            tokenizer,
            tmp_path,
            dataset,
            make_dataset(10, seed=1),
            num_train_epochs=2,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=3,
            learning_rate=0.0,
        )
        trainer.train()
        trainer.predict(trainer.eval_dataset)  # its batches too are TRL's to average into the next evaluation
        trainer.evaluate()
        histories.append(trainer.state.log_history)
    theirs, ours = histories
    assert len(ours) == len(theirs)
    for seen, expected in zip(ours, theirs, strict=True):
        for name in set(expected) - {"loss", "eval_loss", "train_loss", "grad_norm"}:
            if not name.endswith(("runtime", "per_second")):
                assert seen[name] == pytest.approx(expected[name], rel=1e-5), name
        if "loss" in expected:
            assert seen["bt_loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert set(seen) == set(expected) | set(METRICS) | {"mu"}
        if "eval_loss" in expected:
            assert set(seen) == set(expected) | {f"eval_{name}" for name in METRICS}


def test_logged_distances_and_weights_are_those_of_the_reference(tokenizer, tmp_path):
    dataset = make_dataset(8)
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, dataset, learning_rate=0.0,
                           num_train_epochs=1, logging_steps=2)  # fmt: skip
    rows = []
    trainer.model.score.register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    batches = []
    original = trainer.model.forward
    trainer.model.forward = lambda **inputs: batches.append(inputs["attention_mask"]) or original(**inputs)
    trainer.train()
    distances = [
        reference.pair_distance(reference.pool(hidden, mask.sum(dim=1) - 1))
        for hidden, mask in zip(rows, batches, strict=True)
    ]
    ema = reference.DistanceEMA()
    weights = []
    for distance in distances:
        weights.append(reference.normbt_weight(distance, ema.weight_mean(distance)))
        ema.update(distance)
    logged = trainer.state.log_history[0]
    means = {
        "mean_distance": [distance.mean() for distance in distances],
        "min_weight": [weight.min() for weight in weights],
        "mean_weight": [weight.mean() for weight in weights],
        "max_weight": [weight.max() for weight in weights],
    }
    for name, values in means.items():
        assert logged[name] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5), name
    assert logged["mu"] == pytest.approx(ema.mu.item(), rel=1e-6)


def test_evaluation_uses_mu_and_leaves_it(tokenizer, tmp_path):
    dataset, eval_dataset = make_dataset(8), make_dataset(8, seed=1)
    arguments = {"max_steps": 2, "center_rewards_coefficient": 0.05, "per_device_eval_batch_size": 8}
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, dataset, eval_dataset, **arguments)
    trainer.train()
    state = copy.deepcopy(trainer.pair_loss.state_dict())
    metrics = trainer.evaluate()
    assert trainer.pair_loss.state_dict() == state

    batch = trainer.data_collator(list(eval_dataset))
    with torch.no_grad():
        hidden = trainer.model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        hidden = reference.pool(hidden, batch["attention_mask"].sum(dim=1) - 1)
        head = trainer.model.score.weight
        loss = reference.linear_normbt_loss(hidden, head, state["mu"], margin=batch["margin"], center_coef=0.05)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_compute_metrics_receives_the_rewards(tokenizer, tmp_path):
    received = []

    def compute_metrics(prediction):
        received.append(torch.as_tensor(prediction.predictions))
        return {"pairs": len(prediction.predictions) / 2}

    eval_dataset = make_dataset(4)
    options = {"compute_metrics": compute_metrics}
    model = make_model()
    trainer = make_trainer(
        NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4), eval_dataset, None, options
    )
    assert trainer.evaluate()["eval_pairs"] == 4
    batch = trainer.data_collator(list(eval_dataset))
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(received[0].reshape(expected.shape), expected)


class CountingTrainer(RewardTrainer):
    """Somebody's own trainer, with a metric and a weight for each step."""

    def training_step(self, *args, **kwargs):
        self._metrics["train"]["steps"].append(1.0)
        return super().training_step(*args, **kwargs)


class NormBTCountingTrainer(NormBTRewardMixin, CountingTrainer):
    pass


def test_mixin_keeps_what_a_trainer_of_your_own_adds(tokenizer, tmp_path):
    options = {"beta": 0.5, "eps": 1e-3, "max_weight": 1.0}
    trainer = make_trainer(
        NormBTCountingTrainer, make_model(), tokenizer, tmp_path, make_dataset(8), options=options, max_steps=2
    )
    trainer.train()
    assert trainer.pair_loss.beta == 0.5
    assert trainer.pair_loss.options.eps == 1e-3
    assert trainer.state.log_history[0]["steps"] == 1.0
    assert trainer.state.log_history[0]["max_weight"] == 1.0


def test_conversations_are_tokenised_by_the_chat_template(tokenizer, tmp_path):
    answers = {"chosen": "w9 w8", "rejected": "w7"}
    prompt = {"role": "user", "content": "w5 w6"}
    rows = [{name: [prompt, {"role": "assistant", "content": answers[name]}] for name in answers}] * 4
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, Dataset.from_list(rows), max_steps=1)
    assert tokenizer.decode(trainer.train_dataset[0]["chosen_ids"]) == "user w5 w6 <eos> assistant w9 w8 <eos>"
    trainer.train()
    assert trainer.state.log_history[0]["mean_distance"] > 0


def test_model_card_names_the_method(tokenizer, tmp_path):
    dataset = make_dataset(4)
    trainer = make_trainer(
        NormBTRewardTrainer,
        make_model(),
        tokenizer,
        tmp_path,
        dataset,
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
    )
    trainer.train()  # TRL writes the card with each checkpoint
    card = (tmp_path / "README.md").read_text()
    assert "trained with NormBT" in card
    assert "https://huggingface.co/papers/2512.06343" in card
    assert {"trl", "reward-trainer"} <= set(trainer.model.model_tags)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [FULL, LORA])
@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_bitwise(adapters, tokenizer, tmp_path):
    def train(checkpoint=None):
        trainer = make_trainer(
            NormBTRewardTrainer,
            make_model(),
            tokenizer,
            tmp_path,
            make_dataset(24),
            peft_config=None if adapters == FULL else lora("llama", adapters),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            optim="adamw_torch",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole, resumed = train(), train(str(tmp_path / "checkpoint-3"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert whole.pair_loss.num_updates == 6
    assert resumed.pair_loss.state_dict() == whole.pair_loss.state_dict()
    assert torch.equal(losses_of(resumed), losses_of(whole))


def test_checkpoint_loads_without_this_package(tokenizer, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4), **arguments)
    trainer.train()
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-1", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_checkpoint_of_another_loss_starts_mu_anew_and_says_so(tokenizer, tmp_path, messages):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    for cls, max_steps in ((RewardTrainer, 1), (NormBTRewardTrainer, 2)):
        trainer = make_trainer(
            cls, make_model(), tokenizer, tmp_path, make_dataset(8), max_steps=max_steps, **arguments
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if max_steps == 2 else None)
    assert trainer.pair_loss.num_updates == 1
    assert "normbt.pt" in messages.text


# --- the host waits for nothing ------------------------------------------------------------------------------------


class HostReads(TorchFunctionMode):
    """Counts what would make the host wait for a GPU: a tensor's values read or copied by Python. (Not `numpy`, which
    a tensor on a GPU refuses.)"""

    READS = ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.READS
        return func(*args, **kwargs or {})


class WithoutMetrics(RewardTrainer):
    """A reward trainer that reads nothing itself: all reads are the model's and `Trainer`'s."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return -F.logsigmoid(rewards[: len(rewards) // 2] - rewards[len(rewards) // 2 :]).mean()


def test_host_reads_once_per_log_and_never_in_a_step(tokenizer, tmp_path, monkeypatch):
    # As on every other device: what serves the CPU reads mu.
    monkeypatch.setattr(pair_loss, "compute_on_cpu", closed_form.compute_pair_loss)
    monkeypatch.setattr(ema, "move_by_pending_on_cpu", ema.move_mu_)
    reads = {}
    for cls in (WithoutMetrics, NormBTRewardTrainer, RewardTrainer):
        trainer = make_trainer(
            cls, make_model(), tokenizer, tmp_path, make_dataset(32), num_train_epochs=1, logging_steps=4
        )
        with HostReads() as seen:
            trainer.train()
        assert trainer.state.global_step == 8
        reads[cls] = seen.count
    assert reads[NormBTRewardTrainer] == reads[WithoutMetrics] + 2  # two logs
    assert reads[RewardTrainer] >= reads[WithoutMetrics] + 6 * 8  # the counter sees what TRL reads in each step


# --- several processes ---------------------------------------------------------------------------------------------


def train_on_this_rank(cls, model, tokenizer, output_dir, **config):
    data = make_dataset(18), make_dataset(8, seed=1)
    trainer = make_trainer(cls, model, tokenizer, output_dir, *data, logging_steps=2, **config)
    trainer.train()
    return trainer


def trained(trainer):
    """The whole parameters and mu that training has led to."""
    weights = trainer.model.score.normbt if type(trainer) is RewardTrainer else trainer.pair_loss
    return parameters_of(trainer), weights.state_dict()["mu"].clone()


TRAINER_TAKES_FSDP2 = hasattr(Trainer, "_defer_fsdp_gradient_reduction")  # of a model sharded at load time


def sharded_model(folder):
    """The same model, by `fully_shard` (which accelerate does not do on CPUs, but transformers does)."""
    from transformers.distributed import DistributedConfig

    if torch.distributed.get_rank() == 0:
        make_model().save_pretrained(folder)
    torch.distributed.barrier()
    config = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
    return AutoModelForSequenceClassification.from_pretrained(folder, distributed_config=config)


def train_on_two_ranks(output_dir):
    tokenizer = make_tokenizer()
    config = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    histories = [
        train_on_this_rank(cls, make_model(), tokenizer, output_dir, learning_rate=0.0, num_train_epochs=1,
                           eval_strategy="steps", eval_steps=3, **config).state.log_history
        for cls in (RewardTrainer, NormBTRewardTrainer)
    ]  # fmt: skip
    results = {}
    for cls in (NormBTRewardTrainer, applied):
        for engine in ("DDP", "FSDP2") if TRAINER_TAKES_FSDP2 else ("DDP",):
            model = make_model() if engine == "DDP" else sharded_model(output_dir / f"initial-{cls.__name__}")
            trainer = train_on_this_rank(cls, model, tokenizer, output_dir, max_steps=4, **config)
            results[f"{cls.__name__} under {engine}"] = trained(trainer)
    if trainer.is_world_process_zero():
        torch.save((histories, results), output_dir / "two_ranks.pt")


@pytest.mark.slow
def test_two_ranks_log_as_trl_does_and_train_as_one_on_the_joined_batch(tokenizer, tmp_path):
    run_ranks(2, "tests.test_trl_runs", tmp_path)
    (theirs, ours), results = torch.load(tmp_path / "two_ranks.pt", weights_only=True)
    for expected, seen in zip(theirs, ours, strict=True):
        shared = {name for name in expected if name.removeprefix("eval_") in METRICS}
        assert len(shared) == 6 or "train_runtime" in expected
        assert {name: seen[name] for name in shared} == pytest.approx({name: expected[name] for name in shared})
        if "loss" in expected:
            assert seen["bt_loss"] == pytest.approx(expected["loss"])

    initial = torch.cat([parameter.detach().double().flatten() for parameter in make_model().parameters()])
    config = {"max_steps": 4, "per_device_train_batch_size": 4}
    expected, expected_mu = trained(
        train_on_this_rank(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, **config)
    )
    assert len(results) == (4 if TRAINER_TAKES_FSDP2 else 2)
    for run, (parameters, mu) in results.items():
        assert (parameters - expected).norm() < 1e-5 * (expected - initial).norm(), run
        torch.testing.assert_close(mu, expected_mu, rtol=1e-6, atol=0, msg=run)


if __name__ == "__main__":
    train_on_two_ranks(Path(sys.argv[1]))
