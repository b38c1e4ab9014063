"""The scalar head of a reward model: which layer it is, which rows it reads, and the inputs of its model."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normbt_kernels.errors import UserError

NUM_CHECKED = 16  # first forwards or backwards of a model, in which our assumptions about it are checked

KEEP_THE_FORWARD = (
    "by that of a language model, which needs an lm_head: pass liger_kernel_config={'fused_linear_cross_entropy': "
    "False} to keep Liger's other kernels"
)
CANNOT_FOLLOW = (
    "a patched forward (Liger, Unsloth) that scores by itself cannot be followed, nor can a head that was replaced "
    "since, or whose adapter is not active"
)


@dataclass(frozen=True)
class Head:
    """The scalar head of a model, as the model's forward calls it.

    Attributes:
        name: of the attribute that holds it, as peft's `modules_to_save` takes it.
        module: the `nn.Linear`; under peft the copy that is in use, or the adapter layer around the `nn.Linear`.
        owner: the module that calls it: the innermost one around it whose forward takes `input_ids`, None if none does.
    """

    name: str
    module: nn.Module
    owner: nn.Module | None

    def linear(self) -> nn.Linear:
        """The head as a single layer.

        Raises:
            ValueError: the head is wrapped in LoRA matrices, or is not an `nn.Linear` with one output.
        """
        if hasattr(self.module, "base_layer"):
            raise UserError(
                f"the scalar head {self.name!r} is adapted by LoRA, so no single layer reads the hidden states: train "
                "it in full, with modules_to_save instead of target_modules in LoraConfig"
            )
        if not isinstance(self.module, nn.Linear) or self.module.out_features != 1:
            raise UserError(f"head must be an nn.Linear with one output, got {self.module}")
        return self.module

    def warning(self) -> str | None:
        """What will be lost of the head's training, and what to do; None if nothing is."""
        remedy = f"pass task_type='SEQ_CLS' or modules_to_save=[{self.name!r}] in LoraConfig"
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            return f"the scalar head is frozen and will not be trained; with peft, {remedy}"
        beneath = getattr(self.module, "base_layer", None)
        if beneath is not None and not any(parameter.requires_grad for parameter in beneath.parameters()):
            return (
                f"LoRA adapts the scalar head {self.name!r}, and the adapter does not hold the weight beneath: where "
                f"that is new, as on a language model, the reloaded adapter gives other rewards; {remedy}"
            )
        return None


def find_head(model: nn.Module, module: nn.Module | None = None) -> Head:
    """The layer that turns a row into a reward: `module`, or the last layer with one output in registration order.

    Mixture-of-experts gates have one output too, so there may be several such layers. If peft has copies of a head, the
    copy of the active adapter is the head.

    Raises:
        ValueError: the model has no such layer, or has a head for several labels; or `module` is not part of it.
    """
    called = list(_called_modules(model))
    if module is not None:
        heads = [head for head in called if head[1] is module]
        if not heads:
            raise UserError(f"head {type(module).__name__} is not a module of this {type(model).__name__}")
    else:
        layers = [layer for layer in called if _num_outputs(layer[1]) is not None]
        heads = [layer for layer in layers if _num_outputs(layer[1]) == 1]
        num_labels = getattr(getattr(model, "config", None), "num_labels", 1)
        if not heads or _num_outputs(layers[-1][1]) == num_labels != 1:
            raise UserError(
                f"{type(model).__name__} (num_labels={num_labels}) has no Linear layer with one output: a reward model "
                "needs a scalar head (load it with AutoModelForSequenceClassification and num_labels=1)"
            )
    name, head, around = heads[-1]
    owners = [outer for outer in around if "input_ids" in inspect.signature(outer.forward).parameters]
    return Head(name, head, owners[-1] if owners else None)


