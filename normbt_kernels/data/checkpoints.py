"""Loads a reward model from any checkpoint, or makes a small new one: one scalar head, and a pad token of its own.

Every command loads its model here. transformers draws at random whatever a checkpoint does not hold. We allow this only
for a head, and say so. We refuse a checkpoint in which other weights are missing or do not fit, and name them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file, logging

from normbt_kernels.errors import UserError, first_sentence
from normbt_kernels.files import check_name

PAD_TOKEN = "<|pad|>"
# transformers raises these for bad files, and if a library is missing (flash-attn, gguf).
CANNOT_LOAD = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


# --- the tokenizer -------------------------------------------------------------------------------------------------


def load_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or of an adapter's base model if the adapter has none of its own.

    Raises:
        UserError: there is no such tokenizer, or it has no vocabulary (if the files are missing, transformers invents
            an empty tokenizer for some models).
    """
    base = base_of_adapter(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_files(gguf_file))
    except (OSError, ValueError) as error:
        if base is None:
            raise UserError(f"no tokenizer can be loaded from {name}: {first_sentence(error)}") from error
        return load_tokenizer(base)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        if base is not None:
            return load_tokenizer(base)
        raise UserError(
            f"{name}: its tokenizer has no vocabulary: the tokenizer's files are missing beside the model's"
        )
    return tokenizer


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a processor, which also reads images or sound."""
    return getattr(processing_class, "tokenizer", processing_class)


def load_training_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """`load_tokenizer`, with a pad token that is not also the end-of-sequence token.

    A decoder scores the last token that is not the pad token. If that were the end-of-sequence token too, the saved
    checkpoint would score the token before the one that was trained.
    """
    tokenizer = load_tokenizer(name, gguf_file)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        reason = "no pad token" if tokenizer.pad_token is None else "the end-of-sequence token as pad token"
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        print(f"{name} has {reason}: its tokenizer gets {PAD_TOKEN} (id {tokenizer.pad_token_id})")
    return tokenizer


def load_scoring_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`load_tokenizer` as RewardBench uses it: a tokenizer without a pad token pads with its end-of-sequence token.

    Raises:
        UserError: as `load_tokenizer`, or the tokenizer has neither token.
    """
    tokenizer = load_tokenizer(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has neither a pad token nor an end-of-sequence token")
    return tokenizer


def read_template(path: Path) -> str:
    """A chat template from a file. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path}: {error}") from error


# --- the model -----------------------------------------------------------------------------------------------------


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "auto",
    *,
    new_head: bool = False,
    gguf_file: str | None = None,
    attention: str | None = None,
) -> PreTrainedModel | nn.Module:
    """The checkpoint `name`, a folder or hub id, as a sequence classifier with one label. An adapter is put on its base
    model with trainable weights. With `new_head`, the embeddings grow to all tokens of the tokenizer.

    Args:
        name: of a classifier, of a language model, or of a peft adapter that holds a head.
        dtype: of the weights: "float32", ..., or "auto", as they were saved.
        new_head: give a checkpoint without a head for one label a new one, drawn from torch's current seed.
        gguf_file: the file of the checkpoint that holds its weights, in the format of llama.cpp.
        attention: transformers' `attn_implementation`; its own choice if None.

    Raises:
        UserError: there is no such checkpoint; a library that it needs is not installed; its architecture has no
            sequence classifier; it has no head for one label, and `new_head` is False; or another weight is missing,
            has another shape than its configuration says, or is a head by another name.
    """
    base = base_of_adapter(name)
    model, config, missing = _load_classifier(base or name, dtype, gguf_file, attention)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if base is not None:
        return _load_adapter(name, base, model, missing, len(tokenizer))
    if missing:
        if not new_head:
            why = f"it does not hold {_listed(missing)}" if config.num_labels == 1 or _is_no_classifier(config) else (
                f"it has {config.num_labels} labels, and a reward model has one"
            )  # fmt: skip
            raise UserError(f"{name} is no trained reward model: {why}")
        print(_new_head(name, config, missing))
    if new_head:  # a model that only scores must not get embeddings that nobody trained
        _grow(model, len(tokenizer))
    return model


def base_of_adapter(name: str) -> str | None:
    """The base model of a peft adapter; None for any other checkpoint.

    Raises:
        UserError: there is no such folder; or it is an adapter, and peft is not installed.
    """
    check_name(name)
    try:
        if find_adapter_config_file(name) is None:
            return None
    except OSError:
        return None  # there is no such checkpoint; the loader has a better message
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise UserError(f"{name} is a peft adapter: pip install peft") from error
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def _load_classifier(
    name: str, dtype: str, gguf_file: str | None, attention: str | None
) -> tuple[PreTrainedModel, PreTrainedConfig, list[str]]:
    """The classifier, the configuration as saved, and the names of the head's weights that are new."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would print a table of weights, which we judge here
    try:
        config = AutoConfig.from_pretrained(name, **_files(gguf_file))
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            attn_implementation=attention,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_files(gguf_file),
        )
        if gguf_file is not None:  # transformers takes this model for quantised, and refuses to save it
            model = _copied(model)
    except CANNOT_LOAD as error:
        raise UserError(f"{name}: {first_sentence(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    return model, config, _new_weights(name, model, config, report)


def _files(gguf_file: str | None) -> dict[str, str]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """A model made from the configuration, with the same weights."""
    twin = type(model)(model.config).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def _new_weights(name: str, model: PreTrainedModel, config: PreTrainedConfig, report: dict[str, Any]) -> list[str]:
    """The weights of the head that the checkpoint does not hold for one label.

    Raises:
        UserError: other weights are missing or do not fit, or the checkpoint has a head with another name.
    """
    misfits = {key: (tuple(saved), tuple(made)) for key, saved, made in report["mismatched_keys"]}
    for key, (saved, made) in sorted(misfits.items()):
        if not _is_of_head(key, model) or config.num_labels == 1:
            raise UserError(
                f"{name}: {key} has the shape {saved} in the checkpoint, and {made} by its config.json: correct that "
                "(vocab_size, if tokens were added)"
            )
    backbone = [key for key in report["missing_keys"] if not _is_of_head(key, model)]
    if backbone:
        raise UserError(f"{name} is not whole: it does not hold {_listed(backbone)}")
    missing = sorted({*report["missing_keys"], *misfits})
    if report["missing_keys"]:
        others = [key for key in report["unexpected_keys"] if not key.startswith(f"{model.base_model_prefix}.")]
        others = set(others) - (_own_weights(config) if others else set())
        if others:
            raise UserError(
                f"{name} does not hold {_listed(report['missing_keys'])}, but {_listed(others)}: if that is its head, "
                "save it under the first name"
            )
    return missing


def _is_of_head(key: str, model: PreTrainedModel) -> bool:
    """The head is everything outside the backbone, and the pooler that BERT keeps inside it."""
    prefix = model.base_model_prefix
    return not key.startswith(f"{prefix}.") or key.startswith(f"{prefix}.pooler.")


def _own_weights(config: PreTrainedConfig) -> set[str]:
    """The names of all weights of the saved architecture, so that a language model's head is not taken for ours."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        return set()
    with torch.device("meta"):
        return set(architecture(config).state_dict())


def _new_head(name: str, config: PreTrainedConfig, missing: list[str]) -> str:
    if _is_no_classifier(config):
        architecture = (config.architectures or ["a model without a head"])[0]
        return f"{name} is {architecture}: its reward head is new, initialised from the seed ({_listed(missing)})"
    if config.num_labels != 1:
        return f"{name} has {config.num_labels} labels: its head is replaced by a new one with 1, from the seed"
    return f"{name} does not hold {_listed(missing)}: its reward head is new, initialised from the seed"


def _is_no_classifier(config: PreTrainedConfig) -> bool:
    return not any("SequenceClassification" in name for name in config.architectures or [])


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    few = [first, *others[:3]]
    return ", ".join(few) + (f" and {len(others) - 3} more" if len(others) > 3 else "")


def _grow(model: PreTrainedModel, num_tokens: int) -> None:
    if num_tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)


def _load_adapter(name: str, base_name: str, base: PreTrainedModel, missing: list[str], num_tokens: int) -> nn.Module:
    from peft import PeftModel
    from peft.utils import load_peft_weights

    embedding = next(key for key, module in base.named_modules() if module is base.get_input_embeddings())
    its_names = (f"{embedding}.weight", f"{embedding}.base_layer.weight")
    try:
        saved = [len(weight) for key, weight in load_peft_weights(name, "cpu").items() if key.endswith(its_names)]
        _grow(base, saved[0] if saved else num_tokens)
        model = PeftModel.from_pretrained(base, name, is_trainable=True)
    except CANNOT_LOAD as error:
        raise UserError(
            f"the adapter {name} does not fit {base_name} with one label: {' '.join(str(error).split())}"
        ) from error
    saved_modules = [
        path for path, module in base.named_modules() if "modules_to_save" in dict(module.named_children())
    ]
    for key in missing:
        if not any(key.startswith(f"{path}.") for path in saved_modules):
            raise UserError(
                f"neither the adapter {name} nor its base model {base_name} holds {key}: the head was not trained, or "
                "not saved (task_type='SEQ_CLS' or modules_to_save in LoraConfig does both)"
            )
    return model


def add_lora(model: nn.Module, rank: int, alpha: int | None, targets: Sequence[str] | None) -> nn.Module:
    """`model` with LoRA matrices, which are trained instead of its weights, and its head, which is trained in full.

    Args:
        model: a sequence classifier, or an adapter on one, which is refused.
        rank, alpha: of the matrices; alpha is twice the rank if None.
        targets: names of layers, or "all-linear"; peft's own choice for the architecture if None.

    Raises:
        UserError: peft is not installed, or knows no such layers.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise UserError("--lora-r needs peft: pip install peft") from error
    if isinstance(model, PeftModel):
        raise UserError("--model is an adapter already, and its training continues: leave out --lora-r")
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-target: {first_sentence(error)}") from error


# --- limits --------------------------------------------------------------------------------------------------------


def token_limit(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, name: str | None, gguf_file: str | None = None
) -> int:
    """The most tokens that a sequence may have: the least of `max_length`, the tokenizer's limit, and the positions of
    the checkpoint `name`, of which only the configuration is read.

    Raises:
        UserError: there is no such checkpoint, or its architecture has no sequence classifier.
    """
    positions = None if name is None else _checkpoint_positions(base_of_adapter(name) or name, gguf_file)
    return min(filter(None, (max_length, tokenizer.model_max_length, positions)))


def _checkpoint_positions(name: str, gguf_file: str | None) -> int | None:
    try:
        config = AutoConfig.from_pretrained(name, **_files(gguf_file))
        with torch.device("meta"):
            return position_limit(AutoModelForSequenceClassification.from_config(config))
    except CANNOT_LOAD as error:
        raise UserError(f"{name}: {first_sentence(error)}") from error


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence, in tokens, for which `model` has positions; None if it computes them."""
    limits = [
        table.num_embeddings - getattr(table, "offset", 0) - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and _holds_positions(name.rpartition(".")[2])
    ]
    return min(limits, default=None)


def _holds_positions(name: str) -> bool:
    return name == "wpe" or ("position" in name and "relative" not in name)


def vocabulary_size(model: nn.Module) -> int | None:
    """The number of tokens that `model` has embeddings for; None if it is not known."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


# --- a small new one -----------------------------------------------------------------------------------------------


def new_llama(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, intermediate_size: int, num_layers: int, max_tokens: int
) -> LlamaForSequenceClassification:
    """A Llama with four attention heads and a scalar head, drawn from torch's current seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
    )
    return LlamaForSequenceClassification(config)
