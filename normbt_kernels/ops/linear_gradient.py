"""Backward of the linear form: a rank-one outer product that reads no hidden states.

    grad h[n] = c_n v        c_n = sum of dloss/dr over the pairs in which row n serves, times their upstream
    grad v    = u sum_p (...)   made by the forward pass for u = 1, scaled here by the upstream scalar u

Of a pooled (N, S, H) only the pooled positions are not 0. A row may serve in many explicit pairs: the forward pass has
listed them, in any order, and they are sorted here before they are summed, without atomics, so the same inputs give
the same bits. A row in more pairs than a list holds looks through all pairs.

With reduction "none" each pair has its own upstream gradient, which the forward pass cannot know: then, and
only then, the rows are read again for grad v.

Bytes: writes N*H*s (pooled: N*S*H*s). Launches: one, and with explicit pairs or reduction "none" one before it for the
sums over pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import num_multiprocessors, on_device, triton_dtype, uses_kernels
from normbt_kernels.ops.launch import LaunchShape, cdiv
from normbt_kernels.ops.library import define_op
from normbt_kernels.ops.pair_loss import ROW_ENTRIES, accumulate_head_gradient, load_each, sum_partials
from normbt_kernels.ops.pairs import PairArguments, RowPairs, Vector, split_pairs


@triton.jit
def load_upstream(upstream, pair, exists, PER_PAIR: tl.constexpr, ACC: tl.constexpr):
    """What comes from above for each pair, or one scalar for all of them."""
    if PER_PAIR:
        gradient = tl.load(upstream.ptr + pair * upstream.stride, mask=exists, other=0.0).to(ACC)
    else:
        gradient = tl.load(upstream.ptr).to(ACC)
    return gradient


@triton.jit
def sum_listed_pairs(row, exists, count, num_rows, num_pairs, gradient_ptr, upstream, row_entries_ptr,
                     PER_PAIR: tl.constexpr, ROW_ENTRIES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """c_n of a block of rows, none of which serves in more pairs than a list holds."""
    place = tl.arange(0, ROW_ENTRIES)
    listed = exists[:, None] & (place[None, :] < count[:, None])
    out_of_list = 2 * num_pairs
    entry = tl.load(row_entries_ptr + (1 + place.to(tl.int64))[None, :] * num_rows + row[:, None], mask=listed, other=0)
    entry = tl.sort(tl.where(listed, entry.to(tl.int64), out_of_list))
    listed = entry < out_of_list
    gradient = tl.load(gradient_ptr + entry, mask=listed, other=0.0)
    gradient *= load_upstream(upstream, entry % num_pairs, listed, PER_PAIR, ACC)
    return tl.sum(gradient, axis=1)


@triton.jit
def sum_all_pairs(row, num_pairs, gradient_ptr, upstream, index_ptr, index_stride, index_side_stride,
                  PER_PAIR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """c_n of a block of rows, by a look at every pair."""
    coefficient = tl.zeros([BLOCK_N], ACC)
    for start in range(0, num_pairs, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P).to(tl.int64)
        in_range = pair < num_pairs
        upstream_gradient = load_upstream(upstream, pair, in_range, PER_PAIR, ACC)
        for side in tl.static_range(2):
            served = tl.load(index_ptr + pair * index_stride + side * index_side_stride, mask=in_range, other=-1)
            gradient = tl.load(gradient_ptr + side * num_pairs + pair, mask=in_range, other=0.0) * upstream_gradient
            coefficient += tl.sum(tl.where(row[:, None] == served[None, :], gradient[None, :], 0.0), axis=1)
    return coefficient


@triton.jit
def _sum_over_pairs_kernel(
    rows, gradient_ptr, upstream, coefficient_ptr, index_ptr, index_stride, index_side_stride, row_entries_ptr,
    num_rows, num_pairs, hidden_size, partial_ptr, PER_PAIR: tl.constexpr,
    ROW_ENTRIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    num_pairs = tl.cast(num_pairs, tl.int64)
    # 1. of explicit pairs: each row's coefficient
    if coefficient_ptr is not None:
        for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
            row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            exists = row < num_rows
            count = tl.load(row_entries_ptr + row, mask=exists, other=0)
            if tl.max(count, axis=0) <= ROW_ENTRIES:
                coefficient = sum_listed_pairs(
                    row, exists, count, num_rows, num_pairs, gradient_ptr, upstream, row_entries_ptr,
                    PER_PAIR, ROW_ENTRIES, ACC,
                )  # fmt: skip
            else:
                coefficient = sum_all_pairs(
                    row, num_pairs, gradient_ptr, upstream, index_ptr, index_stride, index_side_stride,
                    PER_PAIR, BLOCK_N, 128, ACC,
                )  # fmt: skip
            tl.store(coefficient_ptr + row, coefficient, mask=exists)
    # 2. of reduction "none": the head's gradient
    if partial_ptr is not None:
        slot = partial_ptr + tl.program_id(0) * tl.cast(hidden_size + 1, tl.int64)
        bias_gradient = accumulate_head_gradient(
            rows, gradient_ptr, upstream.ptr, upstream.stride, slot, BLOCK_P, BLOCK_H, ACC
        )
        tl.store(slot + hidden_size, bias_gradient)


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
    gradient_ptr, upstream, coefficient_ptr, head_weight, head_gradient_ptr, num_partials,
    last_token, num_rows, sequence_length, num_pairs, hidden_size,
    INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
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
                if coefficient_ptr is None:
                    pair = row // 2 if INTERLEAVED else row % num_pairs
                    side = row % 2 if INTERLEAVED else row // num_pairs
                    coefficient = tl.load(gradient_ptr + side * num_pairs + pair, mask=served, other=0.0)
                    coefficient *= load_upstream(upstream, pair, served, PER_PAIR, ACC)
                else:
                    coefficient = tl.load(coefficient_ptr + row, mask=served, other=0.0)
                gradient = tl.where(served[:, None], coefficient[:, None] * head[None, :], 0.0)
            out = hidden_gradient_ptr + position[:, None] * hidden_size + columns[None, :]
            mask = (row < num_rows)[:, None] & (columns < hidden_size)[None, :]
            tl.store(out, round_to(gradient, hidden_gradient_ptr.dtype.element_ty), mask=mask)
    # 2. the head, by the programs of the first block of rows
    if head_gradient_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other on the device)
        if tl.program_id(0) == 0:
            scale = tl.full([1], 1.0, ACC)
            if not PER_PAIR:
                scale *= tl.load(upstream.ptr).to(ACC)
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
    row_entries: Tensor  # of explicit pairs, which of them each row serves in

    @property
    def per_pair(self) -> bool:
        return self.loss_gradient.dim() == 1


def _launch_linear_gradient(
    result: Gradients, upstream: Upstream, head_weight: Tensor, hidden: Tensor | None, pairs: Tensor | None,
    interleaved: bool, last_token: Tensor | None, hidden_shape: list[int],
) -> None:  # fmt: skip
    gradient, loss_gradient, head_gradient, row_entries = upstream
    acc, device = triton_dtype(gradient.dtype), gradient.device
    needs_hidden, needs_weight, needs_bias = (tensor.numel() > 0 for tensor in result)
    num_rows, num_pairs, hidden_size = hidden_shape[0], gradient.shape[1], hidden_shape[-1]
    num_partials, coefficient = 1, None
    if hidden is not None or (pairs is not None and needs_hidden):
        rows = None if hidden is None else _rows(hidden, pairs, interleaved, last_token)
        shape = LaunchShape.for_pairs(num_pairs, hidden_size, 4, num_multiprocessors(device))
        block_rows = 32
        num_programs = min(cdiv(num_rows, block_rows), shape.num_programs)
        if rows is not None:
            shape = rows.launch_shape()
            num_programs = num_partials = shape.num_programs
            head_gradient = gradient.new_empty(num_partials, hidden_size + 1)
        if pairs is not None and needs_hidden:
            coefficient = gradient.new_empty(num_rows)
        _sum_over_pairs_kernel[(num_programs,)](
            None if rows is None else PairArguments.of(rows),
            gradient,
            Vector.of(loss_gradient),
            coefficient,
            pairs,
            *((0, 0) if pairs is None else pairs.stride()),
            row_entries if coefficient is not None else None,
            num_rows,
            num_pairs,
            hidden_size,
            None if rows is None else head_gradient,
            PER_PAIR=upstream.per_pair,
            ROW_ENTRIES=ROW_ENTRIES,
            BLOCK_N=block_rows,
            BLOCK_P=shape.block_rows,
            BLOCK_H=shape.block_hidden,
            ACC=acc,
            num_warps=shape.num_warps,
        )
    num_positions = num_rows * (hidden_shape[1] if last_token is not None else 1)
    shape = LaunchShape.for_rows(num_positions if needs_hidden else 1, hidden_size, num_multiprocessors(device))
    _write_gradient_kernel[(shape.num_programs, cdiv(hidden_size, shape.block_hidden))](
        result.hidden if needs_hidden else None,
        result.head_weight if needs_weight else None,
        result.head_bias if needs_bias else None,
        gradient,
        Vector.of(loss_gradient),
        coefficient,
        Vector.of(head_weight),
        head_gradient if needs_weight or needs_bias else None,
        num_partials,
        Vector.of(last_token),
        num_rows,
        hidden_shape[1] if last_token is not None else 1,
        num_pairs,
        hidden_size,
        INTERLEAVED=interleaved,
        PER_PAIR=upstream.per_pair,
        BLOCK_N=shape.block_rows,
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
    gradient, loss_gradient, head_gradient, row_entries, head_weight, hidden, pairs, interleaved, last_token,
    hidden_shape, hidden_dtype, bias_dtype, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    return (
        gradient.new_empty(hidden_shape if needs_hidden else (0,), dtype=hidden_dtype),
        gradient.new_empty(hidden_shape[-1] if needs_weight else 0, dtype=head_weight.dtype),
        gradient.new_empty(() if needs_bias else (0,), dtype=bias_dtype),
    )


@define_op(
    "linear_gradient(Tensor gradient, Tensor loss_gradient, Tensor head_gradient, Tensor row_entries,"
    " Tensor head_weight, Tensor? hidden, Tensor? pairs, bool interleaved, Tensor? last_token,"
    " SymInt[] hidden_shape, ScalarType hidden_dtype, ScalarType bias_dtype,"
    " bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    fake=_linear_gradient_fake,
)
def linear_gradient(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    result = Gradients(*_linear_gradient_fake(*arguments))
    upstream, others = Upstream(*arguments[:4]), arguments[4:10]
    if upstream.gradient.shape[1] == 0:
        for tensor in result:
            tensor.zero_()
    elif uses_kernels(upstream.gradient.device):
        with on_device(upstream.gradient.device):
            _launch_linear_gradient(result, upstream, *others)
    else:
        _compute_linear_gradient(result, upstream, *others)
    return tuple(result)
