"""Attention within the sequences of one packed row by PyTorch's own flash attention, without a mask.

"sdpa" is told by a mask where sequences end, which shuts out flash attention and has every pair of tokens of a row
looked at. A model with `padding_free` gets this attention instead: a packed row carries the ends of its sequences in
the place of the mask, which every model hands to its attention. With a mask, or without, it is "sdpa". On an H100 a
padding-free step took 43 ms, and with masks 56 (bench/NOTES.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from normbt_kernels.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKED_SDPA = "normbt_packed_sdpa"  # its `attn_implementation`
LAYER_TYPES = {"full_attention", "sliding_attention"}  # whose masks hold no more than flash attention is told
# PyTorch 2.11 takes fewer key heads than query heads without being told.
FEWER_KEY_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def use_packed_sdpa(model: nn.Module) -> bool:
    """Gives a model that uses "sdpa" this attention; False if its masks say more than can be said beside them, or flash
    attention does not serve it."""
    if not hasattr(model, "set_attn_implementation"):
        return False
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not all(_needs_no_mask(module) and _fits_flash_attention(module.config) for module in models):
        return False
    register()
    model.set_attn_implementation(PACKED_SDPA)
    return True


def register() -> None:
    """Makes it known to transformers, in this process."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_SDPA, partial(attend, sdpa_attention_forward))
    AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def _needs_no_mask(model: PreTrainedModel) -> bool:
    """Of classes that others wrote no one knows: they inherit that they are made for flash attention."""
    config, module = model.config, inspect.getmodule(type(model))
    return (
        type(model).__module__.startswith("transformers.models.")
        and config._attn_implementation in ("sdpa", PACKED_SDPA)
        and model._supports_flash_attn
        and model._can_set_attn_implementation()
        and set(getattr(config, "layer_types", None) or ()) <= LAYER_TYPES
        # The windows of Phimoe and Qwen2Moe are in their masks alone, so their flash attention has none.
        and (not getattr(config, "sliding_window", None) or "sliding_window=" in inspect.getsource(module))
    )


def _fits_flash_attention(config: PreTrainedConfig) -> bool:
    """Values as wide as keys, of a width that it has, and no dropout, which PyTorch's has not at variable length."""
    dropout = [value for name, value in vars(config).items() if "att" in name and "drop" in name]
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    latent = getattr(config, "kv_lora_rank", None) is not None
    return not any(dropout) and not latent and width <= 256 and width % 8 == 0


def has_flash_attention(device: torch.device) -> bool:
    """Whether PyTorch has flash attention there, for activations in 16 bits. On AMD's GPUs it was never tried."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def carry(ends: Tensor, max_length: int) -> Tensor:
    """What stands in the place of the mask. No mask is of this dtype.

    Args:
        ends: `(N + 1,)` int32, where each sequence begins in the row, and the end of the last.
        max_length: of a sequence.

    Returns:
        `(1, 1, N + 1, max_length)` int32, in the memory of `ends`.
    """
    return ends[None, None, :, None].expand(1, 1, -1, max_length)


def attend(
    sdpa: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: query `(R, heads, T, D)` -> `(R, T, heads, D)`, and no weights.

    Raises:
        ValueError: the row is packed, and the model asks for what this attention does not do.
    """
    attention = sdpa if mask is None or mask.dtype != torch.int32 else partial(_attend_within, sdpa)
    return attention(module, query, key, value, mask, **options)


def _attend_within(
    sdpa: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carried: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or others.get("position_bias") is not None:
        unserved = "a bias for each pair of tokens" if causal else "attention to later tokens"
        raise UserError(
            f"{type(module).__name__} asks for {unserved}, which packed sequences do not get: set padding_free=False"
        )
    device, width = query.device.type, query.shape[-1]
    if torch.is_autocast_enabled(device):  # as for "sdpa": rotary embeddings leave queries and keys in fp32
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    ends, max_length = carried[0, 0, :, 0].contiguous(), carried.shape[-1]
    # A softcap and sinks are for "sdpa" to serve, to refuse or to pass over, as it does where nothing is packed.
    plain = dropout == 0 and others.get("softcap") is None and others.get("s_aux") is None
    fits = query.dtype.itemsize == 2 and width == value.shape[-1] <= 256 and width % 8 == 0
    if query.is_cuda and plain and fits:
        # Not [0], whose derivative fills a tensor with zeros.
        rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        lengths = ends, ends, max_length, max_length
        return varlen_attn(*rows, *lengths, scale=scaling, window_size=window, **FEWER_KEY_HEADS)[None], None
    sequences = zip(*(tensor.split(ends.diff().tolist(), dim=2) for tensor in (query, key, value)), strict=True)
    of_each = []
    for rows in sequences:
        window = _window_mask(rows[0].shape[2], sliding_window, query.device)
        of_each.append(sdpa(module, *rows, window, dropout=dropout, scaling=scaling, is_causal=True, **others)[0])
    return torch.cat(of_each, dim=1), None


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Of a sequence that is longer than the window; to be causal needs no mask."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    behind = position[:, None] - position
    return ((behind >= 0) & (behind < sliding_window))[None, None]
