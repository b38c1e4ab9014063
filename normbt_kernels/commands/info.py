"""`normbt info`: where this installation runs, and whether its loss gives the numbers that were computed by hand.

The self-check runs every entry point on every device, on two pairs whose distances and rewards are whole numbers:

    h_c = (3, 4), h_r = (0, 0):   delta = (3, 4)    rho = 5      v = (1, 2):  d = 11
    h_c = (1, 1), h_r = (6, 13):  delta = (-5, -12) rho = 13                  d = -29
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from normbt_kernels._version import __version__, installed
from normbt_kernels.functional import linear_normbt_loss, normbt_loss, pair_distance
from normbt_kernels.modules import DistanceEMA, LinearNormBTLoss, NormBTLoss
from normbt_kernels.ops.backend import backend_name

Numbers = list[tuple[str, Tensor, list[float]]]  # what it is, as seen, as computed by hand
Check = Callable[[torch.device], Numbers]

CHOSEN = [[3.0, 4.0], [1.0, 1.0]]
REJECTED = [[0.0, 0.0], [6.0, 13.0]]
HEAD = [1.0, 2.0]
RHO = [5.0, 13.0]
CHOSEN_REWARDS, REJECTED_REWARDS = [11.0, 3.0], [0.0, 32.0]
MARGIN = [10.0, -28.0]  # so that z = d - margin is +1 and -1
Z = [1.0, -1.0]
MU = 65.0  # so that the weights are 13 and 5
FIRST_MU = 9.0  # the mean of RHO, which weighs the first batch of a module


def environment() -> str:
    """Versions, and each device with the backend that serves it."""
    lines = [f"{'normbt-kernels':16}{__version__}", f"{'python':16}{platform.python_version()} ({platform.platform()})"]
    for name in ("torch", "triton", "transformers", "accelerate", "trl", "peft", "datasets", "matplotlib"):
        lines.append(f"{name:16}{installed(name) or 'not installed'}")
    for device in _devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
        lines.append(f"{device!s:16}{name}, backend: {_served_by(device)}")
    return "\n".join(lines)


def _served_by(device: torch.device) -> str:
    name = backend_name(device)
    if name != "torch":
        return name
    return "numpy (PyTorch operators for few pairs)" if device.type == "cpu" else "PyTorch operators"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def run() -> list[str]:
    """One line for each number that is wrong; an empty list if none is."""
    return [
        failure for device in _devices() for entry, check in ENTRIES.items() for failure in _run(entry, check, device)
    ]


def _run(entry: str, check: Check, device: torch.device) -> list[str]:
    try:
        numbers = check(device)
    except Exception as error:  # the self-check reports any error and goes on
        return [f"{entry} on {device}: {type(error).__name__}: {error}"]
    return [
        f"{entry}{what} on {device}: expected {expected}, got {seen.flatten().tolist()}"
        for what, seen, expected in numbers
        if not torch.allclose(seen.detach().double().cpu().flatten(), torch.tensor(expected).double(), rtol=1e-5)
    ]


# --- the numbers by hand -----------------------------------------------------------------------------------------


def _loss(mu: float) -> float:
    """mean_p (mu / rho_p) log(1 + exp(-z_p)); eps is 0 throughout."""
    return sum(mu / rho * math.log1p(math.exp(-z)) for rho, z in zip(RHO, Z, strict=True)) / 2


def _reward_gradient(mu: float) -> list[float]:
    """dloss/dr_c = (mu / rho)(sigma(z) - 1) / 2; dloss/dr_r is its negative."""
    return [mu / rho * (1 / (1 + math.exp(-z)) - 1) / 2 for rho, z in zip(RHO, Z, strict=True)]


def _hidden_gradient(mu: float) -> list[float]:
    """g_p v for the chosen rows, -g_p v for the rejected ones."""
    g = _reward_gradient(mu)
    return [sign * g_p * v for sign in (1, -1) for g_p in g for v in HEAD]


def _head_gradient(mu: float) -> list[float]:
    """sum_p g_p delta_p."""
    g = _reward_gradient(mu)
    deltas = [[c - r for c, r in zip(*rows, strict=True)] for rows in zip(CHOSEN, REJECTED, strict=True)]
    return [sum(g_p * delta[j] for g_p, delta in zip(g, deltas, strict=True)) for j in range(2)]


# --- every entry point -------------------------------------------------------------------------------------------


def _reward_form(loss_of: Callable[..., Tensor], mu: float, device: torch.device) -> Numbers:
    chosen, rejected = (
        torch.tensor(rewards, device=device, requires_grad=True) for rewards in (CHOSEN_REWARDS, REJECTED_REWARDS)
    )
    rows = torch.tensor(CHOSEN, device=device), torch.tensor(REJECTED, device=device)
    loss = loss_of(chosen, rejected, *rows, margin=torch.tensor(MARGIN, device=device))
    loss.backward()
    g = _reward_gradient(mu)
    return [
        ("", loss, [_loss(mu)]),
        (", gradient of the chosen rewards", chosen.grad, g),
        (", gradient of the rejected rewards", rejected.grad, [-g_p for g_p in g]),
    ]


def _linear_form(loss_of: Callable[..., Tensor], mu: float, device: torch.device) -> Numbers:
    hidden = torch.tensor(CHOSEN + REJECTED, device=device, requires_grad=True)
    head = torch.tensor(HEAD, device=device, requires_grad=True)
    loss = loss_of(hidden, head, margin=torch.tensor(MARGIN, device=device))
    loss.backward()
    return [
        ("", loss, [_loss(mu)]),
        (", gradient of the hidden rows", hidden.grad, _hidden_gradient(mu)),
        (", gradient of the head", head.grad, _head_gradient(mu)),
    ]


def _module(form: Callable[..., Numbers], loss: DistanceEMA, device: torch.device) -> Numbers:
    """The numbers of a module's first batch, and the mu that it leaves."""
    numbers = form(loss.to(device), FIRST_MU, device)
    return [*numbers, (".mu", loss.mu, [FIRST_MU])]


ENTRIES: dict[str, Check] = {
    "pair_distance": lambda device: [("", pair_distance(torch.tensor(CHOSEN + REJECTED, device=device)), RHO)],
    "normbt_loss": lambda device: _reward_form(partial(normbt_loss, mu=MU, eps=0), MU, device),
    "NormBTLoss": lambda device: _module(_reward_form, NormBTLoss(eps=0, process_group=None), device),
    "linear_normbt_loss": lambda device: _linear_form(partial(linear_normbt_loss, mu=MU, eps=0), MU, device),
    "LinearNormBTLoss": lambda device: _module(_linear_form, LinearNormBTLoss(eps=0, process_group=None), device),
}
