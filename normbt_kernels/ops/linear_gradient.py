"""Backward of the linear form: a rank-one outer product that reads no hidden states.

    grad h[n] = c_n v        c_n = sum of dloss/dr over the pairs in which row n serves, times their upstream
    grad v    = u sum_p (...)   made by the forward pass for u = 1, scaled here by the upstream scalar u

Of a pooled (N, S, H) only the pooled positions are not 0. A row may serve in many explicit pairs: pairs_of_rows.py sums
them first.

With reduction "none" each pair has its own upstream gradient, which the forward pass cannot know: then, and
only then, the rows are read again for grad v.

Bytes: writes N*H*s (pooled: N*S*H*s). Launches: one; before it, those for explicit pairs, and one for reduction "none"
with a trained head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import processors_of, run_on, triton_dtype, uses_kernels
from normbt_kernels.ops.launch import LaunchShape, cdiv
from normbt_kernels.ops.launcher import Launch, Plans, kinds
from normbt_kernels.ops.library import define_op, refuse_gradients, with_empty_tables
from normbt_kernels.ops.on_cpu import are_few, compute_few_gradients
from normbt_kernels.ops.pair_loss import accumulate_head_gradient, sum_partials
from normbt_kernels.ops.pairs import RowArguments, RowPairs, RowStrides, Vector, cast, load_each, vector_stride
from normbt_kernels.ops.pairs_of_rows import PairsOfRows, load_upstream

ONCE = "the NormBT losses cannot be differentiated twice"


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "sequence_length"])
def _sum_head_gradient_kernel(
    rows, gradient_ptr, upstream, partial_ptr, num_pairs, num_rows, sequence_length, hidden_size, num_columns,
    LAYOUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad v of reduction "none", each program its pairs. gradient_ptr: (2, P). upstream: (P,).

    partial_ptr: (programs, num_columns), of which H + 1 columns are filled.
    """
    slot_ptr = partial_ptr + tl.program_id(0) * tl.cast(num_columns, tl.int64)
    accumulate_head_gradient(
        rows, gradient_ptr, upstream, slot_ptr, num_pairs, num_rows, sequence_length, hidden_size,
        LAYOUT, BLOCK_P, BLOCK_H, ACC,
    )  # fmt: skip


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """`value` in the dtype of a gradient; to 16 bits through fp32, the only way that every Triton backend knows."""
    if dtype.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit(do_not_specialize=["num_partials", "num_rows", "sequence_length", "num_pairs"])
