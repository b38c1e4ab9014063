"""Where autograd meets the pass over pairs: the operator, and one Function for both forms of the loss.

The reward form sends gradients to the rewards, the linear form to the hidden states, the head's weight and its bias.
The forward pass leaves behind all that backward needs; hidden states are kept for it only where reduction "none"
must read them again for the head's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from normbt_kernels.ops import few_pairs
from normbt_kernels.ops.backend import run_on, uses_kernels
from normbt_kernels.ops.ema import EMA
from normbt_kernels.ops.launcher import Plans, kinds
from normbt_kernels.ops.library import define_op, is_watched, refuse_gradients, with_empty_tables
from normbt_kernels.ops.linear_gradient import (
    ONCE,
    GradientPlan,
    Gradients,
    Layout,
    Upstream,
    linear_gradient,
    linear_gradient_op,
)
from normbt_kernels.ops.on_cpu import weights_on_cpu
from normbt_kernels.ops.pair_distance import measure_distances
from normbt_kernels.ops.pair_loss import PairLossPlan, run_pair_loss
from normbt_kernels.ops.pairs import RowPairs, accumulate_dtype, cast
from normbt_kernels.ops.terms import WEIGHT, LossOptions, LossResult, Mu, Scores

BACKWARD_ONLY = "the NormBT losses have no forward-mode derivative (jvp, jacfwd, linearize): use a backward one"


class Call(NamedTuple):
    """One pass over pairs, as the implementations take it."""

    rows: RowPairs
    scores: Scores
    mu: Mu
    options: LossOptions
    stats: bool

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What may receive gradients; without a head the rows enter through the weight alone, which is a constant."""
        scores = self.scores
        rows = None if scores.head_weight is None else self.rows.chosen
        return rows, scores.chosen_rewards, scores.rejected_rewards, scores.head_weight, scores.head_bias


class Arguments(NamedTuple):
    """A call and `head_gradient` one by one: what the dispatcher can look into."""

    chosen: Tensor
    rejected: Tensor
    pairs: Tensor | None
    last_token: Tensor | None
    layout: str
    chosen_rewards: Tensor | None
    rejected_rewards: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    margin: Tensor | None
    pair_weight: Tensor | None
    mu_value: float | None
    mu: Tensor | None
    ema_mu: Tensor | None
    ema_num_updates: Tensor | None
    ema_pending: Tensor | None
    ema_beta: float | None
    label_smoothing: float
    center_coef: float
    eps: float
    max_weight: float | None
    power: float
    reduction: str
    stats: bool
    head_gradient: bool  # asked for by autograd, not by the caller

    @classmethod
    def of(cls, call: Call, head_gradient: bool = False) -> Arguments:
        mu = call.mu
        ema = mu.ema or (None,) * 4
        return cls(*call.rows, *call.scores, mu.value, mu.tensor, *ema[:4], *call.options, call.stats, head_gradient)

    @property
    def call(self) -> Call:
        ema = EMA(self.ema_mu, self.ema_num_updates, self.ema_pending, self.ema_beta)
        return Call(
            RowPairs(self.chosen, self.rejected, self.pairs, self.last_token, self.layout),
            Scores(
                self.chosen_rewards, self.rejected_rewards, self.head_weight, self.head_bias,
                self.margin, self.pair_weight,
            ),
            Mu(self.mu_value, self.mu, None if self.ema_mu is None else ema),
            LossOptions(
                self.label_smoothing, self.center_coef, self.eps, self.max_weight, self.power, self.reduction
            ),
            self.stats,
        )  # fmt: skip


class Passes:
    """The forward and the backward pass of calls of one kind: what backward must know besides tensors.

    Args:
        call: one of them.
        needs: which of `call.differentiable` receive gradients.
        run: the operator below autograd, or the implementation itself.
    """

    def __init__(self, call: Call, needs: Sequence[bool], run: Callable[[Call, bool], LossResult]):
        rows, trains_head, per_pair = call.rows, needs[3] or needs[4], call.options.reduction == "none"
        self.run, self.head_gradient = run, trains_head and not per_pair
        self.reads_rows_again = trains_head and per_pair
        self.layout, self.hidden_shape, self.hidden_dtype = rows.layout, rows.chosen.shape, rows.chosen.dtype
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in call.differentiable]

    def forward(self, call: Call) -> LossResult:
        return self.run(call, self.head_gradient)

    def linear_gradient(self, saved: tuple[Tensor | None, ...], needs: tuple[bool, bool, bool]) -> Gradients:
        """Of the hidden states, the head's weight and its bias. saved: the arguments of `linear_gradient`."""
        run = linear_gradient_op if is_watched(saved) else linear_gradient
        return run(*saved, self.layout, self.hidden_shape, self.hidden_dtype, self.dtypes[4] or saved[3].dtype, *needs)


