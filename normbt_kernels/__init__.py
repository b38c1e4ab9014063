"""NormBT for reward models as fused Triton kernels."""
from normbt_kernels._version import __version__
