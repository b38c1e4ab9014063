"""The scalar head of a reward model: which layer it is, what it reads, and what the model around it was given."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def find_head(model: nn.Module) -> nn.Linear:
    """The last `nn.Linear` with one output, in registration order: the layer that turns a row into a reward.

    Mixture-of-experts gates have one output too, which is why the last one is taken and not the only one.

    Raises:
        ValueError: the model has no such layer, has one for several labels, or has wrapped it in LoRA matrices.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    heads = [(name, module) for name, module in linears if module.out_features == 1]
    num_labels = getattr(getattr(model, "config", None), "num_labels", 1)
    if not heads or linears[-1][1].out_features == num_labels != 1:
        raise ValueError(
            f"{type(model).__name__} (num_labels={num_labels}) has no Linear layer with one output: a reward model "
            "needs a scalar head (load it with AutoModelForSequenceClassification and num_labels=1)"
        )
    name, head = heads[-1]
    wrapped, is_lora, _ = name.rpartition(".lora_B.")
    if is_lora:
        raise ValueError(
            f"the scalar head {wrapped!r} is adapted by LoRA, so that no single layer reads the hidden states: train "
            "it in full, with modules_to_save in place of target_modules in LoraConfig"
        )
    return head


def find_owner(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The module that calls `head`: the innermost one around it whose forward takes `input_ids`, None if none does.

    Raises:
        ValueError: `head` is no part of `model`.
    """
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        raise ValueError(f"head {type(head).__name__} is not a module of this {type(model).__name__}")
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    return None


def refuse_fused_liger(args: Any) -> None:
    """
    Raises:
        ValueError: `args`, TrainingArguments, have Liger replace the forward that calls the head.
    """
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise ValueError(
            "use_liger_kernel=True replaces the model's forward by that of a language model, which needs an lm_head: "
            "pass liger_kernel_config={'fused_linear_cross_entropy': False} to keep Liger's other kernels"
        )


def frozen_head_warning(name: str) -> str:
    """What to tell whoever trains with the head `name` frozen."""
    return (
        "the scalar head is frozen and will not be trained; with peft, pass task_type='SEQ_CLS' or "
        f"modules_to_save=[{name!r}] in LoraConfig"
    )


def last_token(is_token: Tensor) -> Tensor:
    """Position of the last real token of each sequence, `(N, S)` mask -> `(N,)` int64, for padding on either side."""
    positions = torch.arange(is_token.shape[1], device=is_token.device)
    return (is_token * positions).argmax(dim=1)


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


class ModelInputs:
    """Tells a head what its model is being called with: kept before the model's forward, taken once, in the head's.

    A head sees hidden states only, and cannot know by itself which token of a sequence its reward is read at.

    Args:
        owner: the module that calls the head, as `find_owner` finds it.
    """

    def __init__(self, owner: nn.Module):
        self.owner = owner
        self._names = tuple(inspect.signature(owner.forward).parameters)
        self._inputs: Mapping[str, Any] | None = None
        self._hooks = (
            owner.register_forward_pre_hook(self._begin, with_kwargs=True),
            owner.register_forward_hook(self._end),
        )

    def take(self) -> Mapping[str, Any]:
        """The arguments of the forward in progress, by name, once; none where the owner's forward is not running."""
        inputs, self._inputs = self._inputs, None
        return inputs or {}

    def unpadded_token(self, inputs: Mapping[str, Any], hidden: Tensor) -> Tensor:
        """The token of `hidden` (N, S, H) that transformers' classifiers score, (N,): the rightmost one that is not
        the pad token; without token ids or a pad token the last position.

        Raises:
            ValueError: the head was called alone, or sees other sequences than the model.
        """
        if not inputs:
            raise ValueError(
                f"the head of {type(self.owner).__name__} was called with {tuple(hidden.shape)} outside the forward of "
                "its model, which tells it where the sequences end: call the model"
            )
        input_ids, pad_token_id = inputs.get("input_ids"), self._pad_token_id()
        if input_ids is None or pad_token_id is None:
            return torch.full(hidden.shape[:1], hidden.shape[1] - 1, device=hidden.device)
        if input_ids.shape != hidden.shape[:2]:
            raise ValueError(
                f"{type(self.owner).__name__} was called with input_ids {tuple(input_ids.shape)}, but its head sees "
                f"{tuple(hidden.shape)}: packed or sharded sequences have no single last token"
            )
        return last_token((input_ids != pad_token_id).to(hidden.device))

    def _pad_token_id(self) -> int | None:
        config = getattr(self.owner, "config", None)
        if hasattr(config, "get_text_config"):  # of multimodal models
            config = config.get_text_config()
        return getattr(config, "pad_token_id", None)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and inspect.unwrap(owner.forward).__module__.startswith("liger_kernel."):
            raise ValueError(
                f"Liger has replaced the forward of {type(owner).__name__} by that of a language model, which needs an "
                "lm_head: pass liger_kernel_config={'fused_linear_cross_entropy': False} to keep its other kernels"
            )
        self._inputs = dict(zip(self._names, args, strict=False)) | kwargs

    def _end(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.take() and owner.training and torch.is_grad_enabled():
            raise ValueError(
                f"the forward of {type(owner).__name__} did not call its scalar head: a patched forward (Liger, "
                "Unsloth) that scores by itself cannot be followed, nor can a head whose adapter is switched off"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelInputs:
        # A copy of the head alone (peft's modules_to_save) stays in this model; a copy of the model is another one.
        if id(self.owner) not in memo:
            return self
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin
