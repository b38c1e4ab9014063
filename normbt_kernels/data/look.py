"""Looks at the data before training: tells in about ten lines what they are, and refuses hopeless ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from normbt_kernels.data.tokens import SIDES, Prepared, Row, is_identical, num_tokens, unknown_tokens
from normbt_kernels.errors import UserError


def look(
    train: Prepared, held_out: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: float
) -> tuple[dict[str, Any], list[str]]:
    """Figures about the pairs, for the record, and the lines that tell them.

    Args:
        train: the training pairs, with what was left out of them.
        held_out: the rows on which the models are judged.
        tokenizer: says which tokens are unknown.
        max_length: the most tokens that a sequence may have.

    Raises:
        UserError: all held-out pairs are trained on.
    """
    lengths = np.array([num_tokens(row) for row in train.rows])
    keys = [_key(row) for row in train.rows]
    trained_on = set(keys)
    known = {
        "training_pairs": len(train.rows),
        "held_out_pairs": len(held_out),
        "tokens_median": float(np.median(lengths)),
        "tokens_95_percent": float(np.quantile(lengths, 0.95)),
        "tokens_max": int(lengths.max()),
        "max_length": max_length,
        "left_out": train.left_out,
        "identical_pairs": sum(map(is_identical, train.rows)),
        "repeated_pairs": len(keys) - len(trained_on),
        "reversed_pairs": sum(key[::-1] in trained_on for key in trained_on) // 2,
        "held_out_pairs_trained_on": sum(_key(row) in trained_on for row in held_out),
        "unknown_tokens": unknown_tokens(train.rows, tokenizer),
        "longer_side_chosen": _longer_side_chosen(train.rows),
    }
    if known["held_out_pairs_trained_on"] == len(held_out):
        raise UserError("every held-out pair is a training pair too: give --eval-dataset other pairs")
    return known, _lines(known, train)


def _key(row: Row) -> tuple[bytes, bytes]:
    chosen, rejected = (np.asarray(row[name], dtype=np.int32).tobytes() for name in SIDES)
    return chosen, rejected


def _longer_side_chosen(rows: Sequence[Row]) -> float | None:
    """How often the longer side is the chosen one, among pairs whose sides differ in length; None if none do."""
    longer = Counter(np.sign(len(row["chosen_ids"]) - len(row["rejected_ids"])) for row in rows)
    return longer[1] / (longer[1] + longer[-1]) if longer[1] + longer[-1] else None


def _lines(known: dict[str, Any], train: Prepared) -> list[str]:
    lines = [
        f"{known['training_pairs']} training pairs, {known['held_out_pairs']} held-out pairs",
        f"tokens of the longer side: median {known['tokens_median']:.0f}, 95% up to {known['tokens_95_percent']:.0f}, "
        f"most {known['tokens_max']}; the limit is {known['max_length']:.0f}",
        *(f"left out: {reason}" for reason in train.left_out),
        *train.remarks,
    ]
    if known["longer_side_chosen"] is not None:
        lines.append(f"the longer side is the chosen one in {known['longer_side_chosen']:.0%} of the pairs")
    for name, what in (
        ("identical_pairs", "training pairs with the same tokens on both sides, which are kept"),
        ("repeated_pairs", "training pairs that are there more than once"),
        ("reversed_pairs", "training pairs that are there with both labels"),
        ("held_out_pairs_trained_on", "held-out pairs that are training pairs too, on which accuracy says nothing"),
    ):
        if known[name]:
            lines.append(f"{what}: {known[name]}")
    if known["unknown_tokens"]:
        lines.append(f"{known['unknown_tokens']:.1%} of the tokens are unknown to the tokenizer")
    return lines
