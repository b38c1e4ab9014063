"""Few pairs on the CPU: which calls PyTorch's own operators serve, and what their gradients keep."""

from dataclasses import replace

import pytest
import torch
from cases import BACKEND, CASES, OURS, STRIDES, assert_same_bits, leaves, linear_case, ours_without_stats, reward_case

import reference
from normbt_kernels import linear_normbt_loss, normbt_loss
from normbt_kernels.ops import few_pairs

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="the kernels serve any number of pairs")


def operator_of(case, **options):
    inputs = leaves(case)
    loss = OURS[case.form](**inputs, **case.arguments | options)
    return (loss[0] if isinstance(loss, tuple) else loss).grad_fn.name()


@pytest.mark.parametrize("form", CASES)
def test_operators_serve_few_pairs_and_the_function_the_rest(form, monkeypatch):
    case = CASES[form]()
    assert operator_of(case) == "DotBackward0"
    assert operator_of(case, reduction="none") == "MulBackward0"
    for others in ({"label_smoothing": 0.1}, {"center_coef": 0.1}, {"return_stats": True}):
        assert operator_of(case, **others) == "PairLossBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert operator_of(case) == "PairLossBackward"
    monkeypatch.setattr(few_pairs, "MAX_ELEMENTS", 3 * 5 - 1)
    assert operator_of(case) == "PairLossBackward"
    assert operator_of(CASES[form](num_pairs=2)) == "DotBackward0"


def test_explicit_pairs_and_pooled_rows_are_served_by_the_function():
    assert operator_of(linear_case(layout="explicit")) == operator_of(linear_case(pooled=True)) == "PairLossBackward"


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_the_loss_is_differentiated_twice_with_its_weight_constant(layout):
    case = linear_case(layout=layout, bias=False)
    frozen = reference.normbt_weight(reference.pair_distance(case.inputs["hidden"], layout), 1.5)

    def second(loss, inputs):
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)

    mine, truth = leaves(case), leaves(case)
    hidden, weight = truth.values()
    chosen, rejected = (hidden[i] for i in reference.pair_rows(len(hidden), layout))
    expected = reference.normbt_loss(chosen @ weight, rejected @ weight, chosen, rejected, frozen_weight=frozen)
    torch.testing.assert_close(
        second(linear_normbt_loss(**mine, **case.arguments), list(mine.values())), second(expected, [hidden, weight])
    )


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_strides_of_rows_and_head_change_no_bit(layout, stride):
    case = linear_case(16, 96, torch.float32, layout=layout, bias=False)
    inputs = case.inputs | {"hidden": STRIDES[stride](case.inputs["hidden"])}
    inputs["weight"] = torch.stack([inputs["weight"]] * 2, dim=1)[:, 0]
    mine, expected = ours_without_stats(replace(case, inputs=inputs)), ours_without_stats(case)
    assert_same_bits(mine.loss, expected.loss)
    assert_same_bits(mine.gradients, expected.gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_the_rows_after_the_loss_changes_no_gradient(dtype):
    case = linear_case(4, 8, dtype, bias=False)
    inputs = leaves(case)
    rows = inputs["hidden"] * 1  # no leaf, so that it can be changed
    loss = linear_normbt_loss(rows, inputs["weight"], **case.arguments)
    with torch.no_grad():
        rows.zero_()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    assert_same_bits(dict(zip(inputs, gradients, strict=True)), ours_without_stats(case).gradients)


def test_infinite_rewards_leave_a_finite_loss():
    case = reward_case(2)
    case.inputs["chosen_rewards"][0] = float("inf")
    mine = ours_without_stats(case)
    assert mine.loss.isfinite()
    assert mine.gradients["chosen_rewards"][0] == 0


@pytest.mark.parametrize("mu", [0.0, 1.5])
def test_identical_rows_without_eps_weigh_what_they_weigh_in_the_kernels(mu):
    case = reward_case(3, 5, torch.float32)
    rewards, rows = [case.inputs[name] for name in ("chosen_rewards", "rejected_rewards")], torch.ones(3, 5)
    few = normbt_loss(*rewards, rows, rows, mu, eps=0.0, reduction="none")
    many, _ = normbt_loss(*rewards, rows, rows, mu, eps=0.0, reduction="none", return_stats=True)
    torch.testing.assert_close(few, many, equal_nan=True)
    assert few.isnan().all() == (mu == 0)