class PairLoss(_SingleLevelFunction):
    """`apply(passes, call, results, *call.differentiable)` returns the loss, and leaves the `LossResult` in `results`.

    The tables are constants: as further outputs they would cost autograd 9 us a step. Single-level: torch.func's
    transforms see the operator, never this Function.
    """

    @staticmethod
    def forward(ctx, passes, call, results, *inputs):
        rows, result = call.rows, passes.forward(call)
        ctx.passes = passes
        ctx.save_for_backward(
            result.loss,  # so that a second differentiation finds its way here and is refused
            result.gradient,
            result.head_gradient,
            call.scores.head_weight,
            rows.chosen if passes.reads_rows_again else None,
            rows.pairs,
            rows.last_token,
        )
        results.append(result)
        return result.loss

    @staticmethod
    def backward(ctx, loss_gradient):
        if not torch.is_grad_enabled():
            return None, None, None, *_gradients(ctx, loss_gradient)
        with torch.no_grad():
            gradients = _gradients(ctx, loss_gradient)
        made = [i for i, value in enumerate(gradients) if value is not None]
        refusing = refuse_gradients(ONCE, [gradients[i] for i in made], [ctx.saved_tensors[0], loss_gradient])
        refusing = dict(zip(made, refusing, strict=True))
        return None, None, None, *(refusing.get(i) for i in range(5))


