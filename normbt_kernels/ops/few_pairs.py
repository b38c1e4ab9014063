"""Few pairs on the CPU: operators of PyTorch make the loss, plain numbers its weights, and autograd differentiates it.

    d = v . (h_c - h_r) or r_c - r_r,    loss = sum_p c_p log sigmoid(d_p - margin_p),    c = -w q / P

A `Function` written in Python costs as much as all of this. But of many rows autograd makes copies, which cost more: at
two to four times `MAX_ELEMENTS` these operators take 1.0 to 3.2 times as long as eager NormBT (bench/NOTES.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from normbt_kernels.ops.backend import uses_kernels
from normbt_kernels.ops.on_cpu import weights_of_differences
from normbt_kernels.ops.pairs import RowPairs, accumulate_dtype
from normbt_kernels.ops.terms import LossOptions, LossResult, Mu, Scores

CPU = torch.device("cpu")
MAX_ELEMENTS = 131072  # of each side


def serves_weights(rows: RowPairs) -> bool:
    """Whether the weights of these pairs are made here."""
    hidden = rows.chosen
    return (
        hidden.is_cpu
        and not uses_kernels(CPU)
        and hidden.dim() == 2
        and 0 < hidden.numel() <= (MAX_ELEMENTS if rows.layout == "apart" else 2 * MAX_ELEMENTS)
        and rows.layout != "explicit"
    )


def serves(rows: RowPairs, options: LossOptions, stats: bool) -> bool:
    """Whether the loss of these pairs is made here."""
    return (
        not stats
        and serves_weights(rows)
        and options.center_coef == 0
        and options.label_smoothing == 0
        and not torch.is_autocast_enabled("cpu")  # it would round `mv` to 16 bits
    )


def few_pairs_weights(rows: RowPairs, mu: Mu, options: LossOptions) -> Tensor:
    """The weights (P,) alone."""
    dtype = accumulate_dtype(rows.chosen, rows.rejected)
    rejected = rows.rejected if rows.layout == "apart" else None
    return weights_of_differences(_differences(rows.layout, *_in(dtype, rows.chosen, rejected)), mu, options, 1.0)


def few_pairs_loss(rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions) -> LossResult:
    """The loss, which autograd differentiates."""
    dtype = accumulate_dtype(rows.chosen, rows.rejected, *scores[:4])
    rejected = rows.rejected if rows.layout == "apart" else None  # one tensor has both
    chosen, rejected, *of_scores = _in(dtype, rows.chosen, rejected, *scores)
    chosen_rewards, rejected_rewards, head_weight, head_bias, margin, pair_weight = of_scores
    delta = _differences(rows.layout, chosen, rejected)
    if head_weight is None:
        z = chosen_rewards - rejected_rewards
    else:
        z = torch.mv(delta, head_weight)
        if head_bias is not None:
            z = z + (head_bias - head_bias)  # its gradient is 0, and not None
    if margin is not None:
        z = z - margin
    scale = -1 / delta.shape[0] if options.reduction == "mean" else -1.0
    coefficient = weights_of_differences(delta, mu, options, scale)
    if pair_weight is not None:
        coefficient = coefficient * pair_weight
    log_likelihood = F.logsigmoid(z)
    per_pair = options.reduction == "none"
    loss = coefficient * log_likelihood if per_pair else torch.dot(coefficient, log_likelihood)
    return LossResult(loss, None, None, None, None)


def _differences(layout: str, chosen: Tensor, rejected: Tensor | None) -> Tensor:
    """h_c - h_r (P, H), contiguous: rows of other strides would have other bits."""
    if layout == "halves":
        chosen, rejected = chosen.chunk(2)
    elif layout == "interleaved":
        chosen, rejected = chosen.unflatten(0, (-1, 2)).unbind(1)
    return (chosen - rejected).contiguous()


def _in(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]
