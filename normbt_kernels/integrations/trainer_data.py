"""Preference data in a `Trainer`: turns any data set of text, messages or token ids into one of checked token ids.

list, datasets.Dataset, map-style data set   read before training; the log counts the pairs that are left out
datasets.IterableDataset, torch stream       read as they come; the log names the first pair that is left out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from normbt_kernels.data.collator import PreferenceCollator
from normbt_kernels.data.preferences import parse_row
from normbt_kernels.data.rows import NUMBERS
from normbt_kernels.data.tokens import (
    SIDES,
    LeftOut,
    check_ids,
    cut,
    num_tokens,
    remark,
    summed_up,
    tokenize_pair,
)
from normbt_kernels.errors import UserError

logger = logging.get_logger(__name__)

BY_LENGTH = ("group_by_length", "batch_rebalance")  # strategies of sampling that ask for each row's length


class SampledByLength:
    """A base class to name before `Trainer`: its strategies of sampling, for data sets of tokenised pairs. A subclass
    of `Trainer` that samples in its own way keeps it."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """As in `Trainer`; the length of a pair is that of its longer sequence."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self._samples_by_length("_get_train_sampler") and has_length(rows):
            import datasets

            rows = datasets.Dataset.from_dict({self.args.length_column_name: [num_tokens(row) for row in rows]})
        return super()._get_train_sampler(rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        """In the order of the rows, whatever the strategy of sampling: there is a prediction for each row."""
        if not self._samples_by_length("_get_eval_sampler"):
            return super()._get_eval_sampler(eval_dataset)
        if eval_dataset is None or not has_length(eval_dataset) or self.args.world_size > 1:
            return None
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _samples_by_length(self, method: str) -> bool:
        samples = getattr(super(), method).__func__ is getattr(Trainer, method)
        return samples and self.args.train_sampling_strategy in BY_LENGTH


class PairsInTrainer(SampledByLength):
    """A base class to name before `Trainer`: it accepts text, messages or token ids if `self.data_collator` is a
    `PreferenceCollator`. `self.left_out` says which pairs are not used, `self.truncate` whether long sequences are cut
    instead, `self.vocabulary` how many tokens the model knows."""

    left_out: LeftOut
    truncate: bool
    vocabulary: int | None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*SIDES, *NUMBERS]

    def _tokenized(self, dataset: Any, name: str, whole: bool = False) -> Any:
        """`dataset` as the collator takes it: checked token ids. With `whole`, no pair may be left out.

        Raises:
            UserError: it is no data set, or several splits to train on; a row is no pair; all pairs are left out, or
                with `whole` any pair.
        """
        if isinstance(dataset, dict) and name == "train_dataset":
            raise UserError(f"train_dataset has the splits {', '.join(map(str, dataset))}: pass one of them")
        if isinstance(dataset, dict):
            return {key: self._tokenized(part, f"{name}[{key!r}]") for key, part in dataset.items()}
        if dataset is None or not isinstance(self.data_collator, PreferenceCollator):
            return dataset
        left_out = replace(self.left_out, keep_identical=self.left_out.keep_identical or whole)
        read = _Reader(self.data_collator.tokenizer, name, left_out, self.truncate, self.vocabulary)
        if isinstance(dataset, torch.utils.data.IterableDataset) and not hasattr(dataset, "map"):
            return TokenStream(dataset, read)
        is_frame = hasattr(dataset, "iloc")  # which is indexed by its columns
        if is_frame or not (hasattr(dataset, "__getitem__") or hasattr(dataset, "column_names")):
            raise UserError(
                f"{name} is a {type(dataset).__name__}: pass a list of rows, a torch data set, or a datasets.Dataset "
                "or IterableDataset (from_pandas takes a data frame, from_generator a generator function)"
            )
        if not hasattr(dataset, "__len__"):
            return _tokenized_stream(dataset, read)
        if not len(dataset):
            return dataset
        with self.args.main_process_first(desc=f"tokenizing {name}"):  # the others find it in the cache
            tokenized, verdicts, remarks = _read_all(dataset, read)
        for line in summed_up((f"{name}, row {i + 1}", text) for i, texts in enumerate(remarks) for text in texts):
            logger.warning(line)
        reasons = left_out.reasons(verdicts)
        kept = [i for i, verdict in enumerate(verdicts) if verdict == "kept"]
        if reasons and (whole or not kept):
            raise UserError(f"{name}: {' and '.join(reasons)}")
        for reason in reasons:
            logger.warning(f"{name}: {reason}, and left out")
        if not reasons:
            return tokenized
        return tokenized.select(kept) if hasattr(tokenized, "select") else [tokenized[i] for i in kept]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in `Trainer`; a data set given here may hold text or messages too, and every pair is judged."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self._tokenized(eval_dataset, "eval_dataset")
        with self._last_batch():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """As in `Trainer`; the data set may hold text or messages too, but no pair longer than `max_length`, because
        there is a prediction for each row."""
        test_dataset = self._tokenized(test_dataset, "test_dataset", whole=True)
        with self._last_batch():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _last_batch(self) -> Iterator[None]:
        """Has a data loader keep its last batch: `dataloader_drop_last` is about the pairs that are trained on."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = dropped


@dataclass
class _Reader:
    """Makes checked token ids of one row, and says what becomes of it."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    left_out: LeftOut
    truncate: bool
    vocabulary: int | None
    numbers: tuple[str, ...] = ()  # the numbers that every row must have, because one has
    said: set[str] = field(default_factory=set)

    def ids(self, row: Mapping[str, Any], index: int) -> tuple[Mapping[str, Any], list[str]]:
        """The row's token ids, and what is to be said of it."""
        where = f"{self.name}, row {index + 1}"
        if any(name in row and row[name] is None for name in NUMBERS):
            row = {name: value for name, value in row.items() if value is not None}
        ids, remarks = row, []
        if not row.keys() >= set(SIDES):
            pair = replace(parse_row(dict(row), where), category=None)
            ids = tokenize_pair(pair, self.tokenizer)
            looks_wrong = remark(pair, ids, self.tokenizer)
            remarks += [] if looks_wrong is None else [looks_wrong]
        for column in self.numbers:
            if column not in ids:
                raise UserError(f"{where}: no {column}, but other rows have one")
        check_ids(ids, where, self.vocabulary)
        if self.truncate and num_tokens(ids) > self.left_out.max_length:
            ids = cut(ids, self.left_out.max_length, self.tokenizer.truncation_side)
            remarks.append(f"cut to {self.left_out.max_length} tokens")
        return ids, remarks

    def kept(self, row: Mapping[str, Any], index: int) -> Mapping[str, Any] | None:
        """The token ids of one row of a stream; None if the pair is left out. The log tells each remark once."""
        ids, remarks = self.ids(row, index)
        verdict = self.left_out.verdict(ids)
        if verdict != "kept":
            remarks.append(f"left out, like all that are {verdict}")
        for said in remarks:
            if said not in self.said:
                self.said.add(said)
                logger.warning(f"{self.name}, row {index + 1}: {said}")
        return ids if verdict == "kept" else None


