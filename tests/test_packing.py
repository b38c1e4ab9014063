"""Packed batches hold every token that the model reads once, and padding only at the ends of rows."""

import pytest
import torch

from normbt_kernels.data.packing import pack, unpack
from tests.tiny_classifiers import PAD, make_batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("one_row", [False, True], ids=["rows", "one row"])
def test_each_sequence_stands_before_its_last_token_with_positions_from_0(one_row, side):
    batch = make_batch(5, side=side)
    packed = pack(**batch, pad_token_id=PAD, one_row=one_row)
    ids, positions = packed["input_ids"].flatten(), packed["position_ids"].flatten()
    for sequence, mask, last in zip(batch["input_ids"], batch["attention_mask"], packed["last_token"], strict=True):
        expected = sequence[mask.bool()]
        there = slice(int(last) - len(expected) + 1, int(last) + 1)
        assert torch.equal(ids[there], expected)
        assert torch.equal(positions[there], torch.arange(len(expected)))
    assert (ids != PAD).sum() == batch["attention_mask"].sum()
    assert not positions[ids == PAD].any()


def test_rows_are_no_longer_than_the_longest_sequence_and_fewer():
    batch = make_batch(8)
    rows, length = pack(**batch, pad_token_id=PAD)["input_ids"].shape
    assert length == batch["attention_mask"].sum(1).max()
    assert -(-batch["attention_mask"].sum() // length) <= rows < len(batch["input_ids"])


def test_one_row_holds_nothing_but_tokens_and_says_where_sequences_begin():
    batch = make_batch(4)
    lengths = batch["attention_mask"].sum(1)
    packed = pack(**batch, pad_token_id=PAD, one_row=True)
    assert packed["input_ids"].shape == (1, lengths.sum())
    assert packed["cu_seq_lens_q"].tolist() == [0, *lengths.cumsum(0).tolist()]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["cu_seq_lens_k"] is packed["cu_seq_lens_q"]
    assert packed["max_length_q"] == packed["max_length_k"] == lengths.max()


def test_a_sequence_ends_with_the_token_that_transformers_scores():
    """The rightmost one that is not the pad token, also where the pad token is the end of the text."""
    ids = torch.tensor([[5, 6, PAD, 7, PAD], [PAD, PAD, PAD, PAD, PAD]])
    packed = pack(ids, torch.ones_like(ids), PAD)
    assert packed["position_ids"].flatten()[packed["last_token"]].tolist() == [3, 0]
    assert packed["input_ids"].flatten()[packed["last_token"]].tolist() == [7, PAD]


@pytest.mark.parametrize("row_length", [None, 16, 1000])
def test_unpacked_is_padded_on_the_right(row_length):
    batch = make_batch(5)
    packed = pack(**batch, pad_token_id=PAD, row_length=row_length)
    unpacked = unpack(packed["input_ids"], packed["position_ids"], packed["last_token"], PAD)
    for name, expected in batch.items():
        assert torch.equal(unpacked[name], expected), name
