"""What each loss leaves behind when it is trained, so that a comparison that was stopped does not train it again."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.commands.train_report import Trained
from normbt_kernels.errors import UserError
from normbt_kernels.files import write_whole

ARRAYS = ("chosen_rewards", "rejected_rewards", "distance")
# What may change between a run and the one that resumes it: where things go and how progress is shown.
FREE = ("output_dir", "resume_from_checkpoint", "logging_dir", "run_name", "disable_tqdm", "report_to", "loss")


def settings(options: TrainOptions, args: TrainingArguments) -> dict[str, Any]:
    """All that a training run goes by, as JSON has it."""
    chosen = asdict(options) | args.to_dict()
    return json.loads(json.dumps({name: value for name, value in chosen.items() if name not in FREE}, default=str))


def save(path: Path, trained: Trained, settings: dict[str, Any]) -> None:
    """Writes the file `path` (.npz), which appears whole or not at all."""
    facts = {field.name: getattr(trained, field.name) for field in fields(Trained) if field.name not in ARRAYS}
    arrays = {name: getattr(trained, name) for name in ARRAYS}
    text = json.dumps({"settings": settings, **facts})
    write_whole(path, lambda path: np.savez_compressed(path, facts=np.array(text), **arrays))


def load(path: Path, settings: dict[str, Any]) -> Trained | None:
    """What `save` wrote, None if it did not.

    Raises:
        UserError: it was trained with other settings.
    """
    if not path.exists():
        return None
    with np.load(path) as file:
        facts = json.loads(str(file["facts"]))
        before = facts.pop("settings")
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise UserError(
                    f"{path.parent} was trained with {name} = {before.get(name)}, not {settings.get(name)}: "
                    "choose another --output-dir"
                )
        return Trained(**{name: file[name] for name in ARRAYS}, **facts)
