"""The command line: `normbt train`, `normbt info`. Imports what a subcommand needs when it runs, not before.

Exit codes: 0 done; 1 the self-check failed; 2 something the user can put right, said in one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normbt_kernels import __version__
from normbt_kernels.training.arguments import (
    TrainOptions,
    UserError,
    add_train_options,
    check_train_options,
    normalize_flags,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEMO_OUTPUT_DIR = "normbt-demo"

TRAIN_DESCRIPTION = f"""\
Train a reward model with NormBT and the Hugging Face Trainer.

  normbt train
      The embedded default: a tiny Llama and generated pairs, plain Bradley-Terry (BT) beside NormBT, in about a
      minute on one CPU core. Downloads nothing. Writes to ./{DEMO_OUTPUT_DIR}, or to ./{DEMO_OUTPUT_DIR}-2, -3, ...
      where that exists.
  normbt train --model meta-llama/Llama-3.2-1B-Instruct --dataset trl-lib/ultrafeedback_binarized \\
      --output-dir runs/llama --bf16 --learning-rate 1e-5 --num-train-epochs 1
  normbt train --model ./my-model --dataset pairs.jsonl --output-dir runs/mine --loss bt normbt
      A line of pairs.jsonl:  {{"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1.0}}
"""

TRAIN_EPILOG = """\
Every option of transformers.TrainingArguments is taken as well (--help-trainer lists them), among them:
  --learning-rate F                    default 5e-5
  --per-device-train-batch-size N      pairs per step and device, default 8
  --gradient-accumulation-steps N      default 1
  --num-train-epochs F / --max-steps N default 3 epochs
  --bf16, --gradient-checkpointing     less memory
  --eval-strategy steps --eval-steps N evaluate while training; the held-out pairs are always judged at the end
  --save-strategy no|steps|epoch       checkpoints to resume from; the final model is always saved
  --resume-from-checkpoint last        continue each loss from its last checkpoint, or from the folder given
  --seed N                             default 42

Written to the output folder: <loss>/ (model and tokenizer, for AutoModelForSequenceClassification.from_pretrained),
results.json (accuracy by category and distance, training log, versions) and results.png (needs matplotlib).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit code."""
    parser = _parser()
    arguments, others = parser.parse_known_args(normalize_flags(sys.argv[1:] if argv is None else argv))
    if others and arguments.command is not _train:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        return arguments.command(arguments, others)
    except UserError as error:
        print(f"normbt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nnormbt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normbt", description="NormBT: the distance-normalised Bradley-Terry loss for reward models."
    )
    parser.add_argument("--version", action="version", version=f"normbt-kernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a reward model; without arguments, a one-minute comparison of BT and NormBT",
        usage="normbt train [--model PATH|ID --dataset PATH|ID --output-dir DIR] [options]",
        description=TRAIN_DESCRIPTION,
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation could as well be Trainer's
    )
    add_train_options(train)
    train.add_argument("--help-trainer", action="store_true", help="list all options of transformers.TrainingArguments")
    train.set_defaults(command=_train)
    info = commands.add_parser("info", help="versions, devices and backends, and a self-check of the loss")
    info.set_defaults(command=_info)
    return parser


def _train(arguments: argparse.Namespace, trainer_arguments: list[str]) -> int:
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'normbt-kernels[train]'") from error
    from normbt_kernels.training import demo, run

    if arguments.help_trainer:
        _trainer_parser().print_help()
        return 0
    options = TrainOptions(**{option.name: getattr(arguments, option.name) for option in fields(TrainOptions)})
    check_train_options(options)
    if (options.model is None) != (options.dataset is None):
        raise UserError("--model and --dataset go together; leave out both for the embedded default")
    is_demo = options.model is None
    if not is_demo and options.output_dir is None:
        raise UserError("--output-dir is required with --model")
    defaults = {"output_dir": options.output_dir or str(_free_folder(Path(DEMO_OUTPUT_DIR)))}
    args = _training_arguments(trainer_arguments, defaults | (demo.TRAINING_DEFAULTS if is_demo else {}))
    run.check_folders(args)
    job = run.demo_job(options, args.seed) if is_demo else run.user_job(options, args.seed)
    run.run(job, options, args)
    return 0


def _training_arguments(command_line: list[str], defaults: dict[str, Any]) -> TrainingArguments:
    parser = _trainer_parser()
    parser.set_defaults(**defaults)
    try:
        (args,) = parser.parse_args_into_dataclasses(args=command_line)
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if args.n_gpu > 1:  # Trainer would split each batch, pairs and all, over them in one process
        print(f"using 1 of {args.n_gpu} GPUs; for all: torchrun --nproc-per-node {args.n_gpu} -m normbt_kernels train")
        args._n_gpu = 1
    return args


def _trainer_parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser, TrainingArguments

    usage = "normbt train [options], see normbt train --help"
    return HfArgumentParser(TrainingArguments, prog="normbt train", usage=usage, allow_abbrev=False)


def _free_folder(first: Path) -> Path:
    folder, number = first, 2
    while folder.exists():
        folder, number = first.with_name(f"{first.name}-{number}"), number + 1
    return folder


def _info(arguments: argparse.Namespace, others: list[str]) -> int:
    from normbt_kernels import selfcheck

    print(selfcheck.environment())
    failures = selfcheck.run()
    print("self-check: " + ("passed" if not failures else "FAILED\n  " + "\n  ".join(failures)))
    return 1 if failures else 0
