"""The comparison of the losses: accuracy by group on the terminal, everything in results.json, a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from normbt_kernels._version import versions
from normbt_kernels.results import aligned, write_results

RESULTS_NAME = "results.json"
LABELS = {
    "bt": "BT",
    "bt-margin": "BT with margin",
    "bt-margin-out": "BT with margin outside",
    "bt-smoothing": "BT with label smoothing",
    "normbt": "NormBT",
    "normbt-margin": "NormBT with margin",
    "normbt-margin-out": "NormBT with margin outside",
    "normbt-smoothing": "NormBT with label smoothing",
}
COLORS = {
    "bt": "#9a9a9a",
    "bt-margin": "#c9a66b",
    "bt-margin-out": "#a0522d",
    "bt-smoothing": "#d3c4b4",
    "normbt": "#1f6fb4",
    "normbt-margin": "#5ab4c9",
    "normbt-margin-out": "#1b9e77",
    "normbt-smoothing": "#9ecae1",
}


@dataclass(frozen=True)
class Trained:
    """One trained model on the held-out pairs: fp32 arrays `(P,)`, Trainer's metrics and log, seconds to train."""

    chosen_rewards: np.ndarray
    rejected_rewards: np.ndarray
    distance: np.ndarray
    metrics: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    learning_rate: float
    seed: int

    @property
    def correct(self) -> np.ndarray:
        return self.chosen_rewards > self.rejected_rewards


def label(column: str) -> str:
    """The name of a column: its loss, and its learning rate if there are several."""
    loss, _, rate = column.partition(" ")
    return f"{LABELS[loss]} {rate}".strip()


def _look(column: str, columns: Sequence[str]) -> dict[str, Any]:
    """How a column is drawn: the colour tells its loss, and the strength of the colour its learning rate."""
    loss, _, rate = column.partition(" ")
    rates = list(dict.fromkeys(name.partition(" ")[2] for name in columns))
    return {"color": COLORS[loss], "alpha": 1 - 0.65 * rates.index(rate) / len(rates), "label": label(column)}


# --- figures -----------------------------------------------------------------------------------------------------


def compare(
    columns: dict[str, list[Trained]], rows: Sequence[dict[str, Any]], model: str, dataset: str, args: TrainingArguments
) -> dict[str, Any]:
    """The content of results.json. Each column has one trained model per seed. The thirds by distance are those of the
    first model, so that all columns are compared on the same pairs."""
    reference = next(iter(columns))
    groups = _groups(rows, columns[reference][0].distance)
    seeds = [trained.seed for trained in columns[reference]]
    against = {column: _baseline(column, columns) for column in columns}
    return {
        "versions": versions(),
        "model": model,
        "dataset": dataset,
        "device": str(args.device),
        "seed": args.seed,
        "seeds": seeds,
        "num_eval_pairs": len(rows),
        "distance_reference": reference,
        "intervals_are": f"95%, over {'seeds' if len(seeds) > 1 else 'held-out pairs'}",
        "groups": [
            {"kind": kind, "name": name, "num_pairs": int(members.sum())} | _figures(columns, against, members)
            for kind, name, members in groups
        ],
        "losses": {column: _history(trained) for column, trained in columns.items()},
        "training_arguments": args.to_dict(),
    }


def _history(trained: list[Trained]) -> dict[str, Any]:
    runs = [{"seconds": run.seconds, "metrics": run.metrics, "history": run.history} for run in trained]
    return runs[0] if len(runs) == 1 else runs[0] | {"runs": runs}


def _baseline(column: str, columns: dict[str, list[Trained]]) -> str | None:
    """The first column with the same learning rate; None if that is `column` itself."""
    rate = columns[column][0].learning_rate
    first = next(name for name, trained in columns.items() if trained[0].learning_rate == rate)
    return None if first == column else first


