"""Backward of the linear form: a rank-one outer product that reads no hidden states.

    grad h[n] = c_n v        c_n = sum of dloss/dr over the pairs in which row n serves, times their upstream
    grad v    = u sum_p (...)   made by the forward pass for u = 1, scaled here by the upstream scalar u

Of a pooled (N, S, H) only the pooled positions are not 0. A row may serve in many explicit pairs: its pairs
are summed in their order, without atomics, so the same inputs give the same bits.

With reduction "none" each pair has its own upstream gradient, which the forward pass cannot know: then, and
only then, the rows are read again for grad v.

Explicit pairs are found by each tile of rows looking through all of them, and skipping the blocks of pairs that
name none of its rows: cheap where the pairs of a prompt stand together, P comparisons per row where they do not.

Bytes: writes N*H*s (pooled: N*S*H*s). Launches: one (reduction "none" with a trained head: two).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import num_multiprocessors, on_device, triton_dtype, uses_kernels
from normbt_kernels.ops.launch import LaunchShape, cdiv
from normbt_kernels.ops.library import define_op
from normbt_kernels.ops.pair_loss import load_each, sum_partials
from normbt_kernels.ops.pairs import PairArguments, RowPairs, Vector, load_tile, locate_pairs, split_pairs


@triton.jit
def _accumulate_head_gradient_kernel(
    rows, gradient_ptr, upstream, partial_ptr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr
):
    # Columns outside, pairs inside: each program sums its own pairs for one block of columns at a time.
    program = tl.program_id(0)
    num_pairs = tl.cast(rows.num_pairs, tl.int64)
    bias_gradient = tl.zeros([BLOCK_P], ACC)
    for start in range(0, rows.hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], ACC)
        for block in range(program, tl.cdiv(rows.num_pairs, BLOCK_P), tl.num_programs(0)):
            pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
            in_range = pair < num_pairs
            chosen_offset, rejected_offset, exists = locate_pairs(rows, pair)
            upstream_gradient = tl.load(upstream.ptr + pair * upstream.stride, mask=in_range, other=0.0).to(ACC)
            chosen_gradient = tl.load(gradient_ptr + pair, mask=in_range, other=0.0) * upstream_gradient
            rejected_gradient = tl.load(gradient_ptr + num_pairs + pair, mask=in_range, other=0.0) * upstream_gradient
            chosen = load_tile(rows, rows.chosen, chosen_offset, exists, columns, ACC)
            rejected = load_tile(rows, rows.rejected, rejected_offset, exists, columns, ACC)
            # g delta + k (h_c + h_r): the difference first, as in the forward pass.
            centering = 0.5 * (chosen_gradient + rejected_gradient)
            gradient = 0.5 * (chosen_gradient - rejected_gradient)
            part = gradient[:, None] * (chosen - rejected) + centering[:, None] * (chosen + rejected)
            total += tl.sum(part, axis=0)
            if start == 0:
                bias_gradient += 2.0 * centering
        slot = partial_ptr + program * (rows.hidden_size + 1)
        tl.store(slot + columns, total, mask=columns < rows.hidden_size)
    tl.store(partial_ptr + program * (rows.hidden_size + 1) + rows.hidden_size, tl.sum(bias_gradient))


@triton.jit
def row_coefficient(
    row, exists, num_pairs, gradient_ptr, upstream, index_ptr, index_stride, index_side_stride,
    INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """c_n of a block of rows."""
    if index_ptr is None:
        pair = row // 2 if INTERLEAVED else row % num_pairs
        side = row % 2 if INTERLEAVED else row // num_pairs
        coefficient = tl.load(gradient_ptr + side * num_pairs + pair, mask=exists, other=0.0)
        coefficient *= tl.load(upstream.ptr + pair * upstream.stride, mask=exists, other=0.0).to(ACC)
    else:
        coefficient = tl.zeros([BLOCK_N], ACC)
        lowest = tl.min(row, axis=0)
        highest = tl.max(row, axis=0)
        for start in range(0, num_pairs, BLOCK_P):
            pair = start + tl.arange(0, BLOCK_P).to(tl.int64)
            in_range = pair < num_pairs
            chosen_row = tl.load(index_ptr + pair * index_stride, mask=in_range, other=-1)
            rejected_row = tl.load(index_ptr + pair * index_stride + index_side_stride, mask=in_range, other=-1)
            # The pairs of a prompt stand together as a rule, so most blocks of pairs name none of these rows.
            chosen_near = (chosen_row >= lowest) & (chosen_row <= highest)
            rejected_near = (rejected_row >= lowest) & (rejected_row <= highest)
            if tl.max((chosen_near | rejected_near).to(tl.int32), axis=0) > 0:
                upstream_gradient = tl.load(upstream.ptr + pair * upstream.stride, mask=in_range, other=0.0).to(ACC)
                chosen = tl.load(gradient_ptr + pair, mask=in_range, other=0.0) * upstream_gradient
                rejected = tl.load(gradient_ptr + num_pairs + pair, mask=in_range, other=0.0) * upstream_gradient
                part = tl.where(row[:, None] == chosen_row[None, :], chosen[None, :], 0.0)
                part += tl.where(row[:, None] == rejected_row[None, :], rejected[None, :], 0.0)
                coefficient += tl.sum(part, axis=1)
    return coefficient


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """`value` in the dtype of a gradient; to 16 bits through fp32, the only way that every Triton backend knows."""
    if dtype.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def write_head_gradient(
    out_ptr, index, head_gradient_ptr, num_partials, columns, mask, num_columns, scale,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    total = sum_partials(head_gradient_ptr, num_partials, columns, num_columns, BLOCK_K, BLOCK_H, ACC)
    tl.store(out_ptr + index, round_to(total * scale, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _write_gradient_kernel(
    hidden_gradient_ptr, weight_gradient_ptr, bias_gradient_ptr,
    gradient_ptr, upstream, head_weight, head_gradient_ptr, num_partials,
    index_ptr, index_stride, index_side_stride, last_token, num_rows, sequence_length, num_pairs, hidden_size,
    INTERLEAVED: tl.constexpr, SCALE_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    num_pairs = tl.cast(num_pairs, tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    # 1. the rows: position s of sequence n is row n where it is the pooled one, and 0 elsewhere
    if hidden_gradient_ptr is not None:
        head = load_each(head_weight, columns, columns < hidden_size, ACC)
        num_tiles = tl.cdiv(num_rows * tl.cast(sequence_length, tl.int64), BLOCK_N)
        for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            position = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            row = position // sequence_length
            served = row < num_rows
            if last_token.ptr is not None:
                token = tl.load(last_token.ptr + row * last_token.stride, mask=served, other=-1).to(tl.int64)
                served = served & (token == position % sequence_length)
            gradient = tl.zeros([BLOCK_N, BLOCK_H], ACC)
            if tl.max(served.to(tl.int32), axis=0) > 0:
                coefficient = row_coefficient(
                    row, served, num_pairs, gradient_ptr, upstream, index_ptr, index_stride, index_side_stride,
                    INTERLEAVED, BLOCK_N, BLOCK_P, ACC,
                )  # fmt: skip
                gradient = tl.where(served[:, None], coefficient[:, None] * head[None, :], 0.0)
            out = hidden_gradient_ptr + position[:, None] * hidden_size + columns[None, :]
            mask = (row < num_rows)[:, None] & (columns < hidden_size)[None, :]
            tl.store(out, round_to(gradient, hidden_gradient_ptr.dtype.element_ty), mask=mask)
    # 2. the head, by the programs of the first block of rows
    if head_gradient_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other on the device)
        if tl.program_id(0) == 0:
            scale = tl.full([1], 1.0, ACC)
            if SCALE_HEAD:
                scale = tl.load(upstream.ptr + tl.arange(0, 1)).to(ACC)
            if weight_gradient_ptr is not None:
                write_head_gradient(
                    weight_gradient_ptr, columns, head_gradient_ptr, num_partials, columns, columns < hidden_size,
                    hidden_size + 1, scale, BLOCK_K, BLOCK_H, ACC,
                )  # fmt: skip
            if bias_gradient_ptr is not None:
                only = tl.arange(0, 1)
                write_head_gradient(
                    bias_gradient_ptr, only, head_gradient_ptr, num_partials, hidden_size + only,
                    tl.program_id(1) + only == 0, hidden_size + 1, scale, BLOCK_K, 1, ACC,
                )  # fmt: skip


class Gradients(NamedTuple):
    """Gradients of the three inputs; (0,) where one is not wanted, and then nothing is computed for it."""

    hidden: Tensor  # (N, H) or (N, S, H), contiguous
    head_weight: Tensor  # (H,)
    head_bias: Tensor  # ()


class Upstream(NamedTuple):
    """What backward knows: the pairs' own gradients (2, P), chosen and rejected, and what comes from above."""

    gradient: Tensor  # (2, P)
    loss_gradient: Tensor  # (), or (P,) with reduction "none"
    head_gradient: Tensor  # (H + 1,) for an upstream of 1; (0,) with reduction "none"

    @property
    def per_pair(self) -> bool:
        return self.loss_gradient.dim() == 1


