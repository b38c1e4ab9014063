"""Gradients against finite differences in fp64, for every option.

The weight is a stop-gradient, which finite differences see through. So the numerical side evaluates our loss with
the weights frozen at the evaluation point, and the analytical side is our loss as users call it, end to end.
"""

import pytest
import torch
from cases import (
    IMPLEMENTATIONS,
    INTERPRETED,
    LAYOUTS,
    OURS,
    UNWEIGHTED,
    Case,
    linear_case,
    pair_vector,
    randn,
    reward_case,
)

from reference import normbt as reference

OPTIONS = {
    "no options": {},
    "margin": {"margin": "strided"},
    "int64 margin": {"margin": "int64"},
    "pair_weight": {"pair_weight": "strided"},
    "bool pair_weight": {"pair_weight": "bool"},
    "label_smoothing": {"label_smoothing": 0.1},
    "center_coef": {"center_coef": 0.3},
    "eps": {"eps": 0.5},
    "no cap": {"max_weight": None},
    "every pair capped": {"max_weight": 0.01},
    "some pairs capped": {"max_weight": 0.5},
    "power 0": {"power": 0.0},
    "power 0.5": {"power": 0.5},
    "power 0.7, some capped": {"power": 0.7, "max_weight": 0.5},
    "mu tensor": {"mu": "tensor"},
    "mu of the batch": {"mu": None},
    "mu of the batch, some capped": {"mu": None, "max_weight": 1.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all at once": {"margin": "column", "pair_weight": "strided", "label_smoothing": 0.1, "center_coef": 0.3,
                    "eps": 0.5, "max_weight": 1.0, "power": 0.7, "mu": None, "reduction": "none"},
}  # fmt: skip
FORMS = {"linear": lambda **options: linear_case(3, 2, **options), "reward": lambda **o: reward_case(3, 2, **o)}


def loss_of(case: Case):
    """Our loss as a function of the inputs alone."""
    return lambda *inputs: OURS[case.form](**dict(zip(case.inputs, inputs, strict=True)), **case.arguments)


def weights_of(case: Case) -> torch.Tensor:
    """q w at the evaluation point, from the reference."""
    options = {name: case.arguments[name] for name in ("eps", "max_weight", "power") if name in case.arguments}
    chosen, rejected = case.rows()
    rho = torch.linalg.vector_norm(chosen - rejected, dim=-1)
    q = case.arguments["pair_weight"]
    return reference.normbt_weight(rho, case.arguments["mu"], **options) * (1 if q is None else q.double().reshape(-1))


