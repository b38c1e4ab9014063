"""What backward reads, keeps, computes and leaves alone."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    DEVICE,
    LAYOUTS,
    OURS,
    Case,
    assert_same_bits,
    leaves,
    linear_case,
    ours,
    ours_without_stats,
    randn,
    reward_case,
)
from torch.utils._python_dispatch import TorchDispatchMode

FORMS = sorted(CASES)
REDUCTIONS = ("mean", "sum", "none")


class Operators(TorchDispatchMode):
    """Records the package's operators: (name, arguments, outputs)."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "normbt":
            self.calls.setdefault(func._opname, []).append((args, outputs))
        return outputs


def forward(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return OURS[case.form](**inputs, **case.arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pooled"])
@pytest.mark.parametrize(("reduction", "mu"), [("mean", None), ("sum", 1.5)])
def test_backward_never_reads_hidden(layout, pooled, reduction, mu):
    case = linear_case(layout=layout, pooled=pooled, reduction=reduction, mu=mu, center_coef=0.1)
    expected = ours(case).gradients
    inputs = leaves(case)
    inputs["hidden"] = inputs["hidden"].detach().clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = forward(case, inputs)
    storages = {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert saved
    assert inputs["hidden"].untyped_storage().data_ptr() not in storages
    with torch.no_grad():
        inputs["hidden"].fill_(float("nan"))  # PyTorch would refuse, had backward kept it; a copy would give NaN
    assert_same_bits(dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True)), expected)
    # ... nor does it keep anything else of that size.
    assert sum(tensor.numel() for tensor in saved if tensor.is_floating_point()) <= 6 * case.num_pairs + 2 * 5 + 1


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_backward_without_reduction_keeps_hidden_only_for_a_trained_head(trained):
    case = linear_case(reduction="none", label_smoothing=0.1)
    inputs = {name: t.detach().requires_grad_(name == "hidden" or trained) for name, t in case.inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        forward(case, inputs)
    storages = {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert (inputs["hidden"].untyped_storage().data_ptr() in storages) == trained


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_may_come_back_with_other_strides(reduction):
    """Offloading gives back a contiguous copy of what was a slice, and the next step may go without it."""
    case = linear_case(reduction=reduction, pooled=True, stride="every second column")
    weight, last_token = (
        torch.stack([x, x], dim=1)[:, 0] for x in (case.inputs["weight"], case.arguments["last_token"])
    )
    case = replace(case, inputs=case.inputs | {"weight": weight}).having(last_token=last_token)
    upstream = torch.ones(3 if reduction == "none" else (), device=DEVICE)
    expected = ours_without_stats(case, upstream).gradients
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda tensor: tensor):
        loss = forward(case, inputs := leaves(case))
    gradients = torch.autograd.grad(loss, list(inputs.values()), upstream)
    assert_same_bits(dict(zip(inputs, gradients, strict=True)), expected)


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ()])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_is_computed_for_inputs_that_need_no_gradient(wanted, reduction):
    case = linear_case(reduction=reduction)
    expected = ours(case, torch.ones(3 if reduction == "none" else (), device=DEVICE)).gradients
    inputs = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in case.inputs.items()}
    with Operators() as operators:
        loss = forward(case, inputs)
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.sum().backward()
    for name, tensor in inputs.items():
        if name in wanted:
            assert_same_bits(tensor.grad, expected[name])
        else:
            assert tensor.grad is None
    ((_, (_, _, head_gradient, _, _)),) = operators.calls["pair_loss"]
    head_in_forward = reduction != "none" and ("weight" in wanted or "bias" in wanted)
    assert head_gradient.numel() == (5 + 1 if head_in_forward else 0)
    for _, gradients in operators.calls.get("linear_gradient", ()):
        names = ("hidden", "weight", "bias")
        assert tuple(name for name, g in zip(names, gradients, strict=True) if g.numel() > 0) == wanted


@pytest.mark.parametrize("form", FORMS)
def test_no_grad_computes_no_gradient_and_the_same_loss(form):
    case = CASES[form]()
    expected = ours(case).loss
    with torch.no_grad(), Operators() as operators:
        loss = forward(case, leaves(case))
    assert not loss.requires_grad
    assert_same_bits(loss, expected)
    ((_, (_, _, head_gradient, _, _)),) = operators.calls["pair_loss"]
    assert head_gradient.numel() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reward_form_sends_nothing_to_the_hidden_states(reduction):
    case = reward_case(reduction=reduction)
    rows = {name: case.arguments[name].requires_grad_() for name in ("chosen_hidden", "rejected_hidden")}
    inputs = leaves(case)
    forward(case, inputs).sum().backward()
    assert all(row.grad is None for row in rows.values())
    assert all(reward.grad is not None for reward in inputs.values())
    assert not forward(case, case.inputs).requires_grad  # the hidden states alone make no graph


