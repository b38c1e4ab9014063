"""How fast each contender is, forward and backward, beside a plain copy of as many bytes as the work must move.

Every size of every entry is one case. The contenders of a case take turns on the same inputs: bench/timing.py explains
the turns and the two clocks, bench/contenders.py the contenders. GB/s count the floor's bytes, whatever a contender
really moves. So the copy, which moves exactly these, is the ceiling, and the share of it tells how well a contender
uses the memory. By default P, H and the dtype vary one at a time; with lists of sizes, their product is measured.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.contenders import CONTENDERS, ENTRIES, Case, Inputs
from bench.harness import DTYPES, Report, error_text, print_table
from bench.timing import Calls, GraphCalls, Replays, free_bytes, number_of_buffers, take_turns


class Grid(NamedTuple):
    """Default sizes: `pairs` at the base, `hidden` at the base, `dtypes` at the base; the first of each is the base."""

    pairs: tuple[int, ...]
    hidden: tuple[int, ...]
    dtypes: tuple[str, ...]
    sequence_length: int


GRIDS = {
    ("cuda", False): Grid(
        (4096, 8, 64, 512, 32768, 262144), (4096, 1024, 2048, 8192, 16384), ("bf16", "fp16", "fp32"), 256
    ),
    ("cuda", True): Grid((4096, 64, 65536), (4096,), ("bf16",), 256),
    ("cpu", False): Grid((4096, 8, 64, 512), (2048, 1024, 4096), ("fp32", "bf16"), 8),
    ("cpu", True): Grid((256, 8), (1024,), ("fp32",), 8),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entry", nargs="+", choices=ENTRIES, default=ENTRIES)
    parser.add_argument("--num-pairs", "-P", nargs="+", type=int, metavar="P")
    parser.add_argument("--hidden-size", "-H", nargs="+", type=int, metavar="H")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--sequence-length", "-S", type=int, metavar="S", help="of the entry pooled")
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=tuple(CONTENDERS))
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="for one case, without compilation (default: 4, --quick: 1.5)")


def run(options: argparse.Namespace) -> int:
    report = Report("speed", options)
    cases = [case for entry in options.entry for case in sizes(entry, options)]
    seconds = options.seconds or (1.5 if options.quick else 4)
    rows: list[dict[str, Any]] = []
    labels = {name: CONTENDERS[name].label for name in options.contender}
    try:
        for case in (progress := tqdm(cases, unit="case")):
            progress.set_description(str(case))
            rows += measure_case(
                case, options.contender, options.device, report.device["cache_bytes"], seconds, options.compile_backend
            )
    except BaseException:  # a capture that fails can leave a GPU on which nothing runs any more
        report.name = "speed-partial"
        raise
    finally:
        print_rows(rows)
        report.save({"labels": labels, "compile_backend": options.compile_backend, "rows": rows})
    report.save_figure(lambda plt: draw(plt, rows))
    return 0 if all(row["error"] is None for row in rows if row["contender"].startswith("ours")) else 1


def sizes(entry: str, options: argparse.Namespace) -> Iterator[Case]:
    grid = GRIDS["cuda" if options.device.type == "cuda" else "cpu", options.quick]
    sequence_length = options.sequence_length or grid.sequence_length
    if options.num_pairs or options.hidden_size or options.dtype:
        chosen = itertools.product(
            options.num_pairs or grid.pairs[:1],
            options.hidden_size or grid.hidden[:1],
            options.dtype or grid.dtypes[:1],
        )
    else:
        base = (grid.pairs[0], grid.hidden[0], grid.dtypes[0])
        chosen = dict.fromkeys(
            [(p, *base[1:]) for p in sorted(grid.pairs)]
            + [(base[0], h, base[2]) for h in sorted(grid.hidden)]
            + [(*base[:2], dtype) for dtype in grid.dtypes]
        )
    for num_pairs, hidden_size, dtype in chosen:
        yield Case(entry, num_pairs, hidden_size, DTYPES[dtype], sequence_length)


def measure_case(
    case: Case,
    contenders: tuple[str, ...],
    device: torch.device,
    cache_bytes: int,
    seconds: float,
    backend: str = "inductor",
) -> list[dict[str, Any]]:
    """One row of the results per contender. A figure that was not measured is None, and `error` or `skipped` says
    why."""
    shape = {
        "entry": case.entry,
        "num_pairs": case.num_pairs,
        "hidden_size": case.hidden_size,
        "sequence_length": case.sequence_length,
        "dtype": str(case.dtype).split(".")[1],
        "floor_bytes": case.floor_bytes(),
    }
    nothing = {"loss": None, "wall": None, "device": None, "gb_per_s": None, "share_of_copy": None, "clock": None}
    rows = {name: {**shape, "contender": name, **nothing, "error": None, "skipped": None} for name in contenders}

    # 1. does it fit? Every buffer with its gradient and its copy, the work of one call, and all this again for graphs
    per_buffer = case.hidden_bytes + case.floor_bytes()["both"]
    work = 2 * case.floor_bytes()["backward"] + 4 * case.row_bytes
    free = free_bytes(device) - work
    if free < 2 * per_buffer:
        needed, had = (per_buffer * 2 + work) / 2**30, (free + work) / 2**30
        for row in rows.values():
            row["skipped"] = f"needs about {needed:.1f} GiB of memory, {had:.1f} GiB are free"
        tqdm.write(f"{case}: skipped, {row['skipped']}")
        return list(rows.values())
    count = number_of_buffers(per_buffer, cache_bytes, free // 2)
    torch.manual_seed(0)
    buffers = [case.make_inputs(device) for _ in range(count)]

    # 2. the functions to time, and the loss that each contender computes, which shows that they agree
    walls, devices = prepare(rows, buffers, device, backend)

    # 3. time all in the same rounds
    samplers = {f"wall {n}": s for n, s in walls.items()} | {f"device {n}": s for n, s in devices.items()}
    figures, errors = take_turns(samplers, seconds)
    for name, row in rows.items():
        row |= {"buffers": count, "rotated_bytes": count * per_buffer}
        row |= {clock: in_microseconds(figures.get(f"{clock} {name}")) for clock in ("wall", "device")}
        found = [errors[key] for key in (f"wall {name}", f"device {name}") if key in errors]
        row["error"] = row["error"] or (found[0] if found else None)
        if row["error"]:
            tqdm.write(f"{case}, {name}: {row['error']}")
    derive(rows)
    del walls, devices, samplers, buffers
    return list(rows.values())


def prepare(rows: dict[str, dict], buffers: list[Inputs], device: torch.device, backend: str) -> tuple[dict, dict]:
    """The samplers of both clocks by contender. A failure is noted in its row."""
    walls, devices = {}, {}
    torch.compiler.reset()  # each size is compiled by itself: torch.compile gives up after eight
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for name, row in rows.items():
        contender = CONTENDERS[name]
        if contender.graphed and device.type != "cuda":
            row["skipped"] = "CUDA graphs need a CUDA device"
            continue
        try:
            function = contender.prepare(backend)
            result = function(buffers[0])
            if contender.trains:
                row["loss"] = result.item()
            del result  # while its graph lives, the leaves' nodes are those of this stream, which no capture may use
            if contender.graphed:
                walls[name] = GraphCalls(function, buffers, pool)
                continue  # on the device these are the kernels of "ours", which is measured there
            walls[name] = Calls(function, buffers, contender.trains)
            if device.type == "cuda":
                devices[name] = Replays(function, buffers, pool, contender.trains)
        except Exception as error:  # whatever fails in one contender, the others keep their figures
            row["error"] = error_text(error)
    return walls, devices


def in_microseconds(phases: dict[str, dict[str, float]] | None) -> dict[str, dict[str, float]] | None:
    if phases is None:
        return None
    return {
        phase: {"median_us": s["median"] * 1e6, "q1_us": s["q1"] * 1e6, "q3_us": s["q3"] * 1e6, "samples": s["samples"]}
        for phase, s in phases.items()
    }


def derive(rows: dict[str, dict[str, Any]]) -> None:
    """GB/s on the floor's bytes, on the device's clock where there is one, and the share of the copy's."""
    copy = rows.get("copy")
    for name, row in rows.items():
        row["clock"] = next((clock for clock in ("device", "wall") if row[clock]), None)
        if row["clock"] is None or (row["clock"] == "wall" and CONTENDERS[name].graphed):
            continue
        if row["entry"] == "reward" and name.startswith("bt-"):  # it reads no rows, so the floor is not its own
            continue
        row["gb_per_s"] = {
            phase: row["floor_bytes"]["both" if name == "copy" else phase] / figures["median_us"] / 1e3 or None
            for phase, figures in row[row["clock"]].items()
        }
        if copy is not None and copy[row["clock"]] is not None:
            copied = row["floor_bytes"]["both"] / copy[row["clock"]]["both"]["median_us"] / 1e3
            row["share_of_copy"] = {phase: gb and gb / copied for phase, gb in row["gb_per_s"].items()}


