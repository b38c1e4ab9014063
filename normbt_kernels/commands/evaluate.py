"""`normbt evaluate`: a reward model and pairs in, accuracy by subset and section out, as a table and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from normbt_kernels._version import versions
from normbt_kernels.data import demo
from normbt_kernels.data.checkpoints import (
    checkpoint_position_limit,
    load_model,
    load_scoring_tokenizer,
    vocabulary_size,
)
from normbt_kernels.data.preferences import Preference, load_preferences, parse_row
from normbt_kernels.data.tokens import LeftOut, check_ids, prepare
from normbt_kernels.errors import UserError
from normbt_kernels.evaluation import SECTION_OF, SECTIONS, Accuracy, accuracy, score_pairs
from normbt_kernels.files import write_json
from normbt_kernels.resumable import partial_path

HUB_ID, HUB_SPLIT = "allenai/reward-bench", "filtered"


def run(
    model: str,
    benchmark: str | None,
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
    """`normbt evaluate`; the arguments are its flags.

    Raises:
        UserError: the model or the data cannot be read, or do not fit together.
    """
    tokenizer = load_scoring_tokenizer(model)
    dataset, dataset_split = dataset or (benchmark and HUB_ID), dataset_split or HUB_SPLIT
    if dataset is None:
        pairs, dataset = demo_pairs(tokenizer), "built-in generated pairs"
    else:
        pairs = load_preferences(dataset, dataset_config, dataset_split, parse=_parser(tokenizer))
    limits = (max_length, tokenizer.model_max_length, checkpoint_position_limit(model))
    limit = min(filter(None, limits))
    # A pair with the same tokens on both sides is a tie, and counts as one.
    prepared = prepare(pairs, tokenizer, LeftOut(limit, keep_identical=True), truncate=truncate)
    rows = prepared.rows
    for remark in prepared.remarks:
        print(remark)
    classifier = load_model(model, tokenizer, dtype).to(device)
    for number, row in enumerate(rows, start=1):
        check_ids(row, f"pair {number}", vocabulary_size(classifier))

    partial = None if out is None else partial_path(out)
    rewards = score_pairs(classifier, tokenizer, rows, batch_size, partial)
    result = accuracy(*rewards, [row["category"] for row in rows] if "category" in rows[0] else None)
    report = {
        "model": model,
        "dataset": dataset,
        "dtype": str(classifier.dtype).removeprefix("torch."),
        "num_left_out": len(pairs) - len(rows),
        "max_length": limit if len(rows) < len(pairs) else None,
        **summary(result),
        "versions": versions(),
    }
    if out is not None:
        write_json(out, report)
        partial.unlink()
    print(table(report))
    if out is not None:
        print(f"wrote {out}")


def demo_pairs(tokenizer: PreTrainedTokenizerBase) -> list[Preference]:
    """The held-out pairs of the built-in default.

    Raises:
        UserError: the tokenizer is not that of the built-in default.
    """
    if tokenizer.get_vocab() != demo.demo_tokenizer().get_vocab():
        raise UserError("--dataset is required: the built-in pairs are for checkpoints of the built-in default only")
    return demo.demo_pairs(demo.NUM_EVAL_PAIRS, seed="held-out")


def _parser(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any, str], Preference]:
    """How to read a row: RewardBench's own, which have a subset, as its package does, others as `normbt train` does.

    RewardBench lays prompt and answer out as a conversation; without a chat template they are joined as they are.
    """

    def parse(row: Any, where: str) -> Preference:
        if isinstance(row, dict) and row.get("subset") is not None:
            row = row | {"category": row["subset"]}
            if tokenizer.chat_template is not None and isinstance(row.get("prompt"), str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        return parse_row(row, where)

    return parse


# --- results -----------------------------------------------------------------------------------------------------


def summary(result: Accuracy) -> dict[str, Any]:
    """`result` as the JSON file has it."""
    numbers = asdict(result)
    numbers["subsets"] = {
        name: {
            "section": SECTION_OF.get(name),
            "num_pairs": num_pairs,
            "weight": SECTIONS[SECTION_OF[name]][name] if name in SECTION_OF else None,
            "accuracy": share,
        }
        for name, (num_pairs, share) in result.subsets.items()
    }
    left_out = [section for section in SECTIONS if section not in result.sections] if result.sections else []
    return {"rule": "chosen > rejected", **numbers, "overall_is": result.overall_is, "sections_left_out": left_out}


def table(report: Mapping[str, Any]) -> str:
    """Accuracy by section and subset, as text."""
    subsets = report["subsets"]
    width = max([len(name) for name in subsets] + [len(report["overall_is"]) + 10, 20]) + 4
    lines = ["", f"{'accuracy':{width}}{'pairs':>7}{'weight':>8}{'right':>9}"]

    def add(name: str, num_pairs: int | str, share: float, weight: int | None = None) -> None:
        lines.append(f"{name:{width}}{num_pairs:>7}{weight or '':>8}{share:9.3f}")

    def add_subsets(section: str | None) -> None:
        for name, subset in subsets.items():
            if subset["section"] == section:
                add(f"  {name}", subset["num_pairs"], subset["accuracy"], subset["weight"])

    for section, share in report["sections"].items():
        add(section, sum(s["num_pairs"] for s in subsets.values() if s["section"] == section), share)
        add_subsets(section)
    unknown = [name for name, subset in subsets.items() if subset["section"] is None]
    if unknown:
        lines.append("in none of RewardBench's sections" + (", and not in overall" if report["sections"] else ""))
        add_subsets(None)
    add("all pairs, unweighted", report["num_pairs"], report["all_pairs"])
    add(f"overall: {report['overall_is']}", "", report["overall"])
    lines.append("")
    if report["sections_left_out"]:
        lines.append(f"No pairs, and left out: {', '.join(report['sections_left_out'])}.")
    if report["num_left_out"]:
        lines.append(f"Left out {report['num_left_out']} pairs longer than {report['max_length']} tokens.")
    if report["num_nan"]:
        lines.append(f"NaN, and counted as wrong: a reward of {report['num_nan']} pairs. Try another --dtype.")
    lines.append(f"Right is chosen > rejected, in {report['dtype']}; {report['num_ties']} ties count as wrong.")
    return "\n".join(lines)
