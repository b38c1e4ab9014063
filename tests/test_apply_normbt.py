"""`apply_normbt`: the Bradley-Terry backward of any trainer becomes NormBT's, and nothing else of the model changes."""

import copy

import pytest
import torch
from torch import nn

import reference
from normbt_kernels import apply_normbt, remove_normbt
from tests.bradley_terry import (
    LOSS,
    Eager,
    assert_close_models,
    assert_gradients_of,
    bt_loss,
    bystanders,
    mu_of,
    paired,
    with_lora,
)
from tests.tiny_classifiers import DECODERS, ENCODERS, gradients, make_batch, make_model

pytest.importorskip("transformers")


def assert_as_close_as_eager(ours, eager, truth):
    """Each layer's gradient is at most twice as far from the fp64 one as eager PyTorch in the same dtype, plus one
    rounding step of that dtype (four of fp32's): CONTRIBUTING.md. (A layer, because a bias of one number is luck.)"""
    assert ours.keys() == eager.keys() == truth.keys()
    for layer in {name.rpartition(".")[0] for name in truth}:
        names = [name for name in truth if name.rpartition(".")[0] == layer]
        own, others, exact = (torch.cat([g[name].flatten() for name in names]) for g in (ours, eager, truth))
        rounding = (4 if own.dtype == torch.float32 else 1) * torch.finfo(own.dtype).eps * exact.norm()
        bound, error = 2 * (others - exact).norm() + rounding, (own - exact).norm()
        assert error <= bound, f"{layer}: {error} > {bound}"


@pytest.mark.parametrize("architecture", DECODERS + ENCODERS)
@pytest.mark.parametrize(
    ("dtype", "layout", "side"),
    [
        (torch.float32, "halves", "right"),
        (torch.float32, "halves", "left"),
        (torch.float32, "interleaved", "right"),
        (torch.bfloat16, "halves", "right"),
    ],
    ids=["fp32", "fp32, left", "fp32, interleaved", "bf16"],
)
@pytest.mark.slow
def test_every_gradient_is_that_of_eager_normbt(architecture, dtype, layout, side):
    model = make_model(architecture, dtype)
    eager, truth = Eager(copy.deepcopy(model)), Eager(copy.deepcopy(model).double())
    apply_normbt(model, layout)
    for seed in range(2):  # the first batch is weighed by its own mean, the second by mu
        batch = make_batch(seed=seed, side=side)
        bt_loss(model, batch, layout, **LOSS).backward()
        for reference_step in (eager, truth):
            reference_step.loss(batch, layout, **LOSS).backward()
        assert_as_close_as_eager(gradients(model), gradients(eager.model), gradients(truth.model))
    mu, num_updates = mu_of(model)
    torch.testing.assert_close(mu.double(), truth.ema.mu, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)
    assert num_updates == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("far", [3, 3000])  # a weight of 1/3000 leaves as many digits as one of 1/3
def test_gradient_is_scaled_in_fp32_and_rounded_once(dtype, layout, far):
    torch.manual_seed(0)
    head, rows = nn.Linear(8, 1).to(dtype), torch.randn(6, 8).to(dtype)
    apply_normbt(head, layout)
    head(rows).sum().mul(0).backward()
    wide = torch.promote_types(dtype, torch.float32)
    mu = mu_of(head)[0].clone()
    torch.testing.assert_close(mu, reference.pair_distance(rows.to(wide), layout).mean().float())
    logits = head(rows * far)
    pairs = reference.pair_rows(6, layout)
    bt, reward_sum = torch.tensor([0.4, -0.3, 0.7]), logits.detach()[torch.stack(pairs), 0].sum(dim=0)
    plain = torch.empty(6, 1, dtype=dtype)
    for i, sign in zip(pairs, (1, -1), strict=True):
        plain[i, 0] = (sign * bt + 0.1 / far * reward_sum).to(dtype)  # with a centering term
    (received,) = torch.autograd.grad(logits, logits, plain)

    w = reference.normbt_weight(reference.pair_distance((rows * far).to(wide), layout), mu)
    chosen, rejected = (plain[i, 0].to(wide) for i in pairs)
    expected = plain.clone()
    for i, sign in zip(pairs, (1, -1), strict=True):
        expected[i, 0] = ((chosen + rejected) / 2 + sign * w * (chosen - rejected) / 2).to(dtype)
    if dtype.itemsize == 2:
        assert torch.equal(received, expected)
    else:
        torch.testing.assert_close(received, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("when", ["before peft", "after peft"])
def test_lora_with_the_head_in_modules_to_save(architecture, when):
    peft = pytest.importorskip("peft")
    model = make_model(architecture)
    eager = Eager(with_lora(peft, copy.deepcopy(model)))
    if when == "before peft":
        apply_normbt(model)
    model = with_lora(peft, model)
    if when == "after peft":
        apply_normbt(model)
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, eager.model)]
    for seed in range(3):
        bt_loss(model, make_batch(seed=seed), **LOSS).backward()
        eager.loss(make_batch(seed=seed), **LOSS).backward()
        for step in steps:
            step.step()
            step.zero_grad()
    assert_close_models(model, eager.model)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu)
    remove_normbt(model)
    assert not [key for key in model.state_dict() if "normbt" in key]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_logits_are_bit_identical_and_eval_has_the_plain_gradient(architecture):
    plain, model = make_model(architecture), make_model(architecture)
    apply_normbt(model)
    batch = make_batch()
    bt_loss(model, batch).backward()
    for mode in (True, False):
        assert torch.equal(model.train(mode)(**batch).logits, plain.train(mode)(**batch).logits)
        assert torch.equal(bt_loss(model, batch), bt_loss(plain, batch))
    before = [value.clone() for value in mu_of(model)]
    gradients(model)
    bt_loss(model.eval(), batch).backward()
    bt_loss(plain.eval(), batch).backward()
    assert all(torch.equal(gradient, gradients_of) for gradient, gradients_of in paired(model, plain))
    assert list(mu_of(model)) == before