@pytest.mark.parametrize("wanted", ["chosen_rewards", "rejected_rewards"])
def test_reward_form_with_one_side_trained(wanted):
    case = reward_case()
    inputs = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in case.inputs.items()}
    forward(case, inputs).backward()
    assert {name for name, tensor in inputs.items() if tensor.grad is not None} == {wanted}
    assert_same_bits(inputs[wanted].grad, ours_without_stats(case).gradients[wanted])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward_gives_the_same_bits(form, reduction):
    case = CASES[form](layout="explicit", reduction=reduction) if form == "linear" else CASES[form](reduction=reduction)
    inputs = leaves(case)
    loss = forward(case, inputs)
    upstream = torch.randn_like(loss)
    first, second = (
        torch.autograd.grad(loss, list(inputs.values()), upstream, retain_graph=keep) for keep in (True, False)
    )
    assert_same_bits(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(inputs.values()), upstream)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_several_upstreams_at_once_are_those_of_each(form, reduction):
    case = CASES[form](dtype=torch.bfloat16, reduction=reduction, center_coef=0.1)
    loss = forward(case, inputs := leaves(case))
    upstreams = randn(2, *loss.shape, dtype=loss.dtype)
    at_once = torch.autograd.grad(loss, list(inputs.values()), upstreams, retain_graph=True, is_grads_batched=True)
    for number, upstream in enumerate(upstreams):
        alone = torch.autograd.grad(loss, list(inputs.values()), upstream, retain_graph=True)
        assert_same_bits([gradient[number] for gradient in at_once], list(alone))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("upstream_requires_grad", [False, True])
def test_double_backward_is_refused_rather_than_wrong(form, upstream_requires_grad):
    case = CASES[form](label_smoothing=0.1)  # without smoothing, autograd can do it for few pairs on the CPU
    inputs = leaves(case)
    loss = forward(case, inputs)
    upstream = torch.ones_like(loss, requires_grad=upstream_requires_grad)
    gradients = torch.autograd.grad(loss, list(inputs.values()), upstream, create_graph=True)
    assert_same_bits(dict(zip(inputs, (g.detach() for g in gradients), strict=True)), ours(case).gradients)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="differentiated twice"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inputs_are_never_modified(form, reduction):
    case = CASES[form](
        mu="tensor", margin="strided", pair_weight="strided", center_coef=0.1, reduction=reduction,
        **({"layout": "explicit", "pooled": True} if form == "linear" else {}),
    )  # fmt: skip
    tensors = [x for x in [*case.inputs.values(), *case.arguments.values()] if isinstance(x, torch.Tensor)]
    before = [(x.clone(), x._version) for x in tensors]
    upstream = randn(3) if reduction == "none" else randn()
    upstream_before = upstream.clone()
    ours(case, upstream)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert_same_bits(tensor, value)
        assert tensor._version == version
    assert_same_bits(upstream, upstream_before)


@pytest.mark.parametrize("form", FORMS)
def test_stats_are_detached_and_change_nothing(form):
    case = CASES[form]()
    inputs = leaves(case)
    loss, stats = OURS[form](**inputs, **case.arguments, return_stats=True)
    assert not any(value.requires_grad for value in stats)
    assert_same_bits(loss, forward(case, inputs))


# 97 pairs: 7 blocks of 16 on the interpreter's 6 programs, so partial sums are added within and across programs.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_inputs_same_bits_in_the_linear_form(layout, reduction):
    case = linear_case(97, 5, torch.float32, layout=layout, reduction=reduction, mu=None, center_coef=0.1)
    upstream = randn(97) if reduction == "none" else None
    assert_same_bits(ours(case, upstream), ours(case, upstream))


def test_same_inputs_same_bits_in_the_reward_form():
    case = reward_case(97, 5, torch.float32, mu=None)
    assert_same_bits(ours(case), ours(case))


def test_a_row_in_many_pairs_is_summed_in_the_same_order_every_time():
    # Every pair shares row 0, whose gradient is then a sum of 200 terms of very different size.
    case = linear_case(200, 5, torch.float32, layout="explicit", max_weight=None)
    case.arguments["pairs"][:, 0] = 0
    case.arguments["pairs"][:, 1].clamp_(min=1)
    case.inputs["hidden"] *= torch.logspace(-4, 4, 202, device=DEVICE)[:, None]
    assert_same_bits(ours(case), ours(case))
