"""Two shortcuts through a decoder's training step that change no reward and no gradient.

    late pooling   in the last layer only the scored tokens pass q_proj, o_proj and the MLP    late_pooling.py
    padding-free   the sequences of a batch stand side by side, without padding    data/packing.py, packed_attention.py

The model is called as before and returns one reward for each sequence. The first forward runs with and without each
shortcut, without gradients, and the results are compared: a model for which a shortcut is not exact is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normbt_kernels.data.packing import pack, unpack
from normbt_kernels.errors import UserError, first_sentence
from normbt_kernels.integrations.head import (
    Head,
    HeadReader,
    compile_anew,
    find_head,
    last_token,
    logits_of,
    mask_of,
    store_in_order,
    text_config,
)
from normbt_kernels.integrations.late_pooling import Narrowing, OfEachForward, modules_to_narrow
from normbt_kernels.integrations.packed_attention import (
    PACKED_SDPA,
    carry,
    has_flash_attention,
    register,
    use_packed_sdpa,
)

# These kinds of attention need no mask over all pairs of tokens of a row, so a batch is one long row.
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
VARIABLE_LENGTH = (*FLASH_ATTENTION, "flex_attention")
PACKED = ("input_ids", "position_ids", "last_token", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
MAX_MASK = 2**30  # entries of a mask over all pairs of tokens of each row, one byte each


def install_shortcuts(model: nn.Module, *, late_pooling: bool = False, padding_free: bool = False) -> None:
    """Makes each forward of a decoder classifier cheaper, with the same rewards and gradients.

    `model(input_ids=..., attention_mask=...)` returns logits (N, 1) as before, in training and in evaluation. With
    `padding_free` the head sees only the scored rows (N, H). The model then also takes packed sequences,
    `model(**pack(...))`; it packs padded ones itself, for which the host waits for their lengths.

    The first forward is repeated with and without each shortcut in evaluation mode, without gradients. Afterwards the
    random state and the modes of all modules are what they were.

    Works on a bare or a peft model, before DDP, `fully_shard` and `torch.compile` (the model stays one graph; the code
    before and after it is not compiled), with gradient checkpointing of both kinds, and with `apply_normbt` and
    `HeadReader`. With `output_hidden_states`, the states of the last layer are right at the scored tokens only.

    Args:
        model: a classifier whose forward takes `input_ids`, padded on either side.
        late_pooling: in the last layer only the scored tokens pass the MLP and the attention's projections of
            queries and output.
        padding_free: padding is not computed. A sequence ends with the rightmost token that is not the pad token.
            The attention of a model that uses "sdpa" is `packed_attention`'s as long as it has the shortcut: on a GPU,
            PyTorch's flash attention without a mask.

    Raises:
        ValueError: the model has no scalar head, has shortcuts already, or is not built like a decoder. At the first
            forward: a shortcut changes what the head reads, or the model cannot be called with it.
    """
    head = find_head(model)
    if head.owner is None:
        raise UserError(
            f"no module of {type(model).__name__} around its head takes input_ids, which the shortcuts need"
        )
    if hasattr(head.owner, "normbt_shortcuts"):
        raise UserError(f"this {type(head.owner).__name__} has shortcuts already: call remove_shortcuts(model) first")
    compile_anew()
    head.owner.normbt_shortcuts = Shortcuts(head, late_pooling, padding_free)


def remove_shortcuts(model: nn.Module) -> None:
    """Undoes `install_shortcuts`.

    Raises:
        ValueError: the model has no shortcuts.
    """
    owners = [module for module in model.modules() if hasattr(module, "normbt_shortcuts")]
    if not owners:
        raise UserError(f"this {type(model).__name__} has no shortcuts")
    for owner in owners:
        owner.normbt_shortcuts.remove()
        del owner.normbt_shortcuts


def packing_for(model: nn.Module, device: torch.device) -> Literal["rows", "one row"]:
    """The `packing` that suits the attention of this model on this device."""
    attention = attention_of(model)
    one_row = attention in VARIABLE_LENGTH or (attention == PACKED_SDPA and has_flash_attention(device))
    return "one row" if one_row else "rows"


def attention_of(model: nn.Module) -> str | None:
    return getattr(model.config, "_attn_implementation", None)


class Shortcuts:
    """The hooks of one model. They change the inputs of its forward, what its head sees, and what it returns."""

    def __init__(self, head: Head, late_pooling: bool, padding_free: bool):
        owner = head.owner
        self._head, self._names = head, tuple(inspect.signature(owner.forward).parameters)
        self._wanted = {"late_pooling": late_pooling, "padding_free": padding_free}
        self._taken = dict(self._wanted)  # differs from it only while the first forward is compared
        self._compared = False
        self._scored = OfEachForward()  # (N,) the scored tokens of the flattened batch
        # torch.compile takes sizes that hang on a module for constants: compiled hooks read none but those they wrote.
        self._packing = False  # during the forward of a packed batch
        self._packed_shape: torch.Size | None = None  # (R, L) of that batch
        self._seen: torch.Size | None = None  # (R, L) of what the head sees of it
        self._rewards: Tensor | None = None  # (N, 1) of a packed batch, from the head to the end of the forward
        narrow = modules_to_narrow(owner) if late_pooling else []
        self._changed_attention = padding_free and use_packed_sdpa(owner)
        self._hooks = [
            *(Narrowing(module, self._rows_of_last_layer) for module in narrow),
            # This hook runs first, so that other hooks see the inputs that the model computes with.
            owner.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
            owner.register_forward_hook(self._after_model, always_call=True),
        ]
        if padding_free:
            self._hooks += [
                head.module.register_forward_pre_hook(self._before_head, prepend=True),
                head.module.register_forward_hook(self._after_head),
            ]
        for module in (owner, head.module):
            store_in_order(module)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._changed_attention and attention_of(self._head.owner) == PACKED_SDPA:
            self._head.owner.set_attn_implementation("sdpa")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._changed_attention:
            register()

    # --- one forward ---

    @torch._disable_dynamo
    def _before_model(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        if not self._compared:
            self._stand_last()
            self._compare(inputs)
        if self._taken["padding_free"]:
            inputs = self._packed(inputs)
            self._scored.begin(inputs.pop("last_token"))
            self._packing, self._packed_shape = True, inputs["input_ids"].shape
        else:
            if "last_token" in inputs:
                raise UserError("this batch is packed: it needs install_shortcuts(model, padding_free=True)")
            self._scored.begin(self._scored_tokens(inputs) if self._taken["late_pooling"] else None)
        return (), inputs

    def _stand_last(self) -> None:
        """Puts our hook on the head's output behind all others. ZeRO-3 has one, which gathers the weight when backward
        reaches the rewards; it would not work on the zeros that our hook returns."""
        if self._wanted["padding_free"]:
            self._head.module._forward_hooks.move_to_end(self._hooks[-1].id)
            store_in_order(self._head.module)

    def _rows_of_last_layer(self) -> Tensor | None:
        return self._scored.get() if self._taken["late_pooling"] else None

    def _before_head(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """(R, L, H) -> (N, H), the scored rows: every reader of a head knows this layout."""
        if not self._packing:
            return None
        (hidden,) = args
        self._seen = hidden.shape[:-1]
        if not torch.compiler.is_compiling() and self._seen != self._packed_shape:
            raise UserError(
                f"the head of {type(self._head.owner).__name__} sees {tuple(hidden.shape)} of packed sequences "
                f"{tuple(self._packed_shape)}: it pools before its head; set padding_free=False"
            )
        return (hidden.flatten(0, 1).index_select(0, self._scored.get()),)

    def _after_head(self, head: nn.Module, args: tuple[Tensor, ...], rewards: Tensor) -> Tensor | None:
        """Keeps the rewards, and returns zeros of the shape that the model expects: nobody reads them."""
        if not self._packing:
            return None
        self._rewards = rewards
        return rewards.new_zeros(*self._seen, 1)

    @torch._disable_dynamo
    def _after_model(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rewards, self._rewards, self._packing = self._rewards, None, False
        self._scored.end()
        if rewards is None or output is None:
            return None
        if not isinstance(output, Mapping):
            return (rewards.to(output[0].dtype), *output[1:])
        output["logits"] = rewards.to(output["logits"].dtype)
        return output

    # --- what the model is called with ---

    def _scored_tokens(self, inputs: Mapping[str, Any]) -> Tensor:
        """The scored token of each padded sequence, (N,), in the flattened batch."""
        input_ids = self._input_ids(inputs)
        mask = mask_of(inputs, input_ids)
        if hasattr(self._head.module, "_inputs") and mask is not None:  # a pooled head goes by the mask
            token = last_token(mask)
        else:
            token = last_token(input_ids != self._pad_token_id())
        return token + torch.arange(len(token), device=token.device) * input_ids.shape[1]

    def _packed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a packed batch, from those of a padded or of a packed one."""
        if inputs.get("labels") is not None:
            raise UserError("padding_free has the model return rewards and no loss: call it without labels")
        if "last_token" not in inputs:
            input_ids = self._input_ids(inputs)
            inputs |= pack(input_ids, mask_of(inputs, input_ids), self._pad_token_id(), self._in_one_row(input_ids))
        # With a cache, transformers does not see that sequences are packed; by default it makes one.
        inputs |= {"attention_mask": self._mask(inputs)}
        return inputs | ({"use_cache": False} if "use_cache" in self._names else {})

    def _mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """What a packed batch has for a mask. Without one, transformers goes by `position_ids` and the lengths."""
        attention, (rows, length) = attention_of(self._head.owner), inputs["input_ids"].shape
        if self._changed_attention and attention == PACKED_SDPA and "cu_seq_lens_q" in inputs:
            return carry(inputs["cu_seq_lens_q"], inputs["max_length_q"])
        if attention in FLASH_ATTENTION and rows > 1:
            raise UserError(
                f"{attention} would look beyond the sequences of this batch, which is packed in {rows} rows: it needs "
                "one row, pack(..., one_row=True) or PreferenceCollator(..., packing='one row')"
            )
        if attention not in VARIABLE_LENGTH and rows * length**2 > MAX_MASK:
            raise UserError(
                f"padding_free needs a mask of {rows} x {length} x {length} for the attention of this model: load it "
                "with attn_implementation='flash_attention_2' (pip install flash-attn) or 'flex_attention' (normbt "
                "train: --attn-implementation), or take fewer or shorter sequences"
            )
        return None

    def _in_one_row(self, input_ids: Tensor) -> bool:
        return packing_for(self._head.owner, input_ids.device) == "one row"

    def _padded(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a padded batch, from those of a padded or of a packed one."""
        if "last_token" not in inputs:
            return dict(inputs)
        packed = [inputs[name] for name in ("input_ids", "position_ids", "last_token")]
        others = {name: value for name, value in inputs.items() if name not in PACKED}
        return others | unpack(*packed, self._pad_token_id())

    def _input_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        if inputs.get("input_ids") is None:
            raise UserError(
                f"{type(self._head.owner).__name__} is called without input_ids (prompt tuning?), which tell where the "
                f"sequences end: set {' and '.join(f'{name}=False' for name, on in self._wanted.items() if on)}"
            )
        return inputs["input_ids"]

    def _pad_token_id(self) -> int:
        pad_token_id = text_config(self._head.owner).pad_token_id
        if pad_token_id is None:
            raise UserError(f"{type(self._head.owner).__name__} has no pad token: set model.config.pad_token_id")
        return pad_token_id

    # --- the first forward, both ways ---

    def _compare(self, inputs: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: with a shortcut the head reads something else, or the model cannot be called.
        """
        model, padded = type(self._head.owner).__name__, self._padded(inputs)
        in_one_row = "cu_seq_lens_q" in inputs
        self._compared = True
        try:
            with _unnoticed(self._head):
                self._taken = dict.fromkeys(self._wanted, False)
                plain = self._rows_read(padded)
                for name in (name for name, on in self._wanted.items() if on):
                    self._taken[name] = True
                    try:
                        packed = self._two_in_a_row(padded, in_one_row) if name == "padding_free" else padded
                        rows = self._rows_read(packed)
                    except UserError:
                        raise
                    except Exception as error:
                        reason = f"{type(error).__name__}: {first_sentence(error)}"
                        raise UserError(f"{model} cannot be called with {name} ({reason}): set {name}=False") from error
                    off = ((rows - plain).norm(dim=-1) / plain.norm(dim=-1)).max().item()
                    if not off <= self._rounding:
                        raise UserError(
                            f"{model} is not made for {name}: in the first batch the rows that its head reads differ "
                            f"by {off:.2g} of their norm, and rounding explains {self._rounding:.2g}: set {name}=False"
                        )
        except BaseException:
            self._compared = False
            raise
        finally:
            self._taken = dict(self._wanted)

    def _two_in_a_row(self, padded: dict[str, Any], in_one_row: bool) -> dict[str, Any]:
        """Packs as the batch came, or else with rows twice as long, so that sequences share a row even in a batch where
        they would not."""
        ids, mask = padded["input_ids"], padded.get("attention_mask")
        in_one_row = in_one_row or self._in_one_row(ids)
        return padded | pack(ids, mask, self._pad_token_id(), in_one_row, row_length=2 * ids.shape[1])

    def _rows_read(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the head reads of the scored tokens, (N, H), in fp32 or wider."""
        reader = HeadReader(self._head)
        precision = self._head.module.register_forward_pre_hook(self._note_rounding)
        try:
            reader.expect(inputs["input_ids"])
            output = self._head.owner(**inputs)
            rows = reader.take(logits_of(output))
        finally:
            reader.remove()
            precision.remove()
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def _note_rounding(self, head: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Notes the tolerance: half of the digits that the forward computes with."""
        device, dtype = args[0].device.type, args[0].dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        elif dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            dtype = torch.bfloat16
        self._rounding = torch.finfo(dtype).eps ** 0.5


def _eager(model: nn.Module) -> AbstractContextManager:
    """Has a compiled model run as it is written: it would be compiled for forwards that are made once, and PyTorch 2.11
    fails to guard the hook that its head has more in them. Flex attention would compute every score without its kernel,
    which is compiled too."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if compiled and attention_of(model) != "flex_attention":
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def _unnoticed(head: Head) -> Iterator[None]:
    """Switches off gradients, dropout and other readers of the head. Afterwards the modes, the random state and the
    readers are what they were."""
    modes = [(module, module.training) for module in head.owner.modules()]
    hooks = [getattr(hook, "__self__", None) for hook in head.module._forward_pre_hooks.values()]
    readers = [(reader, reader._reading) for reader in hooks if isinstance(reader, HeadReader)]
    device = next(head.owner.parameters()).device
    try:
        random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.no_grad(), random_state, _eager(head.owner):
            for module, _ in modes:
                module.training = False
            for reader, _ in readers:
                reader._reading = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for reader, reading in readers:
            reader._reading = reading
