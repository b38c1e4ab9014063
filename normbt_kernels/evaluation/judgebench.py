"""JudgeBench (arXiv:2410.12784): pairs of answers to hard questions, one of them objectively right.

right      reward of the right answer > reward of the wrong one, strictly
category   by the source of the question: knowledge, reasoning, math or coding
overall    share of all pairs that are right
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from normbt_kernels.errors import UserError
from normbt_kernels.evaluation.questions import Benchmark, Question, Report, column, members, num_nan

CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
RIGHT_FIRST = {"A>B": True, "B>A": False}


def parse(row: dict[str, Any], where: str) -> Question:
    """The question in one row of `ScalerLab/JudgeBench`: pair_id, source, question, response_A, response_B, label.

    Raises:
        UserError: the row is not such a question.
    """
    source, label = column(row, "source", str, where), column(row, "label", str, where)
    category = next((name for start, name in CATEGORIES.items() if source.startswith(start)), None)
    if category is None:
        raise UserError(f"{where}: 'source' must begin with one of {', '.join(CATEGORIES)}, got {source!r}")
    if label not in RIGHT_FIRST:
        raise UserError(f"{where}: 'label' must be one of {', '.join(RIGHT_FIRST)}, got {label!r}")
    answers = [column(row, name, str, where) for name in ("response_A", "response_B")]
    if not RIGHT_FIRST[label]:
        answers.reverse()
    prompt = column(row, "question", str, where)
    return Question(prompt, tuple(answers), 1, category, str(row.get("pair_id", where)), where)


def count(questions: Sequence[Question], rewards: Sequence[np.ndarray]) -> Report:
    """Scores by category."""
    right, wrong = np.stack(rewards).T
    groups = members(questions, lambda question: question.subset)
    names = [name for name in CATEGORIES.values() if name in groups]
    rows = [(name, len(groups[name]), (float((right > wrong)[groups[name]].mean()),)) for name in names]
    overall = (float((right > wrong).mean()),)
    num_ties = int((right == wrong).sum())
    return Report(("score",), tuple(rows), overall, "all pairs", num_ties, num_nan(rewards))


JUDGEBENCH = Benchmark("JudgeBench", "ScalerLab/JudgeBench", "gpt", parse, count)