def _read_all(dataset: Any, read: _Reader) -> tuple[Any, list[str], list[list[str]]]:
    """The data set as token ids, and of each row verdict and remarks. A `datasets.Dataset` stays one, cached."""
    columns = getattr(dataset, "column_names", None)
    if columns is None or not hasattr(dataset, "map"):
        rows = [dataset[i] for i in range(len(dataset))]
        read.numbers = tuple(name for name in NUMBERS if any(row.get(name) is not None for row in rows))
        tokenized, remarks = zip(*(read.ids(row, i) for i, row in enumerate(rows)), strict=True)
        same = all(new is old for new, old in zip(tokenized, rows, strict=True))
        return dataset if same else list(tokenized), [read.left_out.verdict(ids) for ids in tokenized], list(remarks)

    given = [name for name in NUMBERS if name in columns]
    read.numbers = tuple(name for name in given if any(value is not None for value in dataset[name]))
    stays = set(SIDES) <= set(columns) and not read.truncate

    def looked_at(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        ids, remarks = read.ids(row, index)
        # As text, since datasets takes the type of a column from its first rows, which may have no remarks.
        return ({} if stays else dict(ids)) | {"verdict": read.left_out.verdict(ids), "remarks": "\n".join(remarks)}

    made = dataset.map(looked_at, with_indices=True, remove_columns=columns, desc=f"reading {read.name}")
    if stays:
        tokenized = dataset.remove_columns([name for name in given if name not in read.numbers])
    else:
        tokenized = made.remove_columns(["verdict", "remarks"])
    return tokenized, list(made["verdict"]), [text.splitlines() for text in made["remarks"]]


def _tokenized_stream(dataset: Any, read: _Reader) -> Any:
    """A `datasets.IterableDataset`, still streaming."""
    columns = dataset.column_names or list(next(iter(dataset), {}))
    numbers = [name for name in NUMBERS if name in columns]

    def ids(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        row = {name: values[0] for name, values in rows.items()}
        if missing := [name for name in numbers if row.get(name) is None]:
            where = f"{read.name}, row {indices[0] + 1}"
            raise UserError(f"{where}: no {missing[0]}: a stream has one in each row, or no column of that name")
        kept = read.kept(row, indices[0])
        names = [*SIDES, *numbers]
        return {name: [] if kept is None else [kept[name]] for name in names}

    return dataset.map(ids, with_indices=True, batched=True, batch_size=1, remove_columns=columns)


class TokenStream(torch.utils.data.IterableDataset):
    """A torch stream of rows, as one of token ids."""

    def __init__(self, rows: torch.utils.data.IterableDataset, read: _Reader):
        self.rows, self.read = rows, read

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for index, row in enumerate(self.rows):
            ids = self.read.kept(row, index)
            if ids is not None:
                yield ids

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
