"""bf16 rewards lose the order of some pairs, and the fused head keeps it."""

import pytest

from bench.bf16_margins import measure


@pytest.mark.slow
def test_fused_head_keeps_the_order_that_bf16_logits_tie():
    shares = measure(num_pairs=250, length=64, hidden_size=64)
    assert shares["linear_normbt_loss"] == (0, 0)
    assert shares["Hugging Face bf16 logits"].tied > 0.02
