"""The options of train, evaluate and diagnose: a class for each command, whose fields are its flags.

`normbt train` takes all of transformers.TrainingArguments too. Nothing heavy is imported here, so that --help is quick.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from normbt_kernels.data import STDLIB_FAULTS
from normbt_kernels.errors import UserError

# The names `--loss` takes; `losses.py` says what each one is.
LOSS_NAMES = tuple(
    f"{base}{variant}" for base in ("bt", "normbt") for variant in ("", "-margin", "-margin-out", "-smoothing")
)

DEFAULT_SMOOTHING = 0.1
DEFAULT_EVAL_FRACTION = 0.05

# These options are about a checkpoint and its pairs, and change nothing about the built-in models and pairs.
OF_A_CHECKPOINT = (
    *("gguf_file", "chat_template", "dtype", "attn_implementation", "lora_r"),
    *("dataset_config", "dataset_split", "eval_dataset", "eval_split", "eval_fraction", "column"),
)

OF_NORMBT = ("beta", "eps", "max_weight", "power")  # which plain Bradley-Terry does not have

Options = TypeVar("Options")


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, "type": type(default), **kwargs})


def _text(help: str, metavar: str) -> Any:
    return _option(None, help, type=str, metavar=metavar)


def _switch(help: str) -> Any:
    return field(default=False, metadata={"help": help, "action": "store_true"})


def _count(default: int | None, help: str) -> Any:
    return _option(default, help, type=_positive, metavar="N")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _several(help: str, **kwargs: Any) -> Any:
    return field(default=None, metadata={"help": help, "nargs": "+", **kwargs})


# --- train ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainOptions:
    """Options of `normbt train`, each one a command line flag of the same name."""

    model: str | None = _text(
        "sequence-classification checkpoint, language model or peft adapter: local folder or hub id. A language model "
        "gets a new scalar head, and a tokenizer without a pad token of its own gets one.",
        "PATH|ID",
    )
    gguf_file: str | None = _text("GGUF file in --model, to train from its weights (needs gguf)", "FILE")
    dataset: str | None = _text(
        "preference pairs: .json, .jsonl, .csv (each also .gz) or .parquet file, or a hub id. Columns: chosen and "
        "rejected (text, or a list of messages), optional prompt (text or messages), system, tools, margin (number, "
        "for the losses named so), pair_weight (number), category (text; accuracy is reported for each). Or "
        f"{STDLIB_FAULTS}: functions of Python's standard library, with and without a fault, made on the spot; without "
        "--model they train a small built-in model.",
        "PATH|ID",
    )
    output_dir: str | None = _text(
        "folder for models and results, which must not hold results already; required with --model", "DIR"
    )
    dataset_config: str | None = _text("configuration of a hub data set that has several", "NAME")
    dataset_split: str = _option("train", "split of a hub data set to train on", metavar="NAME")
    eval_dataset: str | None = _text(
        "held-out pairs, as --dataset; without it, a random share of --dataset is held out", "PATH|ID"
    )
    eval_split: str | None = _text("split of --eval-dataset, if that is a hub id (default: test)", "NAME")
    eval_fraction: float = _option(
        DEFAULT_EVAL_FRACTION, "share of --dataset held out when there is no --eval-dataset", metavar="F"
    )
    column: tuple[str, ...] | None = _several(
        "what the data set calls a column: chosen=response_j rejected=response_k", metavar="NAME=COLUMN"
    )
    chat_template: str | None = _text("Jinja file with the chat template to use instead of the tokenizer's", "FILE")
    loss: tuple[str, ...] | None = _several(
        "losses to train with, one model each, from the same initial weights and in the same data order: "
        "bt (Bradley-Terry) or normbt, each as it is or followed by -margin (the pair's margin is subtracted from "
        "the difference of rewards), -margin-out (it is multiplied with the loss) or -smoothing (smoothed labels) "
        "(default: normbt; without --model: bt normbt)",
        choices=LOSS_NAMES,
        metavar="LOSS",
    )
    seeds: int = _option(
        1, "train each loss with N seeds, from --seed on; the table then gives means with intervals", metavar="N"
    )
    learning_rate: tuple[float, ...] | None = _several(
        "of the optimizer (default: 5e-5); with several, each loss is trained at each one", type=float, metavar="F"
    )
    beta: float = _option(0.9, "NormBT: decay of the running mean distance mu", metavar="F")
    eps: float = _option(1e-6, "NormBT: added to each distance", metavar="F")
    max_weight: float = _option(100.0, "NormBT: cap on a pair's weight; inf for none", metavar="F")
    power: float = _option(1.0, "NormBT: power of the weight; 1 is the paper, 0 plain Bradley-Terry", metavar="F")
    label_smoothing: float | None = _option(
        None,
        f"probability that a label is wrong, for the losses named -smoothing (default: {DEFAULT_SMOOTHING})",
        type=float,
        metavar="F",
    )
    center_coef: float = _option(0.0, "all losses: weight of the mean of (chosen + rejected reward)^2", metavar="F")
    max_length: int = _option(2048, "pairs with a sequence of more tokens are left out, and counted", metavar="N")
    truncate: bool = _switch("cut long sequences at --max-length, at the tokenizer's side, instead of leaving them out")
    keep_identical: bool = _switch("train on pairs with the same tokens on both sides too; else left out, and counted")
    late_pooling: bool = _switch(
        "compute only the scored token in the last layer: the same rewards and gradients in less time (decoders; the "
        "first batch refuses a model that it does not fit)"
    )
    padding_free: bool = _switch(
        "compute no padding: the sequences of a batch stand side by side (as exact, and refused in the same way)"
    )
    lora_r: int | None = _option(None, "train LoRA matrices of this rank, and the head", type=int, metavar="N")
    lora_alpha: int | None = _option(None, "scale of LoRA (default: twice the rank)", type=int, metavar="N")
    lora_target: tuple[str, ...] | None = _several(
        "layers that get LoRA, by name, or all-linear (default: those that peft chooses)", metavar="NAME"
    )
    attn_implementation: str | None = _text(
        "attention of the model: sdpa, flash_attention_2 (pip install flash-attn), flex_attention, ... (default: as "
        "transformers chooses)",
        "NAME",
    )
    dry_run: bool = _switch("look at the data, and stop before anything is trained or written")
    dtype: str = _option(
        "float32",
        "dtype of the weights; float32 with --bf16 is mixed precision",
        choices=("float32", "bfloat16", "float16"),
    )


def check_train_options(options: TrainOptions) -> None:
    """Raises UserError for a number that makes no sense, before anything is loaded or trained."""
    for name, value, fits, expected in (
        ("beta", options.beta, 0 <= options.beta < 1, "in [0, 1)"),
        ("eps", options.eps, 0 <= options.eps < float("inf"), "finite and >= 0"),
        ("max_weight", options.max_weight, options.max_weight > 0, "greater than 0"),
        ("power", options.power, 0 <= options.power < float("inf"), "finite and >= 0"),
        ("label_smoothing", options.label_smoothing, 0 <= (options.label_smoothing or 0) < 1, "in [0, 1)"),
        ("center_coef", options.center_coef, 0 <= options.center_coef < float("inf"), "finite and >= 0"),
        ("eval_fraction", options.eval_fraction, 0 < options.eval_fraction < 1, "between 0 and 1"),
        ("max_length", options.max_length, options.max_length >= 1, "at least 1"),
        ("seeds", options.seeds, options.seeds >= 1, "at least 1"),
        *(("learning_rate", rate, 0 <= rate < float("inf"), "finite and >= 0") for rate in options.learning_rate or ()),
        ("lora_r", options.lora_r, options.lora_r is None or options.lora_r >= 1, "at least 1"),
    ):
        if not fits:
            raise UserError(f"{flag(name)} must be {expected}, got {value}")
    for option in fields(TrainOptions):
        if options.model is None and option.name in OF_A_CHECKPOINT and getattr(options, option.name) != option.default:
            raise UserError(f"{flag(option.name)} needs --model: it changes nothing about the built-in model and pairs")
    check_splits(options)
    if options.eval_split is not None and options.eval_dataset is None:
        raise UserError("--eval-split is a split of --eval-dataset: name that too, it may be the same as --dataset")
    if options.eval_fraction != DEFAULT_EVAL_FRACTION and options.eval_dataset is not None:
        raise UserError(
            "--eval-fraction is held out of --dataset, and --eval-dataset is held out already: leave out one"
        )
    losses = options.loss or ()
    if len(set(losses)) < len(losses):
        raise UserError(f"--loss names a loss twice: {' '.join(losses)}")
    rates = options.learning_rate or ()
    if len(set(rates)) < len(rates):
        raise UserError(f"--learning-rate names one twice: {' '.join(map(str, rates))}")
    for column in options.column or ():
        if "=" not in column:
            raise UserError(f"--column {column}: expected NAME=COLUMN, such as chosen=response_j")
    if options.lora_r is None and (options.lora_alpha is not None or options.lora_target is not None):
        raise UserError("--lora-alpha and --lora-target need --lora-r")
    if options.label_smoothing is not None and not any(name.endswith("-smoothing") for name in losses):
        raise UserError("--label-smoothing is for bt-smoothing and normbt-smoothing: choose one of them with --loss")
    if losses and not any(name.startswith("normbt") for name in losses):
        for name in OF_NORMBT:
            if getattr(options, name) != getattr(TrainOptions, name):
                raise UserError(f"{flag(name)} is for the losses named normbt: choose one of them with --loss")


def check_splits(options: Any) -> None:
    """Raises UserError if the options of a command name a split or a configuration of a file, which has none."""
    on_hub = []
    for source, split in (("dataset", "dataset_split"), ("eval_dataset", "eval_split")):
        path = getattr(options, source, None)
        is_file = path is not None and Path(path).is_file()
        if is_file and getattr(options, split) != getattr(type(options), split):
            raise UserError(f"{flag(split)} is for the hub, and {path} is a file, of which all rows are read")
        on_hub.append(path is not None and not is_file)
    if options.dataset_config is not None and options.dataset is not None and not any(on_hub):
        raise UserError(f"--dataset-config is for the hub, and {options.dataset} is a file, which has only one")


# --- evaluate and diagnose -----------------------------------------------------------------------------------------

_DATASET = (
    ".json, .jsonl, .csv (each also .gz) or .parquet file, a hub id, or stdlib-faults; columns as for normbt train"
)
_CONFIG = "configuration of a hub data set that has several"
_MAX_LENGTH = "pairs with a sequence of more tokens are left out, and counted"
_TRUNCATE = "cut long sequences at --max-length instead of leaving them out"
_BATCH_SIZE = "pairs per forward pass"
_DEVICE = "cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)"


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `normbt evaluate`, which judges the checkpoint MODEL."""

    model: str = field(
        metadata={"help": "trained classifier with one label: local folder or hub id", "metavar": "MODEL"}
    )
    benchmark: str | None = _option(
        None,
        "judge by this benchmark, downloaded from the hub unless --dataset names a local copy of its rows",
        type=str,
        choices=("rewardbench", "rewardbench2", "rm-bench", "judgebench"),
    )
    dataset: str | None = _text(f"{_DATASET} (default: the built-in held-out pairs)", "PATH|ID")
    dataset_config: str | None = _text(_CONFIG, "NAME")
    dataset_split: str | None = _text("split of a hub data set (default: that of the benchmark)", "NAME")
    max_length: int | None = _count(None, f"{_MAX_LENGTH} (default: the tokenizer's own limit)")
    truncate: bool = _switch(_TRUNCATE)
    batch_size: int = _count(16, _BATCH_SIZE)
    device: str | None = _text(_DEVICE, "DEVICE")
    dtype: str = _option(
        "auto", "dtype of the weights; auto: as saved", choices=("auto", "float32", "bfloat16", "float16")
    )
    out: Path | None = field(
        default=None,
        metadata={"help": "write the results there too; it must not exist", "type": Path, "metavar": "FILE.json"},
    )


@dataclass(frozen=True)
class DiagnoseOptions:
    """Options of `normbt diagnose`."""

    model: str | None = _text("checkpoint, as for normbt train (default: built-in)", "PATH|ID")
    gguf_file: str | None = _text("GGUF file in --model, for its weights (needs gguf)", "FILE")
    dataset: str | None = _text(f"{_DATASET} (default: the built-in held-out pairs)", "PATH|ID")
    dataset_config: str | None = _text(_CONFIG, "NAME")
    dataset_split: str = _option("train", "split of a hub data set", metavar="NAME")
    num_gradients: int = _count(256, "pairs whose backbone gradient is measured, spread evenly by distance")
    max_length: int = _count(2048, _MAX_LENGTH)
    truncate: bool = _switch(_TRUNCATE)
    batch_size: int = _count(8, _BATCH_SIZE)
    device: str | None = _text(_DEVICE, "DEVICE")
    dtype: str = _option("float32", "dtype of the weights", choices=("float32", "bfloat16"))
    out: Path | None = field(
        default=None,
        metadata={
            "help": "where the results go, which must not exist (default: normbt-diagnosis.json, or -2, -3, ...)",
            "type": Path,
            "metavar": "FILE.json",
        },
    )


# --- the command line ----------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """One flag per field of `options`; a field without a default is an argument without a flag."""
    for option in fields(options):
        kwargs = dict(option.metadata)
        if option.default is MISSING:
            parser.add_argument(option.name, **kwargs)
            continue
        if option.default is not None and option.default is not False:
            kwargs["help"] += " (default: %(default)s)"
        parser.add_argument(flag(option.name), default=option.default, **kwargs)


def options_from(arguments: argparse.Namespace, options: type[Options]) -> Options:
    """The options of one command, from the parsed command line."""
    return options(**{option.name: getattr(arguments, option.name) for option in fields(options)})


def normalize_flags(command_line: Sequence[str]) -> list[str]:
    """`--output_dir=x` as `--output-dir=x`: Trainer's options are known by both spellings, so ours are too."""
    return [re.sub(r"^--[^=]+", lambda match: flag(match[0][2:]), word) for word in command_line]


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")
