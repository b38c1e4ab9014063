"""Does NormBT train better reward models? Each loss at its own best learning rate, over seeds, on held-out pairs.

A training run takes a small new model and a built-in data set and uses the real Trainer. A seed draws the weights, the
data order and (generated pairs) the training pairs. It draws the same ones for every loss, so losses can be compared
seed by seed. Each loss takes the learning rate with the best mean accuracy on the validation pairs, from the same grid.
The report is the accuracy of all seeds at that rate on the test pairs. No model trains on validation or test pairs, and
the choice does not see the test pairs.

    mixed      fine pairs (one fault) and coarse pairs (much differs): the paper's situation
    fine-only  the control: without coarse pairs there is little for NormBT to mend

Thirds by distance go by the mean rank of a pair under all losses' models of the seed, so they are the same pairs for
every loss. (Thirds by the distances of one loss would collect the pairs that this loss has not learned.) Intervals are
95% by Student's t over seeds. The tests are paired over seeds, two-sided, and not corrected for their number. The
sensitivity sweep changes one of NormBT's constants at a time, at NormBT's own learning rate.

Each finished run is kept under --runs in a folder of its own settings; give the same command again to continue.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Report, print_table
from bench.quality_runs import Run, digest, train_all
from normbt_kernels.commands.arguments import LOSS_NAMES, TrainOptions
from normbt_kernels.commands.train_report import COLORS, LABELS
from normbt_kernels.data import STDLIB_FAULTS

SETTINGS = ("mixed", "fine-only")
CONSTANTS = {
    "beta": (0.0, 0.5, 0.9, 0.99),
    "eps": (1e-6, 0.1, 1.0, 10.0),
    "max_weight": (1.0, 2.0, 5.0, 100.0),
}
DEFAULTS = {name: getattr(TrainOptions(), name) for name in CONSTANTS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=("generated", STDLIB_FAULTS), default="generated")
    parser.add_argument("--loss", nargs="+", choices=LOSS_NAMES, default=LOSS_NAMES, help="(default: all)")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=SETTINGS, help="(default: both)")
    parser.add_argument("--seeds", type=int, help="(default: 8, --quick: 2)")
    parser.add_argument("--grid-seeds", type=int, help="seeds that choose a learning rate (default: 2, --quick: 1)")
    parser.add_argument("--learning-rate", nargs="+", type=float, help="grid (default: 1.25e-4 2.5e-4 5e-4 1e-3 2e-3)")
    parser.add_argument("--steps", type=int, help="of a run (default: the data set's own, --quick: 40)")
    parser.add_argument("--sensitivity-seeds", type=int, help="0 for no sweep (default: 4, --quick: 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s, one per core)")
    parser.add_argument("--runs", type=Path, default=Path("quality-runs"), help="finished runs (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    options.loss = list(dict.fromkeys(options.loss))
    name = "quality" if options.dataset == "generated" else f"quality-{options.dataset}"
    report = Report(name, options)
    quick = options.quick
    seeds = range(options.seeds or (2 if quick else 8))
    grid_seeds = range(min(options.grid_seeds or (1 if quick else 2), len(seeds)))
    grid = options.learning_rate or ([1e-3] if quick else [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3])
    steps = options.steps or (40 if quick else None)
    sweep_seeds = range((0 if quick else 4) if options.sensitivity_seeds is None else options.sensitivity_seeds)
    pool = ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"))
    try:
        settings, sensitivity, finished = experiment(options, seeds, grid, grid_seeds, sweep_seeds, steps, pool)
    finally:
        pool.shutdown(cancel_futures=True)
    print_settings(settings)
    print_sensitivity(sensitivity)
    results = {
        "dataset": options.dataset,
        "steps": steps,
        "runs_finished": finished,
        "seeds": len(seeds),
        "grid": {"learning_rates": list(grid), "seeds": len(grid_seeds)},
        "defaults": DEFAULTS,
        "settings": settings,
        "sensitivity": {"seeds": len(sweep_seeds), "rows": sensitivity},
    }
    report.save(results)
    report.save_figure(lambda plt: draw(plt, results))
    return 0


def experiment(
    options: argparse.Namespace,
    seeds: range,
    grid: Sequence[float],
    grid_seeds: range,
    sweep_seeds: range,
    steps: int | None,
    pool: ProcessPoolExecutor,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    """Trains all that is missing; the comparison of the losses in each setting, the rows of the sweep, and when the
    first and the last run were finished."""
    folder = options.runs / digest(options.dataset, steps)
    folder.mkdir(parents=True, exist_ok=True)

    def train(runs: Iterable[Run], what: str) -> None:
        train_all(list(runs), folder, options.device.type == "cpu", pool, what)

    def predictions(run: Run) -> dict[str, np.ndarray]:
        with np.load(folder / run.path) as arrays:
            return dict(arrays)

    cells = [(setting, loss) for setting in options.setting for loss in options.loss]

    def cell_run(cell: tuple[str, str], learning_rate: float, seed: int) -> Run:
        return Run(options.dataset, *cell, learning_rate, seed, steps)

    train((cell_run(cell, rate, seed) for cell in cells for rate in grid for seed in grid_seeds), "learning rates")

    def validation_accuracy(cell: tuple[str, str], learning_rate: float) -> dict[str, Any]:
        runs = (predictions(cell_run(cell, learning_rate, seed)) for seed in grid_seeds)
        return mean_interval([float(correct(run, "validation").mean()) for run in runs])

    validation = {cell: {rate: validation_accuracy(cell, rate) for rate in grid} for cell in cells}
    best = {cell: max(grid, key=lambda rate, cell=cell: validation[cell][rate]["mean"]) for cell in cells}
    train((cell_run(cell, best[cell], seed) for cell in cells for seed in seeds), "seeds")

    settings = {}
    for setting in options.setting:
        runs = {
            loss: [predictions(cell_run((setting, loss), best[setting, loss], seed)) for seed in seeds]
            for loss in options.loss
        }
        settings[setting] = {
            "learning_rates": {
                loss: {"validation_accuracy": validation[setting, loss], "chosen": best[setting, loss]}
                for loss in options.loss
            },
            "groups": compare(runs),
        }

    sensitivity = []
    if sweep_seeds and ("mixed", "normbt") in cells:
        standard = cell_run(("mixed", "normbt"), best["mixed", "normbt"], 0)
        variants = [
            (name, value, ((name, value),) if value != DEFAULTS[name] else ())
            for name, values in CONSTANTS.items()
            for value in values
        ]
        swept = {
            (name, value): [replace(standard, seed=seed, constants=constants) for seed in sweep_seeds]
            for name, value, constants in variants
        }
        train({run: None for runs in swept.values() for run in runs}, "sensitivity")
        for (constant, value), runs in swept.items():
            groups = group_accuracies([predictions(run) for run in runs])
            sensitivity.append(
                {"constant": constant, "value": value, "groups": {key: mean_interval(of) for key, of in groups.items()}}
            )
    times = sorted(path.stat().st_mtime for path in folder.glob("*.npz"))
    ends = {"first": times[0], "last": times[-1]}
    finished = {
        name: datetime.fromtimestamp(end, timezone.utc).isoformat(timespec="seconds") for name, end in ends.items()
    }
    return settings, sensitivity, finished


# --- comparison --------------------------------------------------------------------------------------------------


def correct(arrays: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Which pairs of a run are right, strictly."""
    return arrays[f"{split}_chosen"] > arrays[f"{split}_rejected"]


