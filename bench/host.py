"""Host time of one step, forward and backward: what decides at the sizes that people train with, 1 to 64 pairs.

    python -m bench host                            both paths, no GPU needed
    python -m bench host --check                    fail if a count is worse than the committed one
    python -m bench host --paths closed-form        one of them

closed-form   what serves the CPU, as it is
kernels       what serves a GPU, with everything up to the call of the driver: Triton compiles for sm_90 and binds each
              launch's arguments, and the launch itself does nothing. PyTorch's operators are those of the CPU here, so
              contenders that consist of operators are given by their number, times `--launch-us`.

Contenders take turns within each round of one process, and the lower quartile of the rounds is reported, because a busy
machine only ever adds time. Beside the times stand two figures that no noise touches, and that `--check` holds to the
committed ones: PyTorch operators dispatched (those that another operator calls left out), and Python calls made.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.profiler import profile

from bench.harness import RESULTS, Report, print_table
from normbt_kernels import LinearNormBTLoss, NormBTLoss, apply_normbt, linear_normbt_loss, normbt_loss
from normbt_kernels.ops import backend

SIZES = [(8, 256), (32, 256), (64, 2048)]
COUNTS = ("operators", "python_calls")
PATHS = ("closed-form", "kernels")
Step = Callable[[Tensor, Tensor], Tensor]


def plain_bt(hidden: Tensor, head: Tensor) -> Tensor:
    chosen, rejected = (hidden @ head).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def eager_normbt(hidden: Tensor, head: Tensor) -> Tensor:
    chosen, rejected = (hidden @ head).chunk(2)
    with torch.no_grad():
        distance = torch.linalg.vector_norm(torch.sub(*hidden.chunk(2)), dim=-1)
        weight = (1.5 / (distance + 1e-6)).clamp(max=100)
    return -(weight * F.logsigmoid(chosen - rejected)).mean()


def contenders(hidden_size: int) -> dict[str, Step]:
    """Each step of one batch; the modules have had their first."""
    known = {"mu": torch.tensor(1.5), "num_updates": torch.tensor(1)}
    linear, reward = LinearNormBTLoss(), NormBTLoss()
    for module in (linear, reward):
        module.load_state_dict(known)

    def of_rewards(loss: Callable[..., Tensor]) -> Step:
        return lambda hidden, head: loss(*(hidden @ head).chunk(2), *hidden.detach().chunk(2))

    def of_module(module: torch.nn.Module) -> Step:
        def step(hidden: Tensor, head: Tensor) -> Tensor:
            chosen, rejected = functional_call(module, {"weight": head[None]}, (hidden,)).squeeze(-1).chunk(2)
            return -F.logsigmoid(chosen - rejected).mean()

        return step

    plain, applied = (torch.nn.Linear(hidden_size, 1, bias=False) for _ in range(2))
    apply_normbt(applied)
    return {
        "plain BT, eager": plain_bt,
        "NormBT, eager": eager_normbt,
        "linear_normbt_loss": lambda hidden, head: linear_normbt_loss(hidden, head, 1.5),
        "LinearNormBTLoss": lambda hidden, head: linear(hidden, head),
        "normbt_loss": of_rewards(lambda *inputs: normbt_loss(*inputs, 1.5)),
        "NormBTLoss": of_rewards(reward),
        "plain BT, nn.Linear": of_module(plain),
        "+ apply_normbt": of_module(applied),
    }


@contextmanager
def launches_that_do_nothing() -> Iterator[None]:
    """The Triton path on a machine without a GPU: compiled for sm_90, and everything but the driver's call is real."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from bench.ahead_of_time import PROCESSORS, TARGETS

    before = driver._active if hasattr(driver, "_active") else None
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: TARGETS["sm_90"],
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    with (
        patch.object(backend, "backend_name", lambda device: "triton"),
        patch.object(backend, "INTERPRETED", PROCESSORS["sm_90"]),
        patch.object(CompiledKernel, "run", lambda *_: None),
        patch.object(CompiledKernel, "_init_handles", lambda _: None),
        patch.object(CompiledKernel, "__del__", lambda _: None, create=True),  # triton 3.6 has none
    ):
        yield
    if before is not None:
        driver.set_active(before)


def one_step(step: Step, hidden: Tensor, head: Tensor) -> None:
    torch.autograd.grad(step(hidden, head), (hidden, head))


