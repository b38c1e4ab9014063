"""`apply_normbt` over many forwards: mu moves once per step of the optimizer, whatever the order of the backwards."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normbt_kernels import apply_normbt
from tests.bradley_terry import (
    LOSS,
    Eager,
    assert_close_models,
    assert_gradients_of,
    bt_loss,
    bystanders,
    mu_of,
    paired,
    weights_of,
)
from tests.step_ema import StepEMA, start
from tests.tiny_classifiers import TinyDecoder, gradients, make_batch, make_model

pytest.importorskip("transformers")


# --- steps of the optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "modernbert"])
def test_mu_moves_once_per_step_of_the_optimizer_with_evaluation_between(architecture):
    model = make_model(architecture)
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model)
    start(weights_of(model))
    eager.ema = StepEMA()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, eager.model)]
    of_another = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    for seed in range(9):
        batch = make_batch(3 if seed % 2 else 2, seed=seed)  # unequal micro-batches
        bt_loss(model, batch).backward()
        eager.loss(batch).backward()
        bystanders(model, make_batch(2, seed=99))
        of_another.step()
        if seed % 3 == 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            eager.ema.end_step()
            assert_close_models(model, eager.model)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu, rtol=1e-5, atol=0)
    assert mu_of(model)[1] == 1 + 3


def test_optimizer_made_after_the_first_forward_is_followed_from_its_first_step():
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    assert mu_of(model)[1] == 1  # no optimizer: each forward is a step
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer.step()
    for seed in range(4):
        bt_loss(model, make_batch(seed=seed)).backward()
    assert mu_of(model)[1] == 1
    optimizer.step()
    assert mu_of(model)[1] == 2


def test_resume_in_the_middle_of_an_accumulation_is_bitwise():
    def train(model, seeds, gradients=()):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for parameter, gradient in zip(model.parameters(), gradients, strict=False):
            parameter.grad = gradient.clone()
        for seed in seeds:
            bt_loss(model, make_batch(seed=seed)).backward()
            if seed % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        return model

    whole, first, second = (make_model() for _ in range(3))
    for model in (whole, first, second):
        apply_normbt(model)
    train(whole, range(9))
    train(first, range(4))
    assert "score.normbt.pending" in first.state_dict()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, range(4, 9), [parameter.grad for parameter in first.parameters()])
    assert mu_of(second) == mu_of(whole)
    assert mu_of(whole)[1] == 3
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))
    assert "score.normbt.pending" not in whole.state_dict()


# --- the order of forwards and backwards ---------------------------------------------------------------------------

BACKWARDS = {
    "sum": lambda losses: sum(losses).backward(),
    "in order": lambda losses: [loss.backward() for loss in losses],
    "in reverse": lambda losses: [loss.backward() for loss in reversed(losses)],
    "twice": lambda losses: [sum(losses).backward(retain_graph=keep) for keep in (True, False)],
}


def under(checkpointing, forward, batch):
    """`forward(batch)` in a checkpoint of the whole model."""
    if checkpointing == "none":
        return forward(batch)
    # Reentrant checkpoints need an input that requires a gradient.
    run = lambda needed, *values: forward(dict(zip(batch, values, strict=True))) + 0 * needed  # noqa: E731
    reentrant = checkpointing == "reentrant"
    return checkpoint(run, torch.zeros((), requires_grad=True), *batch.values(), use_reentrant=reentrant)


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("checkpointing", ["none", "not reentrant"])
@pytest.mark.slow
def test_forwards_are_weighed_in_their_order_whatever_the_order_of_backwards(checkpointing, backwards):
    model = make_model()
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model)
    for step in range(2):
        batches = [make_batch(seed=3 * step + i) for i in range(3)]
        BACKWARDS[backwards]([eager.loss(batch, **LOSS) for batch in batches])
        BACKWARDS[backwards]([under(checkpointing, partial(bt_loss, model, **LOSS), batch) for batch in batches])
        bystanders(model, batches[0])
        assert_gradients_of(model, eager.model)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu, rtol=1e-5, atol=0)
    assert mu_of(model)[1] == 6


def test_several_batches_in_one_checkpoint():
    model = make_model()
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model)
    batch = make_batch()  # the same rows, and yet two weights: the first mean is mu when the second comes
    for seed in range(2):
        eager.loss(make_batch(seed=7 + seed)).backward()
        bt_loss(model, make_batch(seed=7 + seed)).backward()
        (eager.loss(batch) + eager.loss(batch)).backward()
        under("not reentrant", lambda batch: bt_loss(model, batch) + bt_loss(model, batch), batch).backward()
    assert_gradients_of(model, eager.model)
    assert mu_of(model)[1] == 6


@pytest.mark.parametrize("outer", ["none", "reentrant", "not reentrant"])
def test_reentrant_checkpoint_around_the_head_is_refused_in_backward(outer):
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    before, parameters = [value.clone() for value in mu_of(model)], gradients(model)
    loss = under(outer, lambda batch: under("reentrant", partial(bt_loss, model), batch), make_batch())
    with pytest.raises(
        RuntimeError, match=r"head is inside a reentrant activation checkpoint: pass use_reentrant=False"
    ):
        loss.backward()
    assert list(mu_of(model)) == before
    assert parameters
    assert not gradients(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_layers(reentrant):
    plain, model = make_model(), make_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for each in (plain, model):
        apply_normbt(each)
        for seed in range(2):
            bt_loss(each, make_batch(seed=seed)).backward()
    for gradient, expected in paired(model, plain):
        torch.testing.assert_close(gradient, expected)
    assert mu_of(model) == mu_of(plain)


@pytest.mark.slow
def test_torch_compile_gives_the_gradients_of_eager_mode():
    torch._dynamo.reset()
    plain, model = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    apply_normbt(plain)
    apply_normbt(model)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        batch = make_batch(seed=seed)
        bt_loss(compiled, batch, **LOSS).backward()
        bt_loss(plain, batch, **LOSS).backward()
        assert_gradients_of(model, plain)
    assert mu_of(model) == mu_of(plain)
    compiled.eval()
    with torch.no_grad():
        compiled(**batch)
    assert mu_of(model) == mu_of(plain)


@pytest.mark.slow
def test_a_model_that_was_compiled_and_called_before_is_weighed():
    model, ids = TinyDecoder(), torch.randint(1, 9, (4, 3))
    model.compile(backend="eager")
    model(ids)
    apply_normbt(model)
    model(ids)
    assert mu_of(model)[1] == 1
