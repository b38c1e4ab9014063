"""The pass over row pairs in PyTorch operators: the closed form of `pair_loss.py`, which serves every device that has
neither Triton nor `on_cpu.py`."""

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


def compute_pair_loss(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The loss of P >= 1 pairs."""
    dtype, num_pairs = scores.accumulate_dtype(rows), rows.num_pairs
    smoothing, centers = options.label_smoothing, options.center_coef != 0
    scale = 1 / num_pairs if options.reduction == "mean" else 1.0
    # 1. rho, d, and what else is asked for
    chosen, rejected = rows.gather(dtype)
    delta = chosen - rejected
    distance = torch.linalg.vector_norm(delta, dim=-1)
    if scores.head_weight is None:
        chosen_reward, rejected_reward = cast(scores.chosen_rewards, dtype), cast(scores.rejected_rewards, dtype)
        difference = chosen_reward - rejected_reward
    else:
        # Multiply, then sum: torch sums in a cascade, which at H = 32768 is 12x closer to fp64 than a BLAS dot.
        head = cast(scores.head_weight, dtype)
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
    # 3. the head's gradient
    total = None
    if head_gradient:
        total = delta.new_zeros(rows.hidden_size + 1)
        total[:-1].addmv_(delta.T, minus_gradient, alpha=-1)
        if centers:
            total[:-1].addmv_((chosen + rejected).T, centering)
            total[-1] += 2 * centering.sum()
    # 4. what the batch leaves behind
    if options.reduction != "none":
        loss = loss.mean() if options.reduction == "mean" else loss.sum()
    pair_stats = batch_stats = None
    if stats:
        pair_stats = torch.stack((distance, weight, chosen_reward, rejected_reward))
        batch_stats = torch.stack((distance, bt_loss, (difference > 0).to(dtype))).mean(dim=1)
    if mu.takes_up_distances:
        add_to_pending_(mu.ema.pending, distance.sum(), num_pairs)
        if mu.ema.beta is not None:
            move_mu_(*mu.ema[:4])
    return LossResult(loss, gradient, total, pair_stats, batch_stats)
