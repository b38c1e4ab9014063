"""A question with several answers, and the scores that a benchmark gives a model for its rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normbt_kernels.data.rows import check_columns
from normbt_kernels.errors import UserError


@dataclass(frozen=True)
class Question:
    """A prompt and its answers, the right ones first.

    Attributes:
        answers: texts, at least one right and one wrong.
        num_right: how many of them are right.
        subset: the group to which the benchmark counts it.
        name: the benchmark's own name of the question.
        where: source and number of its row, for errors.
    """

    prompt: str
    answers: tuple[str, ...]
    num_right: int
    subset: str
    name: str
    where: str


@dataclass(frozen=True)
class Report:
    """Scores in [0, 1], by row and by column.

    Attributes:
        rows: for each row its name, its number of questions and its scores.
        overall: the scores of the whole benchmark.
        overall_is: says of what they are the mean.
        num_ties: right and wrong answers with equal rewards; every tie is wrong.
        num_nan: questions with a reward that is not a number, which wins no comparison.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[float, ...]], ...]
    overall: tuple[float, ...]
    overall_is: str
    num_ties: int
    num_nan: int


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are, how one is read, and how rewards are counted.

    `parse(row, where)` makes a question of a row. `count(questions, rewards)` takes an array `(answers,)` for each.
    """

    title: str
    dataset: str
    split: str
    parse: Callable[[dict[str, Any], str], Question]
    count: Callable[[Sequence[Question], Sequence[np.ndarray]], Report]


def column(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """`row[name]`.

    Raises:
        UserError: it is missing, or of another type, or a list that holds something else than texts.
    """
    check_columns(row, [name], where)
    value = row[name]
    if not isinstance(value, kind) or (kind is list and not all(isinstance(answer, str) for answer in value)):
        expected = "a list of texts" if kind is list else kind.__name__
        raise UserError(f"{where}: {name!r} must be {expected}, got {value!r:.80}")
    return value


def num_nan(rewards: Sequence[np.ndarray]) -> int:
    return sum(bool(np.isnan(of_answers).any()) for of_answers in rewards)


def members(questions: Sequence[Question], of: Callable[[Question], str]) -> dict[str, list[int]]:
    """The numbers of the questions, grouped by `of(question)`, in the order in which the groups first appear."""
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(of(question), []).append(number)
    return groups