def _launch_linear_gradient(
    result: Gradients, upstream: Upstream, head_weight: Tensor, hidden: Tensor | None, pairs: Tensor | None,
    interleaved: bool, last_token: Tensor | None, hidden_shape: list[int],
) -> None:  # fmt: skip
    gradient, loss_gradient, head_gradient = upstream
    acc, device = triton_dtype(gradient.dtype), gradient.device
    num_pairs, hidden_size = gradient.shape[1], hidden_shape[-1]
    num_partials = 1
    if hidden is not None:
        rows = _rows(hidden, pairs, interleaved, last_token)
        shape = rows.launch_shape()
        num_partials = shape.num_programs
        head_gradient = torch.empty(num_partials, hidden_size + 1, device=device, dtype=gradient.dtype)
        _accumulate_head_gradient_kernel[(num_partials,)](
            PairArguments.of(rows),
            gradient,
            Vector.of(loss_gradient),
            head_gradient,
            BLOCK_P=shape.block_rows,
            BLOCK_H=shape.block_hidden,
            ACC=acc,
            num_warps=shape.num_warps,
        )
    needs_hidden, needs_weight, needs_bias = (tensor.numel() > 0 for tensor in result)
    num_positions = hidden_shape[0] * (hidden_shape[1] if last_token is not None else 1)
    shape = LaunchShape.for_rows(num_positions if needs_hidden else 1, hidden_size, num_multiprocessors(device))
    _write_gradient_kernel[(shape.num_programs, cdiv(hidden_size, shape.block_hidden))](
        result.hidden if needs_hidden else None,
        result.head_weight if needs_weight else None,
        result.head_bias if needs_bias else None,
        gradient,
        Vector.of(loss_gradient),
        Vector.of(head_weight),
        head_gradient if needs_weight or needs_bias else None,
        num_partials,
        pairs,
        *((0, 0) if pairs is None else pairs.stride()),
        Vector.of(last_token),
        hidden_shape[0],
        hidden_shape[1] if last_token is not None else 1,
        num_pairs,
        hidden_size,
        INTERLEAVED=interleaved,
        SCALE_HEAD=not upstream.per_pair,
        BLOCK_N=shape.block_rows,
        BLOCK_P=256,
        BLOCK_H=shape.block_hidden,
        BLOCK_K=4,  # x 1024 columns: more partials at a time spill to local memory
        ACC=acc,
        num_warps=shape.num_warps,
    )


