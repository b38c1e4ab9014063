"""The `normbt::` operators: one schema, one fake, one implementation and one Autograd kernel each.

The implementation is registered for every device and asks `backend.uses_kernels` itself, because the
CPU is served by numpy or by Triton's interpreter, whichever the process runs with.

An eager call that nothing watches does not need the dispatcher, which costs more than the loss of a small batch:
callers then run the implementation themselves. `is_watched` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_key_parse,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

NAMESPACE = "normbt"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
PLAIN = (Tensor, torch.nn.Parameter)
_PRE_DISPATCH, _VMAP_MODE = DispatchKey.PreDispatch, _dispatch_key_parse("VmapMode")


def define_op(schema: str, *, fake: Callable, autograd: Callable) -> Callable[[Callable], Callable]:
    """Registers the decorated implementation as `normbt::<schema>`, and returns the operator.

    `schema` starts with the operator's name; `fake` makes the outputs' shapes without data. `autograd(run, *arguments)`
    runs the operator below autograd by `run(*arguments)`, and gives its results their gradients or refuses to.
    """
    name = schema.partition("(")[0]

    def register(implementation: Callable) -> Callable:
        def with_gradients(keys, *arguments):
            def run(*arguments):
                with torch._C._AutoDispatchBelowAutograd():
                    return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

            # Of torch.func's transforms, this kernel runs in one at a time: a Function needs no rule for them here.
            with enable_single_level_autograd_function():
                return autograd(run, *arguments)

        def run_here(*arguments):
            results = implementation(*arguments)
            return with_empty_tables(results) if isinstance(results, tuple) else results

        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        _library.impl(name, run_here, "CompositeExplicitAutograd")
        _library.impl(name, with_gradients, "Autograd", with_keyset=True)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return op

    return register


def with_empty_tables(results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What an operator returns, which cannot return None in the place of a tensor: (0,) stands for it."""
    like = next(tensor for tensor in results if tensor is not None)
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in results)


def without_gradients(run: Callable, *arguments):
    """The Autograd kernel of an operator whose results are constants."""
    return run(*arguments)


def is_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether anything traces or transforms this call, and so must see the operator: torch.compile and export,
    torch.func, forward-mode differentiation, `is_grads_batched`, a dispatch mode, torch.jit.trace, or tensors that are
    not plain ones (fake, functional, distributed)."""
    if (
        is_dynamo_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or _dispatch_tls_is_dispatch_key_included(_VMAP_MODE)  # of torch.autograd.grad, not of torch.func
        or _get_tracing_state() is not None
    ):
        return True
    for tensor in tensors:  # noqa: SIM110 (`any` of a generator takes twice as long)
        if tensor is not None and type(tensor) not in PLAIN:
            return True
    return False


class _Refusal(torch.autograd.Function):
    """Hands tensors through, and raises when it is differentiated."""

    @staticmethod
    def forward(message: str, num_results: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:num_results])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def refuse_gradients(message: str, results: Iterable[Tensor], of: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """`results`, which raise RuntimeError as soon as they are differentiated with respect to what `of` depends on."""
    results = tuple(results)
    return _Refusal.apply(message, len(results), *results, *of)
