"""Packs sequences of unequal length side by side into few rows, instead of one padded row for each.

    padded   (N, S)   a a a . . .      packed   (R, L)   a a a b b .    position_ids   0 1 2 0 1 0
                      b b . . . .                        c c c c c c                   0 1 2 3 4 5
                      c c c c c c                        last_token 2, 4, 11

`position_ids` begin anew with each sequence. They tell transformers where a sequence ends, so that no token attends to
another sequence.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pad_token_id: int,
    one_row: bool = False,
    row_length: int | None = None,
) -> dict[str, Any]:
    """The padded batch as a packed one, on the same device; the host waits for the lengths.

    A sequence ends with the token that transformers' classifiers score, the rightmost one that is not the pad token:
    a causal model reads nothing behind it.

    Args:
        input_ids: `(N, S)` int64, padded on either side.
        attention_mask: `(N, S)`, None if nothing is padded on the left.
        pad_token_id: of the padding, and of what is left over at the end of a row.
        one_row: put all sequences into a single row, for attention of variable length (flash attention).
        row_length: L, unless all sequences go into one row. By default the length of the longest sequence, so that no
            mask over the rows is larger than that of the padded batch.

    Returns:
        `input_ids`, `position_ids` `(R, L)` int64; `last_token` `(N,)` int64, where each sequence ends in the
        flattened rows. With `one_row` also what attention of variable length needs: `cu_seq_lens_q`, `cu_seq_lens_k`
        `(N + 1,)` int32, and the integers `max_length_q`, `max_length_k`.
    """
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = ((input_ids != pad_token_id) * position).argmax(dim=1, keepdim=True)
    first = torch.zeros_like(last)
    if attention_mask is not None:
        first = torch.minimum(attention_mask.argmax(dim=1, keepdim=True), last)
    lengths = (last - first + 1).flatten().tolist()

    row_length = sum(lengths) if one_row else max(row_length or 0, *lengths)
    starts, num_rows = _place(lengths, row_length)
    start = torch.tensor(starts, device=input_ids.device)
    kept = (position >= first) & (position <= last)
    of_kept = (start[:, None] + position - first)[kept]
    packed = input_ids.new_full((num_rows * row_length,), pad_token_id).index_copy(0, of_kept, input_ids[kept])
    position_ids = torch.zeros_like(packed).index_copy(0, of_kept, (position - first)[kept])
    batch = {
        "input_ids": packed.view(num_rows, row_length),
        "position_ids": position_ids.view(num_rows, row_length),  # 0 in the rest of a row: sequences of one token
        "last_token": start + (last - first).flatten(),
    }
    if one_row:
        ends = torch.nn.functional.pad(start + (last - first).flatten() + 1, (1, 0)).int()
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


def unpack(input_ids: Tensor, position_ids: Tensor, last_token: Tensor, pad_token_id: int) -> dict[str, Tensor]:
    """The packed batch as a padded one: `input_ids`, `attention_mask` `(N, S)`, padded on the right."""
    lengths = position_ids.flatten()[last_token] + 1
    position = torch.arange(int(lengths.max()), device=input_ids.device)
    attention_mask = position < lengths[:, None]
    source = (last_token - lengths + 1)[:, None] + position * attention_mask
    padded = input_ids.flatten()[source].masked_fill(~attention_mask, pad_token_id)
    return {"input_ids": padded, "attention_mask": attention_mask.long()}


def _place(lengths: list[int], row_length: int) -> tuple[list[int], int]:
    """Where each sequence begins in the flattened rows, and the number of rows. If one row holds all, they stand in
    order. Otherwise the longest come first, each in the first row that has room for it."""
    if sum(lengths) <= row_length:
        return [0, *accumulate(lengths)][:-1], 1
    starts, filled = [0] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, used in enumerate(filled) if used + lengths[i] <= row_length), len(filled))
        if row == len(filled):
            filled.append(0)
        starts[i] = row * row_length + filled[row]
        filled[row] += lengths[i]
    return starts, len(filled)
