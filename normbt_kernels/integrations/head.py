"""The scalar head of a reward model: which layer it is, and what it reads."""

from __future__ import annotations

from torch import Tensor, nn


def find_head(model: nn.Module) -> nn.Linear:
    """The last `nn.Linear` with one output, in registration order: the layer that turns a row into a reward.

    Mixture-of-experts gates have one output too, which is why the last one is taken and not the only one.

    Raises:
        ValueError: the model has no such layer.
    """
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no Linear layer with one output: a reward model needs a scalar head "
            "(load it with AutoModelForSequenceClassification and num_labels=1)"
        )
    return heads[-1]


class HeadInput:
    """Keeps what `head` reads in the forward pass between `expect` and `take`, and in no other.

    The hook is registered once: torch.compile traces hooks when it first compiles and never looks for new ones.
    """

    def __init__(self, head: nn.Linear):
        self._input: Tensor | None = None
        self._expected = False
        head.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if self._expected:
            self._input = args[0] if args else kwargs["input"]

    def expect(self) -> None:
        """The next forward pass is the one to keep."""
        self._expected = True

    def take(self) -> Tensor:
        """The input of that forward pass, once: `(N, S, H)` for decoders, `(N, H)` where the head sees pooled
        rows. Nothing is kept afterwards, so activations live no longer than their step."""
        hidden, self._input, self._expected = self._input, None, False
        return hidden