def count(step: Step, hidden: Tensor, head: Tensor) -> dict[str, int]:
    """Operators dispatched and Python calls made by a step that is not the first of its kind."""
    calls = 0

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(on_event)
    try:
        one_step(step, hidden, head)
    finally:
        sys.setprofile(None)
    with profile() as recorded:
        one_step(step, hidden, head)
    operators = [event for event in recorded.events() if event.name.startswith("aten::")]
    outermost = [e for e in operators if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return {"operators": len(outermost), "python_calls": calls}


def measure(num_pairs: int, hidden_size: int, rounds: int) -> dict[str, dict[str, Any]]:
    hidden = torch.randn(2 * num_pairs, hidden_size, requires_grad=True)
    head = (torch.randn(hidden_size) / hidden_size**0.5).requires_grad_()
    steps = contenders(hidden_size)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(20):  # apply_normbt checks the first 16
        for step in steps.values():
            one_step(step, hidden, head)
    counts = {name: count(step, hidden, head) for name, step in steps.items()}
    for _ in range(rounds):
        # Each follows another one each time: code that the one before has left in the cache is a gift.
        for name, step in random.sample(list(steps.items()), len(steps)):
            start = time.perf_counter()
            one_step(step, hidden, head)
            seconds[name].append(time.perf_counter() - start)
    return {name: counts[name] | {"us": 1e6 * sorted(times)[len(times) // 4]} for name, times in seconds.items()}


def regressions(results: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Each count that is worse than the saved one; other versions of what is called make other calls."""
    if results["versions"] != saved["versions"]:
        print(f"no committed counts for {results['versions']}: nothing to be held to", file=sys.stderr)
        return []
    return [
        f"{path}, {size}, {name}: {figure} {now[figure]}, committed {saved['paths'][path][size][name][figure]}"
        for path, sizes in results["paths"].items()
        for size, entries in sizes.items()
        for name, now in entries.items()
        for figure in COUNTS
        if now[figure] > saved["paths"][path][size][name][figure]
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paths", nargs="*", choices=PATHS, default=PATHS, help="(default: both)")
    parser.add_argument("--rounds", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--launch-us", type=float, default=5.0, help="of one operator's launch, stated (%(default)s)")
    parser.add_argument("--check", action="store_true", help="fail if a count is worse than the committed one")
    parser.add_argument("--saved", type=Path, default=RESULTS / "host" / "host.json", help="(default: %(default)s)")
    parser.set_defaults(threads=1)


def run(options: argparse.Namespace) -> int:
    options.threads = options.threads or 1
    report = Report("host", options)
    results: dict[str, Any] = {
        "versions": {
            "python": ".".join(map(str, sys.version_info[:2])),
            "numpy": numpy.__version__,
            **{name: report.environment["versions"][name] for name in ("torch", "triton")},
        },
        "launch_us": options.launch_us,
        "paths": {},
    }
    for path in options.paths:
        sizes = results["paths"][path] = {}
        for num_pairs, hidden_size in SIZES:
            if path == "kernels":
                with launches_that_do_nothing():
                    sizes[f"{num_pairs} x {hidden_size}"] = measure(num_pairs, hidden_size, options.rounds)
            else:
                sizes[f"{num_pairs} x {hidden_size}"] = measure(num_pairs, hidden_size, options.rounds)
        print(f"\n{path}: microseconds of host time, forward + backward, one thread")
        print_table(
            ["P x H", "contender", "us", "/ eager NormBT", "operators", "x launch us", "Python calls"],
            [
                [size, name, f"{e['us']:.0f}", f"{e['us'] / entries['NormBT, eager']['us']:.2f}", e["operators"],
                 f"{e['operators'] * options.launch_us:.0f}", e["python_calls"]]
                for size, entries in sizes.items() for name, e in entries.items()
            ],
        )  # fmt: skip
    if options.check:
        problems = regressions(results, json.loads(options.saved.read_text()))
        print("\n".join(problems), file=sys.stderr)
        return int(bool(problems))
    report.save(results)
    report.save_figure(lambda plt: draw(plt, results))
    return 0


def draw(plt: Any, results: dict[str, Any]):
    figure, axes = plt.subplots(1, len(results["paths"]), figsize=(5 * len(results["paths"]), 3.5), squeeze=False)
    for axis, (path, sizes) in zip(axes[0], results["paths"].items(), strict=True):
        for name in next(iter(sizes.values())):
            axis.plot(list(sizes), [entries[name]["us"] for entries in sizes.values()], marker="o", label=name)
        axis.set(title=path, xlabel="P x H", ylabel="host time, us", ylim=(0, None))
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure
