"""Two clocks, and contenders that take turns.

wall     the host's clock around Python calls; it waits for the device only at the end of a batch of calls. This is the
         time that a training loop sees, launches included.
device   CUDA events around the replay of a CUDA graph with the same batch of calls. This is the time that the device
         needs if nothing makes it wait. An untimed replay before it lets the host run ahead. A CPU has no such clock.

A round is one batch of forward calls, one for each of the rotating buffers, then the backward of each. So each clock
times them separately, and "both" is their sum. The buffers together exceed the last cache (if MAX_BUFFERS allows it),
so a call finds none of its inputs there. All gradients of a round are alive at its end, so that writes rotate as well.

Contenders take turns round by round, and a different one begins each round: a device that slows down slows them all.
We do not use `torch.utils.benchmark` and `triton.testing.do_bench`: they measure one contender after the other on one
buffer, and count the gaps between launches as device time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bench.contenders import Inputs
from bench.harness import error_text

Function = Callable[[Inputs], Tensor]
Seconds = dict[str, float]  # of one call: forward, backward, both; a copy has no backward

MAX_BUFFERS = 64
WARM_UP_ROUNDS = 2


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def per_call(times: Sequence[float], calls: int) -> Seconds:
    """Seconds of one call, from the times at which a round began, its backward half began, and the round ended."""
    start, middle, end = times
    forward, backward = (middle - start) / calls, (end - middle) / calls
    return {"forward": forward, "backward": backward, "both": forward + backward}


def only_forward(seconds: Seconds) -> Seconds:
    return {"forward": seconds["forward"], "both": seconds["forward"]}


def run_forward(function: Function, buffers: Sequence[Inputs]) -> list[Tensor]:
    return [function(inputs) for inputs in buffers]


def run_backward(losses: Sequence[Tensor], buffers: Sequence[Inputs]) -> list[tuple[Tensor, ...]]:
    """Gradients are new tensors each time: nothing is accumulated or zeroed."""
    return [torch.autograd.grad(loss, inputs.leaves()) for loss, inputs in zip(losses, buffers, strict=True)]


class Calls:
    """Wall clock of Python calls."""

    def __init__(self, function: Function, buffers: Sequence[Inputs], trains: bool = True):
        self.function, self.buffers, self.trains = function, buffers, trains
        self.device = buffers[0].mu.device

    def __call__(self) -> Seconds:
        synchronize(self.device)
        start = time.perf_counter()
        losses = run_forward(self.function, self.buffers)
        synchronize(self.device)
        middle = time.perf_counter()
        gradients = run_backward(losses, self.buffers) if self.trains else None
        synchronize(self.device)
        end = time.perf_counter()
        del gradients
        seconds = per_call((start, middle, end), len(self.buffers))
        return seconds if self.trains else only_forward(seconds)


def capture(function: Function, batches: Sequence[Sequence[Inputs]], pool: tuple, trains: bool) -> list[list]:
    """[forward graphs, backward graphs], one of each per batch of buffers, to be replayed in this order.

    Results are not kept: later graphs in the same pool reuse their memory, so several contenders fit on the device.
    """
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # lazy set-up must not fall into the capture
        for _ in range(WARM_UP_ROUNDS):
            loss = function(batches[0][0])
            if trains:
                torch.autograd.grad(loss, batches[0][0].leaves())
            del loss
    torch.cuda.synchronize()
    forward = [torch.cuda.CUDAGraph() for _ in batches]
    backward = [torch.cuda.CUDAGraph() for _ in batches] if trains else []
    losses, gradients = [], []
    with torch.cuda.stream(torch.cuda.current_stream()):  # restores the stream if a capture fails
        for graph, buffers in zip(forward, batches, strict=True):
            with torch.cuda.graph(graph, pool=pool):
                losses.append(run_forward(function, buffers))
        for i, graph in enumerate(backward):
            with torch.cuda.graph(graph, pool=pool):
                gradients.append(run_backward(losses[i], batches[i]))
    return [forward, backward]


class Replays:
    """Device clock: events around one graph of all forward calls and one of all backward calls."""

    def __init__(self, function: Function, buffers: Sequence[Inputs], pool: tuple, trains: bool = True):
        self.graphs = [graph for graphs in capture(function, [buffers], pool, trains) for graph in graphs]
        self.calls, self.trains = len(buffers), trains

    def __call__(self) -> Seconds:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        for graph in self.graphs:
            graph.replay()
        events[0].record()
        self.graphs[0].replay()
        events[1].record()
        if self.trains:
            self.graphs[1].replay()
        events[2].record()
        torch.cuda.synchronize()
        milliseconds = [0.0, *(events[0].elapsed_time(event) for event in events[1:])]
        seconds = per_call([t / 1e3 for t in milliseconds], self.calls)
        return seconds if self.trains else only_forward(seconds)


class GraphCalls:
    """Wall clock of replays: each call's forward is one graph and its backward another, launched from Python."""

    def __init__(self, function: Function, buffers: Sequence[Inputs], pool: tuple):
        self.forward, self.backward = capture(function, [[inputs] for inputs in buffers], pool, True)

    def __call__(self) -> Seconds:
        times = []
        for graphs in (self.forward, self.backward, []):
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            for graph in graphs:
                graph.replay()
        return per_call(times, len(self.forward))


def number_of_buffers(buffer_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """Enough to fill twice the cache; at least four small ones, so that waiting at the end of a batch is cheap."""
    enough = -(-2 * cache_bytes // buffer_bytes)
    at_least = 4 if buffer_bytes < 256 * 2**20 else 1
    return max(1, min(max(enough, at_least), MAX_BUFFERS, free_bytes // buffer_bytes))


def free_bytes(device: torch.device) -> int:
    """Free memory: on a GPU what no process holds, on a host what the system calls available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": lower, "q3": upper, "samples": len(samples)}


def take_turns(
    samplers: Mapping[str, Callable[[], Seconds]], seconds: float, min_rounds: int = 5, max_rounds: int = 100
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """Rounds of all samplers by turns for about `seconds`.

    Returns:
        {sampler: {phase: spread of the seconds of one call}} and, of those that failed, {sampler: error}.
    """
    samplers, samples, errors = dict(samplers), {name: [] for name in samplers}, {}

    def sample(name: str) -> Seconds | None:
        try:
            return samplers[name]()
        except Exception as error:  # whatever fails in one contender, the others keep their figures
            errors[name] = error_text(error)
            del samplers[name]
            return None

    for name in [name for name in samplers for _ in range(WARM_UP_ROUNDS)]:
        if name in samplers:
            sample(name)
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while samplers and rounds < max_rounds and (rounds < min_rounds or time.perf_counter() - start < seconds):
            order = list(samplers)
            for name in order[rounds % len(order) :] + order[: rounds % len(order)]:
                result = sample(name)
                if result is not None:
                    samples[name].append(result)
            rounds += 1
    finally:
        gc.enable()
    return {
        name: {phase: spread([s[phase] for s in samples[name]]) for phase in samples[name][0]} for name in samplers
    }, errors
