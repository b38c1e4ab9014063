"""Distance of each pair, and nothing else: rho_p = ||h_c - h_r||_2 with one read of each row.

Bytes: reads 2*P*H*s, writes 4*P. Each program strides over blocks of pairs, so P may be anything; a row
longer than a block is walked in blocks. No gradient: the weight that the distance feeds is a stop-gradient.
"""

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import on_device, triton_dtype, uses_kernels
from normbt_kernels.ops.launch import LaunchShape
from normbt_kernels.ops.library import define_op
from normbt_kernels.ops.pairs import PairArguments, RowPairs, accumulate_dtype, measure_distance


@triton.jit
def _measure_distance_kernel(
    rows, distance_ptr, distance_sum_ptr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr
):
    total = tl.zeros([BLOCK_P], ACC)
    for block in range(tl.program_id(0), tl.cdiv(rows.num_pairs, BLOCK_P), tl.num_programs(0)):
        pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
        distance = measure_distance(rows, pair, BLOCK_P, BLOCK_H, ACC)
        tl.store(distance_ptr + pair, distance, mask=pair < rows.num_pairs)
        total += distance
    if distance_sum_ptr is not None:
        tl.store(distance_sum_ptr + tl.program_id(0), tl.sum(total))


def launch_measure_distance(rows: RowPairs, distance: Tensor, shape: LaunchShape, distance_sum: Tensor | None) -> None:
    """Writes rho into `distance` (P,), and each program's sum of it into `distance_sum` (programs,) if given."""
    _measure_distance_kernel[(shape.num_programs,)](
        PairArguments.of(rows),
        distance,
        distance_sum,
        BLOCK_P=shape.block_rows,
        BLOCK_H=shape.block_hidden,
        ACC=triton_dtype(distance.dtype),
        num_warps=shape.num_warps,
    )


def _pair_distance_fake(chosen, rejected, pairs, chosen_token, rejected_token):
    rows = RowPairs(chosen, rejected, pairs, chosen_token, rejected_token)
    return chosen.new_empty(rows.num_pairs, dtype=accumulate_dtype(chosen, rejected))


@define_op(
    "pair_distance(Tensor chosen, Tensor rejected, Tensor? pairs, Tensor? chosen_token, Tensor? rejected_token)"
    " -> Tensor",
    fake=_pair_distance_fake,
)
def pair_distance(
    chosen: Tensor, rejected: Tensor, pairs: Tensor | None, chosen_token: Tensor | None, rejected_token: Tensor | None
) -> Tensor:
    rows = RowPairs(chosen, rejected, pairs, chosen_token, rejected_token)
    rows.check_range()
    distance = chosen.new_empty(rows.num_pairs, dtype=accumulate_dtype(chosen, rejected))
    if rows.num_pairs == 0:
        return distance
    if uses_kernels(chosen.device):
        with on_device(chosen.device):
            launch_measure_distance(rows, distance, rows.launch_shape(), None)
        return distance
    for block in rows.blocks():
        chosen_rows, rejected_rows = rows.gather(block, distance.dtype)
        torch.linalg.vector_norm(chosen_rows - rejected_rows, dim=-1, out=distance[block])
    return distance
