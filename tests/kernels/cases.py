"""What the kernel tests share: inputs of both forms of the loss, and one way to run ours and the reference on them.

A `Case` holds the inputs that may receive gradients apart from all other arguments. `ours` and `judge` run it and
return losses, stats and gradients; `judge` in fp64 is the truth, in a lower precision it is what eager PyTorch
makes of the same inputs.

Run with TRITON_INTERPRET=1 the very same tests exercise the Triton kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from normbt_kernels import linear_normbt_loss, normbt_loss
from normbt_kernels.ops import autograd, closed_form, on_cpu, pair_loss, pairs
from normbt_kernels.ops._triton import INTERPRETED
from normbt_kernels.ops.backend import backend_name
from reference import normbt as reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() and not INTERPRETED else torch.device("cpu")
BACKEND = backend_name(DEVICE)  # with INTERPRETED, "triton-interpreter", which takes 50 times as long
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("halves", "interleaved", "explicit")
# 1 is the paper, 0 plain Bradley-Terry. All but 0.7, which stands for any other, have a path of their own in kernels.
POWERS = (0.0, 0.5, 1.0, 0.7)
# With this mu and this cap every weight is 1 exactly: plain Bradley-Terry, or weights of our choice in `pair_weight`.
UNWEIGHTED = {"mu": 1e30, "max_weight": 1.0, "power": 1.0}

OURS = {"linear": linear_normbt_loss, "reward": normbt_loss}
REFERENCE = {"linear": reference.linear_normbt_loss, "reward": reference.normbt_loss}


# --- inputs ------------------------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every device and, up to rounding, in every dtype."""
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def randint(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape, dtype=dtype).to(DEVICE)


# Each makes a tensor of the same values with other strides or another storage offset.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second column": lambda x: torch.stack([x, torch.full_like(x, 7)], -1).flatten(-2)[..., ::2],
    "inside a larger tensor": lambda x: torch.nn.functional.pad(x, (3, 2) + (1, 1) * (x.dim() - 1), value=7)[
        (slice(1, -1),) * (x.dim() - 1) + (slice(3, -2),)
    ],
    "rows apart": lambda x: torch.stack([x, torch.full_like(x, 7)], 1)[:, 0],
}


def pair_vector(kind: str | None, num_pairs: int) -> Tensor | None:
    """A `margin` or a `pair_weight`, as data sets have them."""
    match kind:
        case None:
            return None
        case "int64":
            return randint(0, 4, num_pairs)
        case "bool":
            return randint(0, 2, num_pairs).bool()
        case "column":
            return randn(num_pairs, 1, dtype=torch.float32).abs()
        case "strided":
            return randn(num_pairs, 3).abs()[:, 1]
        case "bfloat16":
            return randn(num_pairs, dtype=torch.bfloat16).abs()
    raise ValueError(kind)


VECTOR_KINDS = (None, "int64", "bool", "column", "strided", "bfloat16")


@dataclass(frozen=True)
class Case:
    form: str  # "linear" or "reward"
    inputs: dict[str, Tensor]  # by argument name: what may receive gradients
    arguments: dict[str, Any]

    def having(self, **arguments) -> Case:
        """The same case with other arguments."""
        return replace(self, arguments=self.arguments | arguments)

    @property
    def num_pairs(self) -> int:
        return self.rows()[0].shape[0]

    def rows(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Chosen and rejected rows, each (P, H)."""
        if self.form == "reward":
            rows = self.arguments["chosen_hidden"], self.arguments["rejected_hidden"]
        else:
            pooled = reference.pool(self.inputs["hidden"], self.arguments["last_token"])
            rows = tuple(pooled[i] for i in reference.pair_rows(len(pooled), self.arguments["pairs"], DEVICE))
        return tuple(row.detach() if dtype is None else row.detach().to(dtype) for row in rows)


def pairs_of(layout: str, num_pairs: int) -> tuple[str | Tensor, int]:
    """The `pairs` argument of a layout and its number of rows. Explicit: rows are shared, the last is in no pair."""
    if layout != "explicit":
        return layout, 2 * num_pairs
    chosen = randint(0, num_pairs + 1, num_pairs)
    rejected = (chosen + randint(1, num_pairs + 1, num_pairs)) % (num_pairs + 1) if num_pairs else chosen
    return torch.stack([chosen, rejected], 1), num_pairs + 2


def linear_case(
    num_pairs: int = 3, hidden_size: int = 5, dtype: torch.dtype = torch.float64, *,
    head_dtype: torch.dtype | None = None, layout: str = "halves", pooled: bool = False, bias: bool = True,
    row_head: bool = False, stride: str = "contiguous",
    margin: str | None = None, pair_weight: str | None = None, mu: float | str | None = 1.5, **arguments,
) -> Case:  # fmt: skip
    """The linear form. `row_head`: a weight (1, H) and a bias (1,), as nn.Linear has them."""
    pairs, num_rows = pairs_of(layout, num_pairs)
    hidden = randn(num_rows, *((4,) if pooled else ()), hidden_size, dtype=dtype)
    weight = randn(hidden_size, dtype=head_dtype or dtype) / hidden_size**0.5
    inputs = {"hidden": STRIDES[stride](hidden), "weight": weight[None] if row_head else weight}
    if bias:
        inputs["bias"] = randn(*((1,) if row_head else ()), dtype=head_dtype or dtype)
    return Case("linear", inputs, {
        "pairs": pairs,
        "last_token": randint(0, 4, num_rows, dtype=torch.int32) if pooled else None,
        "margin": pair_vector(margin, num_pairs),
        "pair_weight": pair_vector(pair_weight, num_pairs),
        "mu": randn().abs() + 1 if mu == "tensor" else mu,
        **arguments,
    })  # fmt: skip


def reward_case(
    num_pairs: int = 3, hidden_size: int = 5, dtype: torch.dtype = torch.float64, *,
    reward_dtype: torch.dtype | None = None, column: bool = False, stride: str = "contiguous",
    margin: str | None = None, pair_weight: str | None = None, mu: float | str | None = 1.5, **arguments,
) -> Case:  # fmt: skip
    """The reward form. `column`: rewards (P, 1), as a model's logits are."""
    shape = (num_pairs, 1) if column else (num_pairs,)
    names = ("chosen_rewards", "rejected_rewards")
    return Case("reward", {name: randn(*shape, dtype=reward_dtype or dtype) for name in names}, {
        "chosen_hidden": STRIDES[stride](randn(num_pairs, hidden_size, dtype=dtype)),
        "rejected_hidden": randn(num_pairs, hidden_size, dtype=dtype),
        "margin": pair_vector(margin, num_pairs),
        "pair_weight": pair_vector(pair_weight, num_pairs),
        "mu": randn().abs() + 1 if mu == "tensor" else mu,
        **arguments,
    })  # fmt: skip


CASES = {"linear": linear_case, "reward": reward_case}


# --- running ours and the judge ----------------------------------------------------------------------------------


class Result(NamedTuple):
    loss: Tensor
    stats: Any
    gradients: dict[str, Tensor]


def leaves(case: Case) -> dict[str, Tensor]:
    """The inputs as leaves of a new graph, with the strides that they have."""
    return {name: tensor.detach().requires_grad_() for name, tensor in case.inputs.items()}


def ours(case: Case, upstream: Tensor | None = None) -> Result:
    inputs = leaves(case)
    loss, stats = OURS[case.form](**inputs, **case.arguments, return_stats=True)
    return Result(loss.detach(), stats, _gradients(loss, inputs, upstream))


def ours_without_stats(case: Case, upstream: Tensor | None = None) -> Result:
    inputs = leaves(case)
    loss = OURS[case.form](**inputs, **case.arguments)
    return Result(loss.detach(), None, _gradients(loss, inputs, upstream))


def judge(case: Case, upstream: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Result:
    """The reference on the same inputs, all cast to `dtype`."""
    inputs = {name: tensor.to(dtype) for name, tensor in leaves(case).items()}
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    arguments = {
        name: value.to(dtype) if isinstance(value, Tensor) and name not in ("pairs", "last_token") else value
        for name, value in case.arguments.items()
    }
    for name in ("margin", "pair_weight"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].reshape(-1)
    loss = REFERENCE[case.form](**inputs, **arguments)
    stats = _expected_stats(case, inputs, arguments) if dtype == torch.float64 else None
    return Result(loss.detach(), stats, _gradients(loss, inputs, upstream))


def _gradients(loss: Tensor, inputs: dict[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), upstream), strict=True))


