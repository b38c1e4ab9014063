"""Pairs as token ids: laid out by the tokenizer and checked; pairs that no loss can use are left out and counted.

    Preference -> {chosen_ids, rejected_ids, margin?, pair_weight?, category?}

A pair is left out if a sequence is too long, or if both sides are the same tokens (a chat template may strip what told
them apart). Identical sides have distance 0 and the largest NormBT weight, and there is nothing to prefer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from normbt_kernels.data.preferences import OPTIONAL_COLUMNS, Preference, Text
from normbt_kernels.data.rows import NUMBERS
from normbt_kernels.errors import UserError, first_sentence

Row = Mapping[str, Any]
SIDES = ("chosen_ids", "rejected_ids")


# --- tokenising ----------------------------------------------------------------------------------------------------


def tokenize(pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, description: str = "tokenizing") -> list:
    """A row for each pair, as `tokenize_pair` makes it.

    Raises:
        UserError: as `tokenize_pair`.
    """
    return [tokenize_pair(pair, tokenizer) for pair in tqdm(pairs, desc=description, unit=" pairs", leave=False)]


def tokenize_pair(pair: Preference, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The row `{chosen_ids, rejected_ids (int32 arrays), margin?, pair_weight?, category?}`.

    Text gets the tokenizer's special tokens and its end-of-sequence token, if it has one. The tokenizer's chat template
    lays conversations out.

    Raises:
        UserError: the pair is a conversation and the tokenizer has no chat template, or the template refuses it; or a
            side has no tokens.
    """
    ids = {}
    for side in ("chosen", "rejected"):
        ids[f"{side}_ids"] = token_ids(getattr(pair, side), tokenizer, pair.where, pair.template)
        if not len(ids[f"{side}_ids"]):
            raise UserError(f"{pair.where}: {side!r} has no tokens")
    return ids | {name: getattr(pair, name) for name in OPTIONAL_COLUMNS if getattr(pair, name) is not None}


def token_ids(
    text: Text, tokenizer: PreTrainedTokenizerBase, where: str, template: Mapping[str, Any] | None = None
) -> np.ndarray:
    """The int32 ids of one text or conversation; `template` holds arguments of the chat template.

    Raises:
        UserError: as `tokenize_pair`, naming `where`.
    """
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return np.asarray(ids, dtype=np.int32)
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: is a conversation, but the tokenizer has no chat template; give plain text instead")
    try:
        laid_out = tokenizer.apply_chat_template(text, tokenize=False, **(template or {}))
    except Exception as error:  # a template is a program of the model's authors: it may raise anything
        raise UserError(f"{where}: the chat template refuses it ({first_sentence(error)})") from error
    return np.asarray(tokenizer(laid_out, add_special_tokens=False)["input_ids"], dtype=np.int32)


