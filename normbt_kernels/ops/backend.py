"""Which implementation serves which device.

"triton"              the kernels, compiled: CUDA and ROCm devices, where Triton is installed
"triton-interpreter"  the kernels, interpreted: any device, with TRITON_INTERPRET=1 set before import
"torch"               without kernels: numpy on the CPU, the closed form in PyTorch operators on every other device
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from normbt_kernels.ops import _triton
from normbt_kernels.ops.launch import Processors

Result = TypeVar("Result")

# Of every launch. Versions of Triton differ in their default, and a * b + c rounded once is another number than twice.
FP_FUSION = True
# Of an interpreted launch: more than one, so that every stride over pairs is exercised.
INTERPRETED = Processors(count=3, shared_bytes=228 * 1024)


@functools.cache
def backend_name(device: torch.device) -> str:
    """The implementation that serves tensors on `device`: "triton", "triton-interpreter" or "torch"."""
    if _triton.INTERPRETED:
        return "triton-interpreter"
    if _triton.INSTALLED and device.type == "cuda":
        return "triton"
    return "torch"


def uses_kernels(device: torch.device) -> bool:
    """Whether tensors on `device` are served by the Triton kernels, compiled or interpreted."""
    return backend_name(device) != "torch"


def triton_dtype(dtype: torch.dtype) -> _triton.tl.dtype:
    """The accumulation dtype, fp32 or fp64, as the kernels name it."""
    return _triton.tl.float64 if dtype == torch.float64 else _triton.tl.float32


def processors_of(device: torch.device) -> Processors:
    return _processors_of_gpu(device) if device.type == "cuda" else INTERPRETED


@functools.cache
def _processors_of_gpu(device: torch.device) -> Processors:
    properties = torch.cuda.get_device_properties(device)
    # Without tiles ahead on ROCm, where nobody has measured them.
    shared_bytes = 0 if torch.version.hip else properties.shared_memory_per_multiprocessor
    return Processors(properties.multi_processor_count, shared_bytes)


def run_on(device: torch.device, run: Callable[..., Result], *arguments: Any) -> Result:
    """`run(*arguments)` with `device` as the current one: Triton launches there, wherever the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return run(*arguments)
    with torch.cuda.device(device):
        return run(*arguments)
