"""Preference pairs: read from a file or the hub, checked row by row, and turned into token ids.

    source -> rows (dicts)  -> Preference (checked)  -> {chosen_ids, rejected_ids, margin?, pair_weight?, category?}

Every complaint about the data names the source and the row, counted from 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from normbt_kernels.data import STDLIB_FAULTS
from normbt_kernels.errors import UserError, first_line

Text = str | list[dict[str, str]]  # plain text, or a conversation

OPTIONAL_COLUMNS = ("margin", "pair_weight", "category")  # in every row or in none


@dataclass(frozen=True)
class Preference:
    """One checked pair: two complete texts or conversations, prompt included. `where` names its row."""

    chosen: Text
    rejected: Text
    margin: float | None = None
    pair_weight: float | None = None
    category: str | None = None
    where: str = ""


# --- reading -----------------------------------------------------------------------------------------------------


def load_preferences(
    source: str, config: str | None, split: str, parse: Callable[[Any, str], Preference] | None = None
) -> list[Preference]:
    """All pairs of a .json, .jsonl or .parquet file, or of a split of a hub dataset (or of a local copy of one).

    The source "stdlib-faults" has the splits "train" and "validation"; any other one is its test split. Each row of
    the others is read by `parse`, called as `parse_row`, which is the default.

    Raises:
        UserError: the source cannot be read, or a row is not a preference pair.
    """
    if source == STDLIB_FAULTS:
        from normbt_kernels.data import stdlib_faults

        return stdlib_faults.split_pairs(split if split in ("train", "validation") else "test", seed=0)
    path = Path(source)
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix in readers:
        if not path.is_file():
            raise UserError(f"{source}: no such file")
        rows = readers[path.suffix](path)
    elif path.is_file():
        raise UserError(f"{source}: not one of {', '.join(readers)}")
    else:
        rows = _read_hub(source, config, split)
    pairs = [(parse or parse_row)(row, f"{source}, row {number}") for number, row in rows]
    if not pairs:
        raise UserError(f"{source}: no rows")
    for name in OPTIONAL_COLUMNS:
        missing = [pair.where for pair in pairs if getattr(pair, name) is None]
        if missing and len(missing) < len(pairs):
            raise UserError(f"{missing[0]}: no {name}, but other rows have one")
    return pairs


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_json(line, f"{path}, row {number}")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    rows = _parse_json(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a list of rows (one JSON object per line is .jsonl)")
    yield from enumerate(rows, start=1)


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{where}: not JSON ({error})") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet ({first_line(error)})") from error


def _read_hub(name: str, config: str | None, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:  # datasets' own errors derive from these
        raise UserError(f"{name}: {first_line(error)}") from error
    yield from enumerate(dataset, start=1)


# --- checking ----------------------------------------------------------------------------------------------------


def parse_row(row: Any, where: str) -> Preference:
    """The pair in one row of user data.

    A text prompt is put before text answers as it is. With messages, or a prompt of messages, the prompt is the
    beginning of the conversation and the answers are its end; answers that open with the user's own message are
    whole conversations already, and their prompt column is left out. RewardBench calls the category `subset`.

    Raises:
        UserError: naming `where`, if this is no preference pair.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object with columns, but {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise UserError(f"{where}: no column {name!r} (columns: {', '.join(map(str, row)) or 'none'})")
    chosen, rejected = (_text_or_messages(row[name], name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{where}: 'chosen' and 'rejected' must both be text or both be messages")
    if row.get("prompt"):
        prompt = _text_or_messages(row["prompt"], "prompt", where)
        chosen, rejected = _join(prompt, chosen), _join(prompt, rejected)
    margin, pair_weight = (_number(row.get(name), name, where) for name in ("margin", "pair_weight"))
    if pair_weight is not None and pair_weight < 0:
        raise UserError(f"{where}: 'pair_weight' is negative: {pair_weight!r}")
    category = row["category"] if row.get("category") is not None else row.get("subset")
    category = None if category is None else str(category)
    return Preference(chosen, rejected, margin, pair_weight, category, where)


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{where}: {name!r} is not a finite number: {value!r}")
    return float(value)


def _text_or_messages(value: Any, name: str, where: str) -> Text:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name!r} is neither text nor a list of messages, or it is empty")
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise UserError(f"{where}: {name!r} has a message that is not {{'role': text, 'content': text}}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _join(prompt: Text, answer: Text) -> Text:
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt + answer
    if isinstance(answer, list) and answer[0]["role"] != "assistant":
        return answer
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages + ([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)


# --- token ids ---------------------------------------------------------------------------------------------------


def tokenize(
    pairs: Iterable[Preference], tokenizer: PreTrainedTokenizerBase, max_length: int, description: str
) -> list[dict[str, Any]]:
    """Rows as `tokenize_pair` makes them, without those longer than `max_length`.

    Raises:
        UserError: as `tokenize_pair`.
    """
    rows = (tokenize_pair(pair, tokenizer) for pair in tqdm(pairs, desc=description, unit=" pairs", leave=False))
    return [row for row in rows if num_tokens(row) <= max_length]


def tokenize_pair(pair: Preference, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The row `{chosen_ids, rejected_ids (int32 arrays), margin?, pair_weight?, category?}`.

    Text gets the tokenizer's special tokens and its end-of-sequence token, if it has one; conversations are laid
    out by the tokenizer's chat template.

    Raises:
        UserError: conversations, and the tokenizer has no chat template, or the template refuses one.
    """
    ids = {f"{side}_ids": _token_ids(getattr(pair, side), tokenizer, pair.where) for side in ("chosen", "rejected")}
    return ids | {name: getattr(pair, name) for name in OPTIONAL_COLUMNS if getattr(pair, name) is not None}


def tokenize_dataset(dataset: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str) -> Any:
    """A trainer's data set of rows as `parse_row` takes them, as one of rows as `tokenize_pair` makes them.

    Pairs longer than `max_length` are left out. A `datasets.Dataset` or `datasets.IterableDataset` stays one, cached
    or streaming as it was; anything else with a length becomes a `datasets.Dataset`.

    Raises:
        UserError: naming `name` and the row, as `parse_row` and `tokenize_pair`.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        dataset = datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))])
    columns = dataset.column_names or list(next(iter(dataset)))
    constants = [column for column in ("margin", "pair_weight") if column in columns]

    def token_ids(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        pair = replace(parse_row(dict(row), f"{name}, row {index + 1}"), category=None)
        for column in constants:
            if getattr(pair, column) is None:
                raise UserError(f"{pair.where}: no {column}, but other rows have one")
        return tokenize_pair(pair, tokenizer)

    description = {"desc": f"tokenizing {name}"} if isinstance(dataset, datasets.Dataset) else {}
    dataset = dataset.map(token_ids, with_indices=True, remove_columns=columns, **description)
    return dataset.filter(lambda row: num_tokens(row) <= max_length)


def num_tokens(row: Mapping[str, Any]) -> int:
    """Of the longer one of a pair's two sequences."""
    return max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _token_ids(text: Text, tokenizer: PreTrainedTokenizerBase, where: str) -> np.ndarray:
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return np.asarray(ids, dtype=np.int32)
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: is a conversation, but the tokenizer has no chat template; give plain text instead")
    try:
        laid_out = tokenizer.apply_chat_template(text, tokenize=False)
    except Exception as error:  # a template is a program of the model's authors: it may raise anything
        raise UserError(f"{where}: the chat template refuses it ({first_line(error)})") from error
    return np.asarray(tokenizer(laid_out, add_special_tokens=False)["input_ids"], dtype=np.int32)
