"""Every input is checked here, on the host, before anything is computed or changed.

Shapes, dtypes, devices and Python numbers are always checked, and without waiting for a device. The operators check the
*values* of `pairs` and `last_token` if these are on the CPU (under `torch.compile` too). On a GPU the kernels never
follow a row or a token that is out of range, and its pair's distance and loss are NaN.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from normbt_kernels.ops.pairs import RowPairs
from normbt_kernels.ops.terms import LossOptions, Mu, Scores

LAYOUTS = ("halves", "interleaved")
REDUCTIONS = ("mean", "sum", "none")
FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def loss_options(
    label_smoothing: float, center_coef: float, eps: float, max_weight: float | None, power: float, reduction: str
) -> LossOptions:
    """The checked constants of the loss."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    # By far the most are floats, and to ask an abstract class about each takes its time.
    if not (type(label_smoothing) is type(center_coef) is type(eps) is type(power) is float):
        given = {"label_smoothing": label_smoothing, "center_coef": center_coef, "eps": eps, "power": power}
        for name, value in given.items():
            if not is_number(value):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    # Comparisons, because torch.compile cannot trace math.isfinite of a number that varies.
    if not abs(center_coef) < math.inf:
        raise ValueError(f"center_coef must be finite, got {center_coef}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be finite and >= 0 (1 is NormBT, 0 plain Bradley-Terry), got {power}")
    if max_weight is not None:
        if type(max_weight) is not float and not is_number(max_weight):
            raise TypeError(f"max_weight must be a number or None, got {type(max_weight).__name__}")
        if not max_weight > 0:
            raise ValueError(f"max_weight must be > 0 or None for no cap, got {max_weight}")
        max_weight = float(max_weight)
    return LossOptions(float(label_smoothing), float(center_coef), float(eps), max_weight, float(power), reduction)


def mu_of(mu: float | Tensor | None, hidden: Tensor) -> Mu:
    """The checked `mu` of the functional forms."""
    if mu is None:
        return Mu(own_mean=True)
    if type(mu) is not float:
        if isinstance(mu, Tensor):
            if mu.dim() != 0:
                raise ValueError(f"mu must be a number, a 0-d tensor or None, got a tensor of shape {tuple(mu.shape)}")
            if not mu.is_floating_point():
                raise TypeError(f"mu must be of a floating-point dtype, got {mu.dtype}")
            if isinstance(hidden, Tensor):
                _check_device("mu", mu, hidden.device)
            return Mu(tensor=mu.detach())
        if not is_number(mu):
            raise TypeError(f"mu must be a number, a 0-d tensor or None, got {type(mu).__name__}")
    if not 0 <= mu < math.inf:
        raise ValueError(f"mu must be finite and >= 0, got {mu}")
    return Mu(value=float(mu))


def reward_inputs(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_hidden: Tensor, rejected_hidden: Tensor,
    margin: Tensor | None, pair_weight: Tensor | None,
) -> tuple[RowPairs, Scores]:  # fmt: skip
    """The checked tensors of the reward form."""
    _check_hidden("chosen_hidden", chosen_hidden, 2)
    num_pairs, device = chosen_hidden.shape[0], chosen_hidden.device
    _check_hidden("rejected_hidden", rejected_hidden, 2, device=device)
    if chosen_hidden.shape != rejected_hidden.shape:
        raise ValueError(
            "chosen_hidden and rejected_hidden must have one shape (P, H), "
            f"got {tuple(chosen_hidden.shape)} and {tuple(rejected_hidden.shape)}"
        )
    rows = RowPairs(chosen_hidden, rejected_hidden, None, None, "apart")
    return rows, Scores(
        _rewards("chosen_rewards", chosen_rewards, num_pairs, device),
        _rewards("rejected_rewards", rejected_rewards, num_pairs, device),
        None,
        None,
        None if margin is None else _constant("margin", margin, num_pairs, device),
        None if pair_weight is None else _constant("pair_weight", pair_weight, num_pairs, device),
    )


def linear_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, pairs: str | Tensor, last_token: Tensor | None,
    margin: Tensor | None, pair_weight: Tensor | None,
) -> tuple[RowPairs, Scores]:  # fmt: skip
    """The checked tensors of the linear form."""
    rows = row_pairs(hidden, pairs, last_token)
    device = hidden.device
    _check_floating("weight", weight, device)
    hidden_size, shape = hidden.shape[-1], weight.shape
    if len(shape) not in (1, 2) or shape[-1] != hidden_size or (len(shape) == 2 and shape[0] != 1):
        raise ValueError(
            f"weight must be (H,) or (1, H) with H = {hidden_size} as in hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        _check_floating("bias", bias, device)
        if bias.numel() != 1 or bias.dim() > 1:
            raise ValueError(f"bias must be () or (1,), got {tuple(bias.shape)}")
        bias = bias if bias.dim() == 0 else bias.reshape(())
    return rows, Scores(
        None,
        None,
        weight if len(shape) == 1 else weight.reshape(hidden_size),
        bias,
        None if margin is None else _constant("margin", margin, rows.num_pairs, device),
        None if pair_weight is None else _constant("pair_weight", pair_weight, rows.num_pairs, device),
    )


def row_pairs(hidden: Tensor, pairs: str | Tensor, last_token: Tensor | None) -> RowPairs:
    """The checked rows of the pairs."""
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
        return RowPairs(hidden, hidden, pairs, last_token, "explicit")
    if not isinstance(pairs, str):
        raise TypeError(f"pairs must be one of {LAYOUTS} or an int64 tensor (P, 2), got {type(pairs).__name__}")
    if pairs not in LAYOUTS:
        raise ValueError(f"pairs must be one of {LAYOUTS} or an int64 tensor (P, 2), got {pairs!r}")
    if num_rows % 2:
        raise ValueError(f"pairs={pairs!r} needs an even number of rows, got hidden {tuple(hidden.shape)}")
    return RowPairs(hidden, hidden, None, last_token, pairs)


def _is_vector(tensor: Tensor, size: int) -> bool:
    """Whether it is (size,) or (size, 1)."""
    # Size by size: under torch.compile(dynamic=True) a size is a symbol, and no tuple of symbols equals a shape.
    shape = tensor.shape
    return len(shape) in (1, 2) and shape[0] == size and (len(shape) == 1 or shape[1] == 1)


def is_number(value) -> bool:
    return isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _check_floating(name: str, tensor: Tensor, device: torch.device | None = None) -> None:
    """On that device, if one is given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the hidden states are on {device}")


def _check_hidden(name: str, hidden: Tensor, dims: int, suffix: str = "", device: torch.device | None = None) -> None:
    _check_floating(name, hidden, device)
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
    _check_floating(name, rewards, device)
    if not _is_vector(rewards, num_pairs):
        raise ValueError(f"{name} must be (P,) or (P, 1) with P = {num_pairs} pairs, got {tuple(rewards.shape)}")
    return rewards if rewards.dim() == 1 else rewards.reshape(num_pairs)


def _constant(name: str, value: Tensor, num_pairs: int, device: torch.device) -> Tensor:
    """`margin` or `pair_weight`, of any real dtype, because data sets have all of them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOATING):
        raise TypeError(
            f"{name} must be real, got {value.dtype} (known: bool, integers, float16, bfloat16, float32, float64)"
        )
    if not _is_vector(value, num_pairs):
        raise ValueError(f"{name} must be (P,) or (P, 1) with P = {num_pairs} pairs, got {tuple(value.shape)}")
    _check_device(name, value, device)
    value = value.detach().reshape(num_pairs)
    return value if value.is_floating_point() else value.to(torch.float32)
