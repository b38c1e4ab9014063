"""Where the two rows of each pair lie, in every layout.

    halves         pair p is rows p and p + N/2
    interleaved    pair p is rows 2p and 2p + 1
    explicit       pair p is rows pairs[p]
    apart          pair p is row p of one tensor and row p of another
    pooled         of row n of (N, S, H), the position last_token[n]

The kernels compute a row's number from its pair's, so no layout needs a view or a copy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import processors_of
from normbt_kernels.ops.launch import LaunchShape

# On the CPU: of each side 256 K elements, 1 MB in fp32, so that delta is still in a core's cache when it is reduced.
CACHE_ELEMENTS = 262144


class RowPairs(NamedTuple):
    """The rows of P pairs."""

    chosen: Tensor  # (N, H), or (N, S, H) with `last_token`; any strides
    rejected: Tensor  # the same tensor, but for "apart"
    pairs: Tensor | None  # (P, 2) int64 of "explicit"
    last_token: Tensor | None  # (N,) the pooled position in S of each row
    layout: str

    @property
    def num_pairs(self) -> int:
        if self.pairs is not None:
            return self.pairs.shape[0]
        return self.chosen.shape[0] if self.layout == "apart" else self.chosen.shape[0] // 2

    @property
    def hidden_size(self) -> int:
        return self.chosen.shape[-1]

    @property
    def sequence_length(self) -> int:
        return 1 if self.last_token is None else self.chosen.shape[1]

    def check_range(self) -> None:
        """Raises ValueError for a row or a token that does not exist, where looking at the values waits for nothing."""
        hidden = self.chosen
        if hidden.device.type != "cpu":
            return
        if self.pairs is not None:
            _check_range("pairs", self.pairs, hidden.shape[0], f"rows of hidden {tuple(hidden.shape)}")
        if self.last_token is not None:
            _check_range("last_token", self.last_token, hidden.shape[1], f"positions of hidden {tuple(hidden.shape)}")

    def launch_shape(self, accumulated: torch.dtype, centers: bool = False, head: bool = True) -> LaunchShape:
        hidden, size = self.chosen, self.chosen.element_size()
        strides = [stride for rows in (self.chosen, self.rejected) for stride in rows.stride()[:-1]]
        copied = hidden.stride(-1) == self.rejected.stride(-1) == 1 and all(s * size % 16 == 0 for s in strides)
        return LaunchShape.for_pairs(
            self.num_pairs,
            self.hidden_size,
            size,
            processors_of(hidden.device),
            accumulated.itemsize,
            copied,
            centers,
            head,
        )

    def detach(self) -> "RowPairs":
        """The same rows as constants."""
        chosen = self.chosen.detach()
        return self._replace(chosen=chosen, rejected=chosen if self.rejected is self.chosen else self.rejected.detach())

    def for_kernels(self) -> "RowPairs":
        """The same, with explicit pairs as the kernels read them."""
        return self if self.pairs is None else self._replace(pairs=self.pairs.contiguous())

    def blocks(self) -> Iterator[tuple[slice | None, "RowPairs"]]:
        """Blocks of pairs whose rows stay in a core's cache between the operators that read them, each with the place
        of its pairs; None for all of them."""
        size, num_pairs = max(1, CACHE_ELEMENTS // self.hidden_size), self.num_pairs
        if num_pairs <= size:
            yield None, self
            return
        for start in range(0, num_pairs, size):
            pairs = slice(start, min(start + size, num_pairs))
            if self.pairs is not None:
                yield pairs, self._replace(pairs=self.pairs[pairs])
            else:
                sides = (self.side(side, pairs) for side in range(2))
                yield pairs, RowPairs(*sides, None, None, "apart")

    def gather(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected rows, each (P, H), in `dtype`."""
        pairs = slice(0, self.num_pairs)
        return cast(self.side(0, pairs), dtype), cast(self.side(1, pairs), dtype)

    def side(self, side: int, pairs: slice) -> Tensor:
        """The rows of some of the pairs on one side, (pairs, H)."""
        hidden, token = (self.chosen, self.rejected)[side], self.last_token
        if self.pairs is not None:
            row = self.pairs[pairs, side]
        elif self.layout == "halves":
            start = side * (len(hidden) // 2)
            row = slice(pairs.start + start, pairs.stop + start)
        elif self.layout == "interleaved":
            row = slice(2 * pairs.start + side, 2 * pairs.stop, 2)
        else:
            return hidden if pairs.stop - pairs.start == len(hidden) else hidden[pairs]
        if token is None:
            return hidden[row]
        sequences, token = hidden[row], token[row]
        return sequences[torch.arange(len(token), device=hidden.device), token]


def _check_range(name: str, index: Tensor, size: int, what: str) -> None:
    if index.numel() == 0:
        return
    lowest, highest = (int(value) for value in index.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} must be in [0, {size}), the {what}; got values from {lowest} to {highest}")


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is, else fp32: the dtype of all arithmetic and of all per-pair results."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)` without a call into PyTorch where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# What the kernels receive: Triton takes (nested) named tuples of pointers and strides as arguments. Sizes that change
# from step to step (P, N, S) are arguments of their own: the kernels are not specialised for their values.


class Vector(NamedTuple):
    """A strided vector, or none at all (`ptr` None is a compile-time fact)."""

    ptr: Tensor | None
    stride: int


class SideArguments(NamedTuple):
    ptr: Tensor
    row_stride: int
    sequence_stride: int
    column_stride: int


class RowArguments(NamedTuple):
    chosen: SideArguments
    rejected: SideArguments
    last_token: Vector
    pairs: Vector

    @classmethod
    def named(cls, rows: tuple) -> "RowArguments":
        chosen, rejected, last_token, pairs = rows
        sides = SideArguments._make(chosen), SideArguments._make(rejected)
        return cls(*sides, Vector._make(last_token), Vector._make(pairs))


def vector_stride(tensor: Tensor | None) -> int:
    strides = () if tensor is None else tensor.stride()
    return strides[-1] if strides else 0


class RowStrides:
    """The strides of rows, with which their pointers make the kernels' arguments."""

    def __init__(self, rows: RowPairs):
        self._chosen, self._rejected = self._of(rows.chosen), self._of(rows.rejected)
        self._last_token, self._pairs = vector_stride(rows.last_token), vector_stride(rows.pairs)

    @staticmethod
    def _of(hidden: Tensor) -> tuple[int, int, int]:
        strides = hidden.stride()
        return strides[0], strides[1] if len(strides) == 3 else 0, strides[-1]

    def arguments(self, chosen, rejected, pairs, last_token) -> tuple:
        """The parts of `RowArguments`."""
        return (
            (chosen, *self._chosen), (rejected, *self._rejected), (last_token, self._last_token), (pairs, self._pairs),
        )  # fmt: skip


@triton.jit
def locate_row(
    rows, side, pair, exists, num_pairs, num_rows, sequence_length, SIDE: tl.constexpr, LAYOUT: tl.constexpr
):
    """Offset of each pair's row on one side, int64 (rows may lie beyond 2^31 elements), and whether it exists.

    pair, exists: (BLOCK_P,), int64 and bool. A row number or a token that is out of range is never followed: the
    caller makes its pair NaN, which shows the mistake without a host synchronisation.
    """
    if LAYOUT == "halves":
        row = pair + SIDE * num_pairs
    elif LAYOUT == "interleaved":
        row = 2 * pair + SIDE
    elif LAYOUT == "explicit":
        row = tl.load(rows.pairs.ptr + 2 * pair + SIDE, mask=exists, other=0)
        exists = exists & (row >= 0) & (row < num_rows)
    else:
        row = pair
    offset = row * side.row_stride
    if rows.last_token.ptr is not None:
        token = tl.load(rows.last_token.ptr + row * rows.last_token.stride, mask=exists, other=0).to(tl.int64)
        exists = exists & (token >= 0) & (token < sequence_length)
        offset += token * side.sequence_stride
    return offset, exists


@triton.jit
def locate_pairs(rows, pair, num_pairs, num_rows, sequence_length, LAYOUT: tl.constexpr):
    """Offsets of both rows of each pair (BLOCK_P,), and whether both exist."""
    exists = pair < num_pairs
    chosen_offset, chosen_exists = locate_row(
        rows, rows.chosen, pair, exists, num_pairs, num_rows, sequence_length, 0, LAYOUT
    )
    rejected_offset, rejected_exists = locate_row(
        rows, rows.rejected, pair, exists, num_pairs, num_rows, sequence_length, 1, LAYOUT
    )
    return chosen_offset, rejected_offset, chosen_exists & rejected_exists


@triton.jit
def load_tile(side, offset, exists, columns, hidden_size, ACC: tl.constexpr):
    """Tile (BLOCK_P, BLOCK_H) of one side's rows in the accumulation dtype, 0 where there is nothing to read."""
    return tl.load(
        side.ptr + offset[:, None] + columns.to(tl.int64)[None, :] * side.column_stride,
        mask=exists[:, None] & (columns < hidden_size)[None, :],
        other=0.0,
    ).to(ACC)


@triton.jit
def load_each(vector, index, exists, ACC: tl.constexpr):
    """Elements of a strided vector in the accumulation dtype, 0 where there is nothing to read."""
    return tl.load(vector.ptr + index.to(tl.int64) * vector.stride, mask=exists, other=0.0).to(ACC)
