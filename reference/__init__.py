"""The judge: NormBT in plain autograd PyTorch, imported by tests and benchmarks, never by the package."""

from reference.normbt import (
    DistanceEMA,
    linear_normbt_loss,
    normbt_loss,
    normbt_weight,
    pair_distance,
    pair_rows,
    pool,
)

__all__ = [
    "DistanceEMA",
    "linear_normbt_loss",
    "normbt_loss",
    "normbt_weight",
    "pair_distance",
    "pair_rows",
    "pool",
]
