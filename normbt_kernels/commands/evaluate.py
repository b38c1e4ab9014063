"""`normbt evaluate`: scores pairs with a reward model; accuracy by subset and section as a table and a JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from normbt_kernels._version import versions
from normbt_kernels.commands.arguments import EvaluateOptions
from normbt_kernels.data.built_in import GENERATED
from normbt_kernels.data.checkpoints import load_model, load_scoring_tokenizer, token_limit
from normbt_kernels.data.preferences import Preference, load_preferences, parse_row
from normbt_kernels.data.tokens import LeftOut, prepare
from normbt_kernels.errors import UserError
from normbt_kernels.evaluation import SECTION_OF, SECTIONS, Accuracy, accuracy, score_pairs
from normbt_kernels.results import aligned, write_results
from normbt_kernels.resumable import partial_path

HUB_ID, HUB_SPLIT = "allenai/reward-bench", "filtered"


def run(options: EvaluateOptions) -> None:
    """`normbt evaluate`.

    Raises:
        UserError: the model or the data cannot be read, or do not fit together.
    """
    tokenizer = load_scoring_tokenizer(options.model)
    limit = token_limit(tokenizer, options.max_length, options.model)
    dataset = options.dataset or (options.benchmark and HUB_ID)
    if dataset is None:
        pairs, dataset = built_in_pairs(tokenizer), GENERATED.name
    else:
        split = options.dataset_split or HUB_SPLIT
        pairs = load_preferences(dataset, options.dataset_config, split, parse=_parser(tokenizer))
    # A pair with the same tokens on both sides is a tie, and counts as one.
    prepared = prepare(pairs, tokenizer, LeftOut(limit, keep_identical=True), truncate=options.truncate)
    rows = prepared.rows
    for remark in prepared.remarks:
        print(remark)
    classifier = load_model(options.model, tokenizer, options.dtype).to(options.device)

    partial = None if options.out is None else partial_path(options.out)
    rewards = score_pairs(classifier, tokenizer, rows, options.batch_size, partial)
    result = accuracy(*rewards, [row["category"] for row in rows] if "category" in rows[0] else None)
    report = {
        "model": options.model,
        "dataset": dataset,
        "dtype": str(classifier.dtype).removeprefix("torch."),
        "num_left_out": len(pairs) - len(rows),
        "max_length": limit if len(rows) < len(pairs) else None,
        **summary(result),
        "versions": versions(),
    }
    print(table(report))
    if options.out is not None:
        write_results(options.out, report, kept=[partial])


def built_in_pairs(tokenizer: PreTrainedTokenizerBase) -> list[Preference]:
    """The held-out pairs of the built-in default.

    Raises:
        UserError: the tokenizer is not that of the built-in default.
    """
    if tokenizer.get_vocab() != GENERATED.make_tokenizer().get_vocab():
        raise UserError("--dataset is required: the built-in pairs are for checkpoints of the built-in default only")
    return GENERATED.pairs("test", 0)


def _parser(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any, str], Preference]:
    """Returns the function that reads a row. Rows with a `subset` are RewardBench's: as in its package, prompt and
    answer become a conversation if the tokenizer has a chat template. All others are read as `normbt train` reads them.
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
    """The content of the JSON file about `result`."""
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
    rows = [["accuracy", "pairs", "weight", "right"]]

    def add(name: str, num_pairs: int | str, share: float, weight: int | None = None) -> None:
        rows.append([name, str(num_pairs), str(weight or ""), f"{share:.3f}"])

    def add_subsets(section: str | None) -> None:
        for name, subset in subsets.items():
            if subset["section"] == section:
                add(f"  {name}", subset["num_pairs"], subset["accuracy"], subset["weight"])

    for section, share in report["sections"].items():
        add(section, sum(s["num_pairs"] for s in subsets.values() if s["section"] == section), share)
        add_subsets(section)
    if any(subset["section"] is None for subset in subsets.values()):
        rows.append(["in none of RewardBench's sections" + (", and not in overall" if report["sections"] else "")])
        add_subsets(None)
    add("all pairs, unweighted", report["num_pairs"], report["all_pairs"])
    add(f"overall: {report['overall_is']}", "", report["overall"])
    lines = ["", *aligned(rows), ""]
    if report["sections_left_out"]:
        lines.append(f"No pairs, and left out: {', '.join(report['sections_left_out'])}.")
    return "\n".join(lines + notes(report, "pairs"))


def notes(report: Mapping[str, Any], items: str) -> list[str]:
    """The lines below a table of scores; `items` names what the model was judged on."""
    lines = []
    if report["num_left_out"]:
        lines.append(f"Left out {report['num_left_out']} {items} longer than {report['max_length']} tokens.")
    if report["num_nan"]:
        lines.append(f"NaN, and counted as wrong: a reward of {report['num_nan']} {items}. Try another --dtype.")
    lines.append(f"Right is {report['rule']}, in {report['dtype']}; ties, which count as wrong: {report['num_ties']}.")
    return lines
