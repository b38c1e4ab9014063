"""`PreferenceCollator`: all chosen sequences, then all rejected ones, padded and masked."""

import pytest
import torch

pytest.importorskip("transformers")


from normbt_kernels.integrations.head import last_token
from normbt_kernels.integrations.transformers import PreferenceCollator
from tests.tiny_pairs import EOS, make_rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_lays_out_all_chosen_then_all_rejected(tokenizer, side):
    tokenizer.padding_side = side
    rows = [{"chosen_ids": [5, 6, 7], "rejected_ids": [8]}, {"chosen_ids": [9, 10], "rejected_ids": [11, 12]}]
    batch = PreferenceCollator(tokenizer)(rows)
    padded = {
        "right": [[5, 6, 7], [9, 10, 0], [8, 0, 0], [11, 12, 0]],
        "left": [[5, 6, 7], [0, 9, 10], [0, 0, 8], [0, 11, 12]],
    }[side]
    assert batch["input_ids"].tolist() == padded
    assert batch["attention_mask"].tolist() == [[int(token != 0) for token in row] for row in padded]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_collator_masks_by_length_where_pad_is_eos(tokenizer):
    tokenizer.pad_token = "<eos>"
    batch = PreferenceCollator(tokenizer)([{"chosen_ids": [5, 6, EOS], "rejected_ids": [8, EOS]}])
    assert batch["input_ids"].tolist() == [[5, 6, EOS], [8, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert last_token(batch["attention_mask"]).tolist() == [2, 1]


def test_collator_keeps_margins_in_fp32_and_rounds_lengths_up(tokenizer):
    rows = [row | {"margin": 0.1 * i} for i, row in enumerate(make_rows(3))]
    batch = PreferenceCollator(tokenizer, pad_to_multiple_of=8)(rows)
    torch.testing.assert_close(batch["margin"], torch.tensor([0.0, 0.1, 0.2]))
    assert batch["input_ids"].shape[1] % 8 == 0


def test_collator_refuses_a_tokenizer_without_a_pad_token(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token"):
        PreferenceCollator(tokenizer)
