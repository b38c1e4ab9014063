"""Distance of each pair, and nothing else: rho_p = ||h_c - h_r||_2 with one read of each row.

Bytes: reads 2*P*H*s, writes 4*P. Each program strides over blocks of pairs, so P may be anything; a row
longer than a block is walked in blocks. No gradient: the weight that the distance feeds is a stop-gradient.
"""

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import on_device, triton_dtype, uses_kernels
from normbt_kernels.ops.library import define_op
from normbt_kernels.ops.pairs import PairArguments, RowPairs, accumulate_dtype, load_tile, locate_pairs


@triton.jit
def _measure_distance_kernel(rows, distance_ptr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(rows.num_pairs, BLOCK_P), tl.num_programs(0)):
        pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
        chosen_offset, rejected_offset, exists = locate_pairs(rows, pair)
        square = tl.zeros([BLOCK_P, BLOCK_H], ACC)
        for start in range(0, rows.hidden_size, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            chosen = load_tile(rows, rows.chosen, chosen_offset, exists, columns, ACC)
            delta = chosen - load_tile(rows, rows.rejected, rejected_offset, exists, columns, ACC)
            square += delta * delta
        distance = tl.where(exists, tl.sqrt(tl.sum(square, axis=1)), float("nan"))
        tl.store(distance_ptr + pair, distance, mask=pair < rows.num_pairs)


def _launch_measure_distance(rows: RowPairs, distance: Tensor) -> None:
    shape = rows.launch_shape()
    _measure_distance_kernel[(shape.num_programs,)](
        PairArguments.of(rows),
        distance,
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
            _launch_measure_distance(rows, distance)
        return distance
    for block in rows.blocks():
        chosen_rows, rejected_rows = rows.gather(block, distance.dtype)
        torch.linalg.vector_norm(chosen_rows - rejected_rows, dim=-1, out=distance[block])
    return distance
