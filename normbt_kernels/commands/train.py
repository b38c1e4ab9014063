"""The main job: the same model trained once per loss, judged on the same held-out pairs."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainingArguments, set_seed

from normbt_kernels.commands import finished
from normbt_kernels.commands import train_report as report
from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.commands.losses import loss_rows, make_loss
from normbt_kernels.data import STDLIB_FAULTS
from normbt_kernels.data.built_in import BuiltIn
from normbt_kernels.data.checkpoints import checkpoint_position_limit, load_model, load_training_tokenizer
from normbt_kernels.data.preferences import Preference, load_preferences
from normbt_kernels.data.tokens import LeftOut, prepare
from normbt_kernels.errors import UserError
from normbt_kernels.integrations.checkpoint import last_whole_checkpoint
from normbt_kernels.integrations.transformers import NormBTTrainer

FINISHED_NAME = "finished.npz"


@dataclass(frozen=True)
class Job:
    """What every loss is trained and judged on. `make_model` draws new weights from torch's current seed."""

    model_name: str
    dataset_name: str
    make_model: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    train_rows: Sequence[dict[str, Any]]
    eval_rows: Sequence[dict[str, Any]]
    losses: Sequence[str]


def built_in_job(built_in: BuiltIn, options: TrainOptions, seed: int) -> Job:
    """A data set that needs no download, and its model. The held-out pairs are the same whatever the seed."""
    torch.set_num_threads(1)  # more gain nothing on models this small, and lose much where cores are shared
    tokenizer = built_in.make_tokenizer()
    return Job(
        model_name=built_in.model_name,
        dataset_name=built_in.name,
        make_model=lambda: built_in.make_model(tokenizer),
        tokenizer=tokenizer,
        train_rows=_rows(built_in.pairs("train", seed), "training", tokenizer, options),
        eval_rows=_rows(built_in.pairs("test", seed), "held-out", tokenizer, options),
        losses=options.loss or ("bt", "normbt"),
    )


def user_job(options: TrainOptions, seed: int) -> Job:
    """The user's checkpoint and pairs.

    Raises:
        UserError: what cannot be read, or leaves nothing to train or to judge on.
    """
    train_pairs = load_preferences(options.dataset, options.dataset_config, options.dataset_split)
    if options.eval_dataset is not None:
        eval_pairs = load_preferences(options.eval_dataset, options.dataset_config, options.eval_split)
    elif options.dataset == STDLIB_FAULTS:
        eval_pairs = load_preferences(options.dataset, None, "test")  # modules that are not trained on
    else:
        eval_pairs = None
    losses = options.loss or ("normbt",)
    if train_pairs[0].margin is not None and not any("-margin" in name for name in losses):
        print(f"the pairs have margins, which --loss {' '.join(losses)} leaves unused; normbt-margin uses them")
    tokenizer = load_training_tokenizer(options.model)
    positions = checkpoint_position_limit(options.model)
    train_rows = _rows(train_pairs, "training", tokenizer, options, positions)
    if eval_pairs is None:
        train_rows, eval_rows = _hold_out(train_rows, options.eval_fraction, seed)
    else:
        eval_rows = _rows(eval_pairs, "held-out", tokenizer, options, positions)
    return Job(
        model_name=options.model,
        dataset_name=options.dataset,
        make_model=lambda: load_model(options.model, tokenizer, options.dtype, new_head=True),
        tokenizer=tokenizer,
        train_rows=train_rows,
        eval_rows=eval_rows,
        losses=losses,
    )


def _rows(
    pairs: Sequence[Preference],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    positions: int | None = None,
) -> list[dict[str, Any]]:
    limit = min(options.max_length, tokenizer.model_max_length, positions or options.max_length)
    left_out = LeftOut(limit, options.keep_identical)
    prepared = prepare(pairs, tokenizer, left_out, truncate=options.truncate, kind=f"{kind} pairs")
    for reason in prepared.left_out:
        print(f"left out: {reason} ({kind})")
    for remark in prepared.remarks:
        print(f"{kind}: {remark}")
    return prepared.rows


