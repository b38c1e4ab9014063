"""NormBT for reward models as fused Triton kernels: the distance-normalised Bradley-Terry loss (arXiv:2512.06343).

A new option of the loss goes into ops/terms.py, checks.py, functional.py and modules.py; a new trainer into
integrations/, a new benchmark into evaluation/, a new command into commands/, a new file format into data/.

The public names are imported when they are first used, so that the command line shows its help without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normbt_kernels._version import __version__

if TYPE_CHECKING:
    from normbt_kernels.functional import NormBTStats, linear_normbt_loss, normbt_loss, pair_distance
    from normbt_kernels.integrations.apply import apply_normbt, remove_normbt
    from normbt_kernels.modules import LinearNormBTLoss, NormBTLoss

_HOMES = {
    "LinearNormBTLoss": "modules",
    "NormBTLoss": "modules",
    "NormBTStats": "functional",
    "apply_normbt": "integrations.apply",
    "linear_normbt_loss": "functional",
    "normbt_loss": "functional",
    "pair_distance": "functional",
    "remove_normbt": "integrations.apply",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
