"""NormBT in plain autograd PyTorch, symbol for symbol (arXiv:2512.06343, section 3).

    delta = h_c - h_r          rho = ||delta||_2          d = r_c - r_r = v . delta
    z     = d - margin
    w     = min((mu / (rho + eps))^power, max_weight)     stop-gradient; power 0 is plain Bradley-Terry
    l     = -[(1-s) log sigma(z) + s log sigma(-z)]       s = label_smoothing
    loss  = mean_p [ q_p w_p l_p + center_coef * (r_c + r_r)^2 ]

"sum" is the same without the division by the number of pairs P, "none" the bracket itself.

Every function computes in the dtype of its inputs, so that fp64 inputs give the truth and bf16
inputs give the error that eager PyTorch makes. Imports nothing of the package that it judges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_rows(num_rows: int, pairs: str | Tensor, device=None) -> tuple[Tensor, Tensor]:
    """Row numbers (chosen, rejected), each (P,), of a layout of `num_rows` rows."""
    if isinstance(pairs, Tensor):
        return pairs[:, 0], pairs[:, 1]
    rows = torch.arange(num_rows, device=device)
    if pairs == "halves":
        return rows[: num_rows // 2], rows[num_rows // 2 :]
    if pairs == "interleaved":
        return rows[0::2], rows[1::2]
    raise ValueError(f"unknown pair layout {pairs!r}")


def pool(hidden: Tensor, last_token: Tensor | None) -> Tensor:
    """The pooled row of each sequence: (N, S, H) with (N,) gives (N, H); (N, H) is returned as it is."""
    if last_token is None:
        return hidden
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last_token]


def pair_distance(hidden: Tensor, pairs: str | Tensor = "halves", last_token: Tensor | None = None) -> Tensor:
    """rho (P,)."""
    rows = pool(hidden, last_token)
    chosen, rejected = pair_rows(rows.shape[0], pairs, rows.device)
    return torch.linalg.vector_norm(rows[chosen] - rows[rejected], dim=-1)


def normbt_weight(rho: Tensor, mu, eps: float = 1e-6, max_weight: float | None = 100.0, power: float = 1.0) -> Tensor:
    """w (P,), detached. `mu=None` takes this batch's mean distance."""
    rho = rho.detach()
    mu = rho.mean() if mu is None else mu
    w = (mu / (rho + eps)) ** power
    return w if max_weight is None else w.clamp(max=max_weight)


def _weighted_loss(r_c, r_r, d, w, margin, pair_weight, label_smoothing, center_coef, reduction):
    z = d if margin is None else d - margin
    s = label_smoothing
    l = -((1 - s) * F.logsigmoid(z) + s * F.logsigmoid(-z))  # noqa: E741
    q = 1 if pair_weight is None else pair_weight
    per_pair = q * w * l + center_coef * (r_c + r_r) ** 2
    if reduction == "none":
        return per_pair
    if reduction == "sum" or per_pair.numel() == 0:  # the empty batch: loss 0, gradients 0
        return per_pair.sum()
    if reduction == "mean":
        return per_pair.mean()
    raise ValueError(f"unknown reduction {reduction!r}")


def normbt_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    mu=None,
    *,
    margin: Tensor | None = None,
    pair_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    eps: float = 1e-6,
    max_weight: float | None = 100.0,
    power: float = 1.0,
    reduction: str = "mean",
    frozen_weight: Tensor | None = None,
) -> Tensor:
    """The reward form. `frozen_weight` (P,) replaces w: what finite differences must hold constant."""
    r_c, r_r = chosen_rewards.reshape(-1), rejected_rewards.reshape(-1)
    rho = torch.linalg.vector_norm(chosen_hidden - rejected_hidden, dim=-1)
    w = normbt_weight(rho, mu, eps, max_weight, power) if frozen_weight is None else frozen_weight
    return _weighted_loss(r_c, r_r, r_c - r_r, w, margin, pair_weight, label_smoothing, center_coef, reduction)


def linear_normbt_loss(
    hidden: Tensor,
    weight: Tensor,
    mu=None,
    *,
    bias: Tensor | None = None,
    pairs: str | Tensor = "halves",
    last_token: Tensor | None = None,
    margin: Tensor | None = None,
    pair_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    eps: float = 1e-6,
    max_weight: float | None = 100.0,
    power: float = 1.0,
    reduction: str = "mean",
    frozen_weight: Tensor | None = None,
) -> Tensor:
    """The linear form: rewards are `rows . v + bias`, as the score head computes them."""
    rows = pool(hidden, last_token)
    rewards = F.linear(rows, weight.reshape(1, -1), None if bias is None else bias.reshape(1)).squeeze(-1)
    chosen, rejected = pair_rows(rows.shape[0], pairs, rows.device)
    return normbt_loss(
        rewards[chosen],
        rewards[rejected],
        rows[chosen],
        rows[rejected],
        mu,
        margin=margin,
        pair_weight=pair_weight,
        label_smoothing=label_smoothing,
        center_coef=center_coef,
        eps=eps,
        max_weight=max_weight,
        power=power,
        reduction=reduction,
        frozen_weight=frozen_weight,
    )


class DistanceEMA:
    """mu of the paper: used before it is updated; the first batch's own mean starts it."""

    def __init__(self, beta: float = 0.9):
        self.beta = beta
        self.mu: Tensor | None = None

    def weight_mean(self, rho: Tensor) -> Tensor:
        """The mu that weighs this batch."""
        return rho.detach().mean() if self.mu is None else self.mu

    def update(self, rho: Tensor) -> None:
        """mu <- beta*mu + (1-beta)*mean(rho); a mean that is not finite leaves it as it was."""
        mean = rho.detach().mean()
        if torch.isfinite(mean):
            self.mu = mean if self.mu is None else self.beta * self.mu + (1 - self.beta) * mean
