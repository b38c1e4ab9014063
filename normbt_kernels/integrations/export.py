"""Writes a trained reward model as a folder that the `rewardbench` package and any plain transformers load.

rewardbench 0.1 runs on transformers 4.51, which loses what version 5 saves under new names, mostly in silence:

    config.json             rope_parameters                  -> rope_theta, rope_scaling, partial_rotary_factor
    tokenizer_config.json   tokenizer_class "Tokenizers..."  -> PreTrainedTokenizerFast
                            extra_special_tokens             -> additional_special_tokens
                            (implied by the class)           -> model_input_names
                            chat_template.jinja              -> chat_template

The rope settings are written in both spellings. The rest is written in the old one, which version 5 reads too.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from normbt_kernels.data.checkpoints import load_model, load_tokenizer
from normbt_kernels.errors import UserError
from normbt_kernels.modules import DistanceEMA

logger = logging.get_logger(__name__)

Json = dict[str, Any]


def export_for_rewardbench(
    model: str | os.PathLike[str] | nn.Module,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    output_dir: str | os.PathLike[str],
) -> None:
    """Writes a reward model and its tokenizer so that `rewardbench --model OUTPUT_DIR` loads them.

    The folder holds a plain classifier with one label: weights under their usual names and in their dtype, adapters
    merged, nothing of this package. This version of transformers gives the same logits bit for bit (up to rounding with
    merged adapters). So does 4.51, where the checkpoint as trained may give others.

    Args:
        model: a checkpoint (folder or hub id) of a classifier or of a peft adapter for one; or the model itself, whole
            on this process, with or without NormBT applied. It is not changed.
        tokenizer: the same for the tokenizer. It needs a chat template and a pad token.
        output_dir: a folder that does not exist or is empty. It appears whole or not at all.

    Raises:
        TypeError: `model` or `tokenizer` is something else.
        ValueError: there are files in `output_dir`; there is no tokenizer, or it has no chat template or no pad token;
            the model has not one label, or a head that the checkpoint does not hold, or weights that are sharded or
            quantised.
    """
    output_dir = Path(output_dir).absolute()
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"{output_dir} exists and is not an empty folder: an export overwrites nothing")
    tokenizer = _checked_tokenizer(tokenizer)
    model = _whole_classifier(model, tokenizer)

    of_loss = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, DistanceEMA))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(of_loss)}
    unfinished = output_dir.with_name(f".{output_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    model.save_pretrained(unfinished, state_dict=weights)
    tokenizer.save_pretrained(unfinished, save_jinja_files=False)
    inputs = inspect.signature(model.forward).parameters
    _rewrite(unfinished / "config.json", lambda config: _config(config, tokenizer.pad_token_id))
    _rewrite(unfinished / "tokenizer_config.json", lambda config: _tokenizer_config(config, tokenizer, inputs))
    if output_dir.exists():
        output_dir.rmdir()
    unfinished.rename(output_dir)


# --- what comes in -------------------------------------------------------------------------------------------------


def _checked_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(os.fspath(tokenizer))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a folder, a hub id or a tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template, and rewardbench needs one to lay out its conversations: set "
            "tokenizer.chat_template to the one that the training texts followed"
        )
    if tokenizer.pad_token is None:
        raise UserError(
            "the tokenizer has no pad token, and a classifier needs one to find the last token of each sequence: set "
            "tokenizer.pad_token to the one that the model was trained with"
        )
    if tokenizer.pad_token == tokenizer.eos_token:
        logger.warning(
            "the pad token is the end-of-sequence token, so the model scores the token before a final one; frameworks "
            "that score the last token of the mask (OpenRLHF, LLaMA-Factory) train the final one"
        )
    return tokenizer


def _whole_classifier(model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with its adapters merged, into a copy if it was passed in."""
    if isinstance(model, str | os.PathLike):
        model = load_model(os.fspath(model), tokenizer)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    elif isinstance(model, nn.Module) and hasattr(model, "merge_and_unload"):
        _check_weights(model)
        model = copy.deepcopy(model).merge_and_unload()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "model must be a folder, a hub id, a transformers model or a peft model that can be merged, "
            f"got {type(model).__name__}"
        )
    if model.config.num_labels != 1:
        raise UserError(f"{type(model).__name__} has num_labels={model.config.num_labels}: a reward model has one")
    _check_weights(model)
    return model


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
            raise UserError(
                f"{name} is not a plain, whole tensor on this process ({type(parameter).__name__} of shape "
                f"{tuple(parameter.shape)}): save a sharded model with trainer.save_model, and export that folder"
            )


# --- what goes out -------------------------------------------------------------------------------------------------


def _rewrite(path: Path, change: Callable[[Json], Json]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8"))), indent=2) + "\n", "utf-8")


def _config(config: Json, pad_token_id: int) -> Json:
    """`config.json` for both versions; multimodal models keep the settings of their decoder in `text_config`."""
    if "text_config" in config:
        return config | {"text_config": _config(config["text_config"], pad_token_id)}
    return config | _old_rope(config) | {"pad_token_id": pad_token_id}


# Names that version 4 uses for one model only. (Phi-3's scaling may have three keys, and calls its type "type".)
OLD_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "phi3": {"rope_type": "type"},
}


def _old_rope(config: Json) -> Json:
    """The rope settings of `config` as version 4 spells them; none without rope, or with one that it does not know."""
    rope, model_type = config.get("rope_parameters") or {}, config["model_type"]
    full, local = rope.get("full_attention") or rope, rope.get("sliding_attention")
    if "rope_theta" not in full:
        return {}
    if model_type == "modernbert":
        return {"global_rope_theta": full["rope_theta"], "local_rope_theta": local["rope_theta"]}
    old = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    scaling = {name: value for name, value in full.items() if name not in config | old}
    if local is not None:
        old["rope_local_base_freq"] = local["rope_theta"]

    def renamed(settings: Json) -> Json:
        return {OLD_NAMES.get(model_type, {}).get(name, name): value for name, value in settings.items()}

    return renamed(old) | {"rope_scaling": None if full["rope_type"] == "default" else renamed(scaling)}


def _tokenizer_config(config: Json, tokenizer: PreTrainedTokenizerBase, inputs: Container[str]) -> Json:
    """`tokenizer_config.json` in the old spelling, which version 5 reads too. A tokenizer without a `tokenizer.json`
    keeps its class, because nothing else can load it."""
    config = dict(config)
    extra = config.pop("extra_special_tokens", [])
    if tokenizer.is_fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # rewardbench passes everything that a tokenizer returns to the model.
    names = [name for name in tokenizer.model_input_names if name in inputs]
    return config | {"additional_special_tokens": extra, "model_input_names": names}
