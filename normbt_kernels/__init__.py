"""NormBT for reward models as fused Triton kernels: the distance-normalised Bradley-Terry loss (arXiv:2512.06343)."""

from normbt_kernels._version import __version__
from normbt_kernels.functional import NormBTStats, linear_normbt_loss, normbt_loss, pair_distance
from normbt_kernels.integrations.apply import apply_normbt, remove_normbt
from normbt_kernels.modules import LinearNormBTLoss, NormBTLoss

__all__ = [
    "LinearNormBTLoss",
    "NormBTLoss",
    "NormBTStats",
    "__version__",
    "apply_normbt",
    "linear_normbt_loss",
    "normbt_loss",
    "pair_distance",
    "remove_normbt",
]
