"""The losses that `normbt train` compares are the formulas that their names stand for, on the collator's batches."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from normbt_kernels.commands import cli
from normbt_kernels.commands.arguments import LOSS_NAMES, TrainOptions
from normbt_kernels.commands.losses import loss_rows, make_loss
from normbt_kernels.data import generated
from normbt_kernels.data.tokens import tokenize
from normbt_kernels.errors import UserError
from normbt_kernels.integrations.transformers import PreferenceCollator, loss_and_form

NUM_PAIRS, HIDDEN_SIZE = 8, 16


@pytest.fixture(scope="module")
def rows():
    return tokenize(generated.make_pairs(NUM_PAIRS, seed="any"), generated.make_tokenizer())


@pytest.fixture(scope="module")
def hidden():
    torch.manual_seed(0)
    return torch.randn(2 * NUM_PAIRS, HIDDEN_SIZE, dtype=torch.float64)


def bradley_terry(variant, d, margin, smoothing):
    """Per pair, from the formulas of the paper's baselines."""
    if variant == "-margin":
        return -F.logsigmoid(d - margin)
    if variant == "-margin-out":
        return -margin * F.logsigmoid(d)
    if variant == "-smoothing":
        return -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)
    return -F.logsigmoid(d)


@pytest.mark.parametrize("smoothing", [None, 0.3])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_each_loss_is_its_formula(rows, hidden, name, smoothing):
    batch = PreferenceCollator(generated.make_tokenizer())(loss_rows(name, rows))
    constants = {key: batch[key].double() for key in ("margin", "pair_weight") if key in batch}
    head = torch.linspace(-1, 1, HIDDEN_SIZE, dtype=torch.float64)
    options = TrainOptions(label_smoothing=smoothing, eps=0.5, max_weight=1.1)
    loss = make_loss(name, options)(hidden, head, **constants)

    chosen, rejected = hidden.chunk(2)
    on_rewards, fused = loss_and_form(make_loss(name, options), "its weight is elsewhere")
    assert not fused
    torch.testing.assert_close(on_rewards(chosen @ head, rejected @ head, chosen, rejected, **constants), loss)
    d, distance = (chosen - rejected) @ head, (chosen - rejected).norm(dim=1)
    margin = torch.tensor([row["margin"] for row in rows], dtype=torch.float64)
    base, variant = ("normbt", name[6:]) if name.startswith("normbt") else ("bt", name[2:])
    weight = (distance.mean() / (distance + 0.5)).clamp(max=1.1) if base == "normbt" else 1.0
    expected = (weight * bradley_terry(variant, d, margin, 0.1 if smoothing is None else smoothing)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # margins are fp32 in a batch


def test_plain_losses_leave_the_margin_unused_and_keep_a_pair_weight(rows):
    weighted = [row | {"pair_weight": 2.0} for row in rows]
    for name in ("bt", "normbt", "bt-smoothing"):
        assert all("margin" not in row and row["pair_weight"] == 2.0 for row in loss_rows(name, weighted))
    assert all("margin" in row for row in weighted)  # what was given is not changed
    products = [row["pair_weight"] for row in loss_rows("bt-margin-out", weighted)]
    assert products == [2 * row["margin"] for row in rows]


def test_margins_that_are_missing_or_negative_are_refused(rows):
    without = [{key: value for key, value in row.items() if key != "margin"} for row in rows]
    for name in ("bt-margin", "normbt-margin-out"):
        with pytest.raises(UserError, match=f"{name} needs pairs with the column 'margin'"):
            loss_rows(name, without)
    negative = [rows[0] | {"margin": -0.5}, *rows[1:]]
    loss_rows("bt-margin", negative)
    with pytest.raises(UserError, match=r"must not be negative: got -0\.5"):
        loss_rows("bt-margin-out", negative)


@pytest.mark.slow
def test_any_list_of_losses_is_one_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generated, "NUM_TRAIN_PAIRS", 64)
    monkeypatch.setattr(generated, "NUM_EVAL_PAIRS", 64)
    losses = ["bt", "bt-margin-out", "normbt-margin", "normbt-smoothing"]
    arguments = ["train", "--max-steps", "2", "--eval-strategy", "no", "--output-dir", str(tmp_path / "out")]
    assert cli.main([*arguments, "--loss", *losses]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["losses"]) == losses
    assert all(list(group["accuracy"]) == losses for group in results["groups"])
    printed = capsys.readouterr().out
    for label in ("BT with margin outside", "NormBT with margin", "NormBT with label smoothing"):
        assert label in printed
