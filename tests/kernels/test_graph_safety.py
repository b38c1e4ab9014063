"""A step never makes the host wait and never launches on another device, so that it can be captured in a CUDA graph."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from cases import BACKEND, CASES, DEVICE, LAYOUTS, OURS, leaves, linear_case, reward_case
from device_checks import host_must_not_wait

from normbt_kernels import LinearNormBTLoss, NormBTLoss, pair_distance
from normbt_kernels.ops import backend
from normbt_kernels.ops.pairs import RowPairs

kernels = pytest.mark.skipif(
    BACKEND == "torch", reason="on the CPU, where nothing waits, the closed form looks at values"
)


def host_reads(step) -> list[str]:
    """Every launch of a step, kernels and operators, that hands a value to the host; on a GPU the first, as PyTorch
    reports it."""
    if BACKEND == "triton":
        step()  # compiles
        try:
            with host_must_not_wait():
                step()
        except RuntimeError as error:
            return [str(error)]
        return []
    from bench.count import HOST_READ, counting

    # On a GPU the values of `pairs` and `last_token` are not looked at.
    with patch.object(RowPairs, "check_range", lambda rows: None), counting() as count:
        step()
    assert count.launches
    return [name for name in count.launches if name == str(HOST_READ)]


@kernels
@pytest.mark.parametrize("form", sorted(CASES))
@pytest.mark.parametrize("mu", [None, 1.5, "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_value_goes_to_the_host(form, mu, reduction):
    case = CASES[form](mu=mu, reduction=reduction, center_coef=0.1, margin="bfloat16")

    def step():
        loss, _ = OURS[form](**leaves(case), **case.arguments, return_stats=True)
        torch.autograd.backward(loss, torch.ones_like(loss))

    assert host_reads(step) == []


@kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pooled"])
def test_no_layout_sends_a_value_to_the_host(layout, pooled):
    case = linear_case(layout=layout, pooled=pooled)
    rows = case.arguments["pairs"], case.arguments["last_token"]
    assert host_reads(lambda: OURS["linear"](**leaves(case), **case.arguments).backward()) == []
    assert host_reads(lambda: pair_distance(case.inputs["hidden"], *rows)) == []


@kernels
@pytest.mark.parametrize("form", sorted(CASES))
def test_the_modules_send_no_value_to_the_host(form):
    case = linear_case() if form == "linear" else reward_case()
    loss = (LinearNormBTLoss if form == "linear" else NormBTLoss)().to(DEVICE)
    names = ("pairs", "last_token") if form == "linear" else ("chosen_hidden", "rejected_hidden")
    arguments = {name: case.arguments[name] for name in names}
    for training in (True, True, False):  # the first batch, a later one, and evaluation
        loss.train(training)
        assert host_reads(lambda: loss(**leaves(case), **arguments).backward()) == []


@kernels
def test_a_value_that_goes_to_the_host_is_seen():
    assert host_reads(lambda: linear_case().inputs["hidden"].sum().item()) != []


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_are_launched_on_the_device_of_the_tensors(current, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())

    def launch():
        return [device.index for device in entered]

    assert backend.run_on(SimpleNamespace(type="cuda", index=1), launch) == ([] if current == 1 else [1])
    assert backend.run_on(torch.device("cpu"), launch) == ([] if current == 1 else [1])
