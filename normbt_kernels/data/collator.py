"""Makes one padded batch of tokenised pairs: all chosen sequences, then all rejected ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from normbt_kernels.data.packing import pack
from normbt_kernels.data.rows import NUMBERS
from normbt_kernels.data.tokens import SIDES, check_ids


@dataclass
class PreferenceCollator:
    """Pads tokenised pairs into one batch in halves layout: row i is preferred to row i + B.

    Pads on `tokenizer.padding_side` with `tokenizer.pad_token_id`. The attention mask follows the lengths, so a pad
    token that also occurs in the text (pad == eos) does no harm.

    Args:
        tokenizer: gives the pad token and the side.
        pad_to_multiple_of: rounds the sequence length up, for tensor cores or to limit recompiles.
        packing: "rows" or "one row" make the batch a packed one, for a model with `padding_free` shortcuts; see `pack`.

    Call it on rows `{"chosen_ids": [int], "rejected_ids": [int]}`, all with a float `"margin"` or none, all with a
    float `"pair_weight"` or none; returns int64 `input_ids` and `attention_mask` `(2B, S)`, or what `pack` makes of
    them, and fp32 `margin` and `pair_weight` `(B,)` if the rows have them.

    Raises:
        ValueError: the tokenizer has no pad token; or the rows have no token ids, an empty side, or a number that only
            some of them have.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None
    packing: Literal["rows", "one row"] | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad token: give it one of its own, "
                "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), and the model a row for it, "
                "model.resize_token_embeddings(len(tokenizer))"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows[0].keys() >= set(SIDES):
            raise ValueError(f"rows need chosen_ids and rejected_ids, got the columns {sorted(rows[0])}")
        numbers = [name for name in NUMBERS if any(name in row for row in rows)]
        for i, row in enumerate(rows, start=1):
            check_ids({name: None for name in numbers} | dict(row), f"pair {i} of the batch")
        sequences = [torch.as_tensor(row[name]) for name in SIDES for row in rows]
        length = max(len(sequence) for sequence in sequences)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, sequence in enumerate(sequences):
            start = length - len(sequence) if self.tokenizer.padding_side == "left" else 0
            input_ids[i, start : start + len(sequence)] = sequence
            attention_mask[i, start : start + len(sequence)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.packing is not None:
            one_row = self.packing == "one row"
            batch = pack(**batch, pad_token_id=self.tokenizer.pad_token_id, one_row=one_row, row_length=length)
        for name in numbers:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch
