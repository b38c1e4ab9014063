"""Each classifier of transformers: the row that is trained is the row that it scores, and shortcuts are exact; or a
refusal. In one file, since its models take longer to import than to try."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import __version__

from normbt_kernels import linear_normbt_loss
from normbt_kernels.integrations.head import HeadReader, find_head
from normbt_kernels.integrations.pooled_head import PooledHead
from tests.every_classifier import ARCHITECTURES, NOT_BUILDABLE, make_classifier, make_pairs, outcomes
from tests.test_scored_row import NOT_THE_ROW

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "whole-step.md").read_text()
# They score a mean of all tokens' rewards (EuroBERT, as it is by default), the token after the last one, or a latent.
REFUSED = {
    "eurobert": NOT_THE_ROW,
    "t5gemma": NOT_THE_ROW,
    "t5gemma2": NOT_THE_ROW,
    "perceiver": "not one row for each",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_every_classifier_is_trained_by_the_rewards_that_it_gives_or_refused(architecture):
    """The fused head with padding on the right, the pooled one of the reward form with padding on the left."""
    model = make_classifier(architecture).eval()
    padded_right, padded_left = make_pairs(side="right"), make_pairs(side="left")
    own, own_padded_left = model(**padded_right).logits, model(**padded_left).logits
    head = find_head(model)
    reader = HeadReader(head)
    reader.expect(padded_right["input_ids"])
    if architecture in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[architecture]):
            reader.take(model(**padded_right).logits)
        return
    logits = model(**padded_right).logits
    linear, rows = head.linear(), reader.take(logits)
    _, stats = linear_normbt_loss(rows, linear.weight, 1.0, bias=linear.bias, return_stats=True)
    trained = torch.cat([stats.chosen_rewards, stats.rejected_rewards])
    torch.testing.assert_close(trained, own.flatten(), rtol=1e-4, atol=1e-5)

    linear.__class__ = PooledHead
    pooled = HeadReader(head, pool=True)
    pooled.expect(padded_left["input_ids"])
    logits = model(**padded_left).logits
    pooled.take(logits)
    torch.testing.assert_close(logits, own_padded_left, rtol=1e-4, atol=1e-5)


def documented():
    """What docs/whole-step.md says of each architecture."""
    rows = re.findall(r"^\| (both|late pooling|padding-free|neither) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    return {architecture: taken for taken, names in rows for architecture in names.split(", ")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_exact_or_refused_in_one_sentence(architecture):
    found = outcomes(architecture)
    assert not any("\n" in outcome for outcome in found.values())
    if f"transformers {__version__.rpartition('.')[0]} " in PAGE:
        exact = [name.replace("late_", "late ").replace("_free", "-free") for name in found if found[name] == "exact"]
        assert documented()[architecture] == {0: "neither", 1: exact[0] if exact else "", 2: "both"}[len(exact)]


def test_every_architecture_is_tried_or_named():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as names

    assert {*ARCHITECTURES, *NOT_BUILDABLE} >= names.keys()
    for architecture in NOT_BUILDABLE:
        with pytest.raises(ImportError):
            make_classifier(architecture)
