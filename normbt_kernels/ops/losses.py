"""Where autograd meets the operators: one Function for each form of the loss.

Both run `pair_loss`, which leaves behind all that their backward needs. The hidden states are kept for
backward only where reduction "none" must read them again for the head's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normbt_kernels.ops.backend import uses_kernels
from normbt_kernels.ops.linear_gradient import linear_gradient
from normbt_kernels.ops.pair_loss import CHOSEN_GRADIENT, LossOptions, Mean, Scores, pair_loss
from normbt_kernels.ops.pairs import RowPairs, split_pairs


def _run(
    rows: RowPairs, scores: Scores, mean: Mean, options: LossOptions, head_gradient: bool = False,
    row_entries: bool = False,
):  # fmt: skip
    is_ema = mean.num_updates is not None
    mu, ema_mu = (None, mean.mu) if is_ema else (mean.mu, None)
    ema = mu, mean.value, ema_mu, mean.num_updates, mean.beta
    return pair_loss(*rows, *scores, *ema, *options, head_gradient, row_entries)


def _refuse_double_backward() -> None:
    # Not `once_differentiable`: where the upstream gradient needs no gradient itself, it detaches without a word.
    if torch.is_grad_enabled():
        raise RuntimeError("the NormBT losses cannot be differentiated twice (backward ran with create_graph=True)")


class RewardLoss(torch.autograd.Function):
    """The reward form: gradients reach the rewards; the hidden states enter through the stop-gradient weight."""

    @staticmethod
    def forward(ctx, chosen_rewards, rejected_rewards, chosen, rejected, margin, pair_weight, mean, options):
        rows = RowPairs(chosen, rejected, None, None, None)
        scores = Scores(chosen_rewards, rejected_rewards, None, None, margin, pair_weight)
        loss, pair_table, batch_table, *_ = _run(rows, scores, mean, options)
        ctx.save_for_backward(pair_table)
        ctx.reward_dtypes = chosen_rewards.dtype, rejected_rewards.dtype
        ctx.mark_non_differentiable(pair_table, batch_table)
        ctx.set_materialize_grads(False)  # or each backward fills two tables of zeros for the outputs above
        return loss, pair_table, batch_table

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        _refuse_double_backward()
        if loss_gradient is None:
            return (None,) * 8
        (pair_table,) = ctx.saved_tensors
        chosen_dtype, rejected_dtype = ctx.reward_dtypes
        # One product and, for 16-bit rewards, one cast: two launches for both sides.
        gradient = (pair_table[CHOSEN_GRADIENT:] * loss_gradient).to(torch.promote_types(chosen_dtype, rejected_dtype))
        chosen, rejected = gradient[0].to(chosen_dtype), gradient[1].to(rejected_dtype)
        return chosen, rejected, None, None, None, None, None, None


class LinearLoss(torch.autograd.Function):
    """The linear form: gradients reach the hidden states, the head's weight and its bias."""

    @staticmethod
    def forward(
        ctx, hidden, head_weight, head_bias, pairs, last_token, margin, pair_weight, mean, options, trains_head
    ):
        rows = split_pairs(hidden, pairs, last_token)
        scores = Scores(None, None, head_weight, head_bias, margin, pair_weight)
        per_pair = options.reduction == "none"
        # Only kernels look up a row's pairs; the closed form adds pair by pair.
        lists = rows.pairs is not None and ctx.needs_input_grad[0] and uses_kernels(hidden.device)
        loss, pair_table, batch_table, head_gradient, row_entries = _run(
            rows, scores, mean, options, trains_head and not per_pair, lists
        )
        ctx.save_for_backward(
            pair_table,
            head_gradient,
            row_entries,
            head_weight,
            pairs if isinstance(pairs, Tensor) else None,
            last_token,
            hidden if trains_head and per_pair else None,
        )
        ctx.interleaved = pairs == "interleaved" if isinstance(pairs, str) else False
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        ctx.bias_dtype = head_weight.dtype if head_bias is None else head_bias.dtype
        ctx.mark_non_differentiable(pair_table, batch_table)
        ctx.set_materialize_grads(False)
        return loss, pair_table, batch_table

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        _refuse_double_backward()
        if loss_gradient is None:
            return (None,) * 10
        pair_table, head_gradient, row_entries, head_weight, pairs, last_token, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = linear_gradient(
            pair_table[CHOSEN_GRADIENT:], loss_gradient, head_gradient, row_entries, head_weight, hidden, pairs,
            ctx.interleaved, last_token, ctx.hidden_shape, ctx.hidden_dtype, ctx.bias_dtype, *needs,
        )  # fmt: skip
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        return *wanted, None, None, None, None, None, None, None
