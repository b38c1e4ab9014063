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
from normbt_kernels.files import write_json, write_whole

RESULTS_NAME = "results.json"
FIGURE_NAME = "results.png"
LABELS = {
    "bt": "BT",
    "bt-margin": "BT margin",
    "bt-margin-out": "BT margin-out",
    "bt-smoothing": "BT smoothing",
    "normbt": "NormBT",
    "normbt-margin": "NormBT margin",
    "normbt-margin-out": "NormBT margin-out",
    "normbt-smoothing": "NormBT smoothing",
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

    @property
    def correct(self) -> np.ndarray:
        return self.chosen_rewards > self.rejected_rewards


def compare(
    trained: dict[str, Trained], rows: Sequence[dict[str, Any]], model: str, dataset: str, args: TrainingArguments
) -> dict[str, Any]:
    """The content of results.json. The thirds go by the distances under the first model: the same pairs for all."""
    reference = next(iter(trained))
    groups = _groups(rows, trained[reference].distance)
    return {
        "versions": versions(),
        "model": model,
        "dataset": dataset,
        "device": str(args.device),
        "seed": args.seed,
        "num_eval_pairs": len(rows),
        "distance_reference": reference,
        "groups": [
            {
                "kind": kind,
                "name": name,
                "num_pairs": int(members.sum()),
                "accuracy": {loss: float(result.correct[members].mean()) for loss, result in trained.items()},
            }
            for kind, name, members in groups
        ],
        "losses": {
            loss: {"seconds": result.seconds, "metrics": result.metrics, "history": result.history}
            for loss, result in trained.items()
        },
        "training_arguments": args.to_dict(),
    }


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
    """Held-out accuracy by group, one column per loss."""
    losses = list(results["losses"])
    columns = {loss: max(9, len(LABELS[loss]) + 2) for loss in losses}
    width = max(len(group["name"]) for group in results["groups"]) + 12
    header = "".join(f"{LABELS[loss]:>{column}}" for loss, column in columns.items())
    lines = ["", f"{'held-out accuracy':{width}}{'pairs':>7}{header}"]
    previous = ""
    for group in results["groups"]:
        kind = group["kind"] if group["kind"] != previous else ""
        previous = group["kind"]
        accuracies = "".join(f"{group['accuracy'][loss]:{column}.3f}" for loss, column in columns.items())
        lines.append(f"{kind:10}{group['name']:{width - 10}}{group['num_pairs']:7}{accuracies}")
    lines += [
        "",
        f"Distance: ||h_chosen - h_rejected|| in the {LABELS[results['distance_reference']]} model, for every column.",
        f"One seed ({results['seed']}): another seed gives other numbers. Repeat with --seed before you conclude.",
    ]
    return "\n".join(lines)


# --- files -------------------------------------------------------------------------------------------------------


def write(results: dict[str, Any], output_dir: Path) -> list[Path]:
    """Writes results.json and, with matplotlib, results.png; each appears whole or not at all."""
    written = []
    figure = output_dir / FIGURE_NAME
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib (pip install 'normbt-kernels[plot]')")
    else:
        matplotlib.use("Agg")
        write_whole(figure, lambda path: draw(results, path))
        written.append(figure)
    path = output_dir / RESULTS_NAME
    write_json(path, _plain(results))
    return [*written, path]


def _plain(value: Any) -> Any:
    """As JSON has it: no numpy numbers, and null for a number that is not finite."""
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
    """Training loss, held-out accuracy over the steps (where it was evaluated), and accuracy by group."""
    import matplotlib.pyplot as plt

    losses = list(results["losses"])
    histories = {loss: results["losses"][loss]["history"] for loss in losses}
    curves = [
        ("bt_loss", "Bradley-Terry loss, unweighted", "training pairs"),
        ("eval_accuracy", "accuracy", "held-out pairs"),
    ]
    curves = [curve for curve in curves if all(any(curve[0] in entry for entry in log) for log in histories.values())]
    figure, (axes,) = plt.subplots(
        1,
        len(curves) + 1,
        figsize=(4.2 * (len(curves) + 1) + 1.5, 4.2),
        width_ratios=[1] * len(curves) + [1.5],
        layout="constrained",
        squeeze=False,
    )
    for axis, (key, label, title) in zip(axes, curves, strict=False):
        for loss in losses:
            points = [(entry["step"], entry[key]) for entry in histories[loss] if key in entry]
            axis.plot(*zip(*points, strict=True), color=COLORS[loss], label=LABELS[loss], linewidth=2)
        axis.set(xlabel="step", ylabel=label, title=title)
        axis.legend(frameon=False)

    bars, groups = axes[-1], results["groups"][::-1]  # so that the first group is on top
    height = 0.8 / len(losses)
    for i, loss in enumerate(losses):
        centres = np.arange(len(groups)) + (len(losses) - 1 - 2 * i) * height / 2
        above_chance = [group["accuracy"][loss] - 0.5 for group in groups]
        drawn = bars.barh(centres, above_chance, height, left=0.5, color=COLORS[loss])
        labels = [f"{group['accuracy'][loss]:.3f}" for group in groups]
        bars.bar_label(drawn, labels, padding=3, fontsize=8)
    bars.set_yticks(range(len(groups)), [group["name"] for group in groups])
    lowest = min(value for group in groups for value in group["accuracy"].values())
    bars.set(xlim=(min(0.45, lowest - 0.1), 1.08), xlabel="accuracy (0.5 is guessing)")
    bars.set_title(f"held-out pairs, seed {results['seed']}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
