"""The pass over row pairs in PyTorch operators: the closed form of `pair_loss.py`, which serves every device without
Triton, a block at a time that stays in a core's cache. (Few pairs on the CPU are those of `few_pairs.py`.)"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normbt_kernels.ops.ema import add_to_pending_, move_mu_
from normbt_kernels.ops.pairs import RowPairs, cast
from normbt_kernels.ops.terms import LossOptions, LossResult, Mu, Scores


def weigh_pairs(distance: Tensor, mu: Mu, options: LossOptions) -> Tensor:
    if mu.ema is not None:
        first = 1.0 if mu.tensor is None else weigh_pairs(distance, Mu(tensor=mu.tensor), options)
        return torch.where(mu.ema.num_updates > 0, weigh_pairs(distance, Mu(tensor=mu.ema.mu), options), first)
    weight = (mu.tensor if mu.value is None else mu.value) / (distance + options.eps)
    if options.power != 1:
        weight = weight**options.power
    if options.power != 0:
        weight.add_(distance, alpha=0)  # NaN where it is infinite, as in `weigh`
    return weight if options.max_weight is None else weight.clamp_(max=options.max_weight)


class _Pairs(NamedTuple):
    """What the closed form makes of a block of pairs, in columns of (pairs,)."""

    loss: Tensor
    gradient: Tensor  # (2, pairs)
    distance: Tensor
    # Of the statistics, if they are asked for.
    weight: Tensor | None = None
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    bt_loss: Tensor | None = None
    difference: Tensor | None = None


def _compute_block(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool,
    head: Tensor | None, head_gradient: Tensor | None, dtype: torch.dtype, scale: float,
) -> _Pairs:  # fmt: skip
    """The pass over pairs whose rows stay in a core's cache; their part of the head's gradient is added to (H + 1,)."""
    smoothing, centers = options.label_smoothing, options.center_coef != 0
    # 1. rho, d, and what else is asked for
    chosen, rejected = rows.gather(dtype)
    delta = chosen - rejected
    distance = torch.linalg.vector_norm(delta, dim=-1)
    chosen_reward = rejected_reward = None
    if head is None:
        chosen_reward, rejected_reward = cast(scores.chosen_rewards, dtype), cast(scores.rejected_rewards, dtype)
        difference = chosen_reward - rejected_reward
    else:
        # Multiply, then sum: torch sums in a cascade, which at H = 32768 is 12x closer to fp64 than a BLAS dot.
        difference = (delta * head).sum(dim=-1)
        if stats or centers:
            rejected_reward = (rejected * head).sum(dim=-1)
            if scores.head_bias is not None:
                rejected_reward += scores.head_bias
            chosen_reward = rejected_reward + difference
    # 2. the loss and its gradient
    z = difference if scores.margin is None else cast(difference - scores.margin, dtype)
    bt_loss = F.logsigmoid(z).neg_()
    sigmoid_minus_z = (-z).sigmoid_()
    if smoothing != 0:
        bt_loss = bt_loss.mul_(1 - smoothing) - smoothing * F.logsigmoid(-z)
        sigmoid_minus_z -= smoothing
    weight = pair_weight = weigh_pairs(distance, mu, options)
    if scores.pair_weight is not None:
        pair_weight = cast(weight * scores.pair_weight, dtype)
    loss = pair_weight * bt_loss
    minus_gradient = sigmoid_minus_z.mul_(pair_weight).mul_(scale)
    gradient = torch.stack((-minus_gradient, minus_gradient))
    if centers:
        reward_sum = chosen_reward + rejected_reward
        loss += options.center_coef * reward_sum**2
        centering = 2 * options.center_coef * reward_sum * scale
        gradient += centering
    # 3. the head's gradient, while the rows are in cache
    if head_gradient is not None:
        head_gradient[:-1].addmv_(delta.T, minus_gradient, alpha=-1)
        if centers:
            head_gradient[:-1].addmv_((chosen + rejected).T, centering)
            head_gradient[-1] += 2 * centering.sum()
    if stats:
        return _Pairs(loss, gradient, distance, weight, chosen_reward, rejected_reward, bt_loss, difference)
    return _Pairs(loss, gradient, distance)


def compute_pair_loss(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The loss of P >= 1 pairs."""
    dtype = scores.accumulate_dtype(rows)
    head = None if scores.head_weight is None else cast(scores.head_weight, dtype)
    total = rows.chosen.new_zeros(rows.hidden_size + 1, dtype=dtype) if head_gradient else None
    scale = 1 / rows.num_pairs if options.reduction == "mean" else 1.0
    done = [
        _compute_block(block, scores.block(place), mu, options, stats, head, total, dtype, scale)
        for place, block in rows.blocks()
    ]
    pairs = done[0]
    if len(done) > 1:
        columns = zip(*done, strict=True)
        pairs = _Pairs(*(None if column[0] is None else torch.cat(column, dim=-1) for column in columns))
    loss, pair_stats, batch_stats = pairs.loss, None, None
    if options.reduction != "none":
        loss = loss.mean() if options.reduction == "mean" else loss.sum()
    if stats:
        pair_stats = torch.stack((pairs.distance, pairs.weight, pairs.chosen_reward, pairs.rejected_reward))
        in_order = (pairs.difference > 0).to(dtype)
        batch_stats = torch.stack((pairs.distance, pairs.bt_loss, in_order)).mean(dim=1)
    if mu.takes_up_distances:
        add_to_pending_(mu.ema.pending, pairs.distance.sum(), rows.num_pairs)
        if mu.ema.beta is not None:
            move_mu_(*mu.ema)
    return LossResult(loss, pairs.gradient, total, pair_stats, batch_stats)
