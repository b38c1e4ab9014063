"""What each row gets from the explicit pairs in which it serves:

    c_n = sum of dloss/dr over the pairs in which row n serves, times their upstream

One kernel sums them, without atomics and in an order that depends on nothing but the inputs, so the same inputs give
the same bits. Each row looks through few pairs for its own. Many pairs are sorted by row, by PyTorch, which also finds
where those of each row begin.

Launches: one, and those of the sorting.
"""

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import triton_dtype
from normbt_kernels.ops.launch import cdiv
from normbt_kernels.ops.launcher import Launch
from normbt_kernels.ops.pairs import Vector, load_each, vector_stride

# Rows x pairs up to which each row looks through all pairs for its own. On an H100 (H=4096, 3 pairs to 2 rows) backward
# took 7 us in this way at 2^11.5, and 33 with sorting; 26 and 71 at 2^23.4, 59 and 80 at 2^25.4, 178 and 91 at 2^27.4.
# Fewer rows than two programs on each of its multiprocessors should take as long as so many (not measured).
MAX_SEARCHED = 2**26
ROWS_AT_ONCE = 4096


@triton.jit
def load_upstream(upstream, pair, exists, PER_PAIR: tl.constexpr, ACC: tl.constexpr):
    """What comes from above for each pair, or one scalar for all of them."""
    return load_each(upstream, pair, exists, ACC) if PER_PAIR else tl.load(upstream.ptr).to(ACC)


@triton.jit(do_not_specialize=["num_rows", "num_pairs"])
def _sum_searched_pairs_kernel(
    pairs_ptr, gradient_ptr, upstream, coefficient_ptr, num_rows, num_pairs,
    PER_PAIR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """c_n of BLOCK_N rows, which look for themselves in BLOCK_P pairs at a time.

    pairs_ptr: (P, 2). gradient_ptr: (2, P). upstream: (P,), or one scalar. coefficient_ptr: (N,).
    """
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    coefficient = tl.zeros([BLOCK_N, BLOCK_P], ACC)
    for first in range(0, num_pairs, BLOCK_P):
        pair = first + tl.arange(0, BLOCK_P).to(tl.int64)
        exists = pair < num_pairs
        above = load_upstream(upstream, pair, exists, PER_PAIR, ACC)
        for side in tl.static_range(2):
            serving = tl.load(pairs_ptr + 2 * pair + side, mask=exists, other=-1)
            gradient = tl.load(gradient_ptr + side * num_pairs + pair, mask=exists, other=0.0) * above
            coefficient += tl.where(serving[None, :] == row[:, None], gradient[None, :], 0.0)
    tl.store(coefficient_ptr + row, tl.sum(coefficient, axis=1), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_pairs"])
def _sum_sorted_pairs_kernel(
    order_ptr, start_ptr, gradient_ptr, upstream, coefficient_ptr, num_rows, num_pairs,
    PER_PAIR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """c_n of BLOCK_N rows, BLOCK_K of their pairs at a time.

    order_ptr: (2P,) places in the (2, P) gradients, sorted by row. start_ptr: (N + 1,) where in it each row's begin.
    gradient_ptr: (2, P). upstream: (P,), or one scalar. coefficient_ptr: (N,).
    """
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < num_rows
    start = tl.load(start_ptr + row, mask=exists, other=0)
    count = tl.load(start_ptr + 1 + row, mask=exists, other=0) - start
    coefficient = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for first in range(0, tl.max(count), BLOCK_K):
        turn = first + tl.arange(0, BLOCK_K).to(tl.int64)
        serves = turn[None, :] < count[:, None]
        place = tl.load(order_ptr + start[:, None] + turn[None, :], mask=serves, other=0)
        gradient = tl.load(gradient_ptr + place, mask=serves, other=0.0)
        gradient *= load_upstream(upstream, place % num_pairs, serves, PER_PAIR, ACC)
        coefficient += tl.where(serves, gradient, 0.0)  # not 0 times an infinite upstream
    tl.store(coefficient_ptr + row, tl.sum(coefficient, axis=1), mask=exists)


class PairsOfRows:
    """The launch for N rows, and the sorting of many pairs."""

    def __init__(self, num_rows: int, gradient: Tensor, loss_gradient: Tensor):
        self.num_rows, self.num_pairs = num_rows, gradient.shape[1]
        self.upstream_stride = vector_stride(loss_gradient)
        self.sorts = max(num_rows, ROWS_AT_ONCE) * self.num_pairs > MAX_SEARCHED
        programs, per_pair, acc = (cdiv(num_rows, 16), 1, 1), loss_gradient.dim() == 1, triton_dtype(gradient.dtype)
        if self.sorts:
            self.sum = Launch(
                _sum_sorted_pairs_kernel, programs, 4, self._arguments, {3: Vector._make},
                PER_PAIR=per_pair, BLOCK_N=16, BLOCK_K=16, ACC=acc,
            )  # fmt: skip
        else:
            self.sum = Launch(
                _sum_searched_pairs_kernel, programs, 8, self._arguments, {2: Vector._make},
                PER_PAIR=per_pair, BLOCK_N=16, BLOCK_P=512, ACC=acc,
            )  # fmt: skip

    def _arguments(self, *tensors) -> tuple:
        *where, gradient, loss_gradient, coefficient = tensors
        upstream = loss_gradient, self.upstream_stride
        return *where, gradient, upstream, coefficient, self.num_rows, self.num_pairs

    def run(self, pairs: Tensor, gradient: Tensor, loss_gradient: Tensor) -> Tensor:
        """c_n, (N,). pairs: (P, 2). gradient: (2, P). loss_gradient: (P,) or ()."""
        coefficient = gradient.new_empty(self.num_rows)
        where = self._sort(pairs) if self.sorts else (pairs.contiguous(),)
        self.sum((*where, gradient, loss_gradient, coefficient))
        return coefficient

    def _sort(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """`order_ptr` and `start_ptr` of the kernel."""
        # Row numbers of 32 bits halve the bytes that are sorted: with 64, all bytes would exceed 1.05 of the floor.
        row = pairs.T.to(torch.int32, memory_format=torch.contiguous_format).reshape(-1)
        row, order = torch.sort(row, stable=True)
        return order, torch.searchsorted(row, torch.arange(self.num_rows + 1, dtype=torch.int32, device=row.device))