def _expected_stats(case: Case, inputs: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    chosen, rejected = case.rows(torch.float64)
    if case.form == "linear":
        head, bias = inputs["weight"].detach().reshape(-1), inputs["bias"].detach() if "bias" in inputs else 0
        r_c, r_r = chosen @ head + bias, rejected @ head + bias
        difference = (chosen - rejected) @ head
    else:
        r_c, r_r = (inputs[name].detach().reshape(-1) for name in ("chosen_rewards", "rejected_rewards"))
        difference = r_c - r_r
    distance = torch.linalg.vector_norm(chosen - rejected, dim=-1)
    weight_options = {name: arguments[name] for name in ("eps", "max_weight", "power") if name in arguments}
    plain = {name: arguments[name] for name in ("margin", "label_smoothing") if name in arguments}
    zero = distance.new_zeros(())
    return {
        "chosen_rewards": r_c,
        "rejected_rewards": r_r,
        "distance": distance,
        "weight": reference.normbt_weight(distance, arguments["mu"], **weight_options),
        "mean_distance": distance.mean() if len(distance) else zero,
        "bt_loss": reference.normbt_loss(r_c, r_r, chosen, rejected, **plain, frozen_weight=torch.ones_like(distance)),
        "accuracy": (difference > 0).double().mean() if len(distance) else zero,
    }


# --- judging -----------------------------------------------------------------------------------------------------


def tolerance(*dtypes: torch.dtype) -> dict[str, float]:
    """Of losses and stats: fp64 is computed in fp64 if any input is, everything else in fp32."""
    bound = 1e-12 if torch.float64 in dtypes else 1e-6
    return {"rtol": bound, "atol": bound}


def assert_loss_and_stats(result: Result, truth: Result, **bounds: float) -> None:
    torch.testing.assert_close(result.loss.double(), truth.loss, **bounds, equal_nan=True)
    if result.stats is None:
        return
    assert set(result.stats._fields) == set(truth.stats)
    for name, expected in truth.stats.items():
        seen = getattr(result.stats, name)
        assert not seen.requires_grad
        torch.testing.assert_close(
            seen.double(), expected, **bounds, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def max_error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth).abs().max().item()


# A gradient is a product of q, mu, 1/(rho+eps), sigma, 1/P, the upstream and v: up to 8 roundings of half an fp32 eps.
ARITHMETIC = 4 * torch.finfo(torch.float32).eps


def assert_gradients_as_good_as_eager(mine: Result, truth: Result, case: Case, upstream: Tensor | None) -> None:
    """Each gradient is at most twice as far from the fp64 truth as eager PyTorch in that gradient's dtype is, plus one
    rounding step of that dtype.

    Distance: the largest over elements, relative to the largest element of the truth; a step is then the dtype's eps.
    To it comes `ARITHMETIC`, so that fp32 gradients do not hang on eager's luck, and 1e-12 replaces both for fp64,
    which is the truth itself. The bias's gradient is a sum over rows that cancels (to 0 without centering), so its
    distance is relative to the sum of absolute values.
    """
    eager = {dtype: judge(case, upstream, dtype) for dtype in {x.dtype for x in case.inputs.values()}}
    for name, gradient in mine.gradients.items():
        expected, dtype = truth.gradients[name], case.inputs[name].dtype
        assert gradient.shape == expected.shape, name
        assert gradient.dtype == dtype, name
        if gradient.numel() == 0:
            continue
        size = expected.abs().max()
        if name == "bias":  # grad h_n = c_n v, and grad bias = sum_n c_n
            size = truth.gradients["hidden"].flatten(1).norm(dim=1).sum() / case.inputs["weight"].double().norm()
        size = max(size.item(), torch.finfo(dtype).smallest_normal)  # below it a step is the smallest subnormal
        error, eager_error = (max_error(g, expected) / size for g in (gradient, eager[dtype].gradients[name]))
        step = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps + ARITHMETIC
        assert error <= 2 * eager_error + step, f"{name}: off by {error:.3g}, eager by {eager_error:.3g} ({step=:.3g})"


def assert_same_bits(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@contextmanager
def in_blocks() -> Iterator[None]:
    """The CPU's arithmetic for pairs that do not fit into a cache, which here holds 64 elements of each side."""
    with patch.object(on_cpu, "CACHE_ELEMENTS", 64), patch.object(pairs, "CACHE_ELEMENTS", 64):
        yield


@contextmanager
def as_on_another_device() -> Iterator[None]:
    """The closed form in PyTorch operators."""
    with (
        patch.object(pair_loss, "compute_on_cpu", closed_form.compute_pair_loss),
        patch.object(autograd, "_numpy_weighs", lambda device: False),
        patch.object(on_cpu, "CACHE_ELEMENTS", 0),
    ):
        yield


IMPLEMENTATIONS = (in_blocks, as_on_another_device) if BACKEND == "torch" else (nullcontext,)


def assert_as_reference(case: Case, upstream: Tensor | None = None) -> None:
    """Loss, stats and gradients, of each implementation that serves the device."""
    dtypes = [x.dtype for x in [*case.inputs.values(), *case.rows()]]
    truth = judge(case, upstream)
    results = []
    for implementation in IMPLEMENTATIONS:
        with implementation():
            results.append(ours(case, upstream))
    if BACKEND == "torch":  # where few pairs are served by other operators as long as nobody asks for statistics
        results.append(ours_without_stats(case, upstream))
    for mine in results:
        assert_loss_and_stats(mine, truth, **tolerance(*dtypes))
        assert_gradients_as_good_as_eager(mine, truth, case, upstream)