def _gradients(ctx, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of `Call.differentiable`."""
    passes, (_, gradient, *saved) = ctx.passes, ctx.saved_tensors
    if saved[1] is None:  # no head
        return None, *_reward_gradients(passes, gradient, loss_gradient), None, None
    _, _, _, needs_hidden, _, _, needs_weight, needs_bias = ctx.needs_input_grad
    hidden, weight, bias = passes.linear_gradient(
        (gradient, loss_gradient, *saved), (needs_hidden, needs_weight, needs_bias)
    )
    return hidden if needs_hidden else None, None, None, weight if needs_weight else None, bias if needs_bias else None


def _reward_gradients(passes: Passes, gradient: Tensor, loss_gradient: Tensor) -> tuple[Tensor, Tensor]:
    chosen_dtype, rejected_dtype = passes.dtypes[1:3]
    dtype = torch.promote_types(chosen_dtype, rejected_dtype)
    if gradient.dtype == dtype or is_watched((loss_gradient,)):
        gradient = cast(gradient * loss_gradient, dtype)
    else:  # `out=` rounds the product at once: one launch for both sides
        gradient = torch.mul(gradient, loss_gradient, out=torch.empty_like(gradient, dtype=dtype))
    chosen, rejected = gradient.unbind()
    return cast(chosen, chosen_dtype), cast(rejected, rejected_dtype)


def _needs_gradients(inputs: tuple[Tensor | None, ...]) -> tuple[bool, ...]:
    if not torch.is_grad_enabled():
        return (False,) * len(inputs)
    return tuple([tensor is not None and tensor.requires_grad for tensor in inputs])


def _differentiable(passes: Passes, call: Call, inputs: tuple[Tensor | None, ...]) -> LossResult:
    results: list[LossResult] = []
    loss = PairLoss.apply(passes, call, results, *inputs)
    result = results[0]
    return result if result.loss is loss else result._replace(loss=loss)


def _autograd(run: Callable, *arguments) -> LossResult:
    """The operator's Autograd kernel. Of nested transforms, an inner one may ask an outer one for `head_gradient`."""
    given = Arguments(*arguments)
    call, asked_for = given.call, given.head_gradient
    inputs = call.differentiable
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise RuntimeError(BACKWARD_ONLY)
    needs = _needs_gradients(inputs)
    backward_mode, forward_mode = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def run_call(call: Call, head_gradient: bool) -> LossResult:
        # As the caller has them, for an outer transform: a Function's forward runs without either.
        with torch.set_grad_enabled(backward_mode), forward_ad._set_fwd_grad_enabled(forward_mode):
            return LossResult(*run(*Arguments.of(call, head_gradient or asked_for)))

    return _differentiable(Passes(call, needs, run_call), call, inputs) if True in needs else run_call(call, False)


def _fake(*arguments) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    rows, scores, _, options, stats = given.call
    memory = {"dtype": scores.accumulate_dtype(rows), "device": rows.chosen.device}
    result = LossResult.allocate(rows.num_pairs, rows.hidden_size, options, stats, given.head_gradient, **memory)
    return with_empty_tables(result)


@define_op(
    "pair_loss(Tensor chosen, Tensor rejected, Tensor? pairs, Tensor? last_token, str layout,"
    " Tensor? chosen_rewards, Tensor? rejected_rewards, Tensor? head_weight, Tensor? head_bias,"
    " Tensor? margin, Tensor? pair_weight, float? mu_value, Tensor? mu,"
    " Tensor(a!)? ema_mu, Tensor(b!)? ema_num_updates, Tensor(c!)? ema_pending, float? ema_beta,"
    " float label_smoothing, float center_coef, float eps, float? max_weight, float power, str reduction,"
    " bool stats, bool head_gradient)"
    " -> (Tensor loss, Tensor gradient, Tensor head_gradient, Tensor pair_stats, Tensor batch_stats)",
    fake=_fake,
    autograd=_autograd,
)
def _pair_loss_op(*arguments) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    return run_pair_loss(*given.call, given.head_gradient)


def _run(call: Call, head_gradient: bool) -> LossResult:
    return run_pair_loss(*call, head_gradient)


class LaunchedPasses(Passes):
    """The same by the kernels: launches that are planned once."""

    def __init__(self, call: Call, needs: Sequence[bool]):
        super().__init__(call, needs, _run)
        self._launches = PairLossPlan(call.rows.for_kernels(), *call[1:], self.head_gradient)
        self._device = call.rows.chosen.device
        self._has_indices = call.rows.pairs is not None or call.rows.last_token is not None
        self._backward: dict[Hashable, GradientPlan] = {}

    def forward(self, call: Call) -> LossResult:
        rows, scores, mu, _, _ = call
        if self._has_indices:
            rows.check_range()
            rows = rows.for_kernels()
        return run_on(self._device, self._launches.run, rows, scores, mu)

    def linear_gradient(self, saved: tuple[Tensor | None, ...], needs: tuple[bool, bool, bool]) -> Gradients:
        gradient, loss_gradient, head_gradient, head_weight, hidden, pairs, last_token = saved
        if is_watched((loss_gradient,)):
            return super().linear_gradient(saved, needs)
        call = (
            Upstream(gradient, loss_gradient, head_gradient), head_weight, hidden,
            Layout(pairs, last_token, self.layout, self.hidden_shape),
        )  # fmt: skip
        # The strides of forward are not enough: hooks on saved tensors (offloading) may give back contiguous copies.
        kind = (
            needs, loss_gradient.dtype, loss_gradient.stride(), head_weight.stride(),
            None if hidden is None else hidden.stride(), None if last_token is None else last_token.stride(),
        )  # fmt: skip
        plan = self._backward.get(kind)
        if plan is None:
            bias_dtype = self.dtypes[4] or head_weight.dtype
            plan = self._backward[kind] = GradientPlan(*call, self.hidden_dtype, bias_dtype, needs)
        return run_on(self._device, plan.run, *call)


_passes: Plans[LaunchedPasses] = Plans()


def _passes_of(call: Call, needs: tuple[bool, ...]) -> Passes:
    rows, scores, mu, options, stats = call
    device, ema = rows.chosen.device, mu.ema
    if not uses_kernels(device) or rows.num_pairs == 0:
        return Passes(call, needs, _run)
    average = None if ema is None else (ema.beta, ema.pending is None, ema.num_updates.dtype)
    tensors = rows.chosen, rows.rejected, rows.pairs, rows.last_token, *scores, mu.tensor
    kind = device, rows.layout, options, stats, needs, average, kinds(tensors)
    return _passes.find(kind, LaunchedPasses, call, needs)


def pair_loss(rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool) -> LossResult:
    """The loss of P pairs, whose gradients reach the rewards or the rows and their head."""
    if mu.own_mean:
        mu = mu._replace(tensor=measure_distances(rows, scores.accumulate_dtype(rows)).mean())
    if is_watched((rows.chosen, rows.rejected, *scores)):
        rows = rows.detach() if scores.head_weight is None else rows  # of given rewards they are constants
        return LossResult(*_pair_loss_op(*Arguments.of(Call(rows, scores, mu, options, stats))))
    if few_pairs.serves(rows, options, stats):
        return few_pairs.few_pairs_loss(rows, scores, mu, options)
    call = Call(rows, scores, mu, options, stats)
    inputs = call.differentiable
    needs = _needs_gradients(inputs)
    passes = _passes_of(call, needs)
    if True in needs:
        return _differentiable(passes, call, inputs)
    with torch.no_grad():
        return passes.forward(call)


def _numpy_weighs(device: torch.device) -> bool:
    return device.type == "cpu" and not uses_kernels(device)


def pair_weights(rows: RowPairs, mu: Mu, options: LossOptions) -> Tensor:
    """The weights (P,) of pairs whose loss is computed elsewhere; `mu` takes up their distances. All are constants."""
    hidden, dtype, watched = rows.chosen, accumulate_dtype(*rows[:2]), is_watched(rows[:2])
    if not watched and rows.num_pairs > 0 and _numpy_weighs(hidden.device):
        if few_pairs.serves_weights(rows):
            return few_pairs.few_pairs_weights(rows, mu, options)
        return weights_on_cpu(rows, mu, options, dtype)
    # The pass over the pairs makes them, in two launches, beside a loss of any rewards that nobody asks for.
    reward = torch.empty(rows.num_pairs, dtype=dtype, device=hidden.device)
    scores = Scores(reward, reward, None, None, None, None)
    if watched:
        result = pair_loss(rows, scores, mu, options, stats=True)
    else:
        result = run_pair_loss(rows, scores, mu, options, stats=True, head_gradient=False)
    return result.pair_stats[WEIGHT]
