"""The command line `normbt`: one function per command, which imports what it needs only when it runs.

Exit codes: 0 done; 1 the self-check failed, or a bug, with its traceback; 2 something the user can put right, said in
one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from normbt_kernels._version import __version__
from normbt_kernels.commands.arguments import (
    DiagnoseOptions,
    EvaluateOptions,
    TrainOptions,
    add_options,
    check_splits,
    check_train_options,
    flag,
    normalize_flags,
    options_from,
)
from normbt_kernels.errors import UserError, first_sentence
from normbt_kernels.files import check_folder, check_new_file, disk_trouble, free_path

if TYPE_CHECKING:
    from transformers import TrainingArguments

Judging = TypeVar("Judging", EvaluateOptions, DiagnoseOptions)

DEMO_OUTPUT_DIR = "normbt-demo"
# What `normbt train` needs of Trainer: the rewards of all held-out pairs, as arrays.
ALL_REWARDS = {
    "prediction_loss_only": False,
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
}
METRICS = ("loss", "bt_loss", "accuracy", "margin")  # of an evaluation, for `--metric-for-best-model`

TRAIN_DESCRIPTION = f"""\
Train a reward model with NormBT and the Hugging Face Trainer.

  normbt train
      The built-in default: a tiny Llama and generated pairs, plain Bradley-Terry (BT) beside NormBT, in about a
      minute on one CPU core. Downloads nothing. Writes to ./{DEMO_OUTPUT_DIR}, or if that exists to
      ./{DEMO_OUTPUT_DIR}-2, -3, ...
  normbt train --dataset stdlib-faults
      A harder task with real text: functions of Python's standard library, and the same functions with a fault. It
      takes about five minutes on one CPU core.
  normbt train --model meta-llama/Llama-3.2-1B-Instruct --dataset trl-lib/ultrafeedback_binarized \\
      --output-dir runs/llama --bf16 --learning-rate 1e-5 --num-train-epochs 1
  normbt train --model ./my-model --dataset pairs.jsonl --output-dir runs/mine --loss bt normbt
      A line of pairs.jsonl:  {{"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1.0}}
"""

TRAIN_EPILOG = """\
Every option of transformers.TrainingArguments works too (--help-trainer lists them). Some of them, with their defaults
for a --model of yours:
  --learning-rate F                    default 5e-5
  --per-device-train-batch-size N      pairs per step and device, default 8
  --gradient-accumulation-steps N      default 1
  --num-train-epochs F / --max-steps N default 3 epochs
  --bf16, --gradient-checkpointing     less memory
  --eval-strategy steps --eval-steps N evaluate while training; the held-out pairs are always judged at the end
  --save-strategy no|steps|epoch       checkpoints to resume from; the final model is always saved
  --resume-from-checkpoint last        keep each loss that is trained already, continue the others from their last
                                       checkpoint if they have one; or name the folder of a checkpoint
  --seed N                             default 42

It writes to the output folder: <loss>/ (model and tokenizer, for AutoModelForSequenceClassification.from_pretrained),
results.json (accuracy by category and distance, training log, versions) and results.png (needs matplotlib).
"""


EVALUATE_DESCRIPTION = """\
Score preference pairs with a trained reward model, and count the right ones as RewardBench v1 does. A pair is right if
chosen > rejected, strictly, by the model's own logits. Sections are weighted by RewardBench's example counts.

  normbt evaluate normbt-demo/normbt
      A checkpoint of the built-in default on the built-in held-out pairs.
  normbt evaluate runs/mine/normbt --benchmark rewardbench2 --out rewardbench2.json
      RewardBench 2, RM-Bench (rm-bench) or JudgeBench (judgebench): table, JSON and a figure. --dataset names a local
      copy of the benchmark's rows.
  normbt evaluate runs/mine/normbt --dataset allenai/reward-bench --out rewardbench.json
      RewardBench (--benchmark rewardbench is the same), or any pairs. A row has the columns prompt, chosen, rejected
      and subset. The tokenizer's chat template makes such a row a conversation, as in the rewardbench package. A row
      without subset is read as normbt train reads it.
"""

EVALUATE_EPILOG = """\
With --out, give a stopped command again to continue it. FILE.json appears when all is done.
"""

DIAGNOSE_DESCRIPTION = """\
Measure which pairs receive the gradient of plain Bradley-Terry (BT), and how NormBT would distribute it.

  normbt diagnose
      The built-in default: a tiny Llama after a short training with BT, on the built-in held-out pairs.
  normbt diagnose --dataset stdlib-faults
      The same for functions of Python's standard library, each with and without a fault.
  normbt diagnose --model ./my-reward-model --dataset pairs.jsonl --out my.json
  normbt diagnose --model Qwen/Qwen2.5-0.5B --dataset trl-lib/ultrafeedback_binarized --dataset-split 'train[:2000]'
      A classifier as trained, or a causal LM with a new head.

At the head, the gradient of a pair is exactly prediction error times distance. For all other weights (the backbone) it
is measured on a sample, one pair at a time. The report shows, under BT and under NormBT, the slope of log gradient norm
on log distance at a fixed error (BT's head: 1, NormBT's: 0), the share of the gradient that each quarter of the pairs
by distance receives, mean norms by error and distance, and a row for each category or subset. The backbone's slope is
the --power that makes its gradient independent of the distance. If the slopes within quarters of the pairs by error
disagree, no power is recommended.
"""

DIAGNOSE_EPILOG = """\
It also writes FILE.json and, with matplotlib, the figure FILE.png. Give a stopped command again to continue it.
"""

EXPORT_DESCRIPTION = """\
Write a plain classifier that the rewardbench package and transformers 4.5x load: adapters merged, the rope settings in
the spellings of transformers 4 and 5.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit code."""
    parser = _parser()
    command_line = normalize_flags(sys.argv[1:] if argv is None else argv)
    arguments, others = parser.parse_known_args(command_line)
    arguments.command_line = command_line
    if others and arguments.command is not _train:
        known = [*parser._option_string_actions, *map(flag, vars(arguments))]
        parser.error(f"unrecognized arguments: {' '.join(others)}{_did_you_mean(others, known)}")
    try:
        return arguments.command(arguments, others)
    except Exception as error:
        return _say(error)
    except KeyboardInterrupt as stop:
        return _say(stop)


def _say(error: BaseException) -> int:
    """Says in one line what stopped a command, and returns its exit code. A bug in this package gets its traceback."""
    if isinstance(error, KeyboardInterrupt):
        print("\nnormbt: interrupted", file=sys.stderr)
        return 130
    line = str(error) if isinstance(error, UserError) else disk_trouble(error)
    if line is None:
        traceback.print_exception(error)
        return 1
    print(f"normbt: error: {line}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normbt", description="NormBT: the distance-normalised Bradley-Terry loss for reward models."
    )
    parser.add_argument("--version", action="version", version=f"normbt-kernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add(
        name: str, command: Callable[..., int], help: str, options: type | None = None, **texts: Any
    ) -> argparse.ArgumentParser:
        # No abbreviations: one could also stand for an option of Trainer's.
        texts |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        added = commands.add_parser(name, help=help, **texts)
        added.set_defaults(command=command)
        if options is not None:
            add_options(added, options)
        return added

    train = add(
        "train",
        _train,
        "train a reward model; without arguments, a one-minute comparison of BT and NormBT",
        TrainOptions,
        usage="normbt train [--model PATH|ID --dataset PATH|ID --output-dir DIR] [options]",
        description=TRAIN_DESCRIPTION,
        epilog=TRAIN_EPILOG,
    )
    train.add_argument("--help-trainer", action="store_true", help="list all options of transformers.TrainingArguments")
    add(
        "evaluate",
        _evaluate,
        "accuracy of a reward model on preference pairs, by subset and by section of RewardBench",
        EvaluateOptions,
        usage="normbt evaluate MODEL [--dataset PATH|ID] [options]",
        description=EVALUATE_DESCRIPTION,
        epilog=EVALUATE_EPILOG,
    )
    add(
        "diagnose",
        _diagnose,
        "which of your pairs receive the gradient of your model, under BT and under NormBT",
        DiagnoseOptions,
        usage="normbt diagnose [--model PATH|ID] [--dataset PATH|ID] [options]",
        description=DIAGNOSE_DESCRIPTION,
        epilog=DIAGNOSE_EPILOG,
    )
    export = add(
        "export",
        _export,
        "write a trained reward model so that the rewardbench package loads it",
        description=EXPORT_DESCRIPTION,
    )
    export.add_argument("checkpoint", help="trained classifier, or a peft adapter for one: local folder or hub id")
    export.add_argument("output_dir", help="folder to write, new or empty")
    export.add_argument(
        "--tokenizer", metavar="PATH|ID", help="tokenizer with the chat template (default: the checkpoint's own)"
    )
    export.add_argument(
        "--chat-template", metavar="FILE", help="Jinja file with the chat template to use instead of the tokenizer's"
    )
    add("info", _info, "versions, devices and backends, and a self-check of the loss")
    return parser


def _train(arguments: argparse.Namespace, trainer_arguments: list[str]) -> int:
    _check_extra()
    from normbt_kernels.commands import run_folder
    from normbt_kernels.commands import train as run
    from normbt_kernels.commands.train_job import built_in_job, user_job
    from normbt_kernels.data.built_in import find_built_in

    if arguments.help_trainer:
        _trainer_parser().print_help()
        return 0
    options = options_from(arguments, TrainOptions)
    check_train_options(options)
    built_in = find_built_in(options.dataset) if options.model is None else None
    if built_in is None and None in (options.model, options.dataset):
        raise UserError("--model and --dataset go together; leave out both for the built-in default")
    if built_in is None and options.output_dir is None:
        raise UserError("--output-dir is required with --model")
    if options.output_dir is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--output-dir is required where several processes train: they must all write to one folder")
    import torch

    defaults = {"dataloader_pin_memory": torch.accelerator.is_available()}  # or it warns in the middle of the bar
    defaults |= {"output_dir": options.output_dir or str(free_path(Path(DEMO_OUTPUT_DIR)))}
    args = _training_arguments(trainer_arguments, defaults | (built_in.training_defaults if built_in else {}))
    if options.learning_rate is not None:
        args.learning_rate = options.learning_rate[0]
    output_dir = Path(args.output_dir)
    if args.process_index == 0 and not options.dry_run:
        run_folder.check(output_dir, args.resume_from_checkpoint)
    job = built_in_job(built_in, options, args.seed) if built_in else user_job(options, args.seed)
    print(*job.said, sep="\n", flush=True)
    if options.dry_run:
        return 0
    try:
        run.run(job, options, args, keep_checkpoints=any(word.startswith("--save") for word in trainer_arguments))
    except (Exception, KeyboardInterrupt) as error:
        code = _say(error)
        refused = isinstance(error, run_folder.OtherRun)  # the same command would be refused again
        line = None if refused else run_folder.continuing(arguments.command_line, output_dir, args.world_size)
        if line is not None and args.process_index == 0:
            print(f"to continue: {line}", file=sys.stderr)
        return code
    return 0


def _training_arguments(command_line: list[str], defaults: dict[str, Any]) -> TrainingArguments:
    from normbt_kernels.commands.train import one_device
    from normbt_kernels.integrations.head import refuse_fused_liger

    parser = _trainer_parser()
    parser.set_defaults(**defaults)
    try:
        args, others = parser.parse_args_into_dataclasses(args=command_line, return_remaining_strings=True)
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if others:
        known = [*parser._option_string_actions, *map(flag, (option.name for option in fields(TrainOptions)))]
        raise UserError(f"unrecognized arguments: {' '.join(others)}{_did_you_mean(others, known)}")
    for name, needed in ALL_REWARDS.items():
        if getattr(args, name) != needed:
            raise UserError(f"leave out {flag(name)} {not needed}: the report needs all rewards at once")
    if args.label_smoothing_factor:
        raise UserError(
            "--label-smoothing-factor smooths the labels of tokens, and pairs have none: use --loss bt-smoothing or "
            "normbt-smoothing, with --label-smoothing"
        )
    refuse_fused_liger(args)
    _check_integrations(args.report_to)
    if args.metric_for_best_model is not None and args.metric_for_best_model.removeprefix("eval_") not in METRICS:
        raise UserError(
            f"--metric-for-best-model {args.metric_for_best_model}: evaluation gives {', '.join(METRICS)}; bt_loss can "
            "be compared between checkpoints"
        )
    if args.n_gpu > 1:
        print(f"using 1 of {args.n_gpu} GPUs; for all: torchrun --nproc-per-node {args.n_gpu} -m normbt_kernels train")
    return one_device(args)


def _check_integrations(names: list[str]) -> None:
    """Raises UserError for a name of `--report-to` that Trainer does not know, or whose library is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for integration in get_reporting_integration_callbacks(names):
            # As Trainer makes them. Some complain when they are dropped, if they could not be made.
            type(integration.__name__, (integration,), {"__del__": lambda self: None})()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--report-to {' '.join(names)}: {' '.join(str(error).split())}") from error


def _did_you_mean(words: Sequence[str], known: Sequence[str]) -> str:
    """A question that names the known option most like the first unknown one; empty if none is like it."""
    import difflib

    option = next((word.split("=")[0] for word in words if word.startswith("--")), "")
    close = difflib.get_close_matches(option.replace("_", "-"), [name for name in known if "_" not in name], 1, 0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _trainer_parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser, TrainingArguments

    usage = "normbt train [options], see normbt train --help"
    return HfArgumentParser(TrainingArguments, prog="normbt train", usage=usage, allow_abbrev=False)


def _evaluate(arguments: argparse.Namespace, others: list[str]) -> int:
    _check_extra()
    from normbt_kernels.commands import benchmark, evaluate

    options = _checked(options_from(arguments, EvaluateOptions))
    command = benchmark if options.benchmark in benchmark.BENCHMARKS else evaluate
    command.run(options)
    return 0


def _diagnose(arguments: argparse.Namespace, others: list[str]) -> int:
    _check_extra()
    from normbt_kernels.commands import diagnose

    options = options_from(arguments, DiagnoseOptions)
    diagnose.run(_checked(replace(options, out=options.out or free_path(Path("normbt-diagnosis.json")))))
    return 0


def _check_extra() -> None:
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'normbt-kernels[train]'") from error


def _checked(options: Judging) -> Judging:
    """`options` with a device that is there, and a place for the results."""
    import torch

    check_splits(options)
    out = options.out
    if out is not None:
        if out.suffix != ".json" or not out.parent.is_dir():
            raise UserError(f"--out {out}: expected a file name that ends in .json, in a folder that exists")
        check_new_file(out, "--out")
    device = options.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: {first_sentence(error)}") from error
    return replace(options, device=device)


def _export(arguments: argparse.Namespace, others: list[str]) -> int:
    try:
        from normbt_kernels.integrations.export import export_for_rewardbench

        check_folder(Path(arguments.output_dir))
        tokenizer = arguments.tokenizer or arguments.checkpoint
        if arguments.chat_template is not None:
            from normbt_kernels.data.checkpoints import load_tokenizer, read_template

            tokenizer = load_tokenizer(tokenizer)
            tokenizer.chat_template = read_template(Path(arguments.chat_template))
        export_for_rewardbench(arguments.checkpoint, tokenizer, arguments.output_dir)
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'normbt-kernels[trl]'") from error
    print(f"written: {arguments.output_dir}")
    return 0


def _info(arguments: argparse.Namespace, others: list[str]) -> int:
    from normbt_kernels.commands import info

    print(info.environment())
    failures = info.run()
    print("self-check: " + ("passed" if not failures else "FAILED\n  " + "\n  ".join(failures)))
    return 1 if failures else 0