def _figures(columns: dict[str, list[Trained]], against: dict[str, str | None], members: np.ndarray) -> dict[str, Any]:
    """Accuracy of one group of pairs by column, and the paired difference from the column's baseline."""
    correct = {name: np.array([run.correct[members] for run in runs]) for name, runs in columns.items()}  # (seeds, P)
    differences = {}
    for name, first in against.items():
        if first is not None:
            difference = correct[name].astype(float) - correct[first]
            mean, interval = _mean_and_interval(difference)
            differences[name] = {
                "from": first,
                "mean": mean,
                "interval": interval,
                "disagree": float((difference != 0).sum(1).mean()),
                "right_where_they_disagree": float((difference > 0).sum(1).mean()),
            }
    figures = {name: _mean_and_interval(of_column) for name, of_column in correct.items()}
    return {
        "accuracy": {name: mean for name, (mean, _) in figures.items()},
        "interval": {name: interval for name, (_, interval) in figures.items()},
        "difference": differences,
    }


def _mean_and_interval(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of `(seeds, P)` and half its 95% interval: over the seeds, or over the pairs where there is one seed."""
    sample = values.mean(1) if len(values) > 1 else values[0].astype(float)
    if len(sample) < 2:
        return float(sample.mean()), None
    return float(sample.mean()), float(_t_quantile(len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))


def _t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t, from a table up to 10 degrees of freedom and to 0.02 beyond."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.6 / freedom


def _groups(rows: Sequence[dict[str, Any]], distance: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """(kind, name, which pairs) of all pairs, of each category, and of each third by distance."""
    groups = [("", "all", np.ones(len(rows), dtype=bool))]
    if "category" in rows[0]:
        categories = np.array([row["category"] for row in rows])
        groups += [("category", str(name), categories == name) for name in np.unique(categories)]
    low, high = np.quantile(distance, [1 / 3, 2 / 3])
    thirds = (distance <= low, (distance > low) & (distance <= high), distance > high)
    names = (f"closest third, up to {low:.2f}", "middle third", f"farthest third, over {high:.2f}")
    groups += [("distance", name, members) for name, members in zip(names, thirds, strict=True)]
    return [group for group in groups if group[2].any()]  # ties in distance can leave a third empty


# --- terminal ----------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Held-out accuracy by group, one column per loss; then each one's difference from the first, pair by pair."""
    groups, columns = results["groups"], list(results["losses"])
    names = [f"{heading:10}{group['name']}" for heading, group in zip(_headings(groups), groups, strict=True)]
    rows = [["held-out accuracy", "pairs", *map(label, columns)]]
    for name, group in zip(names, groups, strict=True):
        accuracies = (_rounded(group["accuracy"][column], group["num_pairs"]) for column in columns)
        rows.append([name, str(group["num_pairs"]), *accuracies])
    lines = ["", *aligned(rows)]
    for column, difference in groups[0]["difference"].items():
        title = f"{label(column)} - {label(difference['from'])}"
        rows = [[title, "pairs", "difference", "disagree", "right there"]]
        rows += [[name, *_difference(group, column)] for name, group in zip(names, groups, strict=True)]
        lines += ["", *aligned(rows)]
    seeds = results["seeds"]
    lines += [
        "",
        f"Distance: ||h_chosen - h_rejected|| in the {label(results['distance_reference'])} model, for every column.",
        f"Differences are of the same pairs; +- is an interval of {results['intervals_are']}.",
        f"One seed ({seeds[0]}): another seed gives other numbers. Repeat with --seeds 5 before you conclude."
        if len(seeds) == 1
        else f"Means over {len(seeds)} seeds, {seeds[0]} to {seeds[-1]}.",
    ]
    return "\n".join(lines)


def _headings(groups: Sequence[dict[str, Any]]) -> list[str]:
    """The kind of each group, or nothing if the group before is of the same kind."""
    kinds = [group["kind"] for group in groups]
    return ["" if kind == previous else kind for previous, kind in zip(["", *kinds], kinds, strict=False)]


def _difference(group: dict[str, Any], column: str) -> list[str]:
    difference, pairs = group["difference"][column], group["num_pairs"]
    text = _rounded(difference["mean"], pairs, sign=True)
    if difference["interval"] is not None:
        text += f" +- {_rounded(difference['interval'], pairs)}"
    return [str(pairs), text, f"{difference['disagree']:.0f}", f"{difference['right_where_they_disagree']:.0f}"]


def _rounded(share: float, num_pairs: int, sign: bool = False) -> str:
    """A share of `num_pairs` with no more decimals than they can tell apart."""
    decimals = 3 if num_pairs >= 100 else 2 if num_pairs >= 10 else 1
    return f"{share:+.{decimals}f}" if sign else f"{share:.{decimals}f}"


# --- files -------------------------------------------------------------------------------------------------------


def write(results: dict[str, Any], output_dir: Path) -> None:
    """Writes results.json and, with matplotlib, results.png beside it."""
    write_results(output_dir / RESULTS_NAME, _plain(results), lambda path: draw(results, path))


def _plain(value: Any) -> Any:
    """`value` in plain JSON types: no numpy numbers, and null for a number that is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def draw(results: dict[str, Any], path: Path) -> None:
    """Training loss, held-out accuracy over the steps (where it was evaluated), accuracy by group, and each loss's
    difference from the first one, with intervals."""
    from matplotlib.figure import Figure

    columns, groups = list(results["losses"]), results["groups"][::-1]  # reversed: the first group is then on top
    histories = {column: results["losses"][column]["history"] for column in columns}
    curves = [
        ("bt_loss", "Bradley-Terry loss, unweighted", "training pairs"),
        ("eval_accuracy", "accuracy", "held-out pairs"),
    ]
    curves = [curve for curve in curves if all(any(curve[0] in entry for entry in log) for log in histories.values())]
    compared = list(groups[0]["difference"])
    height = max(4.2, 1.2 + len(groups) * max(0.28, 0.16 * len(columns)))
    figure = Figure(figsize=(4.2 * len(curves) + 7 + 4 * bool(compared), height), layout="constrained")
    width_ratios = [1] * len(curves) + [1.5] + [1] * bool(compared)
    (axes,) = figure.subplots(1, len(width_ratios), width_ratios=width_ratios, squeeze=False)
    for axis, (key, text, title) in zip(axes, curves, strict=False):
        for column in columns:
            points = [(entry["step"], entry[key]) for entry in histories[column] if key in entry]
            axis.plot(*zip(*points, strict=True), **_look(column, columns), linewidth=2)
        axis.set(xlabel="step", ylabel=text, title=f"{title}, seed {results['seed']}")

    bars = axes[len(curves)]
    thickness = 0.8 / len(columns)
    for i, column in enumerate(columns):
        centres = np.arange(len(groups)) + (len(columns) - 1 - 2 * i) * thickness / 2
        shares = np.array([group["accuracy"][column] for group in groups])
        drawn = bars.barh(centres, shares - 0.5, thickness, left=0.5, **_look(column, columns))
        bars.bar_label(drawn, [_rounded(g["accuracy"][column], g["num_pairs"]) for g in groups], padding=3, fontsize=7)
    bars.set_yticks(range(len(groups)), [f"{group['name']} ({group['num_pairs']})" for group in groups], fontsize=8)
    lowest = min(value for group in groups for value in group["accuracy"].values())
    bars.set(xlim=(min(0.45, lowest - 0.1), 1.08), ylim=(-0.6, len(groups) - 0.4), xlabel="accuracy (0.5 is guessing)")
    bars.set_title("held-out pairs")

    if compared:
        differences = axes[-1]
        for i, column in enumerate(compared):
            centres = np.arange(len(groups)) + (len(compared) - 1 - 2 * i) * 0.4 / len(compared)
            means = [group["difference"][column]["mean"] for group in groups]
            halves = [group["difference"][column]["interval"] or 0.0 for group in groups]
            differences.errorbar(means, centres, xerr=halves, fmt="o", markersize=4, **_look(column, columns))
        differences.axvline(0, color="#444444", linewidth=0.8)
        differences.set_yticks(range(len(groups)), [])
        differences.set(ylim=(-0.6, len(groups) - 0.4), xlabel=f"difference, {results['intervals_are']}")
        differences.set_title(f"less {label(groups[0]['difference'][compared[0]]['from'])}, same pairs")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *bars.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(columns)), frameon=False
    )
    figure.savefig(path, dpi=150, format="png")
