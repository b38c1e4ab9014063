"""The functional face: what comes in is checked here, before anything is computed or changed.

What is checked where: shapes, dtypes, devices and Python numbers always, here, on the host and without waiting
for a device. The *values* of `pairs` and `last_token` are checked by the operators, where they lie on the CPU
(under `torch.compile` too); on a GPU the kernels never follow a row or a token that is out of range, and its
pair's distance and loss are NaN.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from normbt_kernels.ops.losses import LinearLoss, RewardLoss
from normbt_kernels.ops.pair_distance import pair_distance as pair_distance_op
from normbt_kernels.ops.pair_loss import (
    ACCURACY,
    BT_LOSS,
    CHOSEN_REWARD,
    DISTANCE,
    MEAN_DISTANCE,
    REJECTED_REWARD,
    WEIGHT,
    LossOptions,
    Mean,
)
from normbt_kernels.ops.pairs import split_pairs

LAYOUTS = ("halves", "interleaved")
REDUCTIONS = ("mean", "sum", "none")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NormBTStats(NamedTuple):
    """What a batch looked like: detached tensors on its device, fp32 (fp64 for fp64 inputs)."""

    chosen_rewards: Tensor  # (P,)
    rejected_rewards: Tensor  # (P,)
    distance: Tensor  # (P,) ||h_c - h_r||_2
    weight: Tensor  # (P,) min(mu / (distance + eps), max_weight); without `pair_weight`
    mean_distance: Tensor  # ()
    bt_loss: Tensor  # () mean loss with all weights 1 and no centering: comparable across runs
    accuracy: (
        Tensor  # () share of pairs with d > 0; of a linear head d = v . (h_c - h_r), before the rewards are rounded
    )


def normbt_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    mu: float | Tensor | None = None,
    *,
    margin: Tensor | None = None,
    pair_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    eps: float = 1e-6,
    max_weight: float | None = 100.0,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, NormBTStats]:
    """NormBT on rewards that some model has computed (arXiv:2512.06343, section 3).

        loss = mean_p [ q w l(r_c - r_r - margin) + center_coef (r_c + r_r)^2 ]
        w    = min(mu / (||h_c - h_r||_2 + eps), max_weight), a constant in backward

    Args:
        chosen_rewards, rejected_rewards: (P,) or (P, 1), floating point. They receive the gradients.
        chosen_hidden, rejected_hidden: (P, H), the inputs of the score head at the pooled token. Any strides.
            They may require grad and receive none from this loss: the weight is a stop-gradient.
        mu: mean distance of earlier batches, a number or a 0-d tensor; None takes this batch's own mean.
        margin: (P,) subtracted from r_c - r_r. A constant: receives no gradient.
        pair_weight: (P,) multiplies each pair's loss (q). A constant: receives no gradient.
        label_smoothing: s in [0, 1); l = -[(1-s) log sigma(z) + s log sigma(-z)].
        center_coef: weight of the centering term, which is never multiplied by w or q.
        eps: added to the distance, >= 0. On a GPU, a new value of this or of the other numbers below compiles the
            kernel anew (a second or so, once for each value); mu may change freely.
        max_weight: cap on w, which identical pairs would otherwise take to mu / eps; None for no cap.
        reduction: "mean" over pairs, "sum" (no division), or "none" (the (P,) vector).
        return_stats: also return `NormBTStats`.

    Returns:
        The loss, or (loss, stats); () or with reduction "none" (P,). fp64 if the rewards or the hidden states are,
        else fp32. No pairs: 0 (an empty vector with "none"), and gradients of 0. The stats are views of what
        backward needs: copy them before changing them in place.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was seen.
    """
    mean = mean_of(mu, chosen_hidden)
    options = loss_options(label_smoothing, center_coef, eps, max_weight, reduction)
    inputs = reward_inputs(chosen_rewards, rejected_rewards, chosen_hidden, rejected_hidden, margin, pair_weight)
    return finish(*RewardLoss.apply(*inputs, mean, options), return_stats)


def linear_normbt_loss(
    hidden: Tensor,
    weight: Tensor,
    mu: float | Tensor | None = None,
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
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, NormBTStats]:
    """NormBT with the score head fused in: rewards are `hidden . weight + bias`, never rounded to bf16.

    The difference is taken before the product, `weight . (h_c - h_r)` in fp32, which keeps the margins that
    16-bit rewards round away. Each row is read once in forward and written once, as its gradient, in backward.

    Args:
        hidden: (N, H), or (N, S, H) with `last_token`; floating point, any strides.
        weight: (H,) or (1, H), the head's; its dtype may differ from that of `hidden`.
        mu: as in `normbt_loss`.
        bias: () or (1,), or None.
        pairs: "halves" (row i is chosen over row i + N/2), "interleaved" (row 2i over row 2i + 1), or int64
            (P, 2) of (chosen, rejected) rows, where a row may serve in many pairs or in none.
        last_token: int32 or int64 (N,), the position in S of each sequence's pooled row.
        margin, pair_weight, label_smoothing, center_coef, eps, max_weight, reduction, return_stats: as in
            `normbt_loss`.

    Returns:
        As `normbt_loss`; fp64 if `hidden`, `weight` or `bias` is. Gradients reach `hidden`, `weight` and `bias`, each
        in its own dtype, and nothing is computed for those that do not require it (those of weight and bias are
        made together, if either does). Reduction "none" with a trained head reads the rows once more in
        backward, because each pair then has its own upstream gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was seen. `pairs` and
        `last_token` out of range: raised for CPU tensors; on a GPU the pair's loss is NaN (no synchronisation).
    """
    mean = mean_of(mu, hidden)
    options = loss_options(label_smoothing, center_coef, eps, max_weight, reduction)
    inputs = linear_inputs(hidden, weight, bias, pairs, last_token, margin, pair_weight)
    return finish(*LinearLoss.apply(*inputs, mean, options, trains_head(weight, bias)), return_stats)


def pair_distance(hidden: Tensor, pairs: str | Tensor = "halves", last_token: Tensor | None = None) -> Tensor:
    """||h_c - h_r||_2 of each pair, (P,), without gradient; fp32 (fp64 for fp64 `hidden`).

    Args:
        hidden, pairs, last_token: as in `linear_normbt_loss`.

    Raises:
        TypeError, ValueError: as `linear_normbt_loss`.
    """
    check_rows(hidden, pairs, last_token)
    return pair_distance_op(*split_pairs(hidden.detach(), pairs, last_token))


def finish(loss: Tensor, pair_table: Tensor, batch_table: Tensor, return_stats: bool):
    """The public result of a form of the loss."""
    if not return_stats:
        return loss
    return loss, NormBTStats(
        pair_table[CHOSEN_REWARD],
        pair_table[REJECTED_REWARD],
        pair_table[DISTANCE],
        pair_table[WEIGHT],
        batch_table[MEAN_DISTANCE],
        batch_table[BT_LOSS],
        batch_table[ACCURACY],
    )


def trains_head(weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def loss_options(
    label_smoothing: float, center_coef: float, eps: float, max_weight: float | None, reduction: str
) -> LossOptions:
    """The checked constants of the loss."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    for name, value in (("label_smoothing", label_smoothing), ("center_coef", center_coef), ("eps", eps)):
        if not _is_number(value):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    # Comparisons in place of math.isfinite, which torch.compile cannot trace for a number that varies.
    if not abs(center_coef) < math.inf:
        raise ValueError(f"center_coef must be finite, got {center_coef}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if max_weight is not None:
        if not _is_number(max_weight):
            raise TypeError(f"max_weight must be a number or None, got {type(max_weight).__name__}")
        if not max_weight > 0:
            raise ValueError(f"max_weight must be > 0 or None for no cap, got {max_weight}")
        max_weight = float(max_weight)
    return LossOptions(float(label_smoothing), float(center_coef), float(eps), max_weight, reduction)


def mean_of(mu: float | Tensor | None, hidden: Tensor) -> Mean:
    """The checked `mu` of the functional forms."""
    if mu is None:
        return Mean(None, None, None, None)
    if isinstance(mu, Tensor):
        if mu.dim() != 0:
            raise ValueError(f"mu must be a number, a 0-d tensor or None, got a tensor of shape {tuple(mu.shape)}")
        if not mu.is_floating_point():
            raise TypeError(f"mu must be of a floating-point dtype, got {mu.dtype}")
        if isinstance(hidden, Tensor):
            _check_device("mu", mu, hidden.device)
        return Mean(mu.detach(), None, None, None)
    if not _is_number(mu):
        raise TypeError(f"mu must be a number, a 0-d tensor or None, got {type(mu).__name__}")
    if not 0 <= mu < math.inf:
        raise ValueError(f"mu must be finite and >= 0, got {mu}")
    return Mean(None, float(mu), None, None)


def reward_inputs(chosen_rewards, rejected_rewards, chosen_hidden, rejected_hidden, margin, pair_weight) -> tuple:
    """The checked tensors of the reward form, as `RewardLoss` takes them."""
    _check_hidden("chosen_hidden", chosen_hidden, 2)
    _check_hidden("rejected_hidden", rejected_hidden, 2)
    if chosen_hidden.shape != rejected_hidden.shape:
        raise ValueError(
            "chosen_hidden and rejected_hidden must have one shape (P, H), "
            f"got {tuple(chosen_hidden.shape)} and {tuple(rejected_hidden.shape)}"
        )
    num_pairs, device = chosen_hidden.shape[0], chosen_hidden.device
    _check_device("rejected_hidden", rejected_hidden, device)
    return (
        _rewards("chosen_rewards", chosen_rewards, num_pairs, device),
        _rewards("rejected_rewards", rejected_rewards, num_pairs, device),
        chosen_hidden.detach(),
        rejected_hidden.detach(),
        _constant("margin", margin, num_pairs, device),
        _constant("pair_weight", pair_weight, num_pairs, device),
    )


def linear_inputs(hidden, weight, bias, pairs, last_token, margin, pair_weight) -> tuple:
    """The checked tensors of the linear form, as `LinearLoss` takes them."""
    num_pairs = check_rows(hidden, pairs, last_token)
    hidden_size = hidden.shape[-1]
    _check_floating("weight", weight)
    if weight.shape not in ((hidden_size,), (1, hidden_size)):
        raise ValueError(
            f"weight must be (H,) or (1, H) with H = {hidden_size} as in hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    _check_device("weight", weight, hidden.device)
    if bias is not None:
        _check_floating("bias", bias)
        if bias.shape not in ((), (1,)):
            raise ValueError(f"bias must be () or (1,), got {tuple(bias.shape)}")
        _check_device("bias", bias, hidden.device)
        bias = bias.reshape(())
    return (
        hidden,
        weight.reshape(hidden_size),
        bias,
        pairs,
        last_token,
        _constant("margin", margin, num_pairs, hidden.device),
        _constant("pair_weight", pair_weight, num_pairs, hidden.device),
    )


def check_rows(hidden: Tensor, pairs: str | Tensor, last_token: Tensor | None) -> int:
    """Checks which rows of `hidden` make up the pairs, and returns how many pairs they are."""
    if last_token is None:
        _check_hidden("hidden", hidden, 2, " (or (N, S, H) with last_token)")
    else:
        _check_hidden("hidden", hidden, 3, " with last_token")
        _check_last_token(last_token, hidden)
    num_rows = hidden.shape[0]
    if isinstance(pairs, Tensor):
        if pairs.dtype != torch.int64:
            raise TypeError(f"pairs must be int64, got {pairs.dtype}")
        if pairs.dim() != 2 or pairs.shape[1] != 2:
            raise ValueError(f"pairs must be (P, 2) of (chosen, rejected) rows, got {tuple(pairs.shape)}")
        _check_device("pairs", pairs, hidden.device)
        return pairs.shape[0]
    if not isinstance(pairs, str):
        raise TypeError(f"pairs must be one of {LAYOUTS} or an int64 tensor (P, 2), got {type(pairs).__name__}")
    if pairs not in LAYOUTS:
        raise ValueError(f"pairs must be one of {LAYOUTS} or an int64 tensor (P, 2), got {pairs!r}")
    if num_rows % 2:
        raise ValueError(f"pairs={pairs!r} needs an even number of rows, got hidden {tuple(hidden.shape)}")
    return num_rows // 2


def _is_number(value) -> bool:
    return isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the hidden states are on {device}")


def _check_hidden(name: str, hidden: Tensor, dims: int, suffix: str = "") -> None:
    _check_floating(name, hidden)
    if hidden.dim() != dims:
        expected = "(rows, H)" if dims == 2 else "(N, S, H)"
        raise ValueError(f"{name} must be {expected}{suffix}, got {tuple(hidden.shape)}")
    if hidden.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got {tuple(hidden.shape)}")


def _check_last_token(last_token: Tensor, hidden: Tensor) -> None:
    if not isinstance(last_token, Tensor) or last_token.dtype not in (torch.int32, torch.int64):
        seen = last_token.dtype if isinstance(last_token, Tensor) else type(last_token).__name__
        raise TypeError(f"last_token must be an int32 or int64 tensor, got {seen}")
    if last_token.shape != hidden.shape[:1]:
        raise ValueError(
            f"last_token must be (N,) with one position for each sequence of hidden {tuple(hidden.shape)}, "
            f"got {tuple(last_token.shape)}"
        )
    _check_device("last_token", last_token, hidden.device)


def _rewards(name: str, rewards: Tensor, num_pairs: int, device: torch.device) -> Tensor:
    _check_floating(name, rewards)
    if rewards.shape not in ((num_pairs,), (num_pairs, 1)):
        raise ValueError(f"{name} must be (P,) or (P, 1) with P = {num_pairs} pairs, got {tuple(rewards.shape)}")
    _check_device(name, rewards, device)
    return rewards.reshape(num_pairs)


def _constant(name: str, value: Tensor | None, num_pairs: int, device: torch.device) -> Tensor | None:
    """`margin` or `pair_weight`: any real dtype, as data sets have them."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOATING):
        raise TypeError(
            f"{name} must be real, got {value.dtype} (known: bool, integers, float16, bfloat16, float32, float64)"
        )
    if value.shape not in ((num_pairs,), (num_pairs, 1)):
        raise ValueError(f"{name} must be (P,) or (P, 1) with P = {num_pairs} pairs, got {tuple(value.shape)}")
    _check_device(name, value, device)
    value = value.detach().reshape(num_pairs)
    return value if value.is_floating_point() else value.to(torch.float32)
