"""Where autograd meets the pass over pairs: the operator, and one Function for both forms of the loss.

The reward form sends gradients to the rewards, the linear form to the hidden states, the head's weight and its bias.
The forward pass leaves behind all that backward needs; hidden states are kept for it only where reduction "none"
must read them again for the head's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from normbt_kernels.ops.ema import EMA
from normbt_kernels.ops.library import define_op, is_watched, refuse_gradients
from normbt_kernels.ops.linear_gradient import ONCE, linear_gradient
from normbt_kernels.ops.pair_distance import measure_distances
from normbt_kernels.ops.pair_loss import LossOptions, LossResult, Mu, Scores, run_pair_loss
from normbt_kernels.ops.pairs import RowPairs


class Arguments(NamedTuple):
    """The operator's arguments, one by one: what the dispatcher and autograd can look into."""

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
    def of(cls, rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool) -> Arguments:
        return cls(*rows, *scores, mu.value, mu.tensor, *(mu.ema or (None,) * 4), *options, stats, False)

    @property
    def rows(self) -> RowPairs:
        return RowPairs(self.chosen, self.rejected, self.pairs, self.last_token, self.layout)

    @property
    def scores(self) -> Scores:
        return Scores(
            self.chosen_rewards, self.rejected_rewards, self.head_weight, self.head_bias, self.margin, self.pair_weight
        )

    @property
    def mu_or_ema(self) -> Mu:
        ema = EMA(self.ema_mu, self.ema_num_updates, self.ema_pending, self.ema_beta)
        return Mu(self.mu_value, self.mu, None if self.ema_mu is None else ema)

    @property
    def options(self) -> LossOptions:
        return LossOptions(
            self.label_smoothing, self.center_coef, self.eps, self.max_weight, self.power, self.reduction
        )


NO_GRADIENTS = Arguments(*(None,) * len(Arguments._fields))


class PairLoss(_SingleLevelFunction):
    """`apply(run, *Arguments)`: `run` is the operator below autograd, or the implementation itself.

    Single-level: torch.func's transforms see the operator, never this Function.
    """

    @staticmethod
    def forward(ctx, run, *arguments):
        given = Arguments(*arguments)
        needs = Arguments(*ctx.needs_input_grad[1:])
        per_pair, trains_head = given.reduction == "none", needs.head_weight or needs.head_bias
        result = LossResult(*run(*given._replace(head_gradient=trains_head and not per_pair)))
        linear = given.head_weight is not None
        ctx.save_for_backward(
            result.loss,  # so that a second differentiation finds its way here and is refused
            result.gradient,
            result.head_gradient,
            given.head_weight,
            given.pairs if linear else None,
            given.last_token if linear else None,
            given.chosen if trains_head and per_pair else None,
        )
        ctx.needs = needs
        ctx.layout = given.layout
        if linear:
            ctx.hidden_shape, ctx.hidden_dtype = given.chosen.shape, given.chosen.dtype
            ctx.bias_dtype = (given.head_weight if given.head_bias is None else given.head_bias).dtype
        else:
            ctx.reward_dtypes = given.chosen_rewards.dtype, given.rejected_rewards.dtype
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)  # or each backward fills tables of zeros for the outputs above
        return tuple(result)

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        if loss_gradient is None:
            return None, *NO_GRADIENTS
        loss, gradient, head_gradient, head_weight, *_ = ctx.saved_tensors
        with torch.no_grad():
            if head_weight is None:
                gradients = _reward_gradients(ctx, gradient, loss_gradient)
            else:
                gradients = _linear_gradients(ctx, gradient, loss_gradient, head_gradient)
        if torch.is_grad_enabled():
            made = {name: value for name, value in gradients.items() if value is not None}
            gradients = dict(zip(made, refuse_gradients(ONCE, made.values(), [loss, loss_gradient]), strict=True))
        return None, *NO_GRADIENTS._replace(**gradients)


def _reward_gradients(ctx, gradient: Tensor, loss_gradient: Tensor) -> dict[str, Tensor]:
    chosen_dtype, rejected_dtype = ctx.reward_dtypes
    # One product and, for 16-bit rewards, one cast: two launches for both sides.
    gradient = (gradient * loss_gradient).to(torch.promote_types(chosen_dtype, rejected_dtype))
    return {"chosen_rewards": gradient[0].to(chosen_dtype), "rejected_rewards": gradient[1].to(rejected_dtype)}


def _linear_gradients(ctx, gradient: Tensor, loss_gradient: Tensor, head_gradient: Tensor) -> dict[str, Tensor | None]:
    _, _, _, head_weight, pairs, last_token, hidden = ctx.saved_tensors
    run = linear_gradient.op if is_watched((gradient, loss_gradient, head_weight)) else linear_gradient
    needs = ctx.needs.chosen, ctx.needs.head_weight, ctx.needs.head_bias
    gradients = run(
        gradient, loss_gradient, head_gradient, head_weight, hidden, pairs, last_token, ctx.layout,
        ctx.hidden_shape, ctx.hidden_dtype, ctx.bias_dtype, *needs,
    )  # fmt: skip
    names = "chosen", "head_weight", "head_bias"
    return {name: value if needed else None for name, value, needed in zip(names, gradients, needs, strict=True)}


def _differentiable(run: Callable, *arguments) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    if given.head_weight is None and (given.chosen.requires_grad or given.rejected.requires_grad):
        # Without a head, rows enter through the weight alone, which is a constant.
        given = given._replace(chosen=given.chosen.detach(), rejected=given.rejected.detach())
    trained = given.chosen, given.chosen_rewards, given.rejected_rewards, given.head_weight, given.head_bias
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
        return PairLoss.apply(run, *given)
    return run(*given)


def _pair_loss_fake(*arguments) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    dtype = given.scores.accumulate_dtype(given.rows)
    return tuple(LossResult.allocate(given.rows, dtype, given.options, given.head_gradient, given.stats))


@define_op(
    "pair_loss(Tensor chosen, Tensor rejected, Tensor? pairs, Tensor? last_token, str layout,"
    " Tensor? chosen_rewards, Tensor? rejected_rewards, Tensor? head_weight, Tensor? head_bias,"
    " Tensor? margin, Tensor? pair_weight, float? mu_value, Tensor? mu,"
    " Tensor(a!)? ema_mu, Tensor(b!)? ema_num_updates, Tensor(c!)? ema_pending, float? ema_beta,"
    " float label_smoothing, float center_coef, float eps, float? max_weight, float power, str reduction,"
    " bool stats, bool head_gradient)"
    " -> (Tensor loss, Tensor gradient, Tensor head_gradient, Tensor pair_stats, Tensor batch_stats)",
    fake=_pair_loss_fake,
    autograd=_differentiable,
)
def _pair_loss(*arguments) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    return tuple(
        run_pair_loss(given.rows, given.scores, given.mu_or_ema, given.options, given.head_gradient, given.stats)
    )


def pair_loss(rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool) -> LossResult:
    """The loss of P pairs, whose gradients reach the rewards or the rows and their head."""
    if mu.own_mean:
        mu = mu._replace(tensor=measure_distances(rows, scores.accumulate_dtype(rows)).mean())
    arguments = Arguments.of(rows, scores, mu, options, stats)
    if is_watched((rows.chosen, rows.rejected, *scores)):
        return LossResult(*_pair_loss.op(*arguments))
    return LossResult(*_differentiable(_pair_loss, *arguments))
