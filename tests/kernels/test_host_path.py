"""What the host does for a call: eager calls go past the dispatcher, watched ones do not, and sizes that change compile
nothing anew."""

import random
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import count

import pytest
import torch
from cases import (
    BACKEND,
    CASES,
    DEVICE,
    DTYPES,
    LAYOUTS,
    OURS,
    VECTOR_KINDS,
    assert_same_bits,
    leaves,
    linear_case,
    ours,
    reward_case,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from normbt_kernels import LinearNormBTLoss, NormBTLoss, pair_distance
from normbt_kernels.checks import linear_inputs, loss_options
from normbt_kernels.ops import autograd, backend, ema, linear_gradient, pair_loss
from normbt_kernels.ops import pair_distance as distances
from normbt_kernels.ops.launch import LaunchShape
from normbt_kernels.ops.launcher import MAX_PLANS, Launch, Plans
from normbt_kernels.ops.terms import Mu

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


@pytest.mark.parametrize("watching", [nullcontext, Watching])
@pytest.mark.parametrize("num_pairs", [2, 600])  # of which numpy serves the latter
def test_a_loss_keeps_no_rows_alive(watching, num_pairs):
    case = linear_case(num_pairs, 300, torch.float32)
    hidden = case.inputs["hidden"].clone().requires_grad_() * 1  # a leaf would be kept for its gradient
    rows = weakref.ref(hidden)
    with watching():
        loss = OURS["linear"](hidden, case.inputs["weight"], 1.5)
    del hidden
    assert loss.requires_grad
    assert rows() is None


# --- compilations ------------------------------------------------------------------------------------------------


class Compiled:
    """What Triton has compiled, where there is nothing to launch it on."""

    function = packed_metadata = None
    launched = None  # what was launched last: kernel, grid, and all arguments

    def launch_metadata(self, *_):
        pass

    def run(self, *arguments):
        grid, arguments = arguments[:3], arguments[9:]  # the driver's own between them
        Compiled.launched = self, grid, with_addresses(arguments)

    def __getitem__(self, grid):
        return lambda *arguments: self.run(*grid, *range(6), *arguments)


def with_addresses(value):
    """As a launch past the binder has them: the address of each tensor in its place."""
    if isinstance(value, tuple):
        return tuple(with_addresses(part) for part in value)
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def compilations(monkeypatch):
    """Counts what Triton would compile on a GPU: its cache and keys are real, the compiler and the launch are not."""
    if BACKEND != "torch":
        pytest.skip("Triton's cache is that of compiled kernels, on a device that is not there")
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from bench.host import launches_that_do_nothing

    counted = Counter()

    def compile_nothing(self, key, signature, device, *_):
        counted[self.__name__] += 1
        kernel = self.device_caches[device][0][key] = Compiled()
        return kernel

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    with launches_that_do_nothing():
        monkeypatch.setattr(autograd, "_passes", Plans())
        for module in (ema, linear_gradient, distances, pair_loss):
            monkeypatch.setattr(module, "_plans", Plans())
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
        yield counted
        for module in (ema, linear_gradient, distances, pair_loss):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


def step(num_pairs, hidden_size=64, dtype=torch.float32, hidden=None, **arguments):
    hidden = torch.randn(2 * num_pairs, hidden_size, dtype=dtype) if hidden is None else hidden
    hidden = hidden.detach().requires_grad_()
    weight = torch.randn(hidden.shape[-1], dtype=dtype, requires_grad=True)
    loss = OURS["linear"](hidden, weight, 1.5, **arguments)
    torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("layout", ["halves", "interleaved", "explicit", "pooled"])
def test_a_hundred_numbers_of_pairs_compile_as_often_as_there_are_launch_shapes(layout, compilations):
    sizes = range(1, 6001, 60)  # of pairs whose rows search for them, and of those that are sorted
    for num_pairs in sizes:
        arguments, hidden = {"pairs": layout}, None
        if layout == "explicit":
            arguments = {"pairs": torch.randint(0, 2 * num_pairs, (num_pairs, 2))}
        elif layout == "pooled":
            length = 3 + num_pairs % 5
            hidden = torch.empty(2 * num_pairs, 16 * length, 64)
            arguments = {"last_token": torch.zeros(2 * num_pairs, dtype=torch.int64)}
        step(num_pairs, hidden=hidden, **arguments)
    reading = {LaunchShape.for_pairs(p, 64, 4, backend.INTERPRETED) for p in sizes}
    reading = {(shape.block_rows, shape.num_warps, shape.num_stages) for shape in reading}
    assert len(reading) > 2
    assert compilations["_pair_loss_kernel"] == len(reading)
    assert compilations["_finalise_kernel"] == 1
    for kernel in ("_sum_searched_pairs_kernel", "_sum_sorted_pairs_kernel"):
        assert compilations[kernel] == (layout == "explicit")
    if layout != "pooled":
        writing = {LaunchShape.for_rows(2 * p, 64, backend.INTERPRETED.count) for p in sizes}
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


# --- launches past Triton's binder -------------------------------------------------------------------------------


@pytest.fixture
def repeated_launches(compilations, monkeypatch):
    """How often each kernel was launched past the binder, each time as the binder would have launched it."""
    launch, repeated = Launch.__call__, Counter()

    def launch_and_ask_the_binder(self, tensors, *numbers):
        compiled = compilations.total()
        launch(self, tensors, *numbers)
        launched = Compiled.launched
        repeated[self._kernel.__name__] += compilations.total() == compiled
        arguments = self.named(*tensors, *numbers)
        self._kernel[self._grid](*arguments, **self._constants, num_warps=self._num_warps, enable_fp_fusion=True)
        assert launched == Compiled.launched

    monkeypatch.setattr(Launch, "__call__", launch_and_ask_the_binder)
    return repeated


def random_case(rng):
    """Any sizes, dtypes, strides, addresses and options that a kernel may be compiled for."""
    form = rng.choice(sorted(CASES))
    vectors = {name: rng.choice(VECTOR_KINDS) for name in ("margin", "pair_weight")}
    sizes = rng.choice([1, 2, 16, 200]), rng.choice([1, 16, 63, 64])
    options = {
        "reduction": rng.choice(["mean", "none"]),
        "center_coef": rng.choice([0.0, 0.1]),
        "mu": rng.choice([1.5, "tensor", None]),
        "stride": rng.choice(["contiguous", "every second column", "inside a larger tensor"]),
    }
    dtype, other_dtype = rng.choice(DTYPES), rng.choice(DTYPES)
    if form == "reward":
        return reward_case(*sizes, dtype, reward_dtype=other_dtype, column=rng.random() < 0.5, **vectors, **options)
    return linear_case(
        *sizes, dtype, head_dtype=other_dtype, layout=rng.choice(LAYOUTS), pooled=rng.random() < 0.3,
        bias=rng.random() < 0.5, **vectors, **options,
    )  # fmt: skip


def moved(case, rng):
    """The same case, some of its tensors one element further on in memory."""

    def move(value):
        if not isinstance(value, torch.Tensor) or rng.random() < 0.7:
            return value
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        storage = torch.zeros(span + 1, dtype=value.dtype)
        return storage.as_strided(value.shape, value.stride(), 1).copy_(value)

    inputs = {name: move(value) for name, value in case.inputs.items()}
    return replace(case, inputs=inputs, arguments={name: move(value) for name, value in case.arguments.items()})


@pytest.mark.parametrize("seed", range(4))
def test_a_repeated_launch_takes_the_kernel_that_triton_would(seed, repeated_launches):
    rng = random.Random(seed)
    modules = {"linear": LinearNormBTLoss(), "reward": NormBTLoss()}
    for _ in range(25):
        case = random_case(rng)
        for _ in range(3):
            shifted_case = moved(case, rng)
            ours(shifted_case)
            inputs = leaves(shifted_case)
            arguments = {name: shifted_case.arguments[name] for name in ("margin", "pair_weight")}
            if case.form == "linear":
                arguments |= {name: shifted_case.arguments[name] for name in ("pairs", "last_token")}
                pair_distance(inputs["hidden"], arguments["pairs"], arguments["last_token"])
            else:
                arguments |= {name: shifted_case.arguments[name] for name in ("chosen_hidden", "rejected_hidden")}
            modules[case.form](**inputs, **arguments).backward()
    assert set(repeated_launches) >= {
        "_pair_loss_kernel", "_finalise_kernel", "_write_gradient_kernel", "_measure_distance_kernel",
        "_sum_searched_pairs_kernel", "_sum_head_gradient_kernel",
    }  # fmt: skip
    assert min(repeated_launches.values()) > 0


def test_gradients_of_16_bit_rewards_are_rounded_by_their_product():
    case = reward_case(7, 3, torch.bfloat16)
    inputs = leaves(case)
    loss, _ = OURS["reward"](**inputs, **case.arguments, return_stats=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(loss, list(inputs.values()))
    operators = Counter(event.name for event in profile.events())
    assert operators["aten::mul"] == 1
    assert not operators["aten::_to_copy"]


def test_backward_serves_whatever_comes_from_above_and_whatever_is_asked_for():
    case = linear_case(4, 7, torch.float32, bias=False, reduction="none")
    inputs = leaves(case)
    loss = OURS["linear"](**inputs, **case.arguments)
    above = torch.rand(8, device=DEVICE)
    for upstream in (above[:4], above[:1].expand(4), above[::2], above[4:]):
        expected = torch.autograd.grad(loss, list(inputs.values()), upstream.clone(), retain_graph=True)
        for asked_for in ([0, 1], [0], [1]):
            of = [list(inputs.values())[i] for i in asked_for]
            gradients = torch.autograd.grad(loss, of, upstream, retain_graph=True)
            assert_same_bits(list(gradients), [expected[i] for i in asked_for])


def test_the_two_sides_may_lie_in_memory_each_in_its_own_way():
    case = reward_case(5, 9, torch.float32)
    expected = ours(case)
    chosen, rejected = case.arguments["chosen_hidden"].contiguous(), case.arguments["rejected_hidden"].contiguous()
    for sides in ((chosen, rejected.T.contiguous().T), (chosen.T.contiguous().T, rejected)):
        arguments = case.arguments | dict(zip(("chosen_hidden", "rejected_hidden"), sides, strict=True))
        assert_same_bits(ours(replace(case, arguments=arguments)).loss, expected.loss)


class OnGPU(torch.Tensor):
    """Says that it lies on a GPU."""

    index = 0
    device = property(lambda self: torch.device("cuda", self.index))


@pytest.mark.skipif(BACKEND != "torch", reason="the interpreter serves every device")
@pytest.mark.parametrize("watched", [False, True])
def test_each_device_has_plans_of_its_own(watched, monkeypatch):
    pytest.importorskip("triton")
    kinds = []

    class Found(Exception):
        pass

    def find(kind, *_):
        kinds.append(kind)
        raise Found

    monkeypatch.setattr(pair_loss._plans if watched else autograd._passes, "find", find)
    options = loss_options(0.0, 0.0, 1e-6, 100.0, 1.0, "mean")
    for index in (0, 1, 1):
        hidden, weight = torch.randn(4, 8).as_subclass(OnGPU), torch.randn(8).as_subclass(OnGPU)
        hidden.index = weight.index = index
        rows, scores = linear_inputs(hidden, weight, None, "halves", None, None, None)
        call = autograd.Call(rows, scores, Mu(value=1.5), options, False)
        with pytest.raises(Found):
            pair_loss._launch_pair_loss(*call, True) if watched else autograd._passes_of(call, (False,) * 5)
    assert kinds[0] != kinds[1] == kinds[2]


def test_plans_of_kinds_that_keep_changing_are_dropped():
    made, plans = count(), Plans()
    for kind in range(3 * MAX_PLANS):
        plans.find(kind, next, made)
        assert plans.find(kind, next, made) == kind
    assert len(plans._plans) <= MAX_PLANS


@pytest.mark.skipif(BACKEND != "triton-interpreter", reason="bench tune needs kernels, and a GPU its own time")
@pytest.mark.parametrize(
    ("entry", "phase", "plan", "num_pairs"),
    [
        ("linear", "forward", "PairLossPlan", 29),
        ("reward", "forward", "PairLossPlan", 29),
        ("linear", "backward", "GradientPlan", 200),
    ],
)
def test_bench_tune_launches_each_shape_that_it_times(entry, phase, plan, num_pairs, monkeypatch):
    from bench import tune
    from bench.contenders import Case

    made, make = [], getattr(autograd, plan)
    monkeypatch.setattr(autograd, plan, lambda *arguments: made.append(arguments) or make(*arguments))
    times = tune.time_shapes(Case(entry, num_pairs, 16, torch.float32), phase, torch.device("cpu"), 0, 0.01)
    assert len(made) == len(times) > 1