def _write_gradient_kernel(
    hidden_gradient_ptr, weight_gradient_ptr, bias_gradient_ptr,
    gradient_ptr, upstream, coefficient_ptr, head_weight, head_gradient_ptr, num_partials,
    last_token, num_rows, sequence_length, num_pairs, hidden_size, num_columns,
    LAYOUT: tl.constexpr, PER_PAIR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_H columns of some tiles of BLOCK_N rows, and the head's gradient in the same columns.

    hidden_gradient_ptr: (N*S, H), weight_gradient_ptr: (H,), bias_gradient_ptr: (), each or none.
    gradient_ptr: (2, P). upstream: (P,), or one scalar. coefficient_ptr: (N,) of explicit pairs, or none.
    head_weight: (H,). head_gradient_ptr: (num_partials, num_columns) of which the first H + 1 count, or none.
    last_token: (N,), or none.
    """
    # Programs go along the columns first, so that those which run at once write to neighbouring memory.
    num_column_blocks = tl.cdiv(hidden_size, BLOCK_H)
    program, column_block = tl.program_id(0) // num_column_blocks, tl.program_id(0) % num_column_blocks
    columns = column_block * BLOCK_H + tl.arange(0, BLOCK_H)
    # 1. the rows: position s of sequence n is row n where it is the pooled one, and 0 elsewhere
    if hidden_gradient_ptr is not None:
        head = load_each(head_weight, columns, columns < hidden_size, ACC)
        # A tile lies in one sequence: one division finds it, where each position would need one of its own.
        tiles_of_sequence = tl.cdiv(sequence_length, BLOCK_N)
        num_tiles = tl.cdiv(tl.cast(num_rows, tl.int64), BLOCK_N)
        if last_token.ptr is not None:
            num_tiles = num_rows * tl.cast(tiles_of_sequence, tl.int64)
        tiles_each = tl.cdiv(num_tiles, tl.num_programs(0) // num_column_blocks)
        for tile in range(program * tiles_each, tl.minimum((program + 1) * tiles_each, num_tiles)):
            place = tl.arange(0, BLOCK_N)
            serves = True  # whether any position of the tile does
            if last_token.ptr is not None:
                sequence = tl.cast(tile, tl.int64) // tiles_of_sequence
                place += (tile % tiles_of_sequence).to(tl.int32) * BLOCK_N
                exists = place < sequence_length
                position = sequence * sequence_length + place
                token = tl.load(last_token.ptr + sequence * last_token.stride).to(tl.int64)
                served = exists & (place == token)
                serves = token // BLOCK_N == tile % tiles_of_sequence
                row = sequence + tl.zeros([BLOCK_N], tl.int64)
            else:
                position = tl.cast(tile, tl.int64) * BLOCK_N + place
                exists = position < num_rows
                served = exists
                row = position
            gradient = tl.zeros([BLOCK_N, BLOCK_H], ACC)
            if serves:
                if LAYOUT == "explicit":
                    coefficient = tl.load(coefficient_ptr + row, mask=served, other=0.0)
                else:
                    pair = row // 2 if LAYOUT == "interleaved" else row % num_pairs
                    side = row % 2 if LAYOUT == "interleaved" else row // num_pairs
                    coefficient = tl.load(gradient_ptr + side * num_pairs + pair, mask=served, other=0.0)
                    coefficient *= load_upstream(upstream, pair, served, PER_PAIR, ACC)
                gradient = tl.where(served[:, None], coefficient[:, None] * head[None, :], 0.0)
            out = hidden_gradient_ptr + position[:, None] * hidden_size + columns[None, :]
            mask = exists[:, None] & (columns < hidden_size)[None, :]
            tl.store(out, round_to(gradient, hidden_gradient_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")
    # 2. the head, by the programs of the first tiles
    if head_gradient_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other on the device)
        if program == 0:
            scale = tl.full([1], 1.0, ACC)
            if not PER_PAIR:
                scale *= tl.load(upstream.ptr).to(ACC)
            if weight_gradient_ptr is not None:
                exists = columns < hidden_size
                total = sum_partials(
                    head_gradient_ptr, num_partials, columns, exists, num_columns, BLOCK_K, BLOCK_H, ACC
                )
                tl.store(
                    weight_gradient_ptr + columns, round_to(total * scale, weight_gradient_ptr.dtype.element_ty), exists
                )
            if bias_gradient_ptr is not None:
                only = tl.arange(0, 1)
                exists = column_block + only == 0
                total = sum_partials(
                    head_gradient_ptr, num_partials, hidden_size + only, exists, num_columns, BLOCK_K, 1, ACC
                )
                tl.store(bias_gradient_ptr + only, round_to(total * scale, bias_gradient_ptr.dtype.element_ty), exists)


class Gradients(NamedTuple):
    """Gradients of the three inputs; None where one is not wanted, and then nothing is computed for it."""

    hidden: Tensor | None  # (N, H) or (N, S, H), contiguous
    head_weight: Tensor | None  # (H,)
    head_bias: Tensor | None  # ()

    @classmethod
    def allocate(
        cls, like: Tensor, head_weight: Tensor, layout: "Layout",
        hidden_dtype: torch.dtype, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool],
    ) -> "Gradients":  # fmt: skip
        shape, (needs_hidden, needs_weight, needs_bias) = layout.hidden_shape, needs
        return cls(
            like.new_empty(shape, dtype=hidden_dtype) if needs_hidden else None,
            like.new_empty(shape[-1], dtype=head_weight.dtype) if needs_weight else None,
            like.new_empty((), dtype=bias_dtype) if needs_bias else None,
        )


class Upstream(NamedTuple):
    """What backward knows: the pairs' own gradients, and what comes from above."""

    gradient: Tensor  # (2, P), chosen and rejected
    loss_gradient: Tensor  # (), or (P,) with reduction "none"
    head_gradient: Tensor | None  # (H + 1,) for an upstream of 1; not with reduction "none"

    @property
    def per_pair(self) -> bool:
        return self.loss_gradient.dim() == 1

    @property
    def num_pairs(self) -> int:
        return self.gradient.shape[1]


class Layout(NamedTuple):
    """Which row of the hidden states serves in which pair."""

    pairs: Tensor | None  # (P, 2) int64 of "explicit"
    last_token: Tensor | None  # (N,)
    name: str
    hidden_shape: list[int]  # (N, H), or (N, S, H) with `last_token`

    @property
    def num_positions(self) -> int:
        return self.hidden_shape[0] * self.sequence_length

    @property
    def sequence_length(self) -> int:
        return 1 if self.last_token is None else self.hidden_shape[1]

    def rows(self, hidden: Tensor) -> RowPairs:
        return RowPairs(hidden, hidden, self.pairs, self.last_token, self.name)


class GradientPlan:
    """The launches of a backward pass, and what it allocates."""

    def __init__(
        self, upstream: Upstream, head_weight: Tensor, hidden: Tensor | None, layout: Layout,
        hidden_dtype: torch.dtype, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool],
    ):  # fmt: skip
        needs_hidden, needs_weight, needs_bias = needs
        self.made = hidden_dtype, bias_dtype, needs
        num_rows, num_pairs, hidden_size = layout.hidden_shape[0], upstream.num_pairs, layout.hidden_shape[-1]
        per_pair, dtype, device = upstream.per_pair, upstream.gradient.dtype, upstream.gradient.device
        needs_head = needs_weight or needs_bias
        acc, num_partials = triton_dtype(dtype), int(needs_head)
        self.upstream_stride, self.head_stride = vector_stride(upstream.loss_gradient), vector_stride(head_weight)
        self.token_stride = vector_stride(layout.last_token)
        self.pairs_of_rows = self.sum_head = None
        if needs_hidden and layout.name == "explicit":
            self.pairs_of_rows = PairsOfRows(num_rows, *upstream[:2])
        if needs_head and per_pair:
            rows = layout.rows(hidden).for_kernels()
            shape = rows.launch_shape(dtype)
            num_partials = shape.num_programs
            self.sum_head = Launch(
                _sum_head_gradient_kernel, (num_partials, 1, 1), shape.num_warps, self._sum_head_arguments,
                {0: RowArguments.named, 2: Vector._make},
                LAYOUT=layout.name, BLOCK_P=shape.block_rows, BLOCK_H=shape.block_hidden, ACC=acc,
            )  # fmt: skip
            self.row_strides = RowStrides(rows)
            self.row_sizes = num_pairs, num_rows, rows.sequence_length, hidden_size, hidden_size + 1
        shape = LaunchShape.for_rows(
            layout.num_positions if needs_hidden else 1, hidden_size, processors_of(device).count
        )
        self.num_partials = num_partials
        self.sizes = num_rows, layout.sequence_length, num_pairs, hidden_size, hidden_size + 1
        self.write = Launch(
            _write_gradient_kernel,
            (cdiv(hidden_size, shape.block_hidden) * shape.num_programs, 1, 1),
            shape.num_warps,
            self._write_arguments,
            {4: Vector._make, 6: Vector._make, 9: Vector._make},
            LAYOUT=layout.name,
            PER_PAIR=per_pair,
            BLOCK_N=shape.block_rows,
            BLOCK_H=shape.block_hidden,
            BLOCK_K=16 // dtype.itemsize,  # x 1024 columns: more at a time spill to local memory
            ACC=acc,
        )

    def _write_arguments(
        self, hidden, weight, bias, gradient, loss_gradient, coefficient, head_weight, head_gradient, last_token
    ) -> tuple:
        return (
            hidden, weight, bias, gradient, (loss_gradient, self.upstream_stride), coefficient,
            (head_weight, self.head_stride), head_gradient, self.num_partials or 1,
            (last_token, self.token_stride), *self.sizes,
        )  # fmt: skip

    def _sum_head_arguments(self, chosen, rejected, pairs, last_token, gradient, loss_gradient, partials) -> tuple:
        rows = self.row_strides.arguments(chosen, rejected, pairs, last_token)
        return rows, gradient, (loss_gradient, self.upstream_stride), partials, *self.row_sizes

    def run(self, upstream: Upstream, head_weight: Tensor, hidden: Tensor | None, layout: Layout) -> Gradients:
        result = Gradients.allocate(upstream.gradient, head_weight, layout, *self.made)
        coefficient, head_gradient = None, upstream.head_gradient
        if self.pairs_of_rows is not None:
            coefficient = self.pairs_of_rows.run(layout.pairs, *upstream[:2])
        if self.sum_head is not None:
            head_gradient = self._sum_head_gradient(upstream, layout.rows(hidden).for_kernels())
        self.write(
            (
                *result,
                *upstream[:2],
                coefficient,
                head_weight,
                head_gradient if self.num_partials else None,
                layout.last_token,
            )
        )
        return result

    def _sum_head_gradient(self, upstream: Upstream, rows: RowPairs) -> Tensor:
        """The programs' parts of grad v and of the bias's gradient with reduction "none", (programs, H + 1)."""
        partials = upstream.gradient.new_empty(self.num_partials, rows.hidden_size + 1)
        self.sum_head((*rows[:4], *upstream[:2], partials))
        return partials


_plans: Plans[GradientPlan] = Plans()


def _launch_linear_gradient(
    upstream: Upstream, head_weight: Tensor, hidden: Tensor | None, layout: Layout,
    hidden_dtype: torch.dtype, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool],
) -> Gradients:  # fmt: skip
    device, call = upstream.gradient.device, (upstream, head_weight, hidden, layout)
    tensors = *upstream, head_weight, hidden, layout.pairs, layout.last_token
    kind = device, layout.name, tuple(layout.hidden_shape), hidden_dtype, bias_dtype, needs, kinds(tensors)
    plan = _plans.find(kind, GradientPlan, *call, hidden_dtype, bias_dtype, needs)
    return run_on(device, plan.run, *call)


def _compute_linear_gradient(
    upstream: Upstream, head_weight: Tensor, hidden: Tensor | None, layout: Layout,
    hidden_dtype: torch.dtype, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool],
) -> Gradients:  # fmt: skip
    """The closed form; None where a gradient is not wanted."""
    needs_hidden, needs_weight, needs_bias = needs
    each_serves_once = layout.pairs is None and layout.last_token is None
    reads_rows = upstream.per_pair and (needs_weight or needs_bias)
    if each_serves_once and not reads_rows and are_few(upstream.num_pairs, layout.hidden_shape[-1], head_weight.device):
        return Gradients(
            *compute_few_gradients(
                *upstream, head_weight, layout.name == "interleaved", hidden_dtype, bias_dtype, needs
            )
        )
    gradient = upstream.gradient * upstream.loss_gradient
    dtype = gradient.dtype
    hidden_gradient = weight_gradient = bias_gradient = None
    if needs_hidden:
        if layout.pairs is not None:
            coefficient = gradient.new_zeros(layout.hidden_shape[0])
            coefficient.index_add_(0, layout.pairs.T.reshape(-1), gradient.reshape(-1))
        else:
            coefficient = (gradient.T if layout.name == "interleaved" else gradient).reshape(-1)
        column, row = coefficient[:, None], cast(head_weight, dtype)
        # `out=` rounds the product to the dtype of hidden at once, with no fp32 copy of it.
        if layout.last_token is None:
            empty = gradient.new_empty(layout.hidden_shape, dtype=hidden_dtype)
            hidden_gradient = torch.mul(column, row, out=empty)
        else:
            sequence = torch.arange(layout.hidden_shape[0], device=gradient.device)
            hidden_gradient = gradient.new_zeros(layout.hidden_shape, dtype=hidden_dtype)
            hidden_gradient[sequence, layout.last_token] = (column * row).to(hidden_dtype)
    if reads_rows:
        rows = layout.rows(hidden)
        weight_gradient, bias_gradient = gradient.new_zeros(rows.hidden_size), gradient.sum(dim=0).sum()
        for pairs, block in rows.blocks():
            chosen, rejected = block.gather(dtype)
            chosen_gradient, rejected_gradient = gradient if pairs is None else gradient[:, pairs]
            # g delta + k (h_c + h_r): the difference first, as in the forward pass, and a sum in a cascade.
            difference = (chosen_gradient - rejected_gradient)[:, None] * (chosen - rejected)
            centering = (chosen_gradient + rejected_gradient)[:, None] * (chosen + rejected)
            weight_gradient += difference.add_(centering).sum(dim=0) / 2
    elif needs_weight or needs_bias:
        head_gradient = upstream.head_gradient * upstream.loss_gradient
        # A copy: an operator's results share no memory.
        weight_gradient, bias_gradient = head_gradient[:-1], head_gradient[-1].clone() if needs_bias else None
    return Gradients(
        hidden_gradient,
        cast(weight_gradient, head_weight.dtype) if needs_weight else None,
        cast(bias_gradient, bias_dtype) if needs_bias else None,
    )


def _linear_gradient_fake(
    gradient, loss_gradient, head_gradient, head_weight, hidden, pairs, last_token, layout,
    hidden_shape, hidden_dtype, bias_dtype, *needs,
):  # fmt: skip
    places = Layout(pairs, last_token, layout, hidden_shape)
    return with_empty_tables(Gradients.allocate(gradient, head_weight, places, hidden_dtype, bias_dtype, needs))


def _check_sizes(
    gradient, loss_gradient, head_gradient, head_weight, hidden, pairs, last_token, layout,
    hidden_shape, hidden_dtype, bias_dtype, needs_hidden, needs_weight, needs_bias,
) -> None:  # fmt: skip
    """The kernels go by these sizes, so a table that is smaller would be read beyond its end."""
    num_rows, hidden_size = hidden_shape[0], hidden_shape[-1]
    num_pairs = num_rows // 2 if pairs is None else pairs.shape[0]
    per_pair, needs_head = loss_gradient.dim() == 1, needs_weight or needs_bias
    expected = {
        "gradient": (gradient, (2, num_pairs)),
        "loss_gradient": (loss_gradient, (num_pairs,) if per_pair else ()),
        "head_weight": (head_weight, (hidden_size,)),
    }
    if needs_head and per_pair:
        expected["hidden"] = hidden, tuple(hidden_shape)
    elif needs_head:
        expected["head_gradient"] = head_gradient, (hidden_size + 1,)
    if last_token is not None:
        expected["last_token"] = last_token, (num_rows,)
    for name, (tensor, shape) in expected.items():
        if tensor is None or tensor.shape != shape:
            seen = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"normbt::linear_gradient: {name} must be {shape}, got {seen}")


