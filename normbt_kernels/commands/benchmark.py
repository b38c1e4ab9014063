"""`normbt evaluate --benchmark NAME`: scores a model on a benchmark of questions; a table, a JSON file and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from normbt_kernels._version import versions
from normbt_kernels.commands.arguments import EvaluateOptions
from normbt_kernels.commands.evaluate import notes
from normbt_kernels.data.checkpoints import load_model, load_scoring_tokenizer, token_limit
from normbt_kernels.data.rows import read_rows
from normbt_kernels.data.tokens import kept_part, token_ids
from normbt_kernels.errors import UserError
from normbt_kernels.evaluation import score_sequences
from normbt_kernels.evaluation.judgebench import JUDGEBENCH
from normbt_kernels.evaluation.questions import Question
from normbt_kernels.evaluation.rewardbench2 import REWARDBENCH_2
from normbt_kernels.evaluation.rm_bench import RM_BENCH
from normbt_kernels.results import aligned, write_results
from normbt_kernels.resumable import partial_path

BENCHMARKS = {"rewardbench2": REWARDBENCH_2, "rm-bench": RM_BENCH, "judgebench": JUDGEBENCH}


def run(options: EvaluateOptions) -> None:
    """`normbt evaluate --benchmark`.

    Raises:
        UserError: the model or the questions cannot be read, or do not fit together.
    """
    judge = BENCHMARKS[options.benchmark]
    tokenizer = load_scoring_tokenizer(options.model)
    limit = token_limit(tokenizer, options.max_length, options.model)
    dataset = options.dataset or judge.dataset
    rows = read_rows(dataset, options.dataset_config, options.dataset_split or judge.split)
    questions = [judge.parse(row, f"{dataset}, row {number}") for number, row in rows]
    if not questions:
        raise UserError(f"{dataset}: no rows")
    sequences = [
        _token_ids(question, tokenizer, limit if options.truncate else None)
        for question in tqdm(questions, desc="tokenizing", unit=" questions", leave=False)
    ]
    fits = [max(map(len, answers)) <= limit for answers in sequences]
    if not any(fits):
        raise UserError(f"all {len(questions)} questions have an answer of more than {limit} tokens (--max-length)")
    questions = [question for question, fit in zip(questions, fits, strict=True) if fit]
    sequences = [answers for answers, fit in zip(sequences, fits, strict=True) if fit]

    classifier = load_model(options.model, tokenizer, options.dtype).to(options.device)
    partial = None if options.out is None else partial_path(options.out)
    rewards = score_sequences(
        classifier, tokenizer, [ids for answers in sequences for ids in answers], options.batch_size, partial
    )
    ends = np.cumsum([len(answers) for answers in sequences])[:-1]
    result = judge.count(questions, np.split(rewards, ends))
    report = {
        "model": options.model,
        "benchmark": judge.title,
        "dataset": dataset,
        "dtype": str(classifier.dtype).removeprefix("torch."),
        "rule": "reward of right > reward of wrong",
        "num_questions": len(questions),
        "num_left_out": fits.count(False),
        "max_length": limit if not all(fits) else None,
        "num_ties": result.num_ties,
        "num_nan": result.num_nan,
        "columns": list(result.columns),
        "rows": {
            name: {"num_questions": number, **dict(zip(result.columns, scores, strict=True))}
            for name, number, scores in result.rows
        },
        "overall": dict(zip(result.columns, result.overall, strict=True)),
        "overall_is": result.overall_is,
        "versions": versions(),
    }
    print(table(report))
    if options.out is not None:
        write_results(options.out, report, lambda path: draw(report, path), kept=[partial])


def _token_ids(question: Question, tokenizer: PreTrainedTokenizerBase, cut: int | None) -> list[np.ndarray]:
    """Each answer after its prompt: a conversation where the tokenizer has a chat template, else one text."""
    sequences = []
    for answer in question.answers:
        text: Any = question.prompt + answer
        if tokenizer.chat_template is not None:
            text = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": answer}]
        ids = token_ids(text, tokenizer, question.where)
        if cut is not None:
            ids = ids[kept_part(cut, tokenizer.truncation_side)]
        sequences.append(ids)
    return sequences


# --- results -----------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """The scores as text: a line for each row, and one for the whole benchmark."""
    scores = report["rows"] | {f"overall: {report['overall_is']}": {"num_questions": "", **report["overall"]}}
    rows = [
        [name, str(of["num_questions"]), *(f"{of[column]:.3f}" for column in report["columns"])]
        for name, of in scores.items()
    ]
    lines = aligned([[report["benchmark"], "questions", *report["columns"]], *rows])
    return "\n".join(["", *lines, "", *notes(report, "questions")])


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws the scores as bars, the whole benchmark last."""
    from matplotlib.figure import Figure

    rows = [*report["rows"].items(), ("overall", report["overall"])]
    columns = report["columns"]
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(rows) * (len(columns) + 0.8)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(columns)
    for number, column in enumerate(columns):
        places = [place + (number - (len(columns) - 1) / 2) * height for place in range(len(rows))]
        bars = axes.barh(places, [scores[column] for _, scores in rows], height, label=column)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    labels = [f"{name} ({scores['num_questions']})" if "num_questions" in scores else name for name, scores in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("score")
    axes.set_title(f"{report['benchmark']}: {Path(report['model']).name}", fontsize=11)
    if len(columns) > 1:
        figure.legend(loc="outside lower center", ncols=len(columns), frameon=False)
    figure.savefig(path, dpi=150)