def _called_modules(
    module: nn.Module, name: str = "", around: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Each module that a forward may call, with its name and the modules around it. What an adapter layer wraps is left
    out, and so are the copies in peft's `modules_to_save` that are not in use."""
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = [adapter for adapter in module.active_adapters if adapter in copies]
        yield from _called_modules(copies[active[0]] if active else module.original_module, name, around)
        return
    yield name, module, around
    if not hasattr(module, "base_layer"):
        for child_name, child in module.named_children():
            yield from _called_modules(child, child_name, (*around, module))


def _num_outputs(layer: nn.Module) -> int | None:
    return getattr(getattr(layer, "base_layer", layer), "out_features", None)


def refuse_fused_liger(args: Any) -> None:
    """
    Raises:
        ValueError: `args`, TrainingArguments, have Liger replace the forward that calls the head.
    """
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise UserError(f"use_liger_kernel=True replaces the model's forward {KEEP_THE_FORWARD}")


def compile_anew() -> None:
    """Drops what Dynamo has compiled: a forward that it compiled before a hook was registered never calls the hook."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset_code_caches()


def last_token(is_token: Tensor) -> Tensor:
    """Position of the last real token of each sequence, `(N, S)` mask -> `(N,)` int64, for padding on either side."""
    positions = torch.arange(is_token.shape[1], device=is_token.device)
    return (is_token * positions).argmax(dim=1)


def each_at(token: Tensor) -> tuple[Tensor, Tensor]:
    """The index of one token of each sequence: `hidden[each_at(token)]` is `(N, H)` for `token` `(N,)`."""
    return torch.arange(len(token), device=token.device), token


def logits_of(output: Any) -> Tensor:
    """The logits that a model's forward returned, in a mapping or first in a tuple."""
    return output["logits"] if isinstance(output, Mapping) else output[0]


def text_config(model: nn.Module | None) -> Any:
    """The configuration of the decoder, which multimodal models keep in their own; None if there is none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def mask_of(inputs: Mapping[str, Any], hidden: Tensor) -> Tensor | None:
    """The attention mask `(N, S)` that a model is called with; None if there is none or it has another shape."""
    mask = inputs.get("attention_mask")
    return mask.to(hidden.device) if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2] else None


def store_in_order(module: nn.Module) -> None:
    """Has hooks that were put first or last be stored in their order, by which torch.compile of PyTorch 2.11 finds
    them: an ordered dictionary moves an entry without moving it in memory."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        in_order = list(hooks.items())
        hooks.clear()
        hooks.update(in_order)


class HeadReader:
    """Reads the rows from which a model's rewards are computed, in the forward passes between `expect` and `take`.

        hidden (N, S, H) -> rows (N, H)    decoders: at the token that the model scores, as `ModelInputs` finds it
        hidden (N, H)    -> unchanged      the head sees rows that are pooled already

    In the first 16 passes it compares the model's own rewards with those that the head gives for these rows, and
    refuses a model that pools in another way: training would use other distances and rewards than the saved model has.
    One pass would not be enough, because without padding the last position is the last token. The host waits for the
    device in these comparisons.

    The hooks are registered once, as torch.compile traces them when it first compiles and never looks for new ones.

    Args:
        head: as `find_head` finds it.
        pool: give the head only the rows. Their rewards then stand at their tokens and NaN at all others, so a model
            cannot read another token unnoticed.
    """

    def __init__(self, head: Head, pool: bool = False):
        self._name, self._pool = head.name, pool
        self._inputs = ModelInputs(head.owner)
        # torch.compile takes sizes that hang on a module for constants: compiled hooks read none but those they wrote.
        self._reading = False
        self._expected: tuple[int, int] | None = None
        self._seen: torch.Size | None = None  # (N, S, H) of what the head sees, if it sees every token
        self._to_compare = NUM_CHECKED
        self._tokens: tuple[Tensor, Tensor] | None = None
        self._rows: Tensor | None = None
        self._scored: Tensor | None = None
        self._hooks = (
            head.module.register_forward_pre_hook(self._before_head, with_kwargs=True),
            head.module.register_forward_hook(self._after_head, prepend=True),  # before a pooled head expands
        )
        store_in_order(head.module)

    def expect(self, input_ids: Tensor) -> None:
        """The next forward pass has these tokens `(N, S)` and is the one to read."""
        self._reading, self._expected = True, tuple(input_ids.shape)

    def take(self, rewards: Tensor) -> Tensor:
        """The rows `(N, H)` of that forward pass, which gave `rewards`, `(N,)` or `(N, 1)`. Nothing is kept afterwards,
        so activations live no longer than their step.

        Raises:
            ValueError: the model did not call the head; the number of rewards is not that of the rows; or the rewards
                are not those of the rows.
        """
        if self._seen is not None:
            self._check_seen()
        rows, scored = self._rows, self._scored
        self.forget()
        if rows is None:
            raise UserError(f"the forward of the model did not call its scalar head {self._name!r}: {CANNOT_FOLLOW}")
        if rewards.numel() != len(rows):
            raise UserError(
                f"expected one reward for each of {len(rows)} sequences, got logits {tuple(rewards.shape)}: load the "
                "model with num_labels=1"
            )
        if self._to_compare > 0:
            self._compare(rewards.detach().reshape(-1).to(scored), scored)
            self._to_compare -= 1
        return rows

    def forget(self) -> None:
        """Ends the reading, also of a forward pass that did not reach its end."""
        self._reading = False
        self._expected = self._seen = self._tokens = self._rows = self._scored = None

    def _check_seen(self) -> None:
        if self._seen[:2] != self._expected:
            raise UserError(
                f"the head {self._name!r} sees {tuple(self._seen)} for tokens {self._expected}, not one "
                "row for each: virtual tokens (prompt tuning) make a reward depend on the padding, and latents "
                "(Perceiver) are no tokens; use LoRA, or another model"
            )

    def _compare(self, rewards: Tensor, scored: Tensor) -> None:
        if not torch.allclose(rewards, scored, equal_nan=True):
            off = (rewards - scored).abs().max().item()
            raise UserError(
                "the model's own rewards are not those of the last token of each sequence that is not padding, where "
                f"NormBT reads its head {self._name!r}: they are up to {off:.3g} apart; have the model pool its hidden "
                "states before its head (EuroBERT: classifier_pooling='mean')"
            )

    def remove(self) -> None:
        for hook in (*self._hooks, self._inputs):
            hook.remove()

    def _before_head(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]):
        inputs = self._inputs.take()
        if not self._reading:
            return None
        self._rows = hidden = args[0] if args else kwargs["input"]
        if hidden.dim() == 2:
            return None
        self._seen = hidden.shape
        if not torch.compiler.is_compiling():
            self._check_seen()
        self._tokens = each_at(self._inputs.unpadded_token(inputs, hidden))
        self._rows = hidden[self._tokens]
        return ((self._rows,), {}) if self._pool else None

    def _after_head(self, module: nn.Module, args: tuple[Tensor, ...], rewards: Tensor) -> Tensor | None:
        if not self._reading:
            return None
        if self._pool and self._tokens is not None:
            self._scored = rewards.detach().reshape(-1)
            logits = rewards.new_full((*self._seen[:2], 1), float("nan"))
            logits[self._tokens] = rewards
            return logits
        self._scored = (rewards if self._tokens is None else rewards[self._tokens]).detach().reshape(-1)
        return None