def remark(pair: Preference, row: Row, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What looks wrong about a pair that is used nevertheless."""
    if pair.repeats_prompt:
        return "an answer begins with the prompt, which is put before it once more"
    begin = tokenizer.bos_token_id
    if begin is not None and any(list(row[name][:2]) == [begin, begin] for name in SIDES):
        return f"a text begins with {tokenizer.bos_token}, and the tokenizer puts another one before it"
    return None


def summed_up(remarks: Iterable[tuple[str, str | None]]) -> list[str]:
    """One line for each different remark, from (row, remark): the first row that has it, and how many pairs do."""
    rows_of: dict[str, list[str]] = {}
    for where, text in remarks:
        if text is not None:
            rows_of.setdefault(text, []).append(where)
    return [
        f"{rows[0]}: {text}" + (f" (and in {len(rows) - 1} more pairs)" if len(rows) > 1 else "")
        for text, rows in rows_of.items()
    ]


# --- token ids -----------------------------------------------------------------------------------------------------


def num_tokens(row: Row) -> int:
    """The number of tokens of the longer sequence of a pair."""
    return max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def is_identical(row: Row) -> bool:
    """Whether both sides are the same tokens."""
    return bool(np.array_equal(row["chosen_ids"], row["rejected_ids"]))


def check_ids(row: Row, where: str, vocabulary: int | None = None) -> None:
    """Raises UserError naming `where` if a row of token ids has an empty side, an id beyond the model's `vocabulary`,
    or a number that `check_numbers` refuses."""
    for name in SIDES:
        if not len(row[name]):
            raise UserError(f"{where}: {name!r} is empty")
        if vocabulary is not None and (largest := int(np.asarray(row[name]).max())) >= vocabulary:
            raise UserError(
                f"{where}: {name!r} has the token {largest}, but the model has embeddings for {vocabulary}: "
                "model.resize_token_embeddings(len(tokenizer))"
            )
    check_numbers(row, where)


def check_numbers(row: Row, where: str) -> None:
    """Raises UserError naming `where` if a margin or weight is not a finite number, or a weight is negative."""
    for name in NUMBERS:
        if name in row and not _is_finite(row[name]):
            raise UserError(f"{where}: {name!r} is not a finite number: {row[name]!r:.80}")
    if row.get("pair_weight", 0) < 0:
        raise UserError(f"{where}: 'pair_weight' is negative: {row['pair_weight']!r}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


MOSTLY_UNKNOWN = 0.5  # with a larger share of unknown tokens, a tokenizer is not made for the texts


def unknown_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of tokens that the tokenizer does not know."""
    if tokenizer.unk_token_id is None:
        return 0.0
    unknown = sum(int((np.asarray(row[name]) == tokenizer.unk_token_id).sum()) for row in rows for name in SIDES)
    return unknown / sum(len(row[name]) for row in rows for name in SIDES)


def check_known(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if most tokens are unknown: every sequence then looks like every other."""
    share = unknown_tokens(rows, tokenizer)
    if share > MOSTLY_UNKNOWN:
        raise UserError(f"{share:.0%} of the tokens are unknown to the tokenizer: it is not made for these texts")


@dataclass(frozen=True)
class LeftOut:
    """Which pairs are left out: those longer than `max_length` tokens and, unless `keep_identical`, identical ones."""

    max_length: float
    keep_identical: bool = False

    def verdict(self, row: Row) -> str:
        """What becomes of a pair: "kept", "too long" or "identical"."""
        if num_tokens(row) > self.max_length:
            return "too long"
        return "identical" if not self.keep_identical and is_identical(row) else "kept"

    def reasons(self, verdicts: Sequence[str]) -> list[str]:
        """One line for each reason why pairs are left out, such as "3 of 20 pairs are ..."."""
        said = {"too long": f"longer than {self.max_length} tokens", "identical": "the same tokens on both sides"}
        return [
            f"{verdicts.count(verdict)} of {len(verdicts)} pairs are {reason}"
            for verdict, reason in said.items()
            if verdict in verdicts
        ]

    def told(self, rows: Sequence[Row], kind: str = "pairs") -> tuple[list[Row], list[str]]:
        """The kept pairs, and the reasons why others are left out.

        Raises:
            UserError: no pair is left; the message calls the pairs `kind`.
        """
        verdicts = [self.verdict(row) for row in rows]
        kept = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict == "kept"]
        reasons = self.reasons(verdicts)
        if not kept:
            option = " (--max-length)" if "too long" in verdicts else ""
            raise UserError(f"none of the {kind} is left: {' and '.join(reasons)}{option}")
        return kept, reasons


def cut(row: Row, max_length: int, side: str) -> dict[str, Any]:
    """The row with both sequences cut to `max_length` tokens at the "right" or "left" end."""
    return dict(row) | {name: row[name][kept_part(max_length, side)] for name in SIDES}


def kept_part(max_length: int, side: str) -> slice:
    """The tokens that remain of a sequence that is cut to `max_length` tokens at its "right" or "left" end."""
    return slice(-max_length, None) if side == "left" else slice(max_length)


def checked_rows(
    pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, cut_to: int | None, kind: str = "pairs"
) -> tuple[list[Row], list[str]]:
    """A row of token ids for each pair, and a line for each thing that looks wrong. With `cut_to`, sequences are cut to
    that many tokens at the tokenizer's side of truncation.

    Raises:
        UserError: as `tokenize_pair` and `check_known`.
    """
    rows = tokenize(pairs, tokenizer, f"tokenizing {kind}")
    check_known(rows, tokenizer)
    remarks = summed_up((pair.where, remark(pair, row, tokenizer)) for pair, row in zip(pairs, rows, strict=True))
    if cut_to is not None and (num_cut := sum(num_tokens(row) > cut_to for row in rows)):
        rows = [cut(row, cut_to, tokenizer.truncation_side) for row in rows]
        remarks.append(f"{num_cut} of {len(rows)} pairs are cut to {cut_to} tokens")
    return rows, remarks


@dataclass(frozen=True)
class Prepared:
    """The rows of the kept pairs; one line for each reason why others are left out, and one for each remark."""

    rows: list[Row]
    left_out: list[str]
    remarks: list[str]


def prepare(
    pairs: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    left_out: LeftOut,
    *,
    truncate: bool = False,
    kind: str = "pairs",
) -> Prepared:
    """The token ids of `pairs` without those that `left_out` leaves out; `kind` names the pairs in messages. `truncate`
    cuts long sequences, so that no pair is too long.

    Raises:
        UserError: as `checked_rows`; or no pair is left.
    """
    rows, remarks = checked_rows(pairs, tokenizer, left_out.max_length if truncate else None, kind)
    kept, reasons = left_out.told(rows, kind)
    return Prepared(kept, reasons, remarks)
