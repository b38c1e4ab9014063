"""The exponential moving average of the mean distance: mu <- beta*mu + (1-beta)*mean.

The first finite mean becomes mu; a mean that is not finite leaves it as it was, and does not count.
"""

import torch
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton


@triton.jit
def update_ema(mu_ptr, num_updates_ptr, mean, BETA: tl.constexpr):
    mu = tl.load(mu_ptr)
    num_updates = tl.load(num_updates_ptr)
    mean = mean.to(mu.dtype)
    updated = tl.where(num_updates == 0, mean, BETA * mu + (1 - BETA) * mean)
    finite = tl.abs(mean) < float("inf")
    tl.store(mu_ptr, tl.where(finite, updated, mu))
    tl.store(num_updates_ptr, tl.where(finite, num_updates + 1, num_updates))


def update_ema_(mu: Tensor, num_updates: Tensor, mean: Tensor, beta: float) -> None:
    """The same in place on tensors, all 0-d, without waiting for the device."""
    mean = mean.to(mu.dtype)
    updated = torch.where(num_updates == 0, mean, beta * mu + (1 - beta) * mean)
    finite = torch.isfinite(mean)
    mu.copy_(torch.where(finite, updated, mu))
    num_updates.add_(finite)