class ModelInputs:
    """Gives a head the inputs of its model: kept before the forward of the model, taken once, in that of the head.

    A head sees only hidden states. By itself it cannot know at which token of a sequence its reward is read.

    Args:
        owner: the module that calls the head, as `find_head` finds it.
    """

    def __init__(self, owner: nn.Module | None):
        self.owner = owner
        self._inputs: Mapping[str, Any] | None = None
        self._hooks = ()
        if owner is not None:
            self._names = tuple(inspect.signature(owner.forward).parameters)
            self._hooks = (
                owner.register_forward_pre_hook(self._begin, with_kwargs=True),
                owner.register_forward_hook(self._end),
            )

    def take(self) -> Mapping[str, Any]:
        """The arguments of the forward in progress, by name, once; empty if the owner's forward is not running."""
        inputs, self._inputs = self._inputs, None
        return inputs or {}

    def unpadded_token(self, inputs: Mapping[str, Any], hidden: Tensor) -> Tensor:
        """The token of `hidden` (N, S, H) that transformers' classifiers score, (N,): the rightmost one that is not
        the pad token. Without token ids or a pad token, the last one of the mask; without a mask, the last position.

        Raises:
            ValueError: the head was called alone, or sees other sequences than the model, or its owner is unknown.
        """
        if self.owner is None:
            raise UserError(
                f"the head sees {tuple(hidden.shape)}, every token of each sequence, and no module around it takes "
                "input_ids, which tell where the sequences end"
            )
        if not inputs:
            raise UserError(
                f"the head of {type(self.owner).__name__} was called with {tuple(hidden.shape)} outside the forward of "
                "its model, which tells it where the sequences end: call the model"
            )
        input_ids = inputs.get("input_ids")
        pad_token_id = getattr(text_config(self.owner), "pad_token_id", None)
        if input_ids is None or pad_token_id is None:
            is_token = mask_of(inputs, hidden)
            if is_token is None:
                return torch.full(hidden.shape[:1], hidden.shape[1] - 1, device=hidden.device)
            return last_token(is_token)
        if input_ids.shape != hidden.shape[:2]:
            raise UserError(
                f"{type(self.owner).__name__} was called with input_ids {tuple(input_ids.shape)}, but its head sees "
                f"{tuple(hidden.shape)}: packed or sharded sequences have no single last token"
            )
        return last_token((input_ids != pad_token_id).to(hidden.device))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and inspect.unwrap(owner.forward).__module__.startswith("liger_kernel."):
            raise UserError(f"Liger has replaced the forward of {type(owner).__name__} {KEEP_THE_FORWARD}")
        self._inputs = dict(zip(self._names, args, strict=False)) | kwargs

    def _end(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.take() and owner.training and torch.is_grad_enabled():
            raise UserError(f"the forward of {type(owner).__name__} did not call its scalar head: {CANNOT_FOLLOW}")

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelInputs:
        # A copy of the head alone (peft's modules_to_save) stays in this model; a copy of the model is another one.
        if id(self.owner) not in memo:
            return self
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin
