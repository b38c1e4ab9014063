"""Where the two rows of each pair lie, in every layout, as two strided tensors.

    halves         pair p is rows p and p + N/2      slices [:N/2] and [N/2:]
    interleaved    pair p is rows 2p and 2p + 1      slices [0::2] and [1::2]
    explicit       pair p is rows pairs[p]           the whole tensor twice, and the (P, 2) row numbers
    pooled         of row n of (N, S, H), the position last_token[n]

Slices are views, so the kernels see one case: a row number, a stride, and perhaps two look-ups.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import num_multiprocessors
from normbt_kernels.ops.launch import LaunchShape

# Closed form: of each side 256 K elements, 1 MB in fp32, so that delta is still in a core's cache when it is reduced,
# while blocks stay few enough for their operators' thread barriers not to count.
CACHE_ELEMENTS = 262144


class RowPairs(NamedTuple):
    """The rows of P pairs: row p of `chosen` and of `rejected`, or with `pairs` the two rows `pairs[p]`."""

    chosen: Tensor  # (P, H), (P, S, H), or with `pairs` (N, H), (N, S, H); any strides
    rejected: Tensor  # as `chosen`
    pairs: Tensor | None  # (P, 2) int64
    chosen_token: Tensor | None  # the pooled position in S of each row of `chosen`
    rejected_token: Tensor | None

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0] if self.pairs is None else self.pairs.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.chosen.shape[-1]

    def check_range(self) -> None:
        """Raises ValueError for a row or a token that does not exist, where looking at the values waits for nothing."""
        if self.chosen.device.type != "cpu":
            return
        _check_range("pairs", self.pairs, self.chosen.shape[0], f"rows of hidden {tuple(self.chosen.shape)}")
        for hidden, token in ((self.chosen, self.chosen_token), (self.rejected, self.rejected_token)):
            if token is not None:
                _check_range("last_token", token, hidden.shape[1], f"positions of hidden {tuple(hidden.shape)}")

    def launch_shape(self, centers: bool = False) -> LaunchShape:
        processors = num_multiprocessors(self.chosen.device)
        return LaunchShape.for_pairs(self.num_pairs, self.hidden_size, self.chosen.element_size(), processors, centers)

    def blocks(self) -> Iterator[slice]:
        """Blocks of pairs whose rows stay in a core's cache between the operators that read them."""
        size = max(1, CACHE_ELEMENTS // self.hidden_size)
        for start in range(0, self.num_pairs, size):
            yield slice(start, min(start + size, self.num_pairs))

    def gather(self, block: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected rows of a block of pairs, each (pairs, H), in `dtype`."""
        if self.pairs is None:
            chosen_row = rejected_row = block
        else:
            chosen_row, rejected_row = self.pairs[block].unbind(1)
        return (
            _gather(self.chosen, chosen_row, self.chosen_token).to(dtype),
            _gather(self.rejected, rejected_row, self.rejected_token).to(dtype),
        )


def _check_range(name: str, index: Tensor | None, size: int, what: str) -> None:
    if index is None or index.numel() == 0:
        return
    lowest, highest = (int(value) for value in index.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} must be in [0, {size}), the {what}; got values from {lowest} to {highest}")


def _gather(hidden: Tensor, row: slice | Tensor, token: Tensor | None) -> Tensor:
    if token is None:
        return hidden[row]
    sequences, token = hidden[row], token[row]
    return sequences[torch.arange(len(token), device=hidden.device), token]


def split_pairs(hidden: Tensor, pairs: str | Tensor, last_token: Tensor | None) -> RowPairs:
    """The pairs of `hidden`, (N, H) or (N, S, H), as views of it."""
    if isinstance(pairs, Tensor):
        return RowPairs(hidden, hidden, pairs, last_token, last_token)
    half = hidden.shape[0] // 2
    if pairs == "halves":
        chosen, rejected = slice(None, half), slice(half, None)
    else:
        chosen, rejected = slice(0, None, 2), slice(1, None, 2)
    if last_token is None:
        return RowPairs(hidden[chosen], hidden[rejected], None, None, None)
    return RowPairs(hidden[chosen], hidden[rejected], None, last_token[chosen], last_token[rejected])


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is, else fp32: the dtype of all arithmetic and of all per-pair results."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


# What the kernels receive: Triton takes (nested) named tuples of pointers and strides as arguments.


class Vector(NamedTuple):
    """A strided vector, or none at all (`ptr` None is a compile-time fact)."""

    ptr: Tensor | None
    stride: int

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Vector":
        return cls(None, 0) if tensor is None else cls(tensor, tensor.stride(-1) if tensor.dim() else 0)


class RowArguments(NamedTuple):
    ptr: Tensor
    row_stride: int
    sequence_stride: int
    column_stride: int
    token_ptr: Tensor | None
    token_stride: int

    @classmethod
    def of(cls, hidden: Tensor, token: Tensor | None) -> "RowArguments":
        sequence_stride = hidden.stride(1) if hidden.dim() == 3 else 0
        return cls(hidden, hidden.stride(0), sequence_stride, hidden.stride(-1), *Vector.of(token))


class PairArguments(NamedTuple):
    chosen: RowArguments
    rejected: RowArguments
    index_ptr: Tensor | None
    index_stride: int
    index_side_stride: int
    num_rows: int
    sequence_length: int
    num_pairs: int
    hidden_size: int

    @classmethod
    def of(cls, rows: RowPairs) -> "PairArguments":
        return cls(
            RowArguments.of(rows.chosen, rows.chosen_token),
            RowArguments.of(rows.rejected, rows.rejected_token),
            rows.pairs,
            *((0, 0) if rows.pairs is None else rows.pairs.stride()),
            rows.chosen.shape[0],
            rows.chosen.shape[1] if rows.chosen.dim() == 3 else 1,
            rows.num_pairs,
            rows.hidden_size,
        )


@triton.jit
def locate_row(rows, side, pair, exists, SIDE: tl.constexpr):
    """Offset of each pair's row on one side, int64 (rows may lie beyond 2^31 elements), and whether it exists.

    A row number or a token that is out of range is never followed: the caller makes its pair NaN,
    which shows the mistake without a host synchronisation.
    """
    row = pair.to(tl.int64)
    if rows.index_ptr is not None:
        row = tl.load(rows.index_ptr + row * rows.index_stride + SIDE * rows.index_side_stride, mask=exists, other=0)
        exists = exists & (row >= 0) & (row < rows.num_rows)
    offset = row * side.row_stride
    if side.token_ptr is not None:
        token = tl.load(side.token_ptr + row * side.token_stride, mask=exists, other=0).to(tl.int64)
        exists = exists & (token >= 0) & (token < rows.sequence_length)
        offset += token * side.sequence_stride
    return offset, exists


@triton.jit
def locate_pairs(rows, pair):
    """Offsets of both rows of each pair, and whether both exist."""
    exists = pair < rows.num_pairs
    chosen_offset, chosen_exists = locate_row(rows, rows.chosen, pair, exists, 0)
    rejected_offset, rejected_exists = locate_row(rows, rows.rejected, pair, exists, 1)
    return chosen_offset, rejected_offset, chosen_exists & rejected_exists


@triton.jit
def load_tile(rows, side, offset, exists, columns, ACC: tl.constexpr):
    """Tile (pairs, columns) of one side's rows in the accumulation dtype, 0 where there is nothing to read."""
    return tl.load(
        side.ptr + offset[:, None] + columns.to(tl.int64)[None, :] * side.column_stride,
        mask=exists[:, None] & (columns < rows.hidden_size)[None, :],
        other=0.0,
    ).to(ACC)
