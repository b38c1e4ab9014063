"""The rewards that a model gives to pairs and to single sequences, in the model's own dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from normbt_kernels.data.checkpoints import vocabulary_size
from normbt_kernels.data.collator import PreferenceCollator
from normbt_kernels.data.tokens import check_ids, num_tokens
from normbt_kernels.resumable import fingerprint, map_resumable


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    partial: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen and rejected rewards, two fp32 arrays `(P,)`: the model's own logits, evaluated in its own dtype.

    The logits are widened to fp32, not computed in it: two rewards that a 16-bit model rounds to a tie stay a tie. The
    longest pairs come first, so that a batch too large for the memory fails at once.

    Args:
        model: a classifier with one label, on the device and in the dtype to use. Put into eval mode.
        tokenizer: pads the batches; its pad token must be the model's.
        rows: token ids, as `tokenize_pair` makes them.
        batch_size: pairs per forward pass, which has twice as many sequences.
        partial: a file that keeps the rewards until all are there (`map_resumable`).

    Raises:
        UserError: a row has an empty side, or a token that the model has no embedding for.
    """
    vocabulary = vocabulary_size(model)
    for number, row in enumerate(rows, start=1):
        check_ids(row, f"pair {number}", vocabulary)
    collate = PreferenceCollator(tokenizer)
    order = sorted(range(len(rows)), key=lambda i: -num_tokens(rows[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    @torch.inference_mode()
    def score(batch: Sequence[int]) -> list[float]:
        inputs = collate([rows[i] for i in batch])
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return model(**inputs).logits.float().squeeze(-1).tolist()

    model.eval()
    name = None if partial is None else fingerprint(model, rows, batch_size)
    rewards = np.empty((2, len(rows)), dtype=np.float32)
    for batch, scored in zip(batches, map_resumable(score, batches, partial, name, "scoring"), strict=True):
        rewards[:, batch] = np.reshape(scored, (2, len(batch)))
    return rewards[0], rewards[1]


def score_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[np.ndarray],
    batch_size: int = 16,
    partial: Path | None = None,
) -> np.ndarray:
    """The rewards `(N,)` of N sequences of token ids, each scored once: `score_pairs`, two neighbours at a time.

    Args, Raises: as `score_pairs`.
    """
    rows = [
        {"chosen_ids": sequences[i], "rejected_ids": sequences[min(i + 1, len(sequences) - 1)]}
        for i in range(0, len(sequences), 2)
    ]
    rewards = score_pairs(model, tokenizer, rows, batch_size, partial)
    return np.stack(rewards, axis=1).reshape(-1)[: len(sequences)]
