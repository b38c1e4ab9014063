"""Launches that are planned once and repeated, past Triton's binder.

The loss of a few pairs is nothing but host time, and most of that went into finding out anew what is known: launch
shape, strides, constants, and in Triton, which looks at every argument, the kernel compiled for such arguments. All
this follows from the *kind* of a call: options, device, and the dtype, shape and strides of each tensor. So each kind
has a plan, which holds everything but the tensors. What remains to be looked at is where these lie.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor

from normbt_kernels.ops.backend import FP_FUSION

Plan = TypeVar("Plan")
MAX_PLANS = 1024  # lengths of sequences that vary make many kinds, of which few come again


class Plans(Generic[Plan]):
    """The plans of the kinds of calls seen so far."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}

    def find(self, kind: Hashable, make: Callable[..., Plan], *arguments: Any) -> Plan:
        """The plan for `kind`, made by `make(*arguments)` if it is new."""
        plan = self._plans.get(kind)
        if plan is None:
            if len(self._plans) == MAX_PLANS:
                self._plans.clear()
            plan = self._plans[kind] = make(*arguments)
        return plan


def kinds(tensors: Iterable[Tensor | None]) -> tuple[Hashable, ...]:
    """All that a plan may depend on in `tensors`."""
    return tuple([None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors])


class Launch:
    """A launch of one kind: kernel, grid and constants."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], num_warps: int, **constants: Any):
        self._kernel, self._grid, self._num_warps, self._constants = kernel, grid, num_warps, constants
        self._compiled: dict[tuple[bool, ...], Any] = {}

    def __call__(self, tensors: Iterable[Tensor | None], *arguments: Any) -> None:
        """Launches the kernel on the current device.

        Args:
            tensors: all of those in `arguments`. Of their addresses it matters whether 16 divides them.
            arguments: the kernel's, without its constants.
        """
        aligned = tuple([tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors])
        compiled = self._compiled.get(aligned)
        if compiled is not None:
            compiled[self._grid](*arguments, *self._constants.values())
            return
        # The interpreter compiles nothing and returns None.
        self._compiled[aligned] = self._kernel[self._grid](
            *arguments, **self._constants, num_warps=self._num_warps, enable_fp_fusion=FP_FUSION
        )
