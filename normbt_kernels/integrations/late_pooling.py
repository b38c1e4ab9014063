"""Late pooling: in the last decoder layer only the scored tokens pass the MLP and the attention's projections of
queries and output. Keys and values are needed of all tokens.

    (N, S, D) -> scored rows (N, 1, D) -> q_proj, o_proj, mlp -> (N, 1, H) -> written into zeros (N, S, H)

Nothing after that layer mixes tokens, and the model reads only the scored ones. Their residual stream is exact. That of
the other tokens is not, but nobody reads it. The layer also keeps less for backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normbt_kernels.errors import UserError

MLPS = ("mlp", "feed_forward", "ffn")
PROJECTIONS = ("q_proj", "o_proj", "out_proj", "c_proj", "dense", "Wo")


def modules_to_narrow(model: nn.Module) -> list[nn.Module]:
    """The modules of the last layer that work token by token: its MLP, and projections of its attention.

    The last layer is the last element of the last outermost `nn.ModuleList`.

    Raises:
        ValueError: there is no such layer, or it has no MLP of a known name.
    """
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [stack for name, stack in stacks if not any(name.startswith(f"{other}.") for other, _ in stacks)]
    layer = outermost[-1][-1] if outermost and len(outermost[-1]) else nn.Module()
    mlps = [module for name, module in layer.named_children() if name in MLPS]
    if not mlps:
        raise UserError(
            f"late_pooling knows no MLP in the last layer of {type(model).__name__} (looked for {', '.join(MLPS)}): "
            "set late_pooling=False"
        )
    attentions = [module for name, module in layer.named_children() if "att" in name]
    projections = [
        module
        for attention in attentions
        for name, module in attention.named_modules()
        if name.rpartition(".")[2] in PROJECTIONS
    ]
    return projections + mlps


class Narrowing:
    """Gives `module` only the scored rows, and puts its results at their places in a tensor of zeros.

    Args:
        scored: returns the scored rows of the current forward, (N,) indices into its flattened tokens; None for all.
    """

    def __init__(self, module: nn.Module, scored: Callable[[], Tensor | None]):
        self._scored = scored
        self._hooks = (
            module.register_forward_pre_hook(self._narrow),
            module.register_forward_hook(self._widen),
        )

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._rows = self._scored()
        if self._rows is None:
            return None
        hidden, *others = args
        self._tokens = hidden.shape[:-1]
        rows = hidden.flatten(0, -2).index_select(0, self._rows)
        return (rows.unsqueeze(1) if hidden.dim() == 3 else rows, *others)

    def _widen(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._rows is None:
            return None
        rows, *others = output if isinstance(output, tuple) else (output,)
        rows = rows.flatten(0, -2)
        wide = rows.new_zeros(self._tokens.numel(), rows.shape[-1]).index_copy(0, self._rows, rows)
        wide = wide.view(*self._tokens, -1)
        self._rows = None
        return (wide, *others) if isinstance(output, tuple) else wide

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class OfEachForward:
    """Holds one value per forward. The modules read it in that forward, and when a checkpoint repeats a layer of it in
    backward.

    Autograd numbers its nodes in the order in which it makes them. The nodes of a repeated layer were made after its
    forward began and before the next one began, so their numbers tell the forward.
    """

    MAX_KEPT = 1024  # forwards without a backward between them; each keeps one index per sequence

    def __init__(self):
        self._values: deque[tuple[int, Tensor | None]] = deque(maxlen=self.MAX_KEPT)
        self._running: tuple[Tensor | None] | None = None

    def begin(self, value: Tensor | None) -> None:
        self._running = (value,)
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint repeats the whole forward inside backward
            self._values.append((torch._C._autograd._get_sequence_nr(), value))

    def end(self) -> None:
        self._running = None

    def get(self) -> Tensor | None:
        """The value of the forward that runs or is repeated; None between forwards."""
        if self._running is not None:
            return self._running[0]
        if torch._C._current_graph_task_id() == -1:
            return None
        node = torch._C._current_autograd_node()._sequence_nr()
        return next((value for number, value in reversed(self._values) if number <= node), None)

    def __reduce__(self):
        return OfEachForward, ()  # a copy of the model has no forward that could be repeated
