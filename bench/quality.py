"""Does NormBT train better reward models? Each loss at its own best learning rate, over seeds, on held-out pairs.

A training run takes a small new model and a built-in data set and uses the real Trainer. A seed draws the weights, the
data order and (generated pairs) the training pairs. It draws the same ones for every loss, so losses can be compared
seed by seed. Each loss takes the learning rate with the best mean accuracy on the validation pairs, from the same grid.
The seeds that choose it are not those that are reported. The report is the accuracy at that rate on the test pairs. No
model trains on validation or test pairs, and the choice does not see the test pairs.

    mixed        fine pairs (one fault) and coarse pairs (much differs): the paper's situation
    fine-only    a control: without coarse pairs there is little for NormBT to mend
    no-clipping  mixed pairs, and the gradient's norm is not limited (Trainer's limit is 1)
    layer-norm   mixed pairs, and a LayerNorm without weights stands before the head: all hidden states have the same
                 norm, so that a distance is an angle

NormBT is compared at several powers of its weight: 1 is the paper, 0 would be BT.

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Report, print_table
from bench.quality_figure import draw, label
from bench.quality_runs import SETTINGS, Run, digest, train_all
from normbt_kernels.commands.arguments import LOSS_NAMES, TrainOptions
from normbt_kernels.data import STDLIB_FAULTS

CONSTANTS = {
    "beta": (0.0, 0.5, 0.9, 0.99),
    "eps": (1e-6, 0.1, 1.0, 10.0),
    "max_weight": (1.0, 2.0, 5.0, 100.0),
}
DEFAULTS = {name: getattr(TrainOptions(), name) for name in CONSTANTS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=("generated", STDLIB_FAULTS), default="generated")
    parser.add_argument("--loss", nargs="+", choices=LOSS_NAMES, default=("bt", "normbt"), help="(default: bt normbt)")
    parser.add_argument("--power", nargs="+", type=float, default=(0.25, 0.5, 0.75, 1.0), help="of NormBT's weight")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=("mixed",), help="(default: mixed)")
    parser.add_argument("--seeds", type=int, help="that are reported (default: 8, --quick: 2)")
    parser.add_argument("--grid-seeds", type=int, help="others that choose a learning rate (default: 4, --quick: 1)")
    parser.add_argument(
        "--learning-rate", nargs="+", type=float, help="grid, or one for all (default: 2.5e-4 5e-4 1e-3)"
    )
    parser.add_argument("--steps", type=int, help="of a run (default: the data set's own, --quick: 40)")
    parser.add_argument("--sensitivity-seeds", type=int, default=0, help="of the sweep (default: 0, no sweep)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s, one per core)")
    parser.add_argument("--runs", type=Path, default=Path("quality-runs"), help="finished runs (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    name = "quality" if options.dataset == "generated" else f"quality-{options.dataset}"
    report = Report(name, options)
    quick = options.quick
    num_seeds = options.seeds or (2 if quick else 8)
    num_grid_seeds = options.grid_seeds or (1 if quick else 4)
    plan = Plan(
        dataset=options.dataset,
        settings=tuple(options.setting),
        contenders=tuple(contenders(options.loss, options.power)),
        learning_rates=tuple(options.learning_rate or ([1e-3] if quick else [2.5e-4, 5e-4, 1e-3])),
        seeds=range(num_grid_seeds, num_grid_seeds + num_seeds),
        grid_seeds=range(num_grid_seeds),
        sweep_seeds=range(options.sensitivity_seeds),
        steps=options.steps or (40 if quick else None),
    )
    pool = ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"))
    try:
        results = Experiment(plan, options.runs, options.device.type == "cpu", pool).results()
    finally:
        pool.shutdown(cancel_futures=True)
    print_settings(results["settings"])
    print_sensitivity(results["sensitivity"]["rows"])
    report.save(results)
    report.save_figure(lambda plt: draw(plt, results))
    return 0


# --- experiment --------------------------------------------------------------------------------------------------


def contenders(losses: Iterable[str], powers: Iterable[float]) -> Iterator[str]:
    """The names of all that is compared: "bt", "normbt^0.5", and "normbt" for the paper's power, which is 1."""
    powers = dict.fromkeys(powers)
    for loss in dict.fromkeys(losses):
        if loss.startswith("normbt"):
            yield from (loss if power == 1 else f"{loss}^{power:g}" for power in powers)
        else:
            yield loss


@dataclass(frozen=True)
class Plan:
    """What is trained."""

    dataset: str
    settings: tuple[str, ...]
    contenders: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: range
    grid_seeds: range
    sweep_seeds: range
    steps: int | None

    def run(self, setting: str, contender: str, learning_rate: float, seed: int) -> Run:
        loss, _, power = contender.partition("^")
        constants = (("power", float(power)),) if power else ()
        return Run(self.dataset, setting, loss, learning_rate, seed, self.steps, constants)


