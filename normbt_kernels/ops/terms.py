"""What goes into the loss of P pairs, and what comes out: the terms that the kernels and the closed form share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normbt_kernels.ops.ema import EMA
from normbt_kernels.ops.pairs import RowPairs, accumulate_dtype

WEIGHT = 1  # its row in `LossResult.pair_stats`


class LossOptions(NamedTuple):
    """The constants of the loss (design symbols: s, center_coef, eps, max_weight, power) and its reduction."""

    label_smoothing: float
    center_coef: float
    eps: float
    max_weight: float | None
    power: float
    reduction: str


class Scores(NamedTuple):
    """Where rewards come from and what weighs each pair: either both rewards, or the head that makes them."""

    chosen_rewards: Tensor | None  # (P,)
    rejected_rewards: Tensor | None  # (P,)
    head_weight: Tensor | None  # (H,)
    head_bias: Tensor | None  # ()
    margin: Tensor | None  # (P,)
    pair_weight: Tensor | None  # (P,)

    def accumulate_dtype(self, rows: RowPairs) -> torch.dtype:
        inputs = self.chosen_rewards, self.rejected_rewards, self.head_weight, self.head_bias
        return accumulate_dtype(rows.chosen, rows.rejected, *inputs)

    def block(self, pairs: slice | None) -> "Scores":
        """Of some of the pairs; None for all."""
        if pairs is None:
            return self
        return Scores(
            *(None if tensor is None else tensor[pairs] for tensor in self[:2]),
            self.head_weight,
            self.head_bias,
            *(None if tensor is None else tensor[pairs] for tensor in self[4:]),
        )


class Mu(NamedTuple):
    """What the weights are measured by: a number, a tensor, this batch's own mean, or the mu of `ema`.

    As long as `ema` has no mu, the tensor stands for it; each pair weighs 1 if there is no tensor either.
    """

    value: float | None = None
    tensor: Tensor | None = None  # ()
    ema: EMA | None = None  # also takes up this batch's distances, unless its `pending` is None
    own_mean: bool = False  # distances first, their mean, then the ordinary pass: the rows are read twice

    @property
    def takes_up_distances(self) -> bool:
        return self.ema is not None and self.ema.pending is not None


class LossResult(NamedTuple):
    """What is not asked for is None."""

    loss: Tensor  # (), or (P,) with reduction "none"
    gradient: Tensor | None  # (2, P) of the loss with respect to the chosen and the rejected rewards
    head_gradient: Tensor | None  # (H + 1,) of weight and bias for an upstream gradient of 1
    pair_stats: Tensor | None  # (4, P): distance, weight, chosen and rejected reward
    batch_stats: Tensor | None  # (3,): mean distance, BT loss, accuracy

    @classmethod
    def allocate(
        cls, num_pairs: int, hidden_size: int, options: LossOptions, stats: bool, head_gradient: bool, **memory: Any
    ) -> "LossResult":
        """Memory for it, of the dtype and on the device that `memory` names."""
        return cls(
            torch.empty((num_pairs,) if options.reduction == "none" else (), **memory),
            torch.empty((2, num_pairs), **memory),
            torch.empty(hidden_size + 1, **memory) if head_gradient else None,
            torch.empty((4, num_pairs), **memory) if stats else None,
            torch.empty(3, **memory) if stats else None,
        )