def _compute_linear_gradient(
    result: Gradients, upstream: Upstream, head_weight: Tensor, hidden: Tensor | None, pairs: Tensor | None,
    interleaved: bool, last_token: Tensor | None, hidden_shape: list[int],
) -> None:  # fmt: skip
    """The closed form in PyTorch operators."""
    gradient = upstream.gradient * upstream.loss_gradient
    dtype = gradient.dtype
    if result.hidden.numel() > 0:
        if pairs is not None:
            coefficient = gradient.new_zeros(hidden_shape[0]).index_add_(0, pairs.T.reshape(-1), gradient.reshape(-1))
        else:
            coefficient = (gradient.T if interleaved else gradient).reshape(-1)
        # `out=` rounds the product to the dtype of hidden at once, with no fp32 copy of it.
        column, row = coefficient[:, None], head_weight.to(dtype)[None, :]
        if last_token is None:
            torch.mul(column, row, out=result.hidden)
        else:
            sequence = torch.arange(hidden_shape[0], device=gradient.device)
            result.hidden.zero_()[sequence, last_token] = (column * row).to(result.hidden.dtype)
    if not upstream.per_pair:
        weight_gradient, bias_gradient = (upstream.head_gradient * upstream.loss_gradient).tensor_split([-1])
    elif hidden is not None:
        rows = _rows(hidden, pairs, interleaved, last_token)
        weight_gradient, bias_gradient = gradient.new_zeros(rows.hidden_size), gradient.sum(dim=0).sum()
        for block in rows.blocks():
            chosen, rejected = rows.gather(block, dtype)
            chosen_gradient, rejected_gradient = gradient[:, block]
            # g delta + k (h_c + h_r): the difference first, as in the forward pass.
            weight_gradient.addmv_((chosen - rejected).T, (chosen_gradient - rejected_gradient) / 2)
            weight_gradient.addmv_((chosen + rejected).T, (chosen_gradient + rejected_gradient) / 2)
    if result.head_weight.numel() > 0:
        result.head_weight.copy_(weight_gradient)
    if result.head_bias.numel() > 0:
        result.head_bias.copy_(bias_gradient.squeeze())


