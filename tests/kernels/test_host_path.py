"""What the host does for a call: eager calls go past the dispatcher, watched ones do not, and sizes that change compile
nothing anew."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from cases import BACKEND, CASES, DEVICE, OURS, assert_same_bits, leaves, linear_case, ours
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from normbt_kernels.ops import autograd
from normbt_kernels.ops.launch import LaunchShape

# --- the dispatcher ----------------------------------------------------------------------------------------------


@pytest.fixture
def operator_calls(monkeypatch):
    """Counts the calls that go through the operator."""
    calls, operator = Counter(), autograd._pair_loss_op
    monkeypatch.setattr(autograd, "_pair_loss_op", lambda *args: calls.update(["pair_loss"]) or operator(*args))
    return calls


@pytest.mark.parametrize("form", sorted(CASES))
def test_an_eager_call_goes_past_the_dispatcher(form, operator_calls):
    ours(CASES[form]())
    assert not operator_calls


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def loss_of(hidden):
    case = linear_case(2, 3)
    return OURS["linear"](hidden, case.inputs["weight"], 1.5)


def watched_by_a_mode(hidden):
    with Watching():
        return loss_of(hidden)


def of_fake_tensors(hidden):
    with FakeTensorMode() as mode:
        return OURS["linear"](mode.from_tensor(hidden), torch.empty(3, dtype=torch.float64, device=DEVICE), 1.5)


WATCHERS = {
    "a dispatch mode": watched_by_a_mode,
    "torch.func": lambda hidden: torch.func.grad(loss_of)(hidden),
    "make_fx": lambda hidden: make_fx(loss_of)(hidden)(hidden),
    "make_fx before dispatch": lambda hidden: make_fx(loss_of, pre_dispatch=True)(hidden)(hidden),
    "fake tensors": of_fake_tensors,
    "a subclass": lambda hidden: loss_of(hidden.as_subclass(Subclass)),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_whatever_watches_a_call_sees_the_operator(watcher, operator_calls):
    WATCHERS[watcher](torch.randn(4, 3, dtype=torch.float64, device=DEVICE))
    assert operator_calls


@pytest.mark.skipif(BACKEND == "triton-interpreter", reason="Dynamo would trace the interpreter")
def test_a_compiled_call_has_the_operator_in_its_graph():
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(loss_of, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    compiled(torch.randn(4, 3, device=DEVICE))
    torch.compiler.reset()
    assert "normbt.pair_loss" in graphs[0].code


def test_both_ways_give_the_same_bits():
    case = linear_case(5, 7, torch.float32, layout="explicit", center_coef=0.05)
    inputs = leaves(case)
    with Watching():
        loss = OURS["linear"](**inputs, **case.arguments)
        gradients = torch.autograd.grad(loss, list(inputs.values()))
    result = ours(case)
    assert_same_bits([loss.detach(), *gradients], [result.loss, *result.gradients.values()])


# --- compilations ------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """Counts what Triton would compile on a GPU: its cache and keys are real, the compiler and the launch are not."""
    if BACKEND != "torch":
        pytest.skip("Triton's cache is that of compiled kernels, on a device that is not there")
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from bench.host import launches_that_do_nothing

    counted = Counter()
    kernel = SimpleNamespace(run=lambda *_: None, launch_metadata=lambda *_: None, function=None, packed_metadata=None)

    def compile_nothing(self, key, signature, device, *_):
        counted[self.__name__] += 1
        self.device_caches[device][0][key] = kernel
        return kernel

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    with launches_that_do_nothing():
        from normbt_kernels.ops import ema, linear_gradient, pair_distance, pair_loss

        for module in (ema, linear_gradient, pair_distance, pair_loss):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
        yield counted


def step(num_pairs, hidden_size=64, dtype=torch.float32, hidden=None, **arguments):
    hidden = torch.randn(2 * num_pairs, hidden_size, dtype=dtype) if hidden is None else hidden
    hidden = hidden.detach().requires_grad_()
    weight = torch.randn(hidden.shape[-1], dtype=dtype, requires_grad=True)
    loss = OURS["linear"](hidden, weight, 1.5, **arguments)
    torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("layout", ["halves", "interleaved", "explicit", "pooled"])
def test_a_hundred_numbers_of_pairs_compile_as_often_as_there_are_launch_shapes(layout, compilations):
    sizes = range(1, 101)
    for num_pairs in sizes:
        arguments, hidden = {"pairs": layout}, None
        if layout == "explicit":
            arguments = {"pairs": torch.randint(0, 2 * num_pairs, (num_pairs, 2))}
        elif layout == "pooled":
            length = 3 + num_pairs % 5
            hidden = torch.randn(2 * num_pairs, 16 * length, 64)
            arguments = {"last_token": torch.zeros(2 * num_pairs, dtype=torch.int64)}
        step(num_pairs, hidden=hidden, **arguments)
    reading = {LaunchShape.for_pairs(p, 64, 4, 132).block_rows for p in sizes}
    assert compilations["_pair_loss_kernel"] == len(reading)
    assert compilations["_finalise_kernel"] == 1
    assert compilations["_sum_pairs_of_rows_kernel"] == (layout == "explicit")
    if layout != "pooled":
        writing = {LaunchShape.for_rows(2 * p, 64, 132) for p in sizes}
        writing = {(shape.block_rows, shape.block_hidden, shape.num_warps) for shape in writing}
        assert compilations["_write_gradient_kernel"] == len(writing)


def shifted(hidden):
    """The same rows, four bytes further on."""
    storage = torch.empty(hidden.numel() + 1)
    return storage[1:].view_as(hidden).copy_(hidden)


CHANGES = {
    "alignment": lambda: step(8, hidden=shifted(torch.randn(16, 64))),
    "dtype": lambda: step(8, dtype=torch.bfloat16),
    "a stride that 16 does not divide": lambda: step(8, hidden=torch.randn(16, 65)[:, :64]),
    "columns apart": lambda: step(8, hidden=torch.randn(16, 128)[:, ::2]),
    "an option": lambda: step(8, label_smoothing=0.1),
    "power": lambda: step(8, power=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_input_gets_a_kernel_of_its_own(change, compilations):
    step(8)
    before = compilations["_pair_loss_kernel"]
    step(8)
    assert compilations["_pair_loss_kernel"] == before
    CHANGES[change]()
    assert compilations["_pair_loss_kernel"] == before + 1
