"""The folder of a training run. It says what the run is made from, so that a run is continued or refused, never mixed.

run.json               options, arguments, fingerprints of the pairs and the model: written before the first step
<trial>/checkpoint-N   Trainer's
<trial>/finished.npz   what one trained model did
results.json, .png     the comparison, last
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from normbt_kernels.commands.arguments import LOSS_NAMES, TrainOptions
from normbt_kernels.commands.train_report import RESULTS_NAME, Trained
from normbt_kernels.errors import UserError
from normbt_kernels.files import check_folder, write_json, write_whole

RECORD_NAME, FINISHED_NAME = "run.json", "finished.npz"
ARRAYS = ("chosen_rewards", "rejected_rewards", "distance")
# What may change between a run and the one that continues it: where things go, how progress is shown, further losses.
FREE = ("output_dir", "resume_from_checkpoint", "logging_dir", "run_name", "disable_tqdm", "report_to", "loss")


def check(folder: Path, resume: str | None) -> None:
    """Before anything is loaded: whether a run can be written to `folder`, anew or, with `resume`, as a continuation.

    Raises:
        UserError: it cannot be written; it holds a run, and this one is not to continue it; there is no checkpoint
            folder `resume`, which may also be "last".
    """
    check_folder(folder)
    if resume not in (None, "last") and not Path(resume).is_dir():
        raise UserError(f"--resume-from-checkpoint {resume}: no such folder (or say: last)")
    if resume is None and (held := _holds(folder)):
        raise UserError(
            f"{folder} already holds {held}: continue that run with --resume-from-checkpoint last, or choose another "
            "--output-dir"
        )


def _holds(folder: Path) -> str | None:
    """Something of a run in `folder`."""
    for name in (RESULTS_NAME, RECORD_NAME):
        if (folder / name).exists():
            return name
    trials = [path.name for path in folder.glob("*/") if path.name.startswith(LOSS_NAMES) and any(path.iterdir())]
    return min(trials, default=None)


def begin(folder: Path, made_from: dict[str, Any]) -> None:
    """Writes down what the run in `folder` is made from, or compares it with what was written.

    Raises:
        UserError: the run there was made from something else, or does not say from what.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        if held := _holds(folder):
            raise UserError(
                f"{folder} holds {held}, but no {RECORD_NAME} that says how it was made: choose another --output-dir"
            )
        write_json(path, made_from)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(before.keys() | made_from.keys()):
        if before.get(name) != made_from.get(name):
            raise UserError(
                f"{folder} was trained with {name} = {before.get(name)}, not {made_from.get(name)}: choose another "
                "--output-dir"
            )


def made_from(options: TrainOptions, args: TrainingArguments, **fingerprints: str) -> dict[str, Any]:
    """All that a training run goes by, as JSON has it."""
    chosen = asdict(options) | args.to_dict() | fingerprints
    if options.learning_rate is not None:
        chosen["learning_rate"] = options.learning_rate[0] if len(options.learning_rate) == 1 else options.learning_rate
    return json.loads(json.dumps({name: value for name, value in chosen.items() if name not in FREE}, default=str))


def save_finished(folder: Path, trained: Trained) -> None:
    """Writes what the model in `folder` did; the file appears whole or not at all."""
    facts = {field.name: getattr(trained, field.name) for field in fields(Trained) if field.name not in ARRAYS}
    arrays = {name: getattr(trained, name) for name in ARRAYS}
    path = folder / FINISHED_NAME
    write_whole(path, lambda path: np.savez_compressed(path, facts=np.array(json.dumps(facts)), **arrays))


def load_finished(folder: Path) -> Trained | None:
    """What `save_finished` wrote, None if it did not."""
    path = folder / FINISHED_NAME
    if not path.exists():
        return None
    with np.load(path) as file:
        return Trained(**{name: file[name] for name in ARRAYS}, **json.loads(str(file["facts"])))


def remove_checkpoints(folder: Path) -> None:
    """Takes Trainer's checkpoints out of a trial's `folder`."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)


def how_to_load(folder: Path) -> str:
    """The call that loads the model in `folder`, after a colon; nothing for an adapter, which the commands load."""
    if (folder / "adapter_config.json").exists():
        return ""
    return f": AutoModelForSequenceClassification.from_pretrained({str(folder)!r})"


def continuing(command_line: Sequence[str], folder: Path) -> str | None:
    """The command that continues the run in `folder`; None if it has not begun."""
    if not (folder / RECORD_NAME).exists():
        return None
    words = list(command_line)
    if "--resume-from-checkpoint" in words:
        at = words.index("--resume-from-checkpoint")
        del words[at : at + 2]
    if not any(word.startswith("--output-dir") for word in words):
        words += ["--output-dir", str(folder)]
    return shlex.join(["normbt", *words, "--resume-from-checkpoint", "last"])
