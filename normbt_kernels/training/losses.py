"""The losses that `normbt train` compares. Each is called as `LinearNormBTLoss` is; they differ in the weight alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from normbt_kernels import LinearNormBTLoss, linear_normbt_loss
from normbt_kernels.training.arguments import TrainOptions

# min(mu / (rho + eps), 1) is 1 for every distance that a model can produce.
_HUGE = 1e30


class LinearBTLoss(nn.Module):
    """Plain Bradley-Terry by the same fused function: NormBT with every weight equal to 1."""

    def __init__(self, label_smoothing: float = 0.0, center_coef: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.center_coef = center_coef

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Any:
        return linear_normbt_loss(
            hidden,
            weight,
            _HUGE,
            bias=bias,
            label_smoothing=self.label_smoothing,
            center_coef=self.center_coef,
            max_weight=1.0,
            **kwargs,
        )


LOSSES: dict[str, Callable[[TrainOptions], nn.Module]] = {
    "bt": lambda options: LinearBTLoss(options.label_smoothing, options.center_coef),
    "normbt": lambda options: LinearNormBTLoss(
        beta=options.beta, label_smoothing=options.label_smoothing, center_coef=options.center_coef
    ),
}
