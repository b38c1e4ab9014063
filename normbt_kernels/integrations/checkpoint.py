"""The loss in a Trainer's checkpoints: saved and restored beside the model and not inside it, so that anyone can load
the model without this package. This file also tells which checkpoint is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from normbt_kernels.files import write_whole

logger = logging.get_logger(__name__)

LOSS_STATE_NAME = "normbt.pt"


class LossInCheckpoints:
    """A base class to name before `Trainer`: it puts `self.pair_loss` into every checkpoint.

    A resumed run continues with the saved mu, and the best model is evaluated with its own mu. If a checkpoint has no
    mu, a warning says so.

    A process that dies while it saves leaves a folder that is not whole. `train(resume_from_checkpoint=True)` skips it
    and takes the one before: a folder gets its `trainer_state.json` last, when every rank has written its files.
    """

    pair_loss: nn.Module

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, except that `resume_from_checkpoint=True` means the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no checkpoint in {self.args.output_dir} was saved to its end")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state = self.pair_loss.state_dict()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            # The state of an earlier run would make a folder look whole before it is.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            if state:
                write_whole(folder / LOSS_STATE_NAME, lambda path: torch.save(state, path))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json comes next

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_loss(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_loss(self.state.best_model_checkpoint)

    def _load_loss(self, checkpoint: str) -> None:
        if not self.pair_loss.state_dict():
            return
        path = os.path.join(checkpoint, LOSS_STATE_NAME)
        if os.path.isfile(path):
            self.pair_loss.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            logger.warning(f"{checkpoint} has no {LOSS_STATE_NAME}: mu stays as it is")


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The last folder `checkpoint-<step>` that was saved to its end; None if there is none."""
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(folder).isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(_step(folder)), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning(f"{folder} was not saved to its end: passed over")
        else:
            return str(folder)
    return None


def _step(folder: Path) -> str:
    return folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
