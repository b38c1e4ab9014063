"""The trainers with late pooling and padding-free train, evaluate, predict and resume as they do without."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")

import peft
from datasets import Dataset
from transformers import TrainingArguments
from trl import RewardConfig, RewardTrainer

from normbt_kernels import apply_normbt
from normbt_kernels.integrations import shortcuts
from normbt_kernels.integrations.shortcuts import install_shortcuts
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from normbt_kernels.integrations.trl import NormBTRewardTrainer
from tests.test_shortcuts import BOTH, EACH, deaf_to_positions, rows_seen
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import make_rows, make_tokenizer

STEPS = 10


def lora(**options):
    torch.manual_seed(0)
    options |= {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.get_peft_model(make_model(), peft.LoraConfig(**options))


def make_trainer(folder, model=None, arguments=None, **options):
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "optim": "sgd",
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "logging_steps": 5,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        | (arguments or {}),
    )
    rows = make_rows(60, ["margin"])
    model = make_model() if model is None else model
    return NormBTTrainer(model, args, train_dataset=rows, processing_class=make_tokenizer(), **options)


def parameters(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_run(seen, expected, tolerance=2e-6):
    """Parameters, mu and logs to fp32 rounding."""
    theirs = parameters(expected)
    for name, parameter in parameters(seen).items():
        assert (parameter - theirs[name]).norm() <= tolerance * theirs[name].norm().clamp(min=0.1), name
    assert seen.pair_loss.mu.item() == pytest.approx(expected.pair_loss.mu.item(), rel=tolerance)
    for ours, other in zip(seen.state.log_history, expected.state.log_history, strict=True):
        timeless = [name for name in other if not name.endswith(("runtime", "per_second", "total_flos"))]
        assert {name: ours[name] for name in timeless} == pytest.approx(
            {name: other[name] for name in timeless}, rel=1e-4, abs=1e-5
        )


SCENARIOS = {
    "fused head": (make_model, {}),
    "accumulation": (make_model, {"gradient_accumulation_steps": 2, "max_steps": 5}),
    "checkpointing": (make_model, {"gradient_checkpointing": True}),
    "LoRA, head saved": (lambda: lora(task_type="SEQ_CLS"), {}),
    "LoRA on the head": (lora, {"gradient_checkpointing": True}),
    "in one row, as on a GPU": (lambda: lora(task_type="SEQ_CLS"), {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.slow
def test_training_evaluation_and_prediction_are_the_same(scenario, tmp_path, monkeypatch):
    make, arguments = SCENARIOS[scenario]
    monkeypatch.setattr(shortcuts, "has_flash_attention", lambda device: "one row" in scenario)
    rows, found = make_rows(10, ["margin"], seed=1), []
    for options in ({}, BOTH):
        trainer = make_trainer(tmp_path, make(), arguments, **options)
        trainer.train()
        metrics = trainer.evaluate(rows)
        found.append((trainer, metrics, trainer.predict(rows).predictions))
    (plain, metrics, predictions), (short, short_metrics, short_predictions) = found
    assert short.data_collator.packing == ("one row" if "one row" in scenario else "rows")
    assert_same_run(short, plain)
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert short_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5)
    for ours, theirs in zip(short_predictions, predictions, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_the_trainer_computes_neither_padding_nor_the_last_layer_of_other_tokens(tmp_path):
    trainer = make_trainer(tmp_path, arguments={"max_steps": 2}, **BOTH)
    first, last = (rows_seen(layer.mlp) for layer in trainer.model.model.layers)
    trainer.train()
    assert last[-1] == 8
    collate = PreferenceCollator(make_tokenizer())
    padded = max(collate(make_rows(60)[i : i + 4])["input_ids"].numel() for i in range(0, 60, 4))
    assert first[-1] < padded


def test_resumed_equals_uninterrupted(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path, arguments=saving, **BOTH)
    whole.train()
    resumed = make_trainer(tmp_path, arguments=saving, **BOTH)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, parameter in parameters(whole).items():
        assert torch.equal(parameter, parameters(resumed)[name]), name
    assert torch.equal(resumed.pair_loss.mu, whole.pair_loss.mu)


def test_a_refusal_comes_before_mu_moves(tmp_path):
    trainer = make_trainer(tmp_path, deaf_to_positions(make_model()), padding_free=True)
    with pytest.raises(ValueError, match=r"set padding_free=False$"):
        trainer.train()
    assert trainer.pair_loss.num_updates == 0


# --- TRL -----------------------------------------------------------------------------------------------------------


def make_trl_trainer(folder, cls, model, **options):
    args = RewardConfig(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=3,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_list(make_rows(24, ["margin"]))
    return cls(model, args, train_dataset=rows, processing_class=make_tokenizer(), **options)


@pytest.mark.parametrize("options", EACH)
@pytest.mark.slow
def test_trl_trains_the_same(options, tmp_path):
    """With activations checkpointed, as TRL does by itself."""
    plain = make_trl_trainer(tmp_path, NormBTRewardTrainer, make_model())
    short = make_trl_trainer(tmp_path, NormBTRewardTrainer, make_model(), **options)
    for trainer in (plain, short):
        trainer.train()
    assert_same_run(short, plain)


def test_apply_normbt_in_trls_own_trainer_trains_the_same(tmp_path):
    trainers = []
    for options in ({}, BOTH):
        model = make_model()
        trainer = make_trl_trainer(tmp_path, RewardTrainer, model)
        apply_normbt(trainer.model)
        if options:
            install_shortcuts(trainer.model, **options)
        trainer.train()
        trainer.pair_loss = trainer.model.score.normbt
        trainers.append(trainer)
    assert_same_run(*reversed(trainers))