def _refuse_second_gradients(run: Callable, *arguments) -> tuple[Tensor, ...]:
    given = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    gradients = run(*arguments)
    return refuse_gradients(ONCE, gradients, given) if torch.is_grad_enabled() and given else gradients


def linear_gradient(
    gradient: Tensor, loss_gradient: Tensor, head_gradient: Tensor | None, head_weight: Tensor, hidden: Tensor | None,
    pairs: Tensor | None, last_token: Tensor | None, layout: str, hidden_shape: list[int], hidden_dtype: torch.dtype,
    bias_dtype: torch.dtype, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> Gradients:  # fmt: skip
    upstream = Upstream(gradient, loss_gradient, head_gradient)
    places = Layout(pairs, last_token, layout, hidden_shape)
    needs = needs_hidden, needs_weight, needs_bias
    if gradient.shape[1] == 0:
        result = Gradients.allocate(gradient, head_weight, places, hidden_dtype, bias_dtype, needs)
        for tensor in result:
            if tensor is not None:
                tensor.zero_()
        return result
    run = _launch_linear_gradient if uses_kernels(gradient.device) else _compute_linear_gradient
    return run(upstream, head_weight, hidden, places, hidden_dtype, bias_dtype, needs)


@define_op(
    "linear_gradient(Tensor gradient, Tensor loss_gradient, Tensor? head_gradient,"
    " Tensor head_weight, Tensor? hidden, Tensor? pairs, Tensor? last_token, str layout,"
    " SymInt[] hidden_shape, ScalarType hidden_dtype, ScalarType bias_dtype,"
    " bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    fake=_linear_gradient_fake,
    autograd=_refuse_second_gradients,
)
def linear_gradient_op(*arguments) -> Gradients:
    _check_sizes(*arguments)
    return linear_gradient(*arguments)