def print_rows(rows: list[dict[str, Any]]) -> None:
    header = ["case", "contender", "forward us", "backward us", "both us", "q1", "q3", "device us", "GB/s", "of copy"]
    table = []
    for row in rows:
        wall, device = row["wall"] or {}, row["device"] or {}

        def figure(phases: dict, phase: str, name: str = "median_us") -> float | None:
            return phases[phase][name] if phase in phases else None

        share = (row["share_of_copy"] or {}).get("both")
        table.append([
            f"{row['entry']} P={row['num_pairs']} H={row['hidden_size']} {row['dtype']}", row["contender"],
            *(figure(wall, phase) for phase in ("forward", "backward", "both")),
            figure(wall, "both", "q1_us"), figure(wall, "both", "q3_us"), figure(device, "both"),
            (row["gb_per_s"] or {}).get("both"), None if share is None else f"{share:.0%}",
        ])  # fmt: skip
    print_table(header, table)
    print("us: median wall time of one call (q1, q3: quartiles of both); device us: the same by the device's clock")


def draw(plt, rows: list[dict[str, Any]]):
    """Time of forward + backward against P, a panel per entry, at the hidden size and dtype with most sizes of P."""
    clocks = [clock for clock in ("wall", "device") if any(row[clock] for row in rows)] or ["wall"]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    figure, axes = plt.subplots(
        len(clocks), len(entries), figsize=(3.4 * len(entries) + 0.6, 3.3 * len(clocks) + 1), squeeze=False,
        sharex="col", sharey="row", layout="constrained",
    )  # fmt: skip
    for (i, clock), (j, entry) in itertools.product(enumerate(clocks), enumerate(entries)):
        axis, of_entry = axes[i][j], [row for row in rows if row["entry"] == entry]
        slices = {}
        for row in of_entry:
            slices.setdefault((row["hidden_size"], row["dtype"]), set()).add(row["num_pairs"])
        hidden_size, dtype = max(slices, key=lambda key: len(slices[key]))
        lines: dict[str, dict[int, dict]] = {}
        for row in of_entry:
            if row[clock] and (row["hidden_size"], row["dtype"]) == (hidden_size, dtype):
                lines.setdefault(row["contender"], {})[row["num_pairs"]] = row[clock]["both"]
        for name, points in lines.items():
            contender, pairs = CONTENDERS[name], sorted(points)
            axis.plot(
                pairs, [points[p]["median_us"] for p in pairs], label=contender.label, color=contender.color,
                marker="o", markersize=3.5, linestyle=":" if name == "copy" else "-",
                linewidth=2.4 if name == "ours" else 1.4,
            )  # fmt: skip
            axis.fill_between(
                pairs, [points[p]["q1_us"] for p in pairs], [points[p]["q3_us"] for p in pairs],
                color=contender.color, alpha=0.15, linewidth=0,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_minor_formatter(plt.NullFormatter())
        title = f"{entry}, H={hidden_size}, {dtype}"
        rivals = {"eager": "eager", "compiled": "torch.compile"}
        common = set.intersection(*(set(lines.get(name, ())) for name in ("ours", *rivals)))
        if common:
            p = max(common)
            ratios = {name: lines[name][p]["median_us"] / lines["ours"][p]["median_us"] for name in rivals}
            title += f"\ntime over ours at P={p}:\n"
            title += ", ".join(f"{rivals[name]} {ratio:.2f}x" for name, ratio in ratios.items())
        axis.set_title(title, fontsize=9)
        if i == len(clocks) - 1:
            axis.set_xlabel("pairs P")
        if j == 0:
            axis.set_ylabel(f"forward + backward, us\n({clock} time)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), fontsize=9)
    return figure
