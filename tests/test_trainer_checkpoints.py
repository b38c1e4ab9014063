"""Checkpoints of `NormBTTrainer`: a resumed run is the run, and a save that was cut short does no harm."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from normbt_kernels.integrations.checkpoint import last_whole_checkpoint
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from tests.processes import Command
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import make_rows, make_tokenizer

SAVE_STEPS = 3


def make_trainer(folder, trainer_class=NormBTTrainer, adapt=lambda model: model, eval_dataset=None, **arguments):
    """BERT with dropout, so that the random states matter too."""
    defaults = {
        "max_steps": 3 * SAVE_STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(folder), **defaults | arguments)
    model = make_model("bert", num_hidden_layers=1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    rows, tokenizer = make_rows(24, ["margin"]), make_tokenizer()
    return trainer_class(adapt(model), args, train_dataset=rows, eval_dataset=eval_dataset, processing_class=tokenizer)


def assert_same_run(trainer, expected):
    assert trainer.state.global_step == expected.state.global_step
    for name, state in expected.pair_loss.state_dict().items():
        assert torch.equal(trainer.pair_loss.state_dict()[name], state), name
    for name, parameter in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], parameter), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, with its checkpoints."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of its output folder."""
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "copy"))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.slow
def test_resumed_run_with_lora_equals_the_uninterrupted_one_bitwise(tmp_path, bf16):
    peft = pytest.importorskip("peft")

    def with_lora(model):
        torch.manual_seed(0)
        options = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "SEQ_CLS"}
        return peft.get_peft_model(model, peft.LoraConfig(**options))

    uninterrupted = make_trainer(tmp_path, adapt=with_lora, bf16=bf16)
    uninterrupted.train()
    resumed = make_trainer(tmp_path, adapt=with_lora, bf16=bf16)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, uninterrupted)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_the_previous_checkpoint_resumes(whole, tmp_path):
    command = Command("tests.slow_saver", tmp_path)
    command.wait_until((tmp_path / "checkpoint-6" / "saving").exists)
    command.kill()
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")  # which Trainer itself would take
    assert (tmp_path / "checkpoint-6" / "normbt.pt").exists()
    assert not (tmp_path / "checkpoint-6" / "trainer_state.json").exists()

    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    resumed = make_trainer(tmp_path)  # the folder that was cut short has been completed
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_run(resumed, whole)


def test_state_that_was_cut_short_is_passed_over(whole, folder):
    state = folder / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text()[:-5])
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    (folder / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-3")
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_overwriting_a_checkpoint_does_not_leave_its_old_state_behind(folder):
    class Dies(NormBTTrainer):
        def _save_scaler(self, output_dir):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make_trainer(folder, Dies).train()
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "checkpoint-9")
    with pytest.raises(ValueError, match=r"no checkpoint in .* was saved to its end"):
        make_trainer(folder).train(resume_from_checkpoint=True)


def test_state_of_the_loss_is_replaced_in_one_piece(folder, monkeypatch):
    def save_half(state, path, save=torch.save):
        save(state, path)
        if "normbt" in Path(path).name:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise InterruptedError

    before = torch.load(folder / "checkpoint-3" / "normbt.pt")
    trainer = make_trainer(folder, max_steps=SAVE_STEPS, learning_rate=0.1)
    monkeypatch.setattr("normbt_kernels.integrations.checkpoint.torch.save", save_half)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert torch.load(folder / "checkpoint-3" / "normbt.pt") == before


def test_checkpoints_of_the_plain_trainer_resume_too(tmp_path):
    class Plain(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.square().mean()

    args = make_trainer(tmp_path, save_strategy="steps", remove_unused_columns=False).args
    args.max_steps = SAVE_STEPS
    plain = Plain(make_model("bert", num_hidden_layers=1), args, PreferenceCollator(make_tokenizer()), make_rows(24))
    plain.train()
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 * SAVE_STEPS
    assert trainer.pair_loss.num_updates == 2 * SAVE_STEPS  # mu began anew


@pytest.mark.parametrize("save_only_model", [False, True])
def test_best_model_is_evaluated_with_its_own_mu(tmp_path, save_only_model):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_rows(6, ["margin"], seed=1),
        eval_strategy="steps",
        eval_steps=SAVE_STEPS,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.3,  # so that the last model is not the best
        lr_scheduler_type="constant",
        save_only_model=save_only_model,
    )
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    assert trainer.pair_loss.num_updates == trainer.state.best_global_step
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    plain = [entry["eval_bt_loss"] for entry in trainer.state.log_history if "eval_bt_loss" in entry]
    assert plain[-1] in plain[:-1]


def test_resume_drops_what_was_pending_with_the_gradients_that_are_lost(whole, folder):
    path = folder / "checkpoint-6" / "normbt.pt"
    torch.save(torch.load(path) | {"pending": torch.tensor([100.0, 1.0])}, path)  # saved in the middle of a step
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert_same_run(resumed, whole)
