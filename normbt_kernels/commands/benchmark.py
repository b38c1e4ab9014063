"""`normbt evaluate --benchmark NAME`: a reward model and a benchmark of questions in; table, JSON and figure out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from normbt_kernels._version import versions
from normbt_kernels.data.checkpoints import checkpoint_position_limit, load_model, load_scoring_tokenizer
from normbt_kernels.data.rows import read_rows
from normbt_kernels.data.tokens import token_ids
from normbt_kernels.diagnostics.report import can_draw
from normbt_kernels.errors import UserError
from normbt_kernels.evaluation import score_sequences
from normbt_kernels.evaluation.judgebench import JUDGEBENCH
from normbt_kernels.evaluation.questions import Question
from normbt_kernels.evaluation.rewardbench2 import REWARDBENCH_2
from normbt_kernels.evaluation.rm_bench import RM_BENCH
from normbt_kernels.files import write_json, write_whole
from normbt_kernels.resumable import partial_path

BENCHMARKS = {"rewardbench2": REWARDBENCH_2, "rm-bench": RM_BENCH, "judgebench": JUDGEBENCH}


def run(
    model: str,
    benchmark: str,
    dataset: str | None,
    dataset_config: str | None,
    dataset_split: str | None,
    batch_size: int,
    max_length: int | None,
    truncate: bool,
    device: str,
    dtype: str,
    out: Path | None,
) -> None:
    """`normbt evaluate --benchmark`; the arguments are its flags.

    Raises:
        UserError: the model or the questions cannot be read, or do not fit together.
    """
    judge = BENCHMARKS[benchmark]
    tokenizer = load_scoring_tokenizer(model)
    dataset, dataset_split = dataset or judge.dataset, dataset_split or judge.split
    rows = read_rows(dataset, dataset_config, dataset_split)
    questions = [judge.parse(row, f"{dataset}, row {number}") for number, row in rows]
    if not questions:
        raise UserError(f"{dataset}: no rows")
    limit = min(filter(None, (max_length, tokenizer.model_max_length, checkpoint_position_limit(model))))
    sequences = [
        _token_ids(question, tokenizer, limit if truncate else None)
        for question in tqdm(questions, desc="tokenizing", unit=" questions", leave=False)
    ]
    fits = [max(map(len, answers)) <= limit for answers in sequences]
    if not any(fits):
        raise UserError(f"all {len(questions)} questions have an answer of more than {limit} tokens (--max-length)")
    questions = [question for question, fit in zip(questions, fits, strict=True) if fit]
    sequences = [answers for answers, fit in zip(sequences, fits, strict=True) if fit]

    classifier = load_model(model, tokenizer, dtype).to(device)
    partial = None if out is None else partial_path(out)
    rewards = score_sequences(
        classifier, tokenizer, [ids for answers in sequences for ids in answers], batch_size, partial
    )
    ends = np.cumsum([len(answers) for answers in sequences])[:-1]
    result = judge.count(questions, np.split(rewards, ends))
    report = {
        "model": model,
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
    if out is None:
        return
    written = [out]
    if can_draw():
        written.append(out.with_suffix(".png"))
        write_whole(written[-1], lambda path: draw(report, path))
    write_json(out, report)
    partial.unlink()
    print(*(f"wrote {path}" for path in written), sep="\n")


def _token_ids(question: Question, tokenizer: PreTrainedTokenizerBase, cut: int | None) -> list[np.ndarray]:
    """Each answer after its prompt: a conversation where the tokenizer has a chat template, else one text."""
    sequences = []
    for answer in question.answers:
        text: Any = question.prompt + answer
        if tokenizer.chat_template is not None:
            text = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": answer}]
        ids = token_ids(text, tokenizer, question.where)
        if cut is not None:
            ids = ids[-cut:] if tokenizer.truncation_side == "left" else ids[:cut]
        sequences.append(ids)
    return sequences


# --- results -----------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """The scores as text: a line for each row, and one for the whole benchmark."""
    overall = f"overall: {report['overall_is']}"
    width = max(len(name) for name in (*report["rows"], overall)) + 2
    columns = report["columns"]

    def line(name: str, number: Any, scores: Mapping[str, float]) -> str:
        return f"{name:{width}}{number:>10}" + "".join(f"{scores[column]:9.3f}" for column in columns)

    lines = ["", f"{report['benchmark']:{width}}{'questions':>10}" + "".join(f"{column:>9}" for column in columns)]
    lines += [line(name, scores["num_questions"], scores) for name, scores in report["rows"].items()]
    lines += [line(overall, "", report["overall"]), ""]
    if report["num_left_out"]:
        lines.append(
            f"Left out {report['num_left_out']} questions with an answer of over {report['max_length']} tokens."
        )
    if report["num_nan"]:
        lines.append(f"NaN, and counted as wrong: a reward of {report['num_nan']} questions. Try another --dtype.")
    lines.append(f"Right is strictly greater, in {report['dtype']}; {report['num_ties']} ties count as wrong.")
    return "\n".join(lines)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The scores as bars, the whole benchmark last."""
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