def _hold_out(rows: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    num_eval = max(1, round(fraction * len(rows)))
    if num_eval >= len(rows):
        raise UserError(f"holding out {num_eval} of {len(rows)} pairs leaves none to train on (--eval-fraction)")
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[num_eval:], shuffled[:num_eval]


def check_folders(args: TrainingArguments) -> None:
    """Before anything is loaded: a run overwrites results only where it resumes what made them.

    Raises:
        UserError: `args.output_dir` already holds results, or there is no checkpoint folder to resume from.
    """
    resume = args.resume_from_checkpoint
    if resume not in (None, "last") and not Path(resume).is_dir():
        raise UserError(f"--resume-from-checkpoint {resume}: no such folder (or say: last)")
    if resume is None and (Path(args.output_dir) / report.RESULTS_NAME).exists():
        raise UserError(f"{args.output_dir} already holds {report.RESULTS_NAME}: choose another --output-dir")


def one_device(args: TrainingArguments) -> TrainingArguments:
    """`args` for this process to use one GPU of several: Trainer would split each batch, pairs and all, over them."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


def run(job: Job, options: TrainOptions, args: TrainingArguments) -> None:
    """Trains with each loss into `args.output_dir`/<loss>, then writes the comparison beside them."""
    output_dir = Path(args.output_dir)
    print(f"{len(job.train_rows)} training pairs, {len(job.eval_rows)} held-out pairs, on {args.device}", flush=True)
    rows = {name: (loss_rows(name, job.train_rows), loss_rows(name, job.eval_rows)) for name in job.losses}
    settings = finished.settings(options, args)
    files = {name: output_dir / name / FINISHED_NAME for name in job.losses}
    trained = {}
    if args.resume_from_checkpoint == "last":
        found = {name: finished.load(path, settings) for name, path in files.items()}
        trained = {name: result for name, result in found.items() if result is not None}
        for name in trained:
            print(f"{name} is trained already")
    for name in job.losses:
        if name not in trained:
            trained[name] = _train(name, *rows[name], job, options, args)
            if args.process_index == 0:
                finished.save(files[name], trained[name], settings)
    trained = {name: trained[name] for name in job.losses}
    if args.process_index > 0:
        return
    results = report.compare(trained, job.eval_rows, job.model_name, job.dataset_name, args)
    print(report.table(results))
    for path in report.write(results, output_dir):
        print(f"wrote {path}")
    for name in job.losses:
        print(
            f"wrote {output_dir / name}: AutoModelForSequenceClassification.from_pretrained({str(output_dir / name)!r})"
        )


def _train(
    name: str,
    train_rows: Sequence[dict[str, Any]],
    eval_rows: Sequence[dict[str, Any]],
    job: Job,
    options: TrainOptions,
    args: TrainingArguments,
) -> report.Trained:
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / name)
    set_seed(args.seed)  # the same initial weights for every loss; Trainer seeds the data order alike
    trainer = NormBTTrainer(
        job.make_model(),
        args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=job.tokenizer,
        loss=make_loss(name, options),
        late_pooling=options.late_pooling,
        padding_free=options.padding_free,
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossOnTheBar(name))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    seconds = time.perf_counter() - start
    trainer.save_model()
    prediction = trainer.predict(eval_rows)
    return report.Trained(
        *prediction.predictions, metrics=prediction.metrics, history=trainer.state.log_history, seconds=seconds
    )


def _checkpoint(args: TrainingArguments) -> str | None:
    """`--resume-from-checkpoint last` is the last whole one in each loss's own folder; anything else is a path."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    return last_whole_checkpoint(args.output_dir)


class LossOnTheBar(ProgressCallback):
    """Trainer's progress bar with the latest loss and accuracy on it, in place of a printed line for each log."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", accuracy=f"{logs['accuracy']:.3f}")
