"""A reward model from any checkpoint, or a small new one: one scalar head, and a pad token that is nothing else."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from normbt_kernels.data.preferences import first_line
from normbt_kernels.errors import UserError

PAD_TOKEN = "<|pad|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with a pad token that is not also its end of sequence.

    Decoders' forward finds the last token as the last one that is not padding. Were padding the end-of-sequence
    token, the saved checkpoint would read the token before it, and not the one that was trained.

    Raises:
        UserError: there is no such tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        reason = "no pad token" if tokenizer.pad_token is None else "the end-of-sequence token as pad token"
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        print(f"{name} has {reason}: its tokenizer gets {PAD_TOKEN} (id {tokenizer.pad_token_id})")
    return tokenizer


def load_model(name: str, tokenizer: PreTrainedTokenizerBase, dtype: str) -> PreTrainedModel:
    """The checkpoint as a sequence classifier with one label; embeddings grow if the pad token needs a row.

    Raises:
        UserError: there is no such checkpoint, or its architecture has no sequence classifier.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the expected "lm_head unused, score new" is said below, in words
    try:
        config = AutoConfig.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=getattr(torch, dtype), ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    architecture = (config.architectures or ["a model without a head"])[0]
    if "SequenceClassification" not in architecture:
        print(f"{name} is {architecture}: its reward head is new, initialised from the seed")
    elif config.num_labels != 1:
        print(f"{name} has {config.num_labels} labels: its head is replaced by a new one with 1, from the seed")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def new_llama(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, intermediate_size: int, num_layers: int, max_tokens: int
) -> LlamaForSequenceClassification:
    """A Llama with four heads of attention and a scalar head, drawn from torch's current seed."""
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
