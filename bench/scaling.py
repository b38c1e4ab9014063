"""How time grows with the number of pairs P and with the hidden size H: the exponents, over four decades.

It fits the time of forward + backward (by the device's clock on a GPU, by the wall's on a CPU) on a log-log scale. At
small sizes launches and Python take all the time and the slope is near 0, so there are two slopes: of all sizes, and of
the last decade, where the work takes the time. 1 is linear: each pair, and each column, costs the same.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from typing import Any

from tqdm import tqdm

from bench.contenders import CONTENDERS, ENTRIES, Case
from bench.harness import DTYPES, Report, print_table
from bench.speed import measure_case

# For each size that varies: its first and last value, and the value of the other size meanwhile.
SWEEPS = {
    ("cuda", False): {"num_pairs": (32, 524288, 1024), "hidden_size": (16, 262144, 512)},
    ("cuda", True): {"num_pairs": (32, 524288, 1024), "hidden_size": (16, 262144, 512)},
    ("cpu", False): {"num_pairs": (8, 81920, 256), "hidden_size": (8, 81920, 64)},
    ("cpu", True): {"num_pairs": (8, 8192, 64), "hidden_size": (8, 8192, 16)},
}
LETTERS = {"num_pairs": "P", "hidden_size": "H"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entry", nargs="+", choices=ENTRIES, default=("linear", "kwise"))
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=("eager", "ours"))
    parser.add_argument("--largest", type=int, metavar="N", help="ends both sweeps at N")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one size (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    report = Report("scaling", options)
    gpu = options.device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bf16" if gpu else "fp32")]
    seconds = min(options.seconds, 0.5) if options.quick else options.seconds
    sweeps = SWEEPS["cuda" if gpu else "cpu", options.quick]
    cases = []
    for entry in options.entry:
        for varied, (first, last, other) in sweeps.items():
            for size in powers(first, min(last, options.largest or last)):
                num_pairs, hidden_size = (size, other) if varied == "num_pairs" else (other, size)
                cases.append((varied, Case(entry, num_pairs, hidden_size, dtype)))
    rows: list[dict[str, Any]] = []
    for varied, case in (progress := tqdm(cases, unit="size")):
        progress.set_description(str(case))
        measured = measure_case(case, tuple(options.contender), options.device, report.device["cache_bytes"], seconds)
        rows += [{"varied": varied, **row} for row in measured]
        gc.collect()
    slopes = fit(rows)
    print_table(
        ["entry and contender", "against", "from", "to", "slope of all", "of the last decade"],
        [
            [f"{s['entry']}, {s['contender']}", LETTERS[s["varied"]], s["from"], s["to"],
             s["slope"], s["slope_of_last_decade"]] for s in slopes
        ],
    )  # fmt: skip
    report.save({"slopes": slopes, "rows": rows})
    report.save_figure(lambda plt: draw(plt, rows, slopes))
    return 0 if all(row["error"] is None for row in rows if row["contender"] == "ours") else 1


def powers(first: int, last: int, factor: int = 4) -> list[int]:
    sizes = [first]
    while sizes[-1] * factor < last:
        sizes.append(sizes[-1] * factor)
    return sizes if last <= first else [*sizes, last]


def fit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Least squares of log time on log size, for each sweep of each contender."""
    sweeps: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        if row["clock"]:
            key = (row["entry"], row["varied"], row["contender"])
            sweeps.setdefault(key, []).append((row[row["varied"]], row[row["clock"]]["both"]["median_us"]))
    return [
        {
            "entry": entry,
            "varied": varied,
            "contender": contender,
            "from": points[0][0],
            "to": points[-1][0],
            "slope": slope(points),
            "slope_of_last_decade": slope([point for point in points if point[0] >= points[-1][0] / 10]),
        }
        for (entry, varied, contender), points in sweeps.items()
    ]


def slope(points: list[tuple[int, float]]) -> float | None:
    if len({size for size, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*[(math.log(x), math.log(y)) for x, y in points], strict=True)).slope


def draw(plt, rows: list[dict[str, Any]], slopes: list[dict[str, Any]]):
    """One panel per entry and varied size, with the slope of the last decade in the legend and a line of slope 1."""
    panels = list(dict.fromkeys((row["entry"], row["varied"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.5 * len(panels) + 0.5, 3.6), squeeze=False,
                                sharey=True, layout="constrained")  # fmt: skip
    for axis, (entry, varied) in zip(axes[0], panels, strict=True):
        for s in (s for s in slopes if (s["entry"], s["varied"]) == (entry, varied)):
            contender = CONTENDERS[s["contender"]]
            points = [
                (row[varied], row[row["clock"]]["both"]["median_us"]) for row in rows
                if row["clock"] and (row["entry"], row["varied"], row["contender"]) == (entry, varied, s["contender"])
            ]  # fmt: skip
            tail = s["slope_of_last_decade"]
            label = contender.label + ("" if tail is None else f": slope {tail:.2f} at the end")
            axis.plot(*zip(*points, strict=True), color=contender.color, marker="o", markersize=3.5, label=label)
            if s["contender"] == "ours":
                size, time = points[-1]
                axis.plot([size / 100, size], [time / 100, time], color="gray", linestyle=":", label="slope 1")
        fixed = next(row for row in rows if (row["entry"], row["varied"]) == (entry, varied))
        other = "hidden_size" if varied == "num_pairs" else "num_pairs"
        axis.set(xscale="log", yscale="log", xlabel={"num_pairs": "pairs P", "hidden_size": "hidden size H"}[varied])
        axis.set_title(f"{entry}, {LETTERS[other]}={fixed[other]}, {fixed['dtype']}", fontsize=9)
        axis.legend(fontsize=7)
    clock = next((row["clock"] for row in rows if row["clock"]), "no")
    axes[0][0].set_ylabel(f"forward + backward, us ({clock} time)")
    return figure
