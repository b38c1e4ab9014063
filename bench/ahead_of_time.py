"""Compiles every kernel for a GPU that is not there: python -m bench.ahead_of_time sm_80 sm_90 sm_100 gfx942

The interpreter shows what the kernels compute, but not that they compile. This runs the real launchers, turns every
launch into a compilation for the given target, and reads four figures from the machine code: registers, spilled bytes
(each costs device memory traffic that no formula counts), shared memory, and the width of the loads from global memory.
The width is that of the narrowest load of rows, or of the widest load if a kernel reads no rows.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import normbt_kernels
from bench.harness import print_table
from normbt_kernels.ops import backend, pair_loss
from normbt_kernels.ops.launch import Processors
from normbt_kernels.ops.pairs import load_tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132
# What launch shapes are made for. Where the kernels ask for no tiles ahead, there is no shared memory.
PROCESSORS = {
    target: Processors(MULTIPROCESSORS, 1024 * kilobytes)
    for target, kilobytes in {"sm_80": 164, "sm_90": 228, "sm_100": 228, "gfx942": 0}.items()
}
NUM_PAIRS = 16 * MULTIPROCESSORS  # a whole tile for each program
FEW_PAIRS = 64
MANY_PAIRS = 8192  # too many for each row to look through all of them
FIGURES = ("registers", "spill_bytes", "shared_bytes", "load_bytes")


def entry_points() -> dict[str, Callable[[], object]]:
    """Calls that reach every entry point and every branch that the compiler sees, forward and backward."""

    def rows(hidden_size, dtype=torch.bfloat16, num_pairs=NUM_PAIRS):
        return torch.zeros(2 * num_pairs, hidden_size, dtype=dtype)  # no kernel looks at them

    def linear(
        hidden_size=4096,
        dtype=torch.bfloat16,
        mu=1.0,
        frozen=(),
        num_pairs=NUM_PAIRS,
        step=1,
        head_dtype=None,
        **options,
    ):
        hidden = rows(step * hidden_size, dtype, num_pairs)[:, ::step].requires_grad_("hidden" not in frozen)
        weight, bias = torch.randn(hidden_size, dtype=head_dtype or dtype), torch.zeros(1)
        for tensor in (weight, bias):
            tensor.requires_grad_("head" not in frozen)
        loss = normbt_kernels.linear_normbt_loss(hidden, weight, mu, bias=bias, **options)
        (loss[0] if options.get("return_stats") else loss).sum().backward()

    def linear_with_ema(hidden_size=4096):
        weight = torch.randn(hidden_size, requires_grad=True)
        bias = torch.zeros(1, requires_grad=True)
        normbt_kernels.LinearNormBTLoss()(rows(hidden_size).requires_grad_(), weight, bias).backward()

    explicit, many = (torch.randint(0, 2 * num_pairs, (num_pairs, 2)) for num_pairs in (NUM_PAIRS, MANY_PAIRS))

    def pooled(num_pairs=8):
        hidden = torch.zeros(2 * num_pairs, 8, 4096, dtype=torch.bfloat16, requires_grad=True)
        last_token = torch.zeros(2 * num_pairs, dtype=torch.int64)
        weight = torch.randn(4096, requires_grad=True)
        normbt_kernels.LinearNormBTLoss()(hidden, weight, last_token=last_token).backward()

    def reward(mu, power=1.0):
        chosen, rejected = rows(4096).chunk(2)
        rewards = torch.randn(NUM_PAIRS, requires_grad=True)
        margin = rewards.detach()
        normbt_kernels.normbt_loss(rewards, rewards, chosen, rejected, mu, margin=margin, power=power).backward()

    def reward_with_ema():
        chosen, rejected = rows(4096).chunk(2)
        rewards = torch.randn(NUM_PAIRS, dtype=torch.bfloat16, requires_grad=True)
        normbt_kernels.NormBTLoss()(rewards, rewards, chosen, rejected).backward()

    return {
        "linear": linear,
        "linear, 64 pairs": lambda: linear(num_pairs=FEW_PAIRS),
        "linear, H=16384, 64 pairs": lambda: linear(16384, num_pairs=FEW_PAIRS),
        "linear, H=512": lambda: linear(512),
        "linear, H=1024": lambda: linear(1024),
        "linear, H=8192": lambda: linear(8192),
        "linear, H=16384": lambda: linear(16384),
        "linear, H=16384, centered, walked in blocks": lambda: linear(16384, center_coef=0.1),
        "linear, H=16384, with EMA": lambda: linear_with_ema(16384),
        "linear, H=32768, walked in blocks": lambda: linear(32768),
        "linear, H=32768, with statistics, walked in blocks": lambda: linear(32768, return_stats=True),
        "linear, H=16384, with statistics": lambda: linear(16384, return_stats=True),
        "linear, H=8192, every option": lambda: linear(8192, center_coef=0.1, label_smoothing=0.1, max_weight=None),
        "linear, power 0.7": lambda: linear(power=0.7),
        "linear, H=16384, power 0.7": lambda: linear(16384, power=0.7),
        "linear, frozen backbone": lambda: linear(frozen=("hidden",)),
        "linear, frozen head": lambda: linear(frozen=("head",)),
        "linear, the batch's own mean": lambda: linear(mu=None),
        "linear, the batch's own mean, no cap": lambda: linear(mu=None, max_weight=None),
        "linear, fp16": lambda: linear(dtype=torch.float16),
        "linear, fp32": lambda: linear(dtype=torch.float32),
        "linear, fp32, H=8192": lambda: linear(8192, dtype=torch.float32),
        "linear, fp64": lambda: linear(1024, dtype=torch.float64),
        "linear, fp64, H=4096": lambda: linear(dtype=torch.float64),
        "linear with EMA": linear_with_ema,
        "linear, every option": lambda: linear(center_coef=0.1, label_smoothing=0.1, max_weight=None),
        "linear, interleaved": lambda: linear(pairs="interleaved"),
        "linear, explicit pairs": lambda: linear(pairs=explicit),
        "linear, many explicit pairs": lambda: linear(512, pairs=many, num_pairs=MANY_PAIRS),
        "linear, reduction none": lambda: linear(reduction="none"),
        "linear, explicit pairs, reduction none": lambda: linear(pairs=explicit, reduction="none"),
        "linear, odd H": lambda: linear(4099),
        "linear, columns apart": lambda: linear(step=2),
        "linear, head in fp64": lambda: linear(head_dtype=torch.float64),
        "pooled with EMA": pooled,
        "pooled with EMA, many pairs": lambda: pooled(NUM_PAIRS),
        "reward form": lambda: reward(1.0),
        "reward form, the batch's own mean": lambda: reward(None),
        "reward form, power 0.5": lambda: reward(1.0, 0.5),
        "reward form with EMA": reward_with_ema,
        "pair_distance": lambda: normbt_kernels.pair_distance(rows(4096)),
    }


def compile_for(target: str, names: Collection[str]) -> dict[str, dict]:
    """Compiles these entry points for `target`; {"entry point: kernel": what the compiler made of it}."""
    # Never restored: this runs in a process of its own.
    backend.backend_name = lambda device: "triton"
    backend.INTERPRETED = PROCESSORS[target]
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: TARGETS[target],
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    launch, binaries, compiled = JITFunction.run, [], {}

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        binaries.append((kernel.__name__, launch(kernel, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    entries = entry_points()
    for entry in names:
        entries[entry]()
        compiled |= {f"{entry}: {kernel}": describe(binary) for kernel, binary in binaries}
        binaries.clear()
    return compiled


class Load(NamedTuple):
    """A load from global memory in the code of a kernel."""

    location: tuple[str, int]  # file and line of the Triton source, of the innermost function inlined
    width: int  # bytes for each thread


def describe(binary) -> dict[str, Any]:
    """Figures of a compiled kernel; those that are not available are None, and "null" says why."""
    figures, null = {"registers": None, "spill_bytes": None}, []
    if "cubin" in binary.asm:
        try:
            registers, stack = _resource_usage(binary.asm["cubin"])
            figures = {"registers": registers, "spill_bytes": stack}
        except (OSError, RuntimeError) as error:
            null.append(f"registers and spills: {error}")
        assembly = binary.asm["ptx"]
        loads = _loads(assembly, _PTX_LOAD, lambda count, bits: int(count or 1) * int(bits) // 8)
        loads += _loads(assembly, _PTX_COPY, lambda size: int(size, 0))
    else:
        assembly = binary.asm["amdgcn"]
        vectors, scratch = (
            int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
        figures = {"registers": vectors, "spill_bytes": scratch}
        loads = _loads(assembly, _AMD_LOAD, lambda words, name: 4 * int(words) if words else _AMD_BYTES[name])
    # The narrowest load of rows counts; for a kernel that reads no rows, we can only tell the widest load.
    rows = [load.width for load in loads if _reads_rows(load)]
    widths = [load.width for load in loads]
    if not widths:
        null.append("load width: loads nothing from global memory")
    return {
        **figures,
        "shared_bytes": binary.metadata.shared,
        "load_bytes": min(rows) if rows else max(widths, default=None),
        "reads_rows": bool(rows),
        "barrier": any(_is_debug_barrier(place) for place, _ in _find(assembly, _BARRIER)),
        "null": "; ".join(null) or None,
    }


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of each thread, and its stack in local memory, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        process = subprocess.run(command, capture_output=True, text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", process.stdout)
    if usage is None:
        raise RuntimeError(f"cuobjdump said {(process.stderr or process.stdout).strip()!r}")
    return int(usage[1]), int(usage[2])


_PTX_LOAD = re.compile(r"ld\.(?:volatile\.)?global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.[busf](\d+)\s")
_PTX_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global.*\], (0x[0-9a-f]+|\d+)")  # of tiles ahead, to shared memory
_AMD_LOAD = re.compile(r"(?:buffer|global|flat)_load_(?:dwordx(\d)|(dword|ushort|sshort|short|ubyte|sbyte))")
_AMD_BYTES = {"dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1}
_BARRIER = re.compile(r"bar(?:rier)?\.sync|s_barrier")
_FILE = re.compile(r"\.file\s+(\d+)\s+(?:\"[^\"]*\"\s+)?\"([^\"]*)\"")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s")


def _loads(assembly: str, pattern: re.Pattern, width: Callable[..., int]) -> list[Load]:
    """The loads that `pattern` finds, whose groups `width` turns into bytes."""
    return [Load(location, width(*match.groups())) for location, match in _find(assembly, pattern)]


def _find(assembly: str, pattern: re.Pattern) -> Iterator[tuple[tuple[str, int], re.Match]]:
    """Each instruction that `pattern` finds, with the file and line of the Triton source that it is for."""
    files = {number: Path(name).name for number, name in _FILE.findall(assembly)}
    location = "", 0
    for line in assembly.splitlines():
        if match := _LOCATION.search(line):
            location = files.get(match[1], ""), int(match[2])
        elif match := pattern.search(line):
            yield location, match


def _is_debug_barrier(location: tuple[str, int]) -> bool:
    """Whether an instruction is for the one `tl.debug_barrier()`, without which long rows are a race."""
    lines = Path(pair_loss.__file__).read_text().splitlines()
    return location[0] == Path(pair_loss.__file__).name and "tl.debug_barrier()" in lines[location[1] - 1]


def _reads_rows(load: Load) -> bool:
    """Rows are read by `load_tile` and nowhere else."""
    source, first_line = inspect.getsourcelines(load_tile.fn)
    file = Path(inspect.getsourcefile(load_tile.fn)).name
    return load.location[0] == file and first_line <= load.location[1] < first_line + len(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--entries", nargs="*", default=list(entry_points()), help="compile only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    if len(options.targets) > 1:  # one process for each: the first compilation ties a process to its target
        results = {}
        for target in options.targets:
            command = [sys.executable, "-m", "bench.ahead_of_time", target, "--json", "--entries", *options.entries]
            results |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    else:
        results = {target: compile_for(target, options.entries) for target in options.targets}
    if options.json:
        print(json.dumps(results))
        return
    for target, kernels in results.items():
        print(f"\n{target}")
        print_table(
            ["bytes", "registers", "spilled", "shared", "load", ""],
            [[name, *(found[key] for key in FIGURES), found["null"] or ""] for name, found in kernels.items()],
        )


if __name__ == "__main__":
    main()
