"""Launches that are planned once and repeated, past Triton's binder.

The loss of a few pairs is nothing but host time, and most of that went into finding out anew what is known: launch
shape, strides, constants, and in Triton, which looks at every argument, the kernel compiled for such arguments. All
this follows from the *kind* of a call: options, device, and the dtype, shape and strides of each tensor. So each kind
has a plan, which holds everything but the tensors. What remains to be looked at is where these lie.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
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
    """A launch of one kind.

    Args:
        kernel, grid, num_warps: what is launched.
        arguments: makes the kernel's arguments, those before its constants, of what a call is given: each tensor in its
            place, or the address of each.
        records: the named tuples among these arguments, by place. Only the compiler asks for the names, and the
            arguments are made of plain tuples, which takes a third of the time.
        constants: the kernel's.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        num_warps: int,
        arguments: Callable[..., tuple],
        records: Mapping[int, Callable[[tuple], tuple]],
        **constants: Any,
    ):
        self._kernel, self._grid, self._num_warps = kernel, grid, num_warps
        self._arguments, self._records, self._constants = arguments, records, constants
        self._values = tuple(constants.values())
        self._compiled: dict[Hashable, Callable[..., None]] = {}

    def __call__(self, tensors: Iterable[Tensor | None], *numbers: float) -> None:
        """Launches the kernel on the current device.

        Args:
            tensors: all that the kernel reads and writes. Of their addresses it matters whether 16 divides them.
            numbers: what else differs from call to call.
        """
        # Addresses, because Triton asks a tensor for its own, and the driver whether it is one.
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned: Hashable = True  # all of them, as nearly always
        for address in addresses:
            if address is not None and address % 16:
                aligned = tuple([address is None or address % 16 == 0 for address in addresses])
                break
        launch = self._compiled.get(aligned)
        if launch is None:
            self._compile(aligned, *tensors, *numbers)
        else:
            launch(*self._arguments(*addresses, *numbers), *self._values)

    def _compile(self, aligned: Hashable, *given: Any) -> None:
        """Launches by Triton's binder, and keeps what it has compiled."""
        compiled = self._kernel[self._grid](
            *self.named(*given), **self._constants, num_warps=self._num_warps, enable_fp_fusion=FP_FUSION
        )
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled[aligned] = compiled[self._grid]

    def named(self, *given: Any) -> tuple:
        """The kernel's arguments with the names of their parts."""
        return tuple(
            self._records[place](argument) if place in self._records else argument
            for place, argument in enumerate(self._arguments(*given))
        )
