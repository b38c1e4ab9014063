"""Counts kernels whose bytes are known by hand: TRITON_INTERPRET=1 python -m tests.counted_kernels

Triton decides at import whether it interprets, so test_static.py runs this as a process of its own. Prints one JSON
object: of each case the bytes of each access, and the launches.
"""

import json
from dataclasses import replace
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from bench import static
from bench.count import counting
from normbt_kernels import LinearNormBTLoss
from normbt_kernels.ops import pair_distance, pair_loss


@triton.jit
def _copy_kernel(source_ptr, destination_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source_ptr + index, mask=index < size)
    tl.store(destination_ptr + index, value, mask=index < size)


@triton.jit
def _sum_rows_kernel(rows, sum_ptr, BLOCK: tl.constexpr, READS: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(READS):
        total = tl.load(rows[0] + row * rows[1] + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(sum_ptr + row, tl.sum(total))


@triton.jit
def _add_atomically_kernel(total_ptr, count_ptr):
    tl.atomic_add(total_ptr + tl.arange(0, 4), 1.0)
    tl.store(count_ptr, tl.load(count_ptr) + 1)


load_tile = pair_loss.load_tile


@triton.jit
def load_tile_twice(rows, side, offset, exists, columns, ACC: tl.constexpr):
    first = load_tile(rows, side, offset, exists, columns, ACC)
    return 0.5 * (first + load_tile(rows, side, offset, exists, columns, ACC))


def count_kernels() -> dict[str, dict]:
    source, destination = torch.randn(1000, dtype=torch.float16), torch.empty(1000, dtype=torch.float16)
    rows, sums = torch.randn(6, 64, dtype=torch.bfloat16), torch.empty(6)
    totals, number = torch.zeros(4), torch.zeros(1, dtype=torch.int64)

    def copy():
        _copy_kernel[(4,)](source, destination, 1000, BLOCK=256)

    def sum_rows(reads):
        _sum_rows_kernel[(6,)]((rows, rows.stride(0)), sums, BLOCK=64, READS=reads)

    cases = {
        "copy": copy,
        "two copies": lambda: (copy(), copy()),
        "rows once": lambda: sum_rows(1),
        "rows twice": lambda: sum_rows(2),
        "atomics": lambda: _add_atomically_kernel[(3,)](totals, number),
    }
    return {name: count(run) for name, run in cases.items()}


def count(run) -> dict:
    with counting() as counted:
        run()
    accesses = {f"{operand} {'write' if writes else 'read'}": n for (_, operand, writes), n in counted.bytes.items()}
    return {"bytes": accesses, "launches": dict(counted.launches)}


def count_entries() -> dict[str, dict]:
    """The package's own kernels, as they are and with a second read of each tile of rows."""
    counts = {}
    for tiles in ("once", "twice"):
        function = load_tile if tiles == "once" else load_tile_twice
        with patch.object(pair_loss, "load_tile", function), patch.object(pair_distance, "load_tile", function):
            steps = static.entries()
            for name in ("pair_distance", "linear_normbt_loss, 64 pairs"):
                counts[f"{name}, tiles read {tiles}"] = static.count_entry(of_few_pairs(steps[name]))
    return counts


def count_steps() -> dict[str, dict]:
    """What mu costs: where each forward is a step, in a micro-batch, and at the end of a step."""
    hidden, head = torch.randn(8, 16), torch.randn(16)
    alone, follows = LinearNormBTLoss(), LinearNormBTLoss()
    follows.per_step = True
    for loss_fn in (alone, follows):
        loss_fn.load_state_dict({"mu": torch.tensor(1.0), "num_updates": torch.tensor(1)})
    cases = {
        "each forward a step": lambda: alone(hidden, head),
        "micro-batch": lambda: follows(hidden, head),
        "end of a step": follows.end_step,
    }
    return {name: count(run) for name, run in cases.items()}


def of_few_pairs(step: static.Entry, num_pairs: int = 16) -> static.Entry:
    """The same for fewer pairs, which is quicker, and without PyTorch's counts."""
    floor_bytes = step.floor_bytes * num_pairs // step.case.num_pairs
    return replace(step, case=replace(step.case, num_pairs=num_pairs), floor_bytes=floor_bytes, contenders={})


if __name__ == "__main__":
    print(json.dumps({"kernels": count_kernels(), "entries": count_entries(), "steps": count_steps()}))