def test_first_batch_not_finite_and_later_batches_follow_the_formula_of_mu():
    head = nn.Linear(4, 1)
    apply_normbt(head, beta=0.5, max_weight=1.5)
    for distances, mu in [((float("inf"), 1.0), 0.0), ((2.0, 4.0), 3.0), ((1.0, 1.0), 2.0), ((2.0, 8.0), 3.5)]:
        rows = torch.zeros(4, 4)
        rows[:2, 0] = torch.tensor(distances)
        logits = head(rows)
        assert mu_of(head)[0] == mu
    signs = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    (gradient,) = torch.autograd.grad(logits, logits, signs)  # weighed by 2 / 2 and 2 / 8
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [0.25], [-1.0], [-0.25]]))
    (gradient,) = torch.autograd.grad(head(rows / 4), logits := head(rows / 4), signs, allow_unused=True)
    (gradient,) = torch.autograd.grad(logits, logits, signs)  # (0.5 + 2) / 2 < mu: the cap holds for the first pair
    assert gradient[0] == 1.5


# --- which sequences are a pair ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "batches_are"), [("halves", "interleaved"), ("interleaved", "halves")])
@pytest.mark.parametrize("num_pairs", [2, 3])
def test_layout_that_does_not_match_the_batches_is_refused_in_the_first_backward(layout, batches_are, num_pairs):
    model = make_model()
    apply_normbt(model, layout)
    loss = bt_loss(model, make_batch(num_pairs), batches_are)
    with pytest.raises(ValueError, match=f"layout='{layout}' does not match the batches"):
        loss.backward()
    assert not gradients(model)


def bt_loss_apart(model, batch, **options):
    """Plain Bradley-Terry with one forward for the chosen sequences and one for the rejected."""
    rewards = [model(**{name: x.chunk(2)[side] for name, x in batch.items()}).logits[:, 0] for side in (0, 1)]
    ones, hidden = torch.ones(len(rewards[0])), torch.zeros(len(rewards[0]), 1)
    return reference.normbt_loss(*rewards, hidden, hidden, frozen_weight=ones, **options)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_chosen_and_rejected_in_two_forwards_are_refused_in_the_first_backward(layout):
    model = make_model()
    apply_normbt(model, layout)
    with pytest.raises(ValueError, match=r"'apart' \(chosen in one forward, rejected in the next\)"):
        bt_loss_apart(model, make_batch(4)).backward()


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_layout_apart_weighs_chosen_and_rejected_of_two_forwards(architecture):
    model = make_model(architecture)
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model, "apart")
    options = {"margin": LOSS["margin"], "label_smoothing": 0.1}
    for seed in range(3):
        bt_loss_apart(model, make_batch(seed=seed), **options).backward()
        eager.loss(make_batch(seed=seed), **options).backward()
        bystanders(model, make_batch(seed=99))
        assert_gradients_of(model, eager.model)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu, rtol=1e-5, atol=0)
    assert mu_of(model)[1] == 3


def test_layout_apart_refuses_what_it_cannot_weigh():
    model = make_model()
    apply_normbt(model, "apart")
    with pytest.raises(ValueError, match="before the forward on the rejected"):
        model(**make_batch(2)).logits.sum().backward()
    model(**make_batch(2))  # chosen ones again
    with pytest.raises(ValueError, match=r"chosen rows are \(4, 16\).*\(6, 16\)"):
        model(**make_batch(3))
    with pytest.raises(ValueError, match="do not cancel"):
        bt_loss_apart(model, make_batch(), center_coef=0.05).backward()


def test_layout_apart_finds_back_after_a_batch_that_was_left_in_the_middle():
    """As a loop that skips a batch for which memory does not suffice."""
    model = make_model()
    apply_normbt(model, "apart")
    model(**make_batch(1))
    with pytest.raises(ValueError, match="or an earlier forward on chosen ones had none"):
        bt_loss_apart(model, make_batch(2)).backward()
    bt_loss_apart(model, make_batch(2)).backward()
