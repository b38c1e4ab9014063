"""The three public functions and what they return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from normbt_kernels.checks import linear_inputs, loss_options, mu_of, reward_inputs, row_pairs
from normbt_kernels.ops.autograd import pair_loss
from normbt_kernels.ops.pair_distance import measure_distances
from normbt_kernels.ops.pairs import RowPairs
from normbt_kernels.ops.terms import LossOptions, Mu, Scores


class NormBTStats(NamedTuple):
    """Statistics of a batch: detached tensors on its device, fp32 (fp64 for fp64 inputs)."""

    chosen_rewards: Tensor  # (P,)
    rejected_rewards: Tensor  # (P,)
    distance: Tensor  # (P,) ||h_c - h_r||_2
    weight: Tensor  # (P,) min((mu / (distance + eps))^power, max_weight); without `pair_weight`
    mean_distance: Tensor  # ()
    bt_loss: Tensor  # () mean loss with all weights 1 and no centering: comparable across runs
    # () share of pairs with d > 0; for a linear head d is v . (h_c - h_r), before the rewards are rounded
    accuracy: Tensor


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
    power: float = 1.0,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, NormBTStats]:
    """NormBT on rewards that some model has computed (arXiv:2512.06343, section 3).

        loss = mean_p [ q w l(r_c - r_r - margin) + center_coef (r_c + r_r)^2 ]
        w    = min((mu / (||h_c - h_r||_2 + eps))^power, max_weight), a constant in backward

    Args:
        chosen_rewards, rejected_rewards: (P,) or (P, 1), floating point. They receive the gradients.
        chosen_hidden, rejected_hidden: (P, H), the inputs of the score head at the pooled token. Any strides.
            They may require grad and receive none from this loss: the weight is a stop-gradient.
        mu: mean distance of earlier batches, a number or a 0-d tensor. None takes the mean of this batch and reads the
            rows a second time for it.
        margin: (P,) subtracted from r_c - r_r. A constant: receives no gradient.
        pair_weight: (P,) multiplies each pair's loss (q). A constant: receives no gradient.
        label_smoothing: s in [0, 1); l = -[(1-s) log sigma(z) + s log sigma(-z)].
        center_coef: weight of the centering term, which is never multiplied by w or q.
        eps: added to the distance, >= 0. On a GPU, each new value of this number or of the other numbers here compiles
            the kernel again (about a second); mu may change freely.
        max_weight: cap on w; without it identical pairs would get (mu / eps)^power. None for no cap.
        power: how strongly w depends on the distance, >= 0: 1 is the paper's NormBT, 0 plain Bradley-Terry.
        reduction: "mean" over pairs, "sum" (no division), or "none" (the (P,) vector).
        return_stats: also return `NormBTStats`.

    Returns:
        The loss, or (loss, stats); () or with reduction "none" (P,). fp64 if the rewards or the hidden states are,
        else fp32. No pairs: 0 (an empty vector with "none"), and gradients of 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was seen.
        RuntimeError: differentiation in forward mode, or twice; a few pairs on the CPU allow the latter.
    """
    mu = mu_of(mu, chosen_hidden)
    options = loss_options(label_smoothing, center_coef, eps, max_weight, power, reduction)
    inputs = reward_inputs(chosen_rewards, rejected_rewards, chosen_hidden, rejected_hidden, margin, pair_weight)
    return loss_and_stats(*inputs, mu, options, return_stats)


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
    power: float = 1.0,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, NormBTStats]:
    """NormBT with the score head fused in: rewards are `hidden . weight + bias`, never rounded to bf16.

    The rows are subtracted before the product, `weight . (h_c - h_r)` in fp32, which keeps the margins that
    16-bit rewards round away. Each row is read once in forward and written once, as its gradient, in backward.

    Args:
        hidden: (N, H), or (N, S, H) with `last_token`; floating point, any strides.
        weight: (H,) or (1, H), the head's; its dtype may differ from that of `hidden`.
        mu: as in `normbt_loss`.
        bias: () or (1,), or None.
        pairs: "halves" (row i is chosen over row i + N/2), "interleaved" (row 2i over row 2i + 1), or int64
            (P, 2) of (chosen, rejected) rows, where a row may serve in many pairs or in none.
        last_token: int32 or int64 (N,), the position in S of each sequence's pooled row.
        margin, pair_weight, label_smoothing, center_coef, eps, max_weight, power, reduction, return_stats: as in
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
    mu = mu_of(mu, hidden)
    options = loss_options(label_smoothing, center_coef, eps, max_weight, power, reduction)
    inputs = linear_inputs(hidden, weight, bias, pairs, last_token, margin, pair_weight)
    return loss_and_stats(*inputs, mu, options, return_stats)


def pair_distance(hidden: Tensor, pairs: str | Tensor = "halves", last_token: Tensor | None = None) -> Tensor:
    """||h_c - h_r||_2 of each pair, (P,), without gradient; fp32 (fp64 for fp64 `hidden`).

    Args:
        hidden, pairs, last_token: as in `linear_normbt_loss`.

    Raises:
        TypeError, ValueError: as `linear_normbt_loss`.
    """
    return measure_distances(row_pairs(hidden, pairs, last_token))


def loss_and_stats(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, return_stats: bool
) -> Tensor | tuple[Tensor, NormBTStats]:
    """What both forms and both modules return for checked inputs."""
    result = pair_loss(rows, scores, mu, options, return_stats)
    if not return_stats:
        return result.loss
    distance, weight, chosen_rewards, rejected_rewards = result.pair_stats
    return result.loss, NormBTStats(chosen_rewards, rejected_rewards, distance, weight, *result.batch_stats)
