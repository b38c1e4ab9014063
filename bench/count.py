"""Counts the bytes that a step moves through global memory, and its launches, by executing it and not by formula.

    with counting() as count:
        loss = step()
    count.bytes, count.launches

There are two counters, and nothing is counted by both:

- Triton kernels run in Triton's interpreter (set TRITON_INTERPRET=1 before import). Their loads and stores are counted
  element by element where the mask is true. A value that two programs read counts twice, even if a cache would serve
  the second read: so a needless second read shows.
- PyTorch operators are counted at the dispatcher: the bytes that an operator reads plus the bytes that it writes, one
  launch each. An operator that consists of others (`aten::zeros`, `normbt::pair_loss`) is counted as those; views and
  allocations are free. An expanded tensor counts the bytes in memory, not those of its shape. A value that the host
  reads (`item`, `bool`, ...) counts as a launch too: it costs more than one.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

HOST_READ = torch.ops.aten._local_scalar_dense.default
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
# These overwrite their tensor without reading it.
OVERWRITES = {"copy_", "fill_", "zero_", "random_", "uniform_", "normal_"}
# These touch as much of their first argument as they yield, not the whole of it.
GATHERS = {"index", "index_select", "gather", "embedding"}
# These touch as much of their first argument as they are given values, which come last but for `accumulate` or `alpha`.
# The gradient of a gather is `index_put` out of place only because a mode is watching: otherwise autograd overwrites.
SCATTERS = {"index_put", "_index_put_impl_", "index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_"}


class Access(NamedTuple):
    source: str  # a kernel or an operator
    operand: str  # the kernel's parameter; "" of an operator
    writes: bool


@dataclass
class Count:
    bytes: Counter[Access] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    @property
    def total_bytes(self) -> int:
        return self.bytes.total()

    @property
    def total_launches(self) -> int:
        return self.launches.total()


@contextmanager
def counting() -> Iterator[Count]:
    """Counts everything that this thread runs inside the block."""
    count = Count()
    operators = _Operators(count)
    with _counted_kernels(count, operators), operators:
        yield count


@dataclass
class _Kernel:
    """The kernel that runs, and which of its parameters owns which memory."""

    name: str
    starts: list[int]
    operands: list[tuple[int, str]]  # end of the memory, parameter

    @classmethod
    def of(cls, executor: Any, args: tuple, kwargs: dict) -> _Kernel:
        memory = {}
        named = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
        for name, tensor in (tensor for argument in named for tensor in _tensors(*argument)):
            storage = tensor.untyped_storage()
            # Views of one storage cannot be told apart by address: the first parameter stands for them all.
            memory.setdefault(storage.data_ptr(), (storage.data_ptr() + storage.nbytes(), name))
        starts = sorted(memory)
        return cls(executor.fn.__name__, starts, [memory[start] for start in starts])

    def operand(self, address: int) -> str:
        index = bisect.bisect_right(self.starts, address) - 1
        if index >= 0 and address < self.operands[index][0]:
            return self.operands[index][1]
        raise RuntimeError(f"{self.name} accesses address {address:#x}, which belongs to none of its arguments")


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for key, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _tensors(name if key == "ptr" else f"{name}.{key}", part)


@contextmanager
def _counted_kernels(count: Count, operators: _Operators) -> Iterator[None]:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
    launch, patch_builtin = executor.__call__, interpreter._patch_builtin
    running: list[_Kernel] = []
    patched: set[int] = set()

    def access(pointers, mask: np.ndarray | None, *directions: bool) -> None:
        elements = pointers.data.size if mask is None else int(np.count_nonzero(mask))
        if elements == 0:
            return
        address = pointers.data.flat[0 if mask is None else int(np.argmax(mask))]
        element_size = -(-pointers.get_element_ty().primitive_bitwidth // 8)
        for writes in directions:
            kernel = running[-1]
            count.bytes[Access(kernel.name, kernel.operand(int(address)), writes)] += elements * element_size

    # Unmasked accesses, block pointers and tensor descriptors all come down to these two.
    def counted_load(self, pointers, mask, *rest):
        access(pointers, mask.data, False)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        access(pointers, mask.data, True)
        return store(self, pointers, value, mask, *rest)

    def counted_rmw(self, operation, pointers, value, mask, *rest):
        access(pointers, mask.data, False, True)
        return rmw(self, operation, pointers, value, mask, *rest)

    def counted_cas(self, pointers, *rest):
        access(pointers, None, False, True)
        return cas(self, pointers, *rest)

    def counted_launch(self, *args, **kwargs):
        count.launches[self.fn.__name__] += 1
        running.append(_Kernel.of(self, args, kwargs))
        patched.clear()
        try:
            with operators.paused():  # the interpreter copies arguments to and fro; a GPU does not
                return launch(self, *args, **kwargs)
        finally:
            running.pop()

    def patch_builtin_once(package, *rest):
        # The interpreter patches the whole language again at each call of a device function: half of its time.
        if id(package) not in patched:
            patched.add(id(package))
            patch_builtin(package, *rest)

    with (
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
        patch.object(builder, "create_atomic_rmw", counted_rmw),
        patch.object(builder, "create_atomic_cas", counted_cas),
        patch.object(executor, "__call__", counted_launch),
        patch.object(interpreter, "_patch_builtin", patch_builtin_once),
    ):
        yield


class _Operators(TorchDispatchMode):
    """Counts the operators that have a kernel of their own, below autograd."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._paused or func.is_view:
            return func(*args, **kwargs)
        launched = self.count.total_launches
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
        if has_kernel or func.overloadpacket.__name__ in SCATTERS:
            result = func(*args, **kwargs)
        else:  # it consists of other operators, which are counted when it calls them
            with self:
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if self.count.total_launches == launched:
            self._add(func, args, kwargs, result)
        return result

    def _add(self, func, args: tuple, kwargs: dict, result: Any) -> None:
        name = func.overloadpacket.__name__
        if name in ALLOCATIONS:
            return
        arguments = list(_arguments(func, args, kwargs))
        given = {tensor.untyped_storage().data_ptr() for tensor, _ in arguments}
        made = [t for t in _leaves([result]) if t.untyped_storage().data_ptr() not in given]
        changed = [tensor for tensor, is_changed in arguments if is_changed]
        if not any(t.numel() for t in made + changed) and func is not HOST_READ:
            return  # a view, or nothing at all
        if name in GATHERS:
            indices = [tensor for tensor, _ in arguments[1:]]
            read, written = [*made, *indices], made
        elif name in SCATTERS:
            values = arguments[-1][0]
            read, written = [tensor for tensor, _ in arguments[1:]], [values]
            if "_add_" in name or any(value is True for value in (*args, *kwargs.values())):  # accumulate=True
                read.append(values)  # the values to which it adds
        else:
            overwrites = name in OVERWRITES or func._schema.name.endswith("_out") or "out" in kwargs
            read = [tensor for tensor, is_changed in arguments if not (is_changed and overwrites)]
            written = made + changed
        self.count.launches[str(func)] += 1
        self.count.bytes[Access(str(func), "", False)] += sum(map(touched_bytes, read))
        self.count.bytes[Access(str(func), "", True)] += sum(map(touched_bytes, written))


def _arguments(func, args: tuple, kwargs: dict) -> Iterator[tuple[Tensor, bool]]:
    """The tensors that an operator takes, and whether it changes them."""
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        changes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _leaves([value]):
            yield tensor, changes


def _leaves(values: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def touched_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor in memory: elements that stride 0 repeats count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 else min(size, 1)
    return elements * tensor.element_size()


def count_step(run: Callable[[Any], Tensor], inputs: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The figures of one step, and its traffic by phase, kernel or operator, operand and direction.

    The upstream gradient is there already, and leaves accumulate nothing: neither belongs to the loss.
    """
    with counting() as forward:
        result = run(inputs)
    upstream = torch.ones_like(result)
    with counting() as backward:
        if result.requires_grad:
            torch.autograd.grad(result, inputs.leaves(), upstream)
    figures = {
        "bytes": forward.total_bytes + backward.total_bytes,
        "launches_forward": forward.total_launches,
        "launches_backward": backward.total_launches,
    }
    traffic = {
        f"{phase}: {source} {operand} {'write' if writes else 'read'}": size
        for phase, count in (("forward", forward), ("backward", backward))
        for (source, operand, writes), size in count.bytes.most_common()
    }
    return figures, traffic
