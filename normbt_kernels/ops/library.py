"""The `normbt::` operators: one schema, one fake and one implementation each.

The implementation is registered for every device and asks `backend.uses_kernels` itself, because the
CPU is served by the closed form or by Triton's interpreter, whichever the process runs with.
"""

from collections.abc import Callable

import torch


def define_op(schema: str, *, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers the decorated implementation as `normbt::<schema>` and returns the operator itself.

    `schema` starts with the operator's name; `fake` makes the outputs' shapes without data. Plain
    `torch.library.define` rather than `custom_op`: gradients are attached by the autograd Functions,
    so the operators need none of the latter's autograd layers.
    """
    name, _, signature = schema.partition("(")
    qualified = f"normbt::{name}"

    def register(implementation: Callable) -> Callable:
        torch.library.define(qualified, f"({signature}", tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(qualified, fake)
        return getattr(torch.ops.normbt, name).default

    return register
