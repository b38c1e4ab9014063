"""`normbt evaluate`: a reward model's accuracy on preference pairs, counted as RewardBench v1 counts it.

    right     chosen > rejected, strictly, of the rewards that the model returns, in its own dtype: a tie is wrong
    subset    share of its pairs that are right
    section   mean of its subsets, weighted by RewardBench's example counts
    overall   mean of the sections

After RewardBench (arXiv:2403.13787); with the same rewards, the sections are those of `calculate_scores_per_section` in
its package `rewardbench` 0.1.4, but that a section without pairs is left out here, and 0 there. Pairs that are too long
are left out too, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from normbt_kernels._version import versions
from normbt_kernels.data import demo
from normbt_kernels.data.collator import PreferenceCollator
from normbt_kernels.data.preferences import (
    Preference,
    first_line,
    load_preferences,
    num_tokens,
    parse_row,
    tokenize,
)
from normbt_kernels.errors import UserError
from normbt_kernels.files import write_json
from normbt_kernels.resumable import fingerprint, map_resumable, partial_path

# The weight of each subset in its section: its number of pairs, but for math-prm, which has 447 and counts as much as
# the six programming languages together.
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
SECTION_OF = {subset: section for section, weights in SECTIONS.items() for subset in weights}


# --- counting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Shares of right pairs.

    Attributes:
        num_pairs, num_ties, num_nan: pairs, those of them whose two rewards are equal, and those with a reward that is
            not a number; both are wrong.
        all_pairs: share of all pairs that are right.
        subsets: number of pairs and share that is right, by subset; empty if the pairs have no subsets.
        sections: RewardBench's sections that have pairs.
        overall: mean of the sections; without sections the unweighted mean of the subsets; without subsets `all_pairs`.
    """

    num_pairs: int
    num_ties: int
    num_nan: int
    all_pairs: float
    subsets: dict[str, tuple[int, float]]
    sections: dict[str, float]
    overall: float

    @property
    def overall_is(self) -> str:
        """What `overall` is the mean of."""
        for name, means in (("section", self.sections), ("subset", self.subsets)):
            if means:
                return f"mean of {len(means)} {name}{'s' * (len(means) > 1)}"
        return "all pairs"


def accuracy(chosen_rewards: Any, rejected_rewards: Any, subsets: Sequence[str] | None = None) -> Accuracy:
    """Counts the pairs that are right, as RewardBench v1 does.

    Args:
        chosen_rewards, rejected_rewards: `(P,)` arrays or lists, as the model returned them.
        subsets: the subset of each pair, `(P,)`.

    Raises:
        ValueError: the three are not equally long, or empty.
    """
    chosen, rejected = np.asarray(chosen_rewards), np.asarray(rejected_rewards)
    if chosen.ndim != 1 or not len(chosen) or chosen.shape != rejected.shape:
        raise ValueError(f"expected chosen and rejected rewards (P,), got {chosen.shape} and {rejected.shape}")
    if subsets is not None and len(subsets) != len(chosen):
        raise ValueError(f"expected a subset for each of {len(chosen)} pairs, got {len(subsets)}")
    right = chosen > rejected
    shares = {}
    if subsets is not None:
        names = np.asarray(subsets)
        shares = {str(name): (int((names == name).sum()), float(right[names == name].mean())) for name in set(subsets)}
        shares = dict(sorted(shares.items()))
    sections = section_means({name: share for name, (_, share) in shares.items()})
    parts = list(sections.values()) or [share for _, share in shares.values()] or [right.mean()]
    return Accuracy(
        num_pairs=len(chosen),
        num_ties=int((chosen == rejected).sum()),
        num_nan=int((np.isnan(chosen) | np.isnan(rejected)).sum()),
        all_pairs=float(right.mean()),
        subsets=shares,
        sections=sections,
        overall=float(np.mean(parts)),
    )


def section_means(subsets: Mapping[str, float]) -> dict[str, float]:
    """RewardBench's sections from the accuracies of subsets; sections without a subset here are left out."""
    present = {
        section: {name: weight for name, weight in weights.items() if name in subsets}
        for section, weights in SECTIONS.items()
    }
    return {
        section: sum(subsets[name] * weight for name, weight in weights.items()) / sum(weights.values())
        for section, weights in present.items()
        if weights
    }


# --- rewards -----------------------------------------------------------------------------------------------------


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    partial: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen and rejected rewards, two fp32 arrays `(P,)`: the model's own logits, evaluated in its own dtype.

    They are widened to fp32 and not computed in it: what a 16-bit model rounds to a tie stays one. The longest pairs
    come first, so that a batch too large for the memory fails at once.

    Args:
        model: a classifier with one label, on the device and in the dtype to use. Put into eval mode.
        tokenizer: pads the batches; its pad token must be the model's.
        rows: token ids, as `tokenize_pair` makes them.
        batch_size: pairs per forward pass, which has twice as many sequences.
        partial: a file in which rewards are kept until all are there (`map_resumable`).
    """
    collate = PreferenceCollator(tokenizer)
    order = sorted(range(len(rows)), key=lambda i: -num_tokens(rows[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    @torch.inference_mode()
    def score(batch: Sequence[int]) -> list[float]:
        inputs = collate([rows[i] for i in batch])
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return model(**inputs).logits.float().squeeze(-1).tolist()

    model.eval()
    name = None if partial is None else fingerprint(model, rows, batch_size)
    rewards = np.empty((2, len(rows)), dtype=np.float32)
    for batch, scored in zip(batches, map_resumable(score, batches, partial, name, "scoring"), strict=True):
        rewards[:, batch] = np.reshape(scored, (2, len(batch)))
    return rewards[0], rewards[1]


# --- the command -------------------------------------------------------------------------------------------------


def run(
    model: str,
    dataset: str | None,
    dataset_config: str | None,
    dataset_split: str,
    batch_size: int,
    max_length: int | None,
    device: str,
    dtype: str,
    out: Path | None,
) -> None:
    """`normbt evaluate`; the arguments are its flags.

    Raises:
        UserError: the model or the data cannot be read, or do not fit together.
    """
    tokenizer = _load_tokenizer(model)
    if dataset is None:
        pairs, dataset = demo_pairs(tokenizer), "embedded generated pairs"
    else:
        pairs = load_preferences(dataset, dataset_config, dataset_split, parse=_parser(tokenizer))
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    rows = tokenize(pairs, tokenizer, limit, "tokenizing")
    if not rows:
        raise UserError(f"all {len(pairs)} pairs are longer than {limit} tokens (--max-length)")
    classifier = _load_classifier(model, tokenizer, dtype).to(device)

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
    """The held-out pairs of the embedded default.

    Raises:
        UserError: the tokenizer is not that of the embedded default.
    """
    if tokenizer.get_vocab() != demo.demo_tokenizer().get_vocab():
        raise UserError("--dataset is required: the embedded pairs are for checkpoints of the embedded default only")
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


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """As RewardBench: a tokenizer without a pad token pads with its end of sequence."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has neither a pad token nor an end-of-sequence token")
    return tokenizer


def _load_classifier(name: str, tokenizer: PreTrainedTokenizerBase, dtype: str) -> nn.Module:
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"]))
        raise UserError(f"{name} is no trained reward model: it does not hold {missing}")
    if model.config.num_labels != 1:
        raise UserError(f"{name} has {model.config.num_labels} labels: a reward model has one")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


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