def _rows(hidden: Tensor, pairs: Tensor | None, interleaved: bool, last_token: Tensor | None) -> RowPairs:
    layout = "interleaved" if interleaved else "halves"
    return split_pairs(hidden, layout if pairs is None else pairs, last_token)


def _linear_gradient_fake(
    gradient, loss_gradient, head_gradient, head_weight, hidden, pairs, interleaved, last_token,
    hidden_shape, hidden_dtype, bias_dtype, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    return (
        gradient.new_empty(hidden_shape if needs_hidden else (0,), dtype=hidden_dtype),
        gradient.new_empty(hidden_shape[-1] if needs_weight else 0, dtype=head_weight.dtype),
        gradient.new_empty(() if needs_bias else (0,), dtype=bias_dtype),
    )


@define_op(
    "linear_gradient(Tensor gradient, Tensor loss_gradient, Tensor head_gradient, Tensor head_weight, Tensor? hidden,"
    " Tensor? pairs, bool interleaved, Tensor? last_token, SymInt[] hidden_shape, ScalarType hidden_dtype,"
    " ScalarType bias_dtype, bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    fake=_linear_gradient_fake,
)
def linear_gradient(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    result = Gradients(*_linear_gradient_fake(*arguments))
    upstream, others = Upstream(*arguments[:3]), arguments[3:9]
    if upstream.gradient.shape[1] == 0:
        for tensor in result:
            tensor.zero_()
    elif uses_kernels(upstream.gradient.device):
        with on_device(upstream.gradient.device):
            _launch_linear_gradient(result, upstream, *others)
    else:
        _compute_linear_gradient(result, upstream, *others)
    return tuple(result)
