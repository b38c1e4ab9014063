"""Measures which constants of normbt_kernels/ops/launch.py suit this device best, and proposes them to a person.

Every setting of the constants gives a launch shape for each size. Each different shape is timed, forward and backward,
and all take turns. The cost of a setting is the geometric mean, over the sizes, of its time over the best time of that
size. The table shows today's shapes beside the best ones, and the last lines propose a setting. Nothing is tuned at run
time: launch shapes stay pure functions of the sizes, so the same inputs give the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from bench.contenders import Case, ours
from bench.harness import DTYPES, Report, print_table
from bench.timing import Calls, Replays, Seconds, free_bytes, number_of_buffers, take_turns
from normbt_kernels.ops import autograd, launch
from normbt_kernels.ops.backend import processors_of, uses_kernels
from normbt_kernels.ops.launch import LaunchShape, Reading
from normbt_kernels.ops.launcher import Plans

# What the launch shapes of each phase depend on, and the values to try: the fields of `launch.AHEAD`, or of
# `launch.AHEAD_WITHOUT_HEAD` for given rewards, and constants.
CONSTANTS = {
    "forward": {
        "tile_bytes": (8192, 16384, 32768),
        "register_bytes": (128, 256),
        "warps_per_multiprocessor": (8, 12, 16),
        "stages": (1, 3, 4),
    },
    "backward": {
        "WRITTEN_TILE_ELEMENTS": (4096, 8192),
        "WRITTEN_ELEMENTS_PER_WARP": (512, 1024),
        "TILES_OF_A_PROGRAM": (1, 4, 16),
    },
}
READINGS = {"linear": "AHEAD", "reward": "AHEAD_WITHOUT_HEAD"}  # in `launch`, by entry
Setting = tuple[int, ...]  # values of a phase's constants, in their order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entry", choices=READINGS, default="linear", help="(default: %(default)s)")
    parser.add_argument("--num-pairs", "-P", nargs="+", type=int, metavar="P", default=(64, 4096, 65536))
    parser.add_argument("--hidden-size", "-H", nargs="+", type=int, metavar="H", default=(1024, 4096, 8192))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=("bf16",))
    parser.add_argument("--seconds", type=float, help="for one size and phase (default: 4, --quick: 1)")


def run(options: argparse.Namespace) -> int:
    if not uses_kernels(options.device):
        raise SystemExit(f"launch shapes are for GPUs: nothing to tune on {options.device}")
    report = Report("tune", options)
    seconds = options.seconds or (1 if options.quick else 4)
    sizes = itertools.product(options.num_pairs, options.hidden_size, options.dtype)
    cases = [Case(options.entry, p, h, DTYPES[dtype]) for p, h, dtype in sizes]
    phases = list(CONSTANTS) if options.entry == "linear" else ["forward"]  # backward of given rewards writes no rows
    times = {
        phase: {
            str(case): time_shapes(case, phase, options.device, report.device["cache_bytes"], seconds)
            for case in tqdm(cases, desc=phase, unit="size")
        }
        for phase in phases
    }
    rows = [row for phase in phases for row in compare(phase, cases, times[phase], options.device)]
    print_table(["phase", "size", "shape today", "us", "best shape", "us", "today over best"], rows)
    proposals = {phase: propose(phase, cases, times[phase], options.device) for phase in phases}
    for phase, proposal in proposals.items():
        cost, cost_today = proposal["cost"], proposal["cost_today"]
        print(f"{phase}: {proposal['constants']} costs {cost:.3f}x the best of each size, today {cost_today:.3f}x")
    report.save({
        "proposals": proposals,
        "rows": [
            {"phase": phase, "case": case, "shape": str(shape), "median_us": median * 1e6}
            for phase, of_phase in times.items()
            for case, of_case in of_phase.items()
            for shape, median in of_case.items()
        ],
    })  # fmt: skip
    return 0


def settings(phase: str) -> Iterator[Setting]:
    yield from itertools.product(*CONSTANTS[phase].values())


def setting_today(case: Case, phase: str) -> Setting:
    source = getattr(launch, READINGS[case.entry]) if phase == "forward" else launch
    return tuple(getattr(source, name) for name in CONSTANTS[phase])


def shape_of(case: Case, phase: str, setting: Setting, device: torch.device) -> LaunchShape:
    processors = processors_of(device)
    if phase == "forward":
        with patch.object(launch, READINGS[case.entry], Reading(*setting)):
            return LaunchShape.for_pairs(
                case.num_pairs, case.hidden_size, case.dtype.itemsize, processors, head=case.entry == "linear"
            )
    with patch.multiple(launch, **dict(zip(CONSTANTS[phase], setting, strict=True))):
        return LaunchShape.for_rows(case.num_rows, case.hidden_size, processors.count)


def time_shapes(
    case: Case, phase: str, device: torch.device, cache_bytes: int, seconds: float
) -> dict[LaunchShape, float]:
    """Median seconds of one call with each shape that some setting makes."""
    count = 1  # enough for the interpreter, whose times mean nothing
    if device.type == "cuda":
        count = number_of_buffers(2 * case.hidden_bytes, cache_bytes, free_bytes(device) // 2)
    torch.manual_seed(0)
    buffers = [case.make_inputs(device, copy=False) for _ in range(count)]
    shapes = {shape_of(case, phase, setting, device) for setting in [*settings(phase), setting_today(case, phase)]}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def sampler(shape: LaunchShape) -> Callable[[], Seconds]:
        name = "for_pairs" if phase == "forward" else "for_rows"
        plans: Plans = Plans()  # a plan holds the shape that it was made with

        @contextmanager
        def given() -> Iterator[None]:
            with patch.object(LaunchShape, name, lambda *_, **__: shape), patch.object(autograd, "_passes", plans):
                yield

        with given():
            calls = Replays(ours, buffers, pool) if device.type == "cuda" else Calls(ours, buffers)

        def sample() -> Seconds:
            with given():
                return calls()

        return sample

    samplers = {str(shape): sampler(shape) for shape in shapes}
    figures, errors = take_turns(samplers, seconds)
    for shape, error in errors.items():
        tqdm.write(f"{case}, {phase}, {shape}: {error}")
    return {shape: figures[str(shape)][phase]["median"] for shape in shapes if str(shape) in figures}


def compare(phase: str, cases: list[Case], times: dict[str, dict], device: torch.device) -> Iterator[list[Any]]:
    for case in cases:
        of_case = times[str(case)]
        today = shape_of(case, phase, setting_today(case, phase), device)
        best = min(of_case, key=of_case.get)
        yield [
            phase, str(case), brief(today), of_case[today] * 1e6, brief(best), of_case[best] * 1e6,
            f"{of_case[today] / of_case[best]:.3f}",
        ]  # fmt: skip


def propose(phase: str, cases: list[Case], times: dict[str, dict], device: torch.device) -> dict[str, Any]:
    """The setting with the least cost; today's if none is better."""

    def cost(setting: Setting) -> float:
        """The cost of a setting, infinite if one of its shapes failed."""
        logarithms = []
        for case in cases:
            of_case = times[str(case)]
            seconds = of_case.get(shape_of(case, phase, setting, device), math.inf)
            logarithms.append(math.log(seconds / min(of_case.values())))
        return math.exp(sum(logarithms) / len(logarithms))

    today = setting_today(cases[0], phase)
    costs = {setting: cost(setting) for setting in [today, *settings(phase)]}
    best = min(costs, key=costs.get)
    return {
        "constants": dict(zip(CONSTANTS[phase], best, strict=True)),
        "cost": costs[best],
        "cost_today": costs[today],
    }


def brief(shape: LaunchShape) -> str:
    tile = f"{shape.block_rows}x{shape.block_hidden}"
    return f"{shape.num_programs} programs, {tile}, {shape.num_warps} warps, {shape.num_stages} stages"
