"""How much memory forward and backward need beyond their inputs, per contender.

The peak counts from what is allocated before the call, so inputs do not count. "Beyond gradients" leaves out the
gradients that the call returns, which every contender must allocate. On a GPU the figure comes from PyTorch's allocator
(torch.cuda.max_memory_allocated). On a CPU it is a sum: the peak of PyTorch's allocations, which torch.profiler records
(also those of compiled code, but not of BLAS libraries), and that of numpy's and Python's, which tracemalloc records.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.contenders import CONTENDERS, ENTRIES, Case, Inputs
from bench.harness import DTYPES, Report, error_text, print_table

MEASURED = tuple(name for name, contender in CONTENDERS.items() if contender.trains and not contender.graphed)
METHODS = {
    "cuda": "torch.cuda.max_memory_allocated above torch.cuda.memory_allocated before the call",
    "cpu": "running sum of the allocations of torch.profiler(profile_memory=True), and the peak of tracemalloc",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entry", nargs="+", choices=ENTRIES, default=ENTRIES)
    parser.add_argument("--num-pairs", "-P", type=int, metavar="P", help="(default: 4096 on a GPU, 1024 on a CPU)")
    parser.add_argument("--hidden-size", "-H", type=int, metavar="H", help="(default: 4096 on a GPU, 1024 on a CPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--sequence-length", "-S", type=int, metavar="S", help="of pooled (default: 256; CPU: 16)")
    parser.add_argument("--contender", nargs="+", choices=MEASURED, default=MEASURED)


def run(options: argparse.Namespace) -> int:
    report = Report("memory", options)
    gpu = options.device.type == "cuda"
    size = 4096 if gpu else 256 if options.quick else 1024
    measured_by = METHODS["cuda" if gpu else "cpu"]
    print(f"measured by: {measured_by}")
    rows = []
    for entry, name in tqdm(list(itertools.product(options.entry, options.contender)), unit="contender"):
        case = Case(
            entry,
            options.num_pairs or size,
            options.hidden_size or size,
            DTYPES[options.dtype or ("bf16" if gpu else "fp32")],
            options.sequence_length or (256 if gpu else 16),
        )
        rows.append(measure(case, name, options.device))
    print_table(
        ["case", "contender", "inputs MB", "gradients MB", "peak above inputs MB", "beyond gradients MB"],
        [
            [row["case"], row["contender"], *(row[key] and row[key] / 1e6 for key in (
                "input_bytes", "gradient_bytes", "peak_above_inputs_bytes", "peak_beyond_gradients_bytes"))]
            for row in rows
        ],
    )  # fmt: skip
    report.save({"measured_by": measured_by, "rows": rows})
    report.save_figure(lambda plt: draw(plt, rows))
    return 0 if all(row["error"] is None for row in rows if row["contender"] == "ours") else 1


def measure(case: Case, name: str, device: torch.device) -> dict[str, Any]:
    row = {
        "case": str(case),
        "entry": case.entry,
        "contender": name,
        "input_bytes": None,
        "gradient_bytes": None,
        "peak_above_inputs_bytes": None,
        "peak_beyond_gradients_bytes": None,
        "error": None,
    }
    try:
        torch.compiler.reset()
        torch.manual_seed(0)
        inputs = case.make_inputs(device, copy=False)
        function = CONTENDERS[name].prepare()
        step(function, inputs)  # compiles, and allocates what is allocated once
        gc.collect()
        peak, gradients = (peak_on_gpu if device.type == "cuda" else peak_on_cpu)(lambda: step(function, inputs))
    except Exception as error:  # whatever fails in one contender, the others keep their figures
        return row | {"error": error_text(error)}
    gradient_bytes = sum(gradient.nbytes for gradient in gradients)
    return row | {
        "input_bytes": sum(tensor.nbytes for tensor in inputs if tensor is not None),
        "gradient_bytes": gradient_bytes,
        "peak_above_inputs_bytes": peak,
        "peak_beyond_gradients_bytes": max(0, peak - gradient_bytes),
    }


def step(function: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(function(inputs), inputs.leaves())


def peak_on_gpu(call: Callable[[], Any]) -> tuple[int, Any]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def peak_on_cpu(call: Callable[[], Any]) -> tuple[int, Any]:
    tracemalloc.start()
    call()  # by itself, because the profiler is Python too
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return peak + max(itertools.accumulate(changes, initial=0)), result


def draw(plt, rows: list[dict[str, Any]]):
    """Bars of the peak above the inputs; the part of it that is gradients, which all must allocate, is pale."""
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    figure, axes = plt.subplots(
        1, len(entries), figsize=(3 * len(entries) + 1.8, 3.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, entry in zip(axes[0], entries, strict=True):
        for row in (row for row in rows if row["entry"] == entry and row["error"] is None):
            contender = CONTENDERS[row["contender"]]
            beyond = row["peak_beyond_gradients_bytes"] / 1e6
            gradients = row["peak_above_inputs_bytes"] / 1e6 - beyond
            axis.barh(contender.label, gradients, color=contender.color, alpha=0.3)
            axis.barh(contender.label, beyond, left=gradients, color=contender.color)
            axis.annotate(f" {gradients + beyond:,.3g}", (gradients + beyond, contender.label), va="center", fontsize=8)
        axis.set_title(next(row["case"] for row in rows if row["entry"] == entry), fontsize=9)
        axis.set_xlabel("peak above the inputs, MB")
        axis.margins(x=0.15)
        axis.grid(axis="y", visible=False)
    axes[0][0].invert_yaxis()
    figure.suptitle("Memory of forward + backward: gradients, which all must allocate (pale), and the rest", fontsize=9)
    return figure
