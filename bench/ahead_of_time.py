"""Compiles every kernel for a GPU that is not there: python -m bench.ahead_of_time sm_80 sm_90 sm_100 gfx942

The interpreter proves what the kernels compute, not that they compile. This runs the real launchers, with every
launch turned into a compilation for the given target, and reads from the machine code what the compiler made of
it: registers, spilled bytes (a figure above 0 costs device memory traffic that no formula counts), shared memory,
and the widest load from global memory.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import normbt_kernels
from normbt_kernels.ops import backend

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132
NUM_PAIRS = 256


def entry_points() -> dict[str, Callable[[], object]]:
    """What to run: every entry point, and every branch that the compiler sees, forward and backward."""

    def rows(hidden_size, dtype=torch.bfloat16):
        return torch.randn(2 * NUM_PAIRS, hidden_size, dtype=dtype, requires_grad=True)

    def linear(hidden_size=4096, dtype=torch.bfloat16, **options):
        hidden = rows(hidden_size, dtype)
        weight, bias = torch.randn(hidden_size, dtype=dtype, requires_grad=True), torch.zeros(1, requires_grad=True)
        normbt_kernels.linear_normbt_loss(hidden, weight, 1.0, bias=bias, **options).sum().backward()

    def pooled():
        hidden = torch.randn(16, 8, 4096, dtype=torch.bfloat16, requires_grad=True)
        last_token = torch.zeros(16, dtype=torch.int64)
        weight = torch.randn(4096, requires_grad=True)
        normbt_kernels.LinearNormBTLoss()(hidden, weight, last_token=last_token).backward()

    def reward(mu):
        chosen, rejected = rows(4096).chunk(2)
        rewards = torch.randn(NUM_PAIRS, requires_grad=True)
        normbt_kernels.normbt_loss(rewards, rewards, chosen, rejected, mu, margin=rewards.detach()).backward()

    return {
        "linear": linear,
        "linear, H=1024": lambda: linear(1024),
        "linear, H=8192": lambda: linear(8192),
        "linear, H=16384, walked in blocks": lambda: linear(16384, center_coef=0.1),
        "linear, fp32": lambda: linear(dtype=torch.float32),
        "linear, fp64": lambda: linear(1024, dtype=torch.float64),
        "linear, every option": lambda: linear(center_coef=0.1, label_smoothing=0.1, max_weight=None),
        "linear, interleaved": lambda: linear(pairs="interleaved"),
        "linear, explicit pairs": lambda: linear(pairs=torch.randint(0, 2 * NUM_PAIRS, (NUM_PAIRS, 2))),
        "linear, reduction none": lambda: linear(reduction="none"),
        "linear, odd H": lambda: linear(4099),
        "pooled with EMA": pooled,
        "reward form": lambda: reward(1.0),
        "reward form, the batch's own mean": lambda: reward(None),
        "pair_distance": lambda: normbt_kernels.pair_distance(rows(4096)),
    }


def compile_for(target: str) -> dict[str, dict]:
    """Compiles every entry point for `target`; {"entry point: kernel": what the compiler made of it}."""
    # Never restored: this runs in a process of its own.
    backend.backend_name = lambda device: "triton"
    backend.INTERPRETED_MULTIPROCESSORS = MULTIPROCESSORS
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
    for entry, run in entry_points().items():
        run()
        compiled |= {f"{entry}: {kernel}": describe(binary) for kernel, binary in binaries}
        binaries.clear()
    return compiled


def describe(binary) -> dict:
    if "cubin" in binary.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(binary.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        loads = re.findall(r"ld\.global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.[busf](\d+)", binary.asm["ptx"])
        load_bytes = [int(count or 1) * int(bits) // 8 for count, bits in loads]
    else:
        assembly = binary.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly).group(1))
        stack = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly).group(1))
        loads = re.findall(r"(?:buffer|global)_load_(?:dwordx(\d)|(dword)|(ushort|short)|(ubyte))", assembly)
        load_bytes = [
            4 * int(count) if count else 4 if dword else 2 if short else 1 for count, dword, short, _ in loads
        ]
    return {
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": binary.metadata.shared,
        "load_bytes": max(load_bytes, default=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    if len(options.targets) > 1:  # one process for each, since a process is given over to its target
        results = {}
        for target in options.targets:
            command = [sys.executable, "-m", "bench.ahead_of_time", target, "--json"]
            results |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    else:
        results = {target: compile_for(target) for target in options.targets}
    if options.json:
        print(json.dumps(results))
        return
    for target, kernels in results.items():
        print(f"\n{target:72}{'registers':>10}{'spilled':>9}{'shared':>8}{'load':>6}   (bytes)")
        for name, figures in kernels.items():
            print(name.ljust(72) + "{registers:>10}{spill_bytes:>9}{shared_bytes:>8}{load_bytes:>6}".format(**figures))


if __name__ == "__main__":
    main()
