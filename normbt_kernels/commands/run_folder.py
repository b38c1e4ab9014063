"""The folder of a training run. It records what the run is made from, so that two runs are never mixed.

run.json               options, arguments, fingerprints of the pairs and the model: written before the first step
<trial>/checkpoint-N   Trainer's
<trial>/finished.npz   rewards, distances and log of one trained model
results.json, .png     the comparison, written last
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
# These may change when a run is continued: where things go, how progress is shown, further losses.
FREE = ("output_dir", "resume_from_checkpoint", "logging_dir", "run_name", "disable_tqdm", "report_to", "loss")


class OtherRun(UserError):
    """A folder holds a run that this one cannot continue."""


def check(folder: Path, resume: str | None) -> None:
    """Checks, before anything is loaded, that a run can begin in `folder` or, with `resume`, continue there.

    Raises:
        UserError: the folder cannot be written; it holds a run and `resume` is None; or there is no checkpoint folder
            `resume` ("last" means the last one of each trial).
    """
    check_folder(folder)
    if resume not in (None, "last") and not Path(resume).is_dir():
        raise UserError(f"--resume-from-checkpoint {resume}: no such folder (or say: last)")
    if resume is None and (held := _holds(folder)):
        raise UserError(
            f"{folder} already holds {held}: continue that run with --resume-from-checkpoint last, or choose another "
            "--output-dir"
        )


def check_checkpoint(resume: str | None, models: Sequence[Path]) -> None:
    """
    Raises:
        UserError: `resume` names a folder that is no checkpoint of the one model that is to be trained.
    """
    if resume not in (None, "last") and [Path(resume).resolve().parent] != [model.resolve() for model in models]:
        raise UserError(
            f"--resume-from-checkpoint {resume}: no checkpoint of {', '.join(map(str, models))} (say last, and each "
            "model continues from its own)"
        )


def _holds(folder: Path) -> str | None:
    """The name of something in `folder` that a run has written; None if there is nothing."""
    for name in (RESULTS_NAME, RECORD_NAME):
        if (folder / name).exists():
            return name
    trials = [path.name for path in folder.glob("*/") if _is_trial(path.name) and any(path.iterdir())]
    return min(trials, default=None)


def _is_trial(name: str) -> bool:
    return any(name == loss or name.startswith((f"{loss}-lr", f"{loss}-seed")) for loss in LOSS_NAMES)


def begin(folder: Path, made_from: dict[str, Any]) -> None:
    """Records what the run in `folder` is made from, or compares that with the record of an earlier run.

    Raises:
        OtherRun: the earlier run was made from something else, or left no record.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        if held := _holds(folder):
            raise OtherRun(
                f"{folder} holds {held}, but no {RECORD_NAME} that says how it was made: choose another --output-dir"
            )
        write_json(path, made_from)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(before.keys() | made_from.keys()):
        if before.get(name) != made_from.get(name):
            raise OtherRun(
                f"{folder} was trained with {name} = {before.get(name)}, not {made_from.get(name)}: choose another "
                "--output-dir"
            )


def made_from(options: TrainOptions, args: TrainingArguments, **others: Any) -> dict[str, Any]:
    """Everything that determines a training run, as plain JSON values; a number that is not finite becomes text."""
    facts = asdict(options) | args.to_dict() | others
    if options.learning_rate is not None:
        facts["learning_rate"] = options.learning_rate[0] if len(options.learning_rate) == 1 else options.learning_rate
    text = json.dumps({name: value for name, value in facts.items() if name not in FREE}, default=str)
    return json.loads(text, parse_constant=str)


def save_finished(folder: Path, trained: Trained) -> None:
    """Writes the results of the model in `folder`; the file appears whole or not at all."""
    facts = {field.name: getattr(trained, field.name) for field in fields(Trained) if field.name not in ARRAYS}
    arrays = {name: getattr(trained, name) for name in ARRAYS}
    path = folder / FINISHED_NAME
    write_whole(path, lambda path: np.savez_compressed(path, facts=np.array(json.dumps(facts)), **arrays))


def load_finished(folder: Path) -> Trained | None:
    """What `save_finished` wrote; None if the model is not finished."""
    path = folder / FINISHED_NAME
    if not path.exists():
        return None
    with np.load(path) as file:
        return Trained(**{name: file[name] for name in ARRAYS}, **json.loads(str(file["facts"])))


def remove_checkpoints(folder: Path) -> None:
    """Removes Trainer's checkpoints from a trial's `folder`."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)


def how_to_load(folder: Path) -> str:
    """A colon and the call that loads the model in `folder`; empty for an adapter, which needs its base model."""
    if (folder / "adapter_config.json").exists():
        return ""
    return f": AutoModelForSequenceClassification.from_pretrained({str(folder)!r})"


def continuing(command_line: Sequence[str], folder: Path, processes: int) -> str | None:
    """The command that continues the run in `folder`; None if it has not begun."""
    if not (folder / RECORD_NAME).exists():
        return None
    if processes > 1:
        return "give the same command again, with --resume-from-checkpoint last"  # its launcher is not in our arguments
    words = list(command_line)
    if "--resume-from-checkpoint" in words:
        at = words.index("--resume-from-checkpoint")
        del words[at : at + 2]
    if not any(word.startswith("--output-dir") for word in words):
        words += ["--output-dir", str(folder)]
    return shlex.join(["normbt", *words, "--resume-from-checkpoint", "last"])
