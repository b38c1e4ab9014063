"""The training runs behind `bench quality`: one small model each, trained by the real Trainer, its predictions kept."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

import normbt_kernels
from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.files import write_whole

if TYPE_CHECKING:
    from normbt_kernels.data.built_in import BuiltIn

CODE = ("modules.py", "functional.py", "ops/*.py", "commands/losses.py", "integrations/transformers.py")


SETTINGS = ("mixed", "fine-only", "no-clipping", "layer-norm")


@dataclass(frozen=True)
class Run:
    """One training run. `setting` is one of SETTINGS; `constants` are those of NormBT that are not the defaults."""

    dataset: str
    setting: str
    loss: str
    learning_rate: float
    seed: int
    steps: int | None
    constants: tuple[tuple[str, float], ...] = ()

    @property
    def path(self) -> str:
        constants = "".join(f"-{name}{value:g}" for name, value in self.constants)
        return f"{self.setting}-{self.loss}{constants}-lr{self.learning_rate:g}-seed{self.seed}.npz"


def digest(dataset: str, steps: int | None) -> str:
    """Names what a run depends on beside its own fields: pairs, model, settings, and what `fingerprint` adds."""
    built_in = built_in_of(dataset)
    pairs = [built_in.pairs(split, 0) for split in ("train", "validation", "test")]
    config = built_in.make_model(built_in.make_tokenizer()).config.to_json_string()
    return f"{dataset}-{fingerprint(pairs, config, built_in.training_defaults, steps)}"


def fingerprint(*facts: Any) -> str:
    """A short name for `facts`, the versions, and the code of the loss."""
    import torch
    import transformers

    package = Path(normbt_kernels.__file__).parent
    code = [path.read_text() for part in CODE for path in sorted(package.glob(part))]
    return hashlib.sha256(repr((facts, code, torch.__version__, transformers.__version__)).encode()).hexdigest()[:12]


def train_all(runs: Sequence[Run], folder: Path, use_cpu: bool, pool: ProcessPoolExecutor, what: str) -> None:
    """Has each run's predictions in `folder`, training those that are not there yet."""
    missing = [run for run in runs if not (folder / run.path).exists()]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=what, unit="run") as bar:
        for done in as_completed([pool.submit(train_one, run, folder, use_cpu) for run in missing]):
            done.result()
            bar.update()


def train_one(run: Run, folder: Path, use_cpu: bool) -> None:
    """Trains, and writes fp32 rewards and distances of the validation and the test pairs, `(P,)` each."""
    import torch
    from transformers import PrinterCallback, TrainingArguments, set_seed
    from transformers.utils import logging

    from normbt_kernels.commands.losses import loss_rows, make_loss
    from normbt_kernels.commands.train import one_device
    from normbt_kernels.integrations.transformers import NormBTTrainer

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    built_in, tokenizer, rows = load(run.dataset, run.setting, run.seed)
    with tempfile.TemporaryDirectory() as scratch:
        args = one_device(TrainingArguments(scratch, use_cpu=use_cpu, **settings_of(run, built_in)))
        set_seed(run.seed)
        trainer = NormBTTrainer(
            new_model(run, built_in, tokenizer),
            args,
            train_dataset=loss_rows(run.loss, rows["train"]),
            processing_class=tokenizer,
            loss=make_loss(run.loss, TrainOptions(**dict(run.constants))),
            keep_identical=True,  # 5 of the 8,000 generated pairs, which were there when the results were measured
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        arrays = {}
        for split in ("validation", "test"):
            scores = trainer.predict(loss_rows(run.loss, rows[split])).predictions
            for kind, values in zip(("chosen", "rejected", "distance"), scores, strict=True):
                arrays[f"{split}_{kind}"] = values
            arrays[f"{split}_category"] = np.array([row["category"] for row in rows[split]])
    write_whole(folder / run.path, lambda path: np.savez_compressed(path, **arrays))


def settings_of(run: Run, built_in: BuiltIn) -> dict[str, Any]:
    """The TrainingArguments of a run."""
    settings = built_in.training_defaults | {"learning_rate": run.learning_rate, "seed": run.seed}
    settings |= {"eval_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    if run.steps is not None:
        settings |= {"max_steps": run.steps, "warmup_steps": run.steps // 10}
    if run.setting == "no-clipping":
        settings["max_grad_norm"] = 0.0
    return settings


def new_model(run: Run, built_in: BuiltIn, tokenizer: Any) -> Any:
    """The data set's model, drawn from torch's current seed."""
    from torch.nn import LayerNorm

    model = built_in.make_model(tokenizer)
    if run.setting == "layer-norm":
        config = model.config
        model.model.norm = LayerNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)
    return model


def built_in_of(dataset: str) -> BuiltIn:
    from normbt_kernels.data.built_in import find_built_in

    return find_built_in(None if dataset == "generated" else dataset)


@lru_cache(maxsize=16)  # of every seed: the losses take turns
def load(dataset: str, setting: str, seed: int) -> tuple[Any, Any, dict[str, list[dict[str, Any]]]]:
    """The data set, its tokenizer, and its tokenized pairs by split."""
    from normbt_kernels.data.tokens import tokenize_pair

    built_in = built_in_of(dataset)
    tokenizer = built_in.make_tokenizer()
    rows = {}
    for split in ("train", "validation", "test"):
        pairs = built_in.pairs(split, seed)
        if setting == "fine-only":
            pairs = [pair for pair in pairs if pair.category.startswith("fine")]
        rows[split] = [tokenize_pair(pair, tokenizer) for pair in pairs]
    return built_in, tokenizer, rows