def group_accuracies(
    runs: Sequence[dict[str, np.ndarray]], distances: Sequence[np.ndarray] = ()
) -> dict[str, list[float]]:
    """Test accuracy of each run, by group of pairs: all, each category, thirds by `distances`, an array each."""
    groups: dict[str, list[float]] = {"all": [float(correct(run, "test").mean()) for run in runs]}
    for category in np.unique(runs[0]["test_category"]):
        groups[str(category)] = [float(correct(run, "test")[run["test_category"] == category].mean()) for run in runs]
    for run, distance in zip(runs, distances, strict=bool(distances)):
        order = np.argsort(distance, kind="stable")
        for third, members in zip(("closest", "middle", "farthest"), np.array_split(order, 3), strict=True):
            groups.setdefault(f"{third} third", []).append(float(correct(run, "test")[members].mean()))
    if len(np.unique(runs[0]["test_category"])) == 1:
        del groups[str(runs[0]["test_category"][0])]  # it is all pairs
    return groups


def compare(runs: dict[str, Sequence[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """By group: each loss's accuracies with their interval, and differences paired by seed: to plain BT, and of NormBT
    on top of a loss to that loss."""
    by_seed = zip(*runs.values(), strict=True)
    mean_ranks = [np.mean([_ranks(run["test_distance"]) for run in of_seed], axis=0) for of_seed in by_seed]
    accuracies = {loss: group_accuracies(of_loss, mean_ranks) for loss, of_loss in runs.items()}
    pairs = [(loss, "bt") for loss in runs if loss != "bt" and "bt" in runs]
    pairs += [(f"norm{loss}", loss) for loss in runs if loss != "bt" and f"norm{loss}" in runs]
    groups: dict[str, Any] = {}
    for group in next(iter(accuracies.values())):
        of_loss = {loss: accuracies[loss][group] for loss in runs}
        groups[group] = {
            "accuracy": {loss: mean_interval(of_loss[loss]) | {"seeds": of_loss[loss]} for loss in runs},
            "difference": [
                {"loss": loss, "baseline": baseline} | paired(of_loss[loss], of_loss[baseline])
                for loss, baseline in pairs
            ],
        }
    return groups


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"))


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and its 95% interval by Student's t; null for one value, which has no spread."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "interval_95": None}
    from scipy import stats

    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return {"mean": mean, "interval_95": [mean - float(half), mean + float(half)]}


def paired(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Mean of the differences seed by seed, its interval, and the p-value of a paired t test (null: all are equal)."""
    from scipy import stats

    differences = np.subtract(values, baseline)
    p_value = float(stats.ttest_rel(values, baseline).pvalue) if np.ptp(differences) > 0 else None
    return mean_interval(differences) | {"p_value": p_value}


# --- terminal and figure -----------------------------------------------------------------------------------------


def print_settings(settings: dict[str, Any]) -> None:
    for setting, of in settings.items():
        losses = list(of["learning_rates"])
        print(f"\n{setting}: accuracy on test pairs, mean over seeds +- half its 95% interval")
        print_table(
            ["loss", "learning rate", *of["groups"]],
            [
                [LABELS[loss], f"{of['learning_rates'][loss]['chosen']:g}",
                 *(_plus_minus(group["accuracy"][loss]) for group in of["groups"].values())]
                for loss in losses
            ],
        )  # fmt: skip
        print(f"\n{setting}: difference, paired by seed, and its p-value")
        rows = zip(*(group["difference"] for group in of["groups"].values()), strict=True)
        print_table(
            ["loss", "less", *of["groups"]],
            [
                [LABELS[row[0]["loss"]], LABELS[row[0]["baseline"]], *(_difference(cell) for cell in row)]
                for row in rows
            ],
        )


def print_sensitivity(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    print("\nNormBT with one constant changed: accuracy on test pairs")
    print_table(
        ["constant", "value", *rows[0]["groups"]],
        [[row["constant"], f"{row['value']:g}", *map(_plus_minus, row["groups"].values())] for row in rows],
    )


def _plus_minus(value: dict[str, Any]) -> str:
    if value["interval_95"] is None:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} +-{(value['interval_95'][1] - value['mean']):.3f}"


def _difference(value: dict[str, Any]) -> str:
    p_value = "" if value["p_value"] is None else f" p={value['p_value']:.3f}"
    return f"{value['mean']:+.3f}{p_value}"


def draw(plt: Any, results: dict[str, Any]) -> Any:
    """A row of panels for each setting, one panel per group: mean and interval of each loss. Below, what learning rates
    and NormBT's constants do."""
    settings, sweep = results["settings"], results["sensitivity"]["rows"]
    num_columns = max(
        len(settings) + (len(CONSTANTS) if sweep else 0), *(len(of["groups"]) for of in settings.values())
    )
    num_rows = len(settings) + 1
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(2.6 * num_columns + 1, 2.9 * num_rows), squeeze=False, layout="constrained"
    )
    for row, (setting, of) in zip(axes, settings.items(), strict=False):
        losses = list(of["learning_rates"])[::-1]  # so that the first is on top
        for axis, (group, values) in zip(row, of["groups"].items(), strict=False):
            for height, loss in enumerate(losses):
                value = values["accuracy"][loss]
                low, high = value["interval_95"] or (value["mean"], value["mean"])
                axis.plot([low, high], [height, height], color=COLORS[loss], linewidth=2)
                axis.plot(value["mean"], height, "o", color=COLORS[loss])
                axis.plot(value["seeds"], [height] * len(value["seeds"]), "|", color=COLORS[loss], alpha=0.5)
            axis.set_yticks(range(len(losses)), [LABELS[loss] for loss in losses] if axis is row[0] else [])
            axis.set_title(group, fontsize=10)
        row[0].set_ylabel(setting)
        row[0].set_xlabel("test accuracy: mean, 95% interval, seeds", fontsize=8)
    for axis, (setting, of) in zip(axes[-1], settings.items(), strict=False):
        for loss, rates in of["learning_rates"].items():
            values = {float(rate): accuracy["mean"] for rate, accuracy in rates["validation_accuracy"].items()}
            axis.semilogx(list(values), list(values.values()), "o-", color=COLORS[loss], markersize=3)
        axis.set_xticks(list(values), [f"{rate * 1e4:g}" for rate in values])
        axis.minorticks_off()
        axis.set(xlabel="learning rate, 1e-4", ylabel="validation accuracy")
        axis.set_title(f"{setting}, each rate", fontsize=10)
    for axis, constant in zip(axes[-1][len(settings) :], CONSTANTS if sweep else (), strict=False):
        rows = [row for row in sweep if row["constant"] == constant]
        for group in rows[0]["groups"]:
            means = [row["groups"][group]["mean"] for row in rows]
            ends = [row["groups"][group]["interval_95"] or (mean, mean) for row, mean in zip(rows, means, strict=True)]
            places = range(len(rows))
            axis.plot(places, means, "o-", label=group)
            axis.fill_between(places, *zip(*ends, strict=True), alpha=0.15)
        axis.set_xticks(places, [f"{row['value']:g}" for row in rows])
        axis.set(xlabel=f"NormBT's {constant}", ylabel="test accuracy")
    if sweep:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes.flat:
        if not axis.has_data():
            axis.remove()
    figure.suptitle(
        f"{results['dataset']} pairs, {results['seeds']} seeds, each loss at its own learning rate", fontsize=11
    )
    return figure
