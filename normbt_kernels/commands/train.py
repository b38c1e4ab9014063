"""`normbt train`: trains the same model once per loss and judges all on the same held-out pairs."""

from __future__ import annotations

import copy
import io
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.utils import logging

from normbt_kernels.commands import run_folder
from normbt_kernels.commands import train_report as report
from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.commands.losses import loss_rows, make_loss
from normbt_kernels.commands.train_job import Job
from normbt_kernels.errors import UserError
from normbt_kernels.integrations.checkpoint import last_whole_checkpoint
from normbt_kernels.integrations.transformers import NormBTTrainer
from normbt_kernels.resumable import model_fingerprint, rows_fingerprint


def one_device(args: TrainingArguments) -> TrainingArguments:
    """`args` with one GPU for this process: Trainer would split each batch over several, and with it the pairs."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


@dataclass(frozen=True)
class Trial:
    """One model to train. `name` is its folder; models that differ only in the seed share a `column` of the table."""

    loss: str
    learning_rate: float
    seed: int
    name: str
    column: str


def trials(options: TrainOptions, losses: Sequence[str], args: TrainingArguments) -> list[Trial]:
    """Every loss at every learning rate with every seed, seed by seed: a stopped grid is then a smaller grid."""
    rates = options.learning_rate or (args.learning_rate,)
    seeds = range(args.seed, args.seed + options.seeds)
    made = []
    for seed in seeds:
        for rate in rates:
            for loss in losses:
                column = loss if len(rates) == 1 else f"{loss} {rate:g}"
                name = loss + (f"-lr{rate:g}" if len(rates) > 1 else "") + (f"-seed{seed}" if len(seeds) > 1 else "")
                made.append(Trial(loss, rate, seed, name, column))
    return made


def run(job: Job, options: TrainOptions, args: TrainingArguments, keep_checkpoints: bool) -> None:
    """Trains every trial into `args.output_dir`/<trial>, then writes the comparison beside them.

    A trial's checkpoints are removed when it is finished, unless `keep_checkpoints`.
    """
    output_dir, planned = Path(args.output_dir), trials(options, job.losses, args)
    run_folder.check_checkpoint(args.resume_from_checkpoint, [output_dir / trial.name for trial in planned])
    rows = {name: (loss_rows(name, job.train_rows), loss_rows(name, job.eval_rows)) for name in job.losses}
    set_seed(args.seed)
    model = job.make_model()
    try:
        NormBTTrainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:  # its library is not installed, or it needs other options
        raise UserError(f"--optim {args.optim.value}: {' '.join(str(error).split())}") from error
    others = {
        "training pairs": rows_fingerprint(job.train_rows),
        "held-out pairs": rows_fingerprint(job.eval_rows),
        "model": model_fingerprint(model),
        "processes": args.world_size,  # each has batches of its own: a step has as many times the pairs
    }
    del model  # each trial makes its own
    made_from = run_folder.made_from(options, args, **others)
    if args.process_index == 0:
        run_folder.begin(output_dir, made_from)
    columns: dict[str, list[report.Trained]] = {}
    for trial in planned:
        folder = output_dir / trial.name
        trained = run_folder.load_finished(folder) if args.resume_from_checkpoint == "last" else None
        if trained is not None:
            print(f"{trial.name} is trained already")
        else:
            trained = _train(trial, *rows[trial.loss], job, options, args)
            if args.process_index == 0:
                run_folder.save_finished(folder, trained)
                if not keep_checkpoints:
                    run_folder.remove_checkpoints(folder)
        columns.setdefault(trial.column, []).append(trained)
    if args.process_index > 0:
        return
    results = report.compare(columns, job.eval_rows, job.model_name, job.dataset_name, args)
    results |= {"data": job.data, "made_from": made_from, "command": shlex.join(["normbt", *sys.argv[1:]])}
    print(report.table(results))
    report.write(results, output_dir)
    for trial in planned:
        print(f"wrote {output_dir / trial.name}{run_folder.how_to_load(output_dir / trial.name)}")


def _train(
    trial: Trial,
    train_rows: Sequence[dict[str, Any]],
    eval_rows: Sequence[dict[str, Any]],
    job: Job,
    options: TrainOptions,
    args: TrainingArguments,
) -> report.Trained:
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / trial.name)
    args.seed, args.learning_rate = trial.seed, trial.learning_rate
    set_seed(args.seed)  # the same initial weights for every loss; Trainer seeds the data order alike
    with quiet_progress_bars(), redirect_stdout(io.StringIO()):  # it has printed this once, for the fingerprint
        model = job.make_model()
    trainer = NormBTTrainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=job.tokenizer,
        loss=make_loss(trial.loss, options),
        keep_identical=True,  # the job has left them out already
        late_pooling=options.late_pooling,
        padding_free=options.padding_free,
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossOnTheBar(trial.name))
    start = time.perf_counter()
    with quiet_progress_bars():  # bars of files that are read and written would break ours
        trainer.train(resume_from_checkpoint=_checkpoint(args))
        seconds = time.perf_counter() - start
        trainer.save_model()
    prediction = trainer.predict(eval_rows)
    return report.Trained(
        *prediction.predictions,
        metrics=prediction.metrics,
        history=trainer.state.log_history,
        seconds=seconds,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
    )


@contextmanager
def quiet_progress_bars() -> Iterator[None]:
    """Hides transformers' own bars, such as "Writing model shards", but not Trainer's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: "last" means the last whole one of this trial, anything else is a path."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    if args.save_only_model:
        print(f"the checkpoints in {args.output_dir} hold only the model (--save-only-model): the trial begins anew")
        return None
    return last_whole_checkpoint(args.output_dir)


class LossOnTheBar(ProgressCallback):
    """Trainer's progress bar, which shows the latest Bradley-Terry loss and accuracy instead of printing each log."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_prediction_step(self, args, state, control, **kwargs):
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("held-out pairs")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            # The unweighted loss can be compared: NormBT's own is scaled by its weights.
            self.training_bar.set_postfix(bt_loss=f"{logs['bt_loss']:.3f}", accuracy=f"{logs['accuracy']:.3f}")
