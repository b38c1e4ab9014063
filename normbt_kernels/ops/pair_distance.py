"""Distance of each pair, and nothing else: rho_p = ||h_c - h_r||_2 with one read of each row.

Bytes: reads 2*P*H*s, writes 4*P. Each program strides over blocks of pairs, so P may be anything; a row
longer than a block is walked in blocks. No gradient: the weight that the distance feeds is a stop-gradient.
"""

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import run_on, triton_dtype, uses_kernels
from normbt_kernels.ops.launcher import Launch, Plans, kinds
from normbt_kernels.ops.library import define_op, is_watched, without_gradients
from normbt_kernels.ops.on_cpu import distances_on_cpu
from normbt_kernels.ops.pairs import RowArguments, RowPairs, RowStrides, accumulate_dtype, load_tile, locate_pairs


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "sequence_length"])
def _measure_distance_kernel(
    rows, distance_ptr, num_pairs, num_rows, sequence_length, hidden_size,
    LAYOUT: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Each program: every num_programs-th block of BLOCK_P pairs. distance_ptr: (P,)."""
    first_columns = tl.arange(0, BLOCK_H)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_pairs, BLOCK_P), tl.num_programs(0), num_stages=STAGES):
        pair = tl.cast(block, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        chosen_offset, rejected_offset, exists = locate_pairs(rows, pair, num_pairs, num_rows, sequence_length, LAYOUT)
        if ONE_BLOCK:
            chosen = load_tile(rows.chosen, chosen_offset, exists, first_columns, hidden_size, ACC)
            delta = chosen - load_tile(rows.rejected, rejected_offset, exists, first_columns, hidden_size, ACC)
            square = delta * delta
        else:
            square = tl.zeros([BLOCK_P, BLOCK_H], ACC)
            for start in range(0, hidden_size, BLOCK_H):
                columns = start + first_columns
                chosen = load_tile(rows.chosen, chosen_offset, exists, columns, hidden_size, ACC)
                delta = chosen - load_tile(rows.rejected, rejected_offset, exists, columns, hidden_size, ACC)
                square += delta * delta
        distance = tl.where(exists, tl.sqrt(tl.sum(square, axis=1)), float("nan"))
        tl.store(distance_ptr + pair, distance, mask=pair < num_pairs)


class DistancePlan:
    def __init__(self, rows: RowPairs, distance: Tensor):
        shape = rows.launch_shape(distance.dtype, head=False)
        self.strides = RowStrides(rows)
        self.sizes = rows.num_pairs, rows.chosen.shape[0], rows.sequence_length, rows.hidden_size
        self.measure = Launch(
            _measure_distance_kernel,
            (shape.num_programs, 1, 1),
            shape.num_warps,
            self._arguments,
            {0: RowArguments.named},
            LAYOUT=rows.layout,
            ONE_BLOCK=shape.block_hidden >= rows.hidden_size,
            BLOCK_P=shape.block_rows,
            BLOCK_H=shape.block_hidden,
            ACC=triton_dtype(distance.dtype),
            STAGES=shape.num_stages,
        )

    def _arguments(self, chosen, rejected, pairs, last_token, distance) -> tuple:
        return self.strides.arguments(chosen, rejected, pairs, last_token), distance, *self.sizes

    def run(self, rows: RowPairs, distance: Tensor) -> None:
        self.measure((*rows[:4], distance))


_plans: Plans[DistancePlan] = Plans()


def _launch_measure_distance(rows: RowPairs, distance: Tensor) -> None:
    rows = rows.for_kernels()
    kind = distance.device, rows.layout, kinds((*rows[:4], distance))
    run_on(distance.device, _plans.find(kind, DistancePlan, rows, distance).run, rows, distance)


def _pair_distance_fake(chosen, rejected, pairs, last_token, layout, dtype):
    return chosen.new_empty(RowPairs(chosen, rejected, pairs, last_token, layout).num_pairs, dtype=dtype)


def _pair_distance(
    chosen: Tensor, rejected: Tensor, pairs: Tensor | None, last_token: Tensor | None, layout: str, dtype: torch.dtype
) -> Tensor:
    rows = RowPairs(chosen, rejected, pairs, last_token, layout)
    rows.check_range()
    if rows.num_pairs == 0 or uses_kernels(chosen.device):
        distance = chosen.new_empty(rows.num_pairs, dtype=dtype)
        if rows.num_pairs > 0:
            _launch_measure_distance(rows, distance)
        return distance
    if chosen.device.type == "cpu":
        return distances_on_cpu(rows, dtype)
    chosen_rows, rejected_rows = rows.gather(dtype)
    return torch.linalg.vector_norm(chosen_rows - rejected_rows, dim=-1)


_pair_distance_op = define_op(
    "pair_distance(Tensor chosen, Tensor rejected, Tensor? pairs, Tensor? last_token, str layout, ScalarType dtype)"
    " -> Tensor",
    fake=_pair_distance_fake,
    autograd=without_gradients,
)(_pair_distance)


def measure_distances(rows: RowPairs, dtype: torch.dtype | None = None) -> Tensor:
    """rho (P,) of the pairs, without gradient; in `dtype`, or in that which the rows are accumulated in."""
    dtype = dtype or accumulate_dtype(rows.chosen, rows.rejected)
    rows = rows.detach()
    run = _pair_distance_op if is_watched((rows.chosen, rows.rejected)) else _pair_distance
    return run(*rows, dtype)