class Experiment:
    """Trains what is missing of a plan, and compares what its models predict."""

    def __init__(self, plan: Plan, runs: Path, use_cpu: bool, pool: ProcessPoolExecutor):
        self.plan, self.use_cpu, self.pool = plan, use_cpu, pool
        self.folder = runs / digest(plan.dataset, plan.steps)
        self.folder.mkdir(parents=True, exist_ok=True)

    def results(self) -> dict[str, Any]:
        """What is reported, as JSON has it."""
        plan = self.plan
        cells = [(setting, contender) for setting in plan.settings for contender in plan.contenders]
        grid = plan.learning_rates if len(plan.learning_rates) > 1 else ()  # one rate needs no choice
        self.train(
            "learning rates",
            (plan.run(*cell, rate, seed) for seed in plan.grid_seeds for cell in cells for rate in grid),
        )
        accuracy = {cell: {rate: self.validation_accuracy(*cell, rate) for rate in grid} for cell in cells}
        rates = {
            cell: max(of, key=lambda rate, of=of: of[rate]["mean"], default=plan.learning_rates[0])
            for cell, of in accuracy.items()
        }
        self.train("seeds", (plan.run(*cell, rates[cell], seed) for seed in plan.seeds for cell in cells))

        def groups(setting: str) -> dict[str, Any]:
            runs = {
                contender: [plan.run(setting, contender, rates[setting, contender], seed) for seed in plan.seeds]
                for contender in plan.contenders
            }
            return compare({contender: [self.predictions(run) for run in of] for contender, of in runs.items()})

        return {
            "dataset": plan.dataset,
            "steps": plan.steps,
            "seeds": len(plan.seeds),
            "seeds_reported": list(plan.seeds),
            "grid": {"learning_rates": list(plan.learning_rates), "seeds": list(plan.grid_seeds) if grid else []},
            "defaults": DEFAULTS,
            "settings": {
                setting: {
                    "learning_rates": {
                        contender: {
                            "validation_accuracy": accuracy[setting, contender],
                            "chosen": rates[setting, contender],
                        }
                        for contender in plan.contenders
                    },
                    "groups": groups(setting),
                }
                for setting in plan.settings
            },
            "sensitivity": {"seeds": len(plan.sweep_seeds), "rows": self.sweep(rates)},
            "runs_finished": self.finished(),
        }

    def train(self, what: str, runs: Iterable[Run]) -> None:
        train_all(list(runs), self.folder, self.use_cpu, self.pool, what)

    def predictions(self, run: Run) -> dict[str, np.ndarray]:
        with np.load(self.folder / run.path) as arrays:
            return dict(arrays)

    def validation_accuracy(self, setting: str, contender: str, learning_rate: float) -> dict[str, Any]:
        runs = (self.plan.run(setting, contender, learning_rate, seed) for seed in self.plan.grid_seeds)
        return mean_interval([float(correct(self.predictions(run), "validation").mean()) for run in runs])

    def sweep(self, rates: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
        """Test accuracy of NormBT with one constant changed, by group; none without seeds, or without NormBT."""
        if not self.plan.sweep_seeds or ("mixed", "normbt") not in rates:
            return []
        standard = self.plan.run("mixed", "normbt", rates["mixed", "normbt"], 0)
        runs = {
            (name, value): [
                replace(standard, seed=seed, constants=((name, value),) if value != DEFAULTS[name] else ())
                for seed in self.plan.sweep_seeds
            ]
            for name, values in CONSTANTS.items()
            for value in values
        }
        self.train("sensitivity", {run: None for of_value in runs.values() for run in of_value})
        return [
            {
                "constant": name,
                "value": value,
                "groups": {
                    group: mean_interval(accuracies)
                    for group, accuracies in group_accuracies([self.predictions(run) for run in of_value]).items()
                },
            }
            for (name, value), of_value in runs.items()
        ]

    def finished(self) -> dict[str, str]:
        """When the first and the last run ended."""
        times = [path.stat().st_mtime for path in self.folder.glob("*.npz")]
        return {
            name: datetime.fromtimestamp(end, UTC).isoformat(timespec="seconds")
            for name, end in (("first", min(times)), ("last", max(times)))
        }


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
    """By group: each loss's accuracies with their interval, and differences paired by seed: to plain BT, of NormBT on
    top of a loss to that loss, and of other powers to NormBT."""
    by_seed = zip(*runs.values(), strict=True)
    mean_ranks = [np.mean([_ranks(run["test_distance"]) for run in of_seed], axis=0) for of_seed in by_seed]
    accuracies = {loss: group_accuracies(of_loss, mean_ranks) for loss, of_loss in runs.items()}
    pairs = [(loss, "bt") for loss in runs if loss != "bt" and "bt" in runs]
    pairs += [(f"norm{loss}", loss) for loss in runs if loss != "bt" and f"norm{loss}" in runs]
    pairs += [(loss, loss.partition("^")[0]) for loss in runs if "^" in loss and loss.partition("^")[0] in runs]
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


# --- terminal -----------------------------------------------------------------------------------------


def print_settings(settings: dict[str, Any]) -> None:
    for setting, of in settings.items():
        rates = {loss: rate["chosen"] for loss, rate in of["learning_rates"].items()}
        print_groups(setting, of["groups"], rates)


def print_groups(title: str, groups: dict[str, Any], rates: dict[str, float]) -> None:
    print(f"\n{title}: accuracy on test pairs, mean over seeds +- half its 95% interval")
    print_table(
        ["loss", "learning rate", *groups],
        [
            [label(loss), f"{rate:g}", *(_plus_minus(group["accuracy"][loss]) for group in groups.values())]
            for loss, rate in rates.items()
        ],
    )
    print(f"\n{title}: difference, paired by seed, and its p-value")
    rows = zip(*(group["difference"] for group in groups.values()), strict=True)
    print_table(
        ["loss", "less", *groups],
        [[label(row[0]["loss"]), label(row[0]["baseline"]), *(_difference(cell) for cell in row)] for row in rows],
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
