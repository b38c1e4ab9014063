"""Compares each goal with what was measured: python -m bench.goals DIR

Reads every speed.json, memory.json, train-step.json and graph-step.json under DIR (bench/gpu_check.sh puts them there),
prints one row for each goal, and writes them to DIR/goals.json. A ratio compares contenders of one file, which took
turns in one run; a share compares with the copy of the same case. If there is no figure, or only one of a CPU, the row
says "not measured". Times are medians: by the device's clock for large sizes, by the wall's for small ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import print_table
from normbt_kernels.files import write_json

NOT_MEASURED = "not measured"
PAIRS = 65536
HIDDEN = 4096
SMALL_PAIRS, SMALL_HIDDEN = (8, 256), (2048, 8192)  # from, to


class Found(NamedTuple):
    """A measured figure, and a note about it."""

    value: float
    note: str = ""


class Goal(NamedTuple):
    what: str
    goal: str
    measured: Callable[[Results], Found | None]
    reached: Callable[[float], bool]
    unit: str  # "x" of a ratio, "%" of a share


class Results(NamedTuple):
    """The results of one GPU, by the benchmark that made them, in the order of their paths."""

    device: str | None
    files: dict[str, list[dict[str, Any]]]  # {"speed": [content of a speed.json, ...], ...}
    left_out: list[str]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """
        Raises:
            ValueError: the results are of more than one GPU.
        """
        files: dict[str, list[dict[str, Any]]] = {"speed": [], "memory": [], "train-step": [], "graph-step": []}
        devices, left_out = set(), []
        for path in sorted(folder.rglob("*.json")):
            if path.stem not in files:
                continue
            content = json.loads(path.read_text())
            device = content["environment"]["device"]
            if device["type"] != "cuda":
                left_out.append(f"{path.relative_to(folder)}: measured on {device['name']}, which is no GPU")
                continue
            devices.add(device["name"])
            files[path.stem].append(content)
        if len(devices) > 1:
            raise ValueError(f"{folder} holds results of several GPUs: {', '.join(sorted(devices))}")
        return cls(next(iter(devices), None), files, left_out)

    def speed(self, *contenders: str, **shape: Any) -> Iterator[dict[str, dict[str, Any]]]:
        """Rows by contender of each case of this shape for which one file has all `contenders`, on both clocks."""
        for content in self.files["speed"]:
            cases: dict[tuple, dict[str, dict[str, Any]]] = {}
            for row in content["rows"]:
                if all(row[name] == value for name, value in shape.items()):
                    size = row["num_pairs"], row["hidden_size"], row["sequence_length"]
                    cases.setdefault(size, {})[row["contender"]] = row
            for rows in cases.values():
                if all(name in rows and rows[name]["wall"] and rows[name]["device"] for name in contenders):
                    yield rows


def median(row: dict[str, Any], clock: str) -> float:
    return row[clock]["both"]["median_us"]


def large(entry: str, hidden_size: int = HIDDEN) -> dict[str, Any]:
    return {"entry": entry, "num_pairs": PAIRS, "hidden_size": hidden_size, "dtype": "bfloat16"}


# --- figures -------------------------------------------------------------------------------------------------------


def share_of_copy(shape: dict[str, Any]) -> Callable[[Results], Found | None]:
    def measured(results: Results) -> Found | None:
        rows = next(results.speed("ours", "copy", **shape), None)
        return None if rows is None else Found(rows["ours"]["share_of_copy"]["both"])

    return measured


def times_over_ours(rival: str, shape: dict[str, Any]) -> Callable[[Results], Found | None]:
    def measured(results: Results) -> Found | None:
        rows = next(results.speed("ours", rival, **shape), None)
        return None if rows is None else Found(median(rows[rival], "device") / median(rows["ours"], "device"))

    return measured


def small(figures: dict[tuple[int, int], float]) -> Found | None:
    """The worst of the small sizes, if both ends of both ranges were measured."""
    figures = {
        (p, h): figure
        for (p, h), figure in figures.items()
        if SMALL_PAIRS[0] <= p <= SMALL_PAIRS[1] and SMALL_HIDDEN[0] <= h <= SMALL_HIDDEN[1]
    }
    if not all((p, h) in figures for p in SMALL_PAIRS for h in SMALL_HIDDEN):
        return None
    worst = max(figures, key=figures.get)
    return Found(figures[worst], f"at P={worst[0]}, H={worst[1]}, the worst of {len(figures)} sizes")


def small_calls(rival: str) -> Callable[[Results], Found | None]:
    def measured(results: Results) -> Found | None:
        cases = results.speed("ours", rival, entry="linear", dtype="bfloat16")
        return small({
            (rows["ours"]["num_pairs"], rows["ours"]["hidden_size"]):
            median(rows["ours"], "wall") / median(rows[rival], "wall")
            for rows in cases
        })  # fmt: skip

    return measured


def small_graphs(results: Results) -> Found | None:
    return small({
        (row["num_pairs"], row["hidden_size"]): row["step"]["median_us"] / row["empty"]["median_us"]
        for content in results.files["graph-step"] for row in content["rows"]
    })  # fmt: skip


def memory(results: Results) -> Found | None:
    case = f"linear P={PAIRS} H={HIDDEN} bfloat16"
    rows = [row for content in results.files["memory"] for row in content["rows"] if row["case"] == case]
    ours = next((row for row in rows if row["contender"] == "ours" and row["error"] is None), None)
    return None if ours is None else Found(ours["peak_beyond_gradients_bytes"] / ours["input_bytes"])


def training_step(smallest: float, largest: float) -> Callable[[Results], Found | None]:
    """The overhead over plain BT, of a model in bf16 whose number of parameters is in [smallest, largest)."""

    def measured(results: Results) -> Found | None:
        for content in results.files["train-step"]:
            settings, rows = content["settings"], {row["contender"]: row for row in content["rows"]}
            low, high = rows["bt-again"]["interval_95_percent"]
            if smallest <= settings["parameters"] < largest and settings["dtype"] == "bfloat16":
                note = "" if low <= 0 <= high else f"; not to be trusted: plain BT again, {low:+.2f}% to {high:+.2f}%"
                interval = "{:+.2f}% to {:+.2f}%".format(*rows["ours"]["interval_95_percent"])
                return Found(rows["ours"]["overhead_percent"] / 100, f"95%: {interval}{note}")
        return None

    return measured


def share_beside_that_at_4096(hidden_size: int) -> Callable[[Results], Found | None]:
    def measured(results: Results) -> Found | None:
        for content in results.files["speed"]:
            of_file = results._replace(files={"speed": [content]})
            own, base = (share_of_copy(large("linear", h))(of_file) for h in (hidden_size, HIDDEN))
            if own and base:
                return Found(own.value / base.value, f"{own.value:.1%} beside {base.value:.1%}")
        return None

    return measured


def at_least(bound: float) -> Callable[[float], bool]:
    return lambda value: value >= bound


def at_most(bound: float) -> Callable[[float], bool]:
    return lambda value: value <= bound


def within(bound: float) -> Callable[[float], bool]:
    return lambda value: abs(value) <= bound


LINEAR, FROZEN, REWARD = large("linear"), large("frozen"), large("reward")
HF_WAY = {"entry": "pooled", "num_pairs": 32, "sequence_length": 1024, "hidden_size": HIDDEN, "dtype": "bfloat16"}
CALLS, GRAPH = "P=8..256, H=2048..8192, wall time of the call", "P=8..256, H=2048..8192, one CUDA graph"

GOALS = (
    Goal("linear, P=65536, H=4096", ">= 90% of the copy", share_of_copy(LINEAR), at_least(0.9), "%"),
    Goal("", ">= 5x eager NormBT", times_over_ours("eager", LINEAR), at_least(5), "x"),
    Goal("", ">= 1.4x compiled NormBT", times_over_ours("compiled", LINEAR), at_least(1.4), "x"),
    Goal("", "faster than eager plain BT", times_over_ours("bt-eager", LINEAR), lambda value: value > 1, "x"),
    Goal("frozen backbone, same size", ">= 90% of the copy", share_of_copy(FROZEN), at_least(0.9), "%"),
    Goal("", ">= 6x eager NormBT", times_over_ours("eager", FROZEN), at_least(6), "x"),
    Goal("reward form, same size", ">= 90% of the copy", share_of_copy(REWARD), at_least(0.9), "%"),
    Goal("pooled, N=64, S=1024, H=4096", ">= 2.5x the HF way", times_over_ours("eager", HF_WAY), at_least(2.5), "x"),
    Goal(CALLS, "<= 1/3 of eager NormBT", small_calls("eager"), at_most(1 / 3), "x"),
    Goal("", "<= eager plain BT", small_calls("bt-eager"), at_most(1), "x"),
    Goal(GRAPH, "<= 2x two empty kernels", small_graphs, at_most(2), "x"),
    Goal("memory above inputs and gradients", "<= 2% of the inputs", memory, at_most(0.02), "%"),
    Goal("training step, 0.1B, bf16", "within +-0.5% of plain BT", training_step(1e8, 5e8), within(0.005), "%"),
    Goal("training step, 1.2B, bf16", "within +-0.5% of plain BT", training_step(1e9, 5e9), within(0.005), "%"),
    Goal("H=16384", ">= 90% of the share at 4096", share_beside_that_at_4096(16384), at_least(0.9), "%"),
    Goal("H=1024", ">= 90% of the share at 4096", share_beside_that_at_4096(1024), at_least(0.9), "%"),
)


def table(results: Results) -> list[dict[str, Any]]:
    rows, what = [], ""
    for goal in GOALS:
        what = goal.what or what  # an empty text means the same size as in the row above
        found = goal.measured(results)
        rows.append({
            "what": what,
            "goal": goal.goal,
            "value": found and found.value,
            "measured": NOT_MEASURED if found is None else as_text(found.value, goal.unit),
            "reached": None if found is None else goal.reached(found.value),
            "note": found.note if found else "",
        })  # fmt: skip
    return rows


def as_text(value: float, unit: str) -> str:
    return f"{100 * value:.2f}%" if unit == "%" else f"{value:.2f}x"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the results of one GPU, at any depth")
    folder = parser.parse_args(arguments).folder
    results = Results.read(folder)
    rows = table(results)
    print(f"goals on {results.device or 'no GPU'}")
    verdicts = {None: NOT_MEASURED, True: "reached", False: "MISSED"}
    print_table(
        ["what", "goal", "measured", "", "note"],
        [[row["what"], row["goal"], row["measured"], verdicts[row["reached"]], row["note"]] for row in rows],
    )
    for line in results.left_out:
        print(f"left out: {line}")
    content = {"device": results.device, "left_out": results.left_out, "rows": rows}
    write_json(folder / "goals.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
