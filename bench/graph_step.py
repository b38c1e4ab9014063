"""Times one of our steps in a CUDA graph beside a graph of two kernels that do nothing: python -m bench.graph_step

With few pairs a step consists of launches, and no graph of two launches is faster than one of two empty kernels. Both
graphs take turns, each replayed many times in a row, and the host's clock runs until the device is done. The step is
forward and backward of the linear form on one buffer. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.contenders import Case, ours
from bench.harness import Report, add_common_arguments, print_table
from bench.speed import in_microseconds
from bench.timing import WARM_UP_ROUNDS, Seconds, take_turns
from normbt_kernels.ops._triton import triton

REPLAYS = 64  # in a row


@triton.jit
def _nothing_kernel():
    pass


def launch_two_empty_kernels() -> list[Tensor]:
    _nothing_kernel[(1,)]()
    _nothing_kernel[(1,)]()
    return []


def capture(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], Any]]:
    """The outputs of `step` recorded as a CUDA graph, and the replay that fills them: a replay reads what lies where
    the step's inputs lay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and lazy set-up must not fall into the capture
        for _ in range(WARM_UP_ROUNDS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return outputs, graph.replay


def sampler(step: Callable[[], list[Tensor]]) -> Callable[[], Seconds]:
    _, replay = capture(step)

    def sample() -> Seconds:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
        return {"both": (time.perf_counter() - start) / REPLAYS}

    return sample


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = case.make_inputs(device, copy=False)

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(ours(inputs), inputs.leaves()))

    figures, errors = take_turns({"step": sampler(step), "empty": sampler(launch_two_empty_kernels)}, seconds)
    if errors:
        raise RuntimeError(f"{case}: {errors}")
    return {
        "entry": case.entry,
        "num_pairs": case.num_pairs,
        "hidden_size": case.hidden_size,
        "dtype": str(case.dtype).split(".")[1],
        **{name: in_microseconds(figures[name])["both"] for name in figures},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--num-pairs", "-P", nargs="+", type=int, metavar="P", default=(8, 64, 256))
    parser.add_argument("--hidden-size", "-H", nargs="+", type=int, metavar="H", default=(2048, 8192))
    parser.add_argument("--seconds", type=float, help="for one size (default: 2, --quick: 0.5)")
    options = parser.parse_args()
    if options.device.type != "cuda":
        parser.error(f"CUDA graphs need a CUDA device: nothing to measure on {options.device}")
    report = Report("graph-step", options)
    seconds = options.seconds or (0.5 if options.quick else 2)
    sizes = itertools.product(options.num_pairs, options.hidden_size)
    rows = [measure(Case("linear", p, h, torch.bfloat16), options.device, seconds) for p, h in sizes]
    print_table(
        ["size", "step us", "empty us", "step over empty"],
        [
            [f"P={row['num_pairs']} H={row['hidden_size']}", *(row[name]["median_us"] for name in ("step", "empty")),
             f"{row['step']['median_us'] / row['empty']['median_us']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip
    report.save({"replays": REPLAYS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