class FrozenWeights(torch.autograd.Function):
    """Forward: `frozen`, what finite differences are taken of. Backward: that of `plain`."""

    @staticmethod
    def forward(ctx, plain, frozen, *inputs):
        ctx.plain = plain
        ctx.save_for_backward(*inputs)
        return frozen(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            loss = ctx.plain(*inputs)
        return None, None, *torch.autograd.grad(loss, inputs, upstream)


def gradcheck(function, case: Case, **options) -> bool:
    # Far tighter than gradcheck's 1e-5 and 1e-3, which would pass a loss that is wrong in its fourth digit. The
    # interpreter takes milliseconds for each call: there, a random projection of the Jacobian stands for its columns.
    inputs = [tensor.detach().clone().requires_grad_() for tensor in case.inputs.values()]
    return torch.autograd.gradcheck(function, inputs, eps=1e-5, atol=1e-8, rtol=1e-6, fast_mode=INTERPRETED, **options)


def check(case: Case) -> None:
    frozen = loss_of(case.having(**UNWEIGHTED, pair_weight=weights_of(case)))
    for implementation in IMPLEMENTATIONS:
        with implementation():
            assert gradcheck(lambda *inputs: FrozenWeights.apply(loss_of(case), frozen, *inputs), case)


# With the interpreter, the gradients of all options are compared with those of the
# reference (test_against_reference.py), and some are checked here once more.
INTERPRETED_OPTIONS = ("no options", "center_coef", "some pairs capped", "mu of the batch", "all at once")
checked = {name: options for name, options in OPTIONS.items() if not INTERPRETED or name in INTERPRETED_OPTIONS}


@pytest.mark.parametrize("options", checked.values(), ids=checked)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_holds_the_weight_constant(form, options):
    check(FORMS[form](**options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pooled"])
@pytest.mark.parametrize("reduction", ["none"] if INTERPRETED else ["mean", "none"])
def test_gradient_in_every_layout(layout, pooled, reduction):
    # Pairs of "explicit" share rows, and its last row is in none.
    check(linear_case(2, 1 if pooled else 2, layout=layout, pooled=pooled, center_coef=0.3, reduction=reduction))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("row_head", [False, True], ids=["weight (H,)", "weight (1, H)"])
def test_gradient_in_every_shape_of_head(bias, row_head):
    check(linear_case(2, 2, bias=bias, row_head=row_head, center_coef=0.3))


def test_gradient_of_reward_columns():
    check(reward_case(column=True))


@pytest.mark.parametrize("mu", [1.5] if INTERPRETED else [None, 1.5])
def test_naive_gradcheck_of_hidden_states_fails(mu):
    """It must: passing would mean that gradients flow through the weight."""
    linear = linear_case(2, 2, mu=mu)
    assert not gradcheck(loss_of(linear), linear, raise_exception=False)
    case = reward_case(2, 2, mu=mu)
    names = "chosen_hidden", "rejected_hidden"
    with_hidden = Case("reward", case.inputs | {name: case.arguments[name] for name in names},
                       {name: value for name, value in case.arguments.items() if name not in names})  # fmt: skip
    assert not gradcheck(loss_of(with_hidden), with_hidden, raise_exception=False)


@pytest.mark.parametrize("mu", [None, 1.5])
def test_head_and_rewards_pass_gradcheck_directly(mu):
    """The weight does not depend on them, so nothing needs to be frozen."""
    case = linear_case(mu=mu, center_coef=0.3)
    hidden = case.inputs["hidden"]
    head = Case("linear", {name: case.inputs[name] for name in ("weight", "bias")}, case.arguments | {"hidden": hidden})
    assert gradcheck(loss_of(head), head)
    rewards = reward_case(mu=mu, center_coef=0.3)
    assert gradcheck(loss_of(rewards), rewards)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_plain_bradley_terry_passes_gradcheck_directly(form, reduction):
    case = FORMS[form](**UNWEIGHTED, margin="strided", label_smoothing=0.1, center_coef=0.3, reduction=reduction)
    assert gradcheck(loss_of(case), case)


def test_frozen_weights_leave_the_loss_as_it_is():
    """The judge of this file, judged: at the evaluation point, both sides of the check are one loss."""
    case = linear_case(mu=None, pair_weight="bool", max_weight=1.0)
    frozen = case.having(**UNWEIGHTED, pair_weight=weights_of(case))
    inputs = case.inputs.values()
    torch.testing.assert_close(loss_of(frozen)(*inputs), loss_of(case)(*inputs), rtol=1e-14, atol=0)


def test_a_wrong_gradient_fails_the_check():
    """... and it can fail: centering left out of the frozen side, 1e-6 of it."""
    case = linear_case(2, 2, center_coef=1e-6)
    frozen = loss_of(case.having(**UNWEIGHTED, pair_weight=weights_of(case), center_coef=0.0))
    wrong = lambda *inputs: FrozenWeights.apply(loss_of(case), frozen, *inputs)  # noqa: E731
    assert not gradcheck(wrong, case, raise_exception=False)


def test_margin_and_pair_weight_are_constants():
    margin, pair_weight = (pair_vector("strided", 3).requires_grad_() for _ in range(2))
    case = linear_case().having(margin=margin, pair_weight=pair_weight, mu=randn().abs().requires_grad_())
    weight = case.inputs["weight"].requires_grad_()
    loss = OURS["linear"](case.inputs["hidden"], weight, **case.arguments)
    loss.backward()
    assert weight.grad is not None
    assert margin.grad is None
    assert pair_weight.grad is None
    assert case.arguments["mu"].grad is None
