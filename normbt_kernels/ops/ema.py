"""The exponential moving average of the mean distance, in two moves.

    pending <- pending + (sum_p rho_p, P)            each forward
    mu      <- beta*mu + (1-beta)*mean(pending)      each optimizer step; the first mean becomes mu; then pending <- 0

A mean that is not finite leaves mu as it was. So mu does not depend on how a batch is cut into micro-batches, and
ranks share it by adding their `pending` up.
"""

from typing import NamedTuple

import torch
from numpy import ndarray
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import run_on, uses_kernels
from normbt_kernels.ops.launcher import Launch, Plans, kinds
from normbt_kernels.ops.library import define_op, is_watched, without_gradients


class Arrays(NamedTuple):
    """Buffers on the CPU as numpy sees them."""

    mu: ndarray
    num_updates: ndarray
    pending: ndarray | None


class ArrayCache:
    """The arrays of one EMA, as long as its buffers stay where they are: to ask PyTorch takes 5 us for each of them."""

    def __init__(self) -> None:
        self.addresses: tuple[int, ...] = ()
        self.arrays: Arrays | None = None

    def __reduce__(self):
        return ArrayCache, ()  # a copy of a module has other buffers


class EMA(NamedTuple):
    """The buffers of a module, all on one device."""

    mu: Tensor  # () fp32
    num_updates: Tensor  # () int64
    # (2,) fp32: the sum of distances and the number of pairs since mu last moved; None: nothing is taken up
    pending: Tensor | None
    beta: float | None  # a number: each forward moves mu; None: it only adds to `pending`
    cache: ArrayCache | None = None

    def arrays(self) -> Arrays:
        """Of buffers on the CPU."""
        mu, num_updates, pending, _, cache = self
        addresses = mu.data_ptr(), num_updates.data_ptr(), 0 if pending is None else pending.data_ptr()
        if cache is not None and cache.addresses == addresses:
            return cache.arrays
        arrays = Arrays(mu.numpy(), num_updates.numpy(), None if pending is None else pending.numpy())
        if cache is not None:
            cache.arrays, cache.addresses = arrays, addresses
        return arrays


@triton.jit
def add_to_pending(pending_ptr, distance_sum, pair_count):
    """Adds both to pending (2,)."""
    dtype = pending_ptr.dtype.element_ty
    tl.store(pending_ptr, tl.load(pending_ptr) + distance_sum.to(dtype))
    tl.store(pending_ptr + 1, tl.load(pending_ptr + 1) + pair_count.to(dtype))


@triton.jit
def move_mu(mu_ptr, num_updates_ptr, pending_ptr, BETA: tl.constexpr):
    """Moves mu () by the mean of pending (2,), unless it holds no pairs or is not finite."""
    mu = tl.load(mu_ptr)
    num_updates = tl.load(num_updates_ptr)
    pair_count = tl.load(pending_ptr + 1)
    mean = tl.load(pending_ptr) / pair_count
    moved = tl.where(num_updates == 0, mean, BETA * mu + (1 - BETA) * mean)
    moves = tl.abs(mean) < float("inf")  # nor is 0 / 0
    tl.store(mu_ptr, tl.where(moves, moved, mu))
    tl.store(num_updates_ptr, num_updates + moves)
    tl.store(pending_ptr, 0.0)
    tl.store(pending_ptr + 1, 0.0)


@triton.jit
def _move_mu_kernel(mu_ptr, num_updates_ptr, pending_ptr, BETA: tl.constexpr):
    move_mu(mu_ptr, num_updates_ptr, pending_ptr, BETA)


_plans: Plans[Launch] = Plans()


def _plan_move(beta: float) -> Launch:
    return Launch(_move_mu_kernel, (1, 1, 1), 1, lambda *buffers: buffers, {}, BETA=beta)


# The same in PyTorch operators, which do not wait for the device, and as plain arithmetic for the CPU.


def add_to_pending_(pending: Tensor, distance_sum: Tensor, num_pairs: int) -> None:
    total, count = pending.unbind()
    total.add_(distance_sum)
    count.add_(num_pairs)


def move_mu_(mu: Tensor, num_updates: Tensor, pending: Tensor, beta: float) -> None:
    total, count = pending.unbind()
    mean = total / count
    moves = mean < float("inf")  # nor is 0 / 0; distances are not negative
    moved = torch.where(num_updates == 0, mean, beta * mu + (1 - beta) * mean)
    mu.copy_(torch.where(moves, moved, mu))
    num_updates.add_(moves)
    pending.zero_()


def move_mu_on_cpu(state: Arrays, beta: float, distance_sum: float, pair_count: float) -> None:
    if pair_count > 0 and distance_sum < float("inf"):
        mean, num_updates = distance_sum / pair_count, state.num_updates.item()
        state.mu[()] = beta * state.mu.item() + (1 - beta) * mean if num_updates > 0 else mean
        state.num_updates[()] = num_updates + 1


def move_by_pending_on_cpu(mu: Tensor, num_updates: Tensor, pending: Tensor, beta: float) -> None:
    state = EMA(mu, num_updates, pending, beta).arrays()
    move_mu_on_cpu(state, beta, *state.pending.tolist())
    state.pending[:] = 0


def _move_mu(mu: Tensor, num_updates: Tensor, pending: Tensor, beta: float) -> None:
    if uses_kernels(mu.device):
        tensors = mu, num_updates, pending
        run_on(mu.device, _plans.find((mu.device, beta, kinds(tensors)), _plan_move, beta), tensors)
    elif mu.device.type == "cpu":
        move_by_pending_on_cpu(mu, num_updates, pending, beta)
    else:
        move_mu_(mu, num_updates, pending, beta)


_move_mu_op = define_op(
    "move_mu(Tensor(a!) mu, Tensor(b!) num_updates, Tensor(c!) pending, float beta) -> ()",
    fake=lambda mu, num_updates, pending, beta: None,
    autograd=without_gradients,
)(_move_mu)


def move_mu_now(mu: Tensor, num_updates: Tensor, pending: Tensor, beta: float) -> None:
    """Moves mu by what is pending, in place and in one launch."""
    run = _move_mu_op if is_watched((mu,)) else _move_mu
    run(mu, num_updates, pending, beta)
