"""What `normbt train` works on: the user's checkpoint and pairs, or a built-in data set and its model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.data import STDLIB_FAULTS
from normbt_kernels.data.built_in import BuiltIn
from normbt_kernels.data.checkpoints import (
    add_lora,
    load_model,
    load_training_tokenizer,
    read_template,
    token_limit,
)
from normbt_kernels.data.look import look
from normbt_kernels.data.preferences import Preference, load_preferences
from normbt_kernels.data.tokens import LeftOut, Prepared, Row, prepare
from normbt_kernels.errors import UserError
from normbt_kernels.files import check_name


@dataclass(frozen=True)
class Job:
    """What every loss is trained and judged on. `make_model` draws new weights from torch's current seed; `data` holds
    the figures about the pairs, and `said` the lines that tell them."""

    model_name: str
    dataset_name: str
    make_model: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    train_rows: Sequence[Row]
    eval_rows: Sequence[Row]
    losses: Sequence[str]
    data: dict[str, Any]
    said: Sequence[str]


def built_in_job(built_in: BuiltIn, options: TrainOptions, seed: int) -> Job:
    """A built-in data set and its model. The held-out pairs do not depend on the seed."""
    torch.set_num_threads(1)  # more threads do not help models this small, and hurt where cores are shared
    tokenizer = built_in.make_tokenizer()
    limit = token_limit(tokenizer, options.max_length, None)
    train, held_out = (
        _prepared(built_in.pairs(split, seed), kind, tokenizer, options, limit)
        for split, kind in (("train", "training pairs"), ("test", "held-out pairs"))
    )
    data, said = look(train, held_out.rows, tokenizer, limit)
    return Job(
        model_name=built_in.model_name,
        dataset_name=built_in.name,
        make_model=lambda: built_in.make_model(tokenizer),
        tokenizer=tokenizer,
        train_rows=train.rows,
        eval_rows=held_out.rows,
        losses=options.loss or ("bt", "normbt"),
        data=data,
        said=said,
    )


def user_job(options: TrainOptions, seed: int) -> Job:
    """The user's checkpoint and pairs.

    Raises:
        UserError: something cannot be read, or no pair is left to train or to judge on.
    """
    check_name(options.model)
    columns = dict(column.split("=", 1) for column in options.column or ())
    train_pairs = load_preferences(options.dataset, options.dataset_config, options.dataset_split, columns=columns)
    if options.eval_dataset is not None:
        eval_pairs = load_preferences(
            options.eval_dataset, options.dataset_config, options.eval_split or "test", columns=columns
        )
    elif options.dataset == STDLIB_FAULTS:
        eval_pairs = load_preferences(options.dataset, None, "test")  # modules that are not trained on
    else:
        eval_pairs = None
    losses = options.loss or ("normbt",)
    if train_pairs[0].margin is not None and not any("-margin" in name for name in losses):
        print(f"the pairs have margins, which --loss {' '.join(losses)} leaves unused; normbt-margin uses them")

    tokenizer = load_training_tokenizer(options.model, options.gguf_file)
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(Path(options.chat_template))
    limit = token_limit(tokenizer, options.max_length, options.model, options.gguf_file)
    train = _prepared(train_pairs, "training pairs", tokenizer, options, limit)
    remarks = train.remarks
    if eval_pairs is None:  # held out of the pairs that are left, so that as many are judged as the user asked for
        train_rows, eval_rows = _hold_out(train.rows, options.eval_fraction, seed)
    else:
        held_out = _prepared(eval_pairs, "held-out pairs", tokenizer, options, limit)
        train_rows, eval_rows = train.rows, held_out.rows
        remarks = [*remarks, *held_out.remarks, *(f"left out: held-out pairs: {why}" for why in held_out.left_out)]
    data, said = look(Prepared(train_rows, train.left_out, remarks), eval_rows, tokenizer, limit)

    def make_model() -> nn.Module:
        model = load_model(
            options.model,
            tokenizer,
            options.dtype,
            new_head=True,
            gguf_file=options.gguf_file,
            attention=options.attn_implementation,
        )
        if options.lora_r is None:
            return model
        return add_lora(model, options.lora_r, options.lora_alpha, options.lora_target)

    return Job(
        model_name=options.model,
        dataset_name=options.dataset,
        make_model=make_model,
        tokenizer=tokenizer,
        train_rows=train_rows,
        eval_rows=eval_rows,
        losses=losses,
        data=data,
        said=said,
    )


def _prepared(
    pairs: Sequence[Preference], kind: str, tokenizer: PreTrainedTokenizerBase, options: TrainOptions, limit: int
) -> Prepared:
    left_out = LeftOut(limit, options.keep_identical)
    return prepare(pairs, tokenizer, left_out, truncate=options.truncate, kind=kind)


def _hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    num_eval = max(1, round(fraction * len(rows)))
    if num_eval >= len(rows):
        raise UserError(f"holding out {num_eval} of {len(rows)} pairs leaves none to train on (--eval-fraction)")
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[num_eval:], shuffled[:num_eval]
