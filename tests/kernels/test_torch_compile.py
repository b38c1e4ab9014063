"""The operators are what torch.library says they are, and whatever traces the loss gets all of it and its gradients."""

import pytest
import torch
from cases import BACKEND, CASES, DEVICE, INTERPRETED, LAYOUTS, OURS, Case, assert_same_bits, linear_case, ours, randn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from normbt_kernels import LinearNormBTLoss, NormBTLoss, linear_normbt_loss, pair_distance
from normbt_kernels.checks import linear_inputs, reward_inputs
from normbt_kernels.ops.autograd import Arguments, Call
from normbt_kernels.ops.ema import EMA
from normbt_kernels.ops.terms import LossOptions, Mu

pytestmark = [
    pytest.mark.slow,
    *map(pytest.mark.filterwarnings, ("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")),
]

# --- opcheck -----------------------------------------------------------------------------------------------------
# All of its tests: the schema (what is mutated, what aliases), autograd registration, the fake against the real
# operator, and ahead-of-time dispatch with dynamic shapes. They look at host code, so the interpreter, which takes its
# time, runs some of them.


def mus() -> dict[str, Mu]:
    mu, zero, one = randn().abs().float(), torch.tensor(0, device=DEVICE), torch.tensor(1, device=DEVICE)
    pending = torch.zeros(2, device=DEVICE)
    return {
        "number": Mu(value=1.5),
        "tensor": Mu(tensor=mu),
        "tensor, and an EMA's first batch": Mu(tensor=mu, ema=EMA(torch.zeros_like(mu), zero, pending, 0.9)),
        "EMA, later batch": Mu(ema=EMA(mu, one, pending, 0.9)),
        "EMA, micro-batch": Mu(ema=EMA(mu, one, pending, None)),
        "EMA, eval": Mu(ema=EMA(mu, one, None, None)),
    }


def arguments_of(case: Case, mu: str = "number", stats: bool = True, **options) -> Arguments:
    """What the operator is given."""
    constants = LossOptions(0.1, 0.05, 1e-6, 100.0, 0.5, case.arguments.get("reduction", "mean"))._replace(**options)
    given = {name: value for name, value in (case.inputs | case.arguments).items() if name not in ("mu", "reduction")}
    given = {"bias": None} | given if case.form == "linear" else given
    rows, scores = (linear_inputs if case.form == "linear" else reward_inputs)(**given)
    return Arguments.of(Call(rows, scores, mus()[mu], constants, stats))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_pair_distance(layout):
    case = linear_case(3, 5, torch.bfloat16, layout=layout, pooled=layout == "explicit")
    rows = arguments_of(case).call.rows
    torch.library.opcheck(torch.ops.normbt.pair_distance.default, (*rows, torch.float32))


@pytest.mark.parametrize(
    ("form", "mu", "reduction", "differentiates"),
    [
        ("linear", "EMA, later batch", "mean", True),
        ("reward", "number", "none", True),
        *(
            []
            if INTERPRETED
            else [
                *(("linear", mu, "mean", True) for mu in mus() if mu != "EMA, later batch"),
                ("linear", "number", "none", False),
                ("reward", "EMA, later batch", "mean", False),
            ]
        ),
    ],
)
def test_opcheck_pair_loss(form, mu, reduction, differentiates):
    options = {"layout": "explicit", "pooled": True} if form == "linear" else {}
    case = CASES[form](3, 5, torch.float32, margin="strided", pair_weight="strided", reduction=reduction, **options)
    inputs = {name: tensor.clone().requires_grad_(differentiates) for name, tensor in case.inputs.items()}
    arguments = arguments_of(Case(form, inputs, case.arguments), mu, stats=reduction == "mean")
    torch.library.opcheck(torch.ops.normbt.pair_loss.default, arguments)


def test_opcheck_move_mu():
    ema = mus()["EMA, later batch"].ema
    torch.library.opcheck(torch.ops.normbt.move_mu.default, ema[:4])


def backward_arguments(layout: str, reduction: str, needs: tuple[bool, bool, bool]) -> list:
    case = linear_case(3, 5, torch.bfloat16, layout=layout, pooled=True)
    hidden, per_pair = case.inputs["hidden"], reduction == "none"
    return [
        randn(2, 3, dtype=torch.float32), randn(*(3,) * per_pair, dtype=torch.float32),
        randn(0 if per_pair else 6, dtype=torch.float32),
        case.inputs["weight"], hidden if per_pair and needs[1] else None,
        case.arguments["pairs"] if layout == "explicit" else None, case.arguments["last_token"], layout,
        list(hidden.shape), torch.bfloat16, torch.float32, *needs,
    ]  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("layout", "needs"),
    [
        *((layout, (True, True, True)) for layout in (["explicit"] if INTERPRETED else LAYOUTS)),
        ("explicit", (True, False, False)),
        ("explicit", (False, True, True)),
    ],
)
def test_opcheck_linear_gradient(layout, needs, reduction):
    torch.library.opcheck(torch.ops.normbt.linear_gradient.default, backward_arguments(layout, reduction, needs))


# --- autograd of the operators themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted(CASES))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_differentiates_as_the_function_does(form, reduction):
    case = CASES[form](3, 5, torch.float32, reduction=reduction)
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in case.inputs.items()}
    plain = {"label_smoothing": 0.0, "center_coef": 0.0, "power": 1.0}
    loss, *tables = torch.ops.normbt.pair_loss(*arguments_of(Case(form, inputs, case.arguments), **plain))
    upstream = randn(*loss.shape, dtype=torch.float32)
    assert not any(table.requires_grad for table in tables)
    gradients = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), upstream), strict=True))
    assert_same_bits(gradients, ours(case, upstream).gradients)


def test_backward_operator_refuses_to_be_differentiated():
    arguments = backward_arguments("halves", "mean", (True, True, True))
    arguments[3] = arguments[3].requires_grad_()
    gradient, *_ = torch.ops.normbt.linear_gradient(*arguments)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


def test_the_distance_operator_gives_a_constant():
    rows = arguments_of(linear_case()).call.rows
    hidden = rows.chosen.clone().requires_grad_()
    distance = torch.ops.normbt.pair_distance(*rows._replace(chosen=hidden, rejected=hidden), torch.float64)
    assert not distance.requires_grad


SIZES = {
    # what is given in the place of a table of backward, and its name
    "head_gradient": (2, torch.empty(0)),
    "gradient": (0, torch.empty(2, 2)),
    "loss_gradient": (1, torch.empty(2)),
    "head_weight": (3, torch.empty(4)),
    "last_token": (6, torch.zeros(5, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", SIZES)
def test_no_kernel_reads_beyond_a_table_that_is_too_small(name):
    arguments = backward_arguments("halves", "mean", (True, True, True))
    place, table = SIZES[name]
    arguments[place] = table.to(DEVICE)
    with pytest.raises(ValueError, match=f"normbt::linear_gradient: {name} must be"):
        torch.ops.normbt.linear_gradient(*arguments)


def test_backward_operator_needs_the_rows_for_a_head_without_reduction():
    arguments = backward_arguments("halves", "none", (True, False, False))
    arguments[-2] = True
    with pytest.raises(ValueError, match=r"hidden must be .*got None"):
        torch.ops.normbt.linear_gradient(*arguments)


# --- torch.compile -----------------------------------------------------------------------------------------------

compiles = pytest.mark.skipif(
    BACKEND == "triton-interpreter", reason="Inductor would have its own kernels interpreted; the operators are opaque"
)


@pytest.fixture
def compiled():
    """torch.compile of a whole function, with nothing left over from other tests."""
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **options)
    torch.compiler.reset()


def results(loss_function, case: Case) -> list:
    """Loss, stats and gradients."""
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in case.inputs.items()}
    loss, stats = loss_function(**inputs, **case.arguments, return_stats=True)
    loss.sum().backward()
    return [loss.detach(), *(value.detach() for value in stats), *(tensor.grad for tensor in inputs.values())]


@compiles
@pytest.mark.parametrize("form", sorted(CASES))
def test_compiled_form_is_the_eager_one_to_the_bit(form, compiled):
    case = CASES[form](3, 8, torch.bfloat16, margin="strided", center_coef=0.05, mu="tensor")
    assert_same_bits(results(compiled(OURS[form]), case), results(OURS[form], case))


@compiles
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("pooled", "reduction", "mu"), [(False, "mean", None), (True, "none", 1.5)], ids=["rows", "pooled"]
)
def test_every_layout_is_traced(layout, pooled, reduction, mu, compiled):
    # The graphs of forward and backward, without the code that Inductor makes of them: that takes seconds a case.
    case = linear_case(3, 8, torch.float32, layout=layout, pooled=pooled, reduction=reduction, mu=mu)
    traced = compiled(OURS["linear"], backend="aot_eager")
    assert_same_bits(results(traced, case), results(OURS["linear"], case))


@compiles
@pytest.mark.parametrize("form", sorted(CASES))
def test_compiled_between_other_operators(form, compiled):
    """The loss of something computed, with an upstream gradient of something computed."""
    case = CASES[form](4, 8, torch.float32)

    def step(*inputs):
        scaled = {name: 0.5 * tensor for name, tensor in zip(case.inputs, inputs, strict=True)}
        return OURS[form](**scaled, **case.arguments) * 3.0

    gradients = []
    for function in (step, compiled(step)):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in case.inputs.values()]
        gradients.append(torch.autograd.grad(function(*inputs), inputs))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


@compiles
@pytest.mark.parametrize(("form", "dynamic"), [("linear", True), ("linear", None), ("reward", None)])
def test_one_graph_serves_every_number_of_pairs(form, dynamic, compiled):
    function = compiled(OURS[form], backend="aot_eager", dynamic=dynamic)
    # Without dynamic=True, the second size is what makes it dynamic.
    for num_pairs in (3,) if dynamic else (3, 7):
        case = CASES[form](num_pairs, 8, torch.float32, mu="tensor")
        assert_same_bits(results(function, case), ours_as_list(case))
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_pairs in (12, 5):
            case = CASES[form](num_pairs, 8, torch.float32, mu="tensor")
            assert_same_bits(results(function, case), ours_as_list(case))


@compiles
@pytest.mark.parametrize("form", sorted(CASES))
def test_mu_as_a_number_may_change_from_call_to_call(form, compiled):
    # The second value makes it a symbol in the graph.
    function = compiled(OURS[form], backend="aot_eager")
    for mu in (1.5, 2.5, 3.5):
        case = CASES[form](3, 8, torch.float32, mu=mu)
        assert_same_bits(results(function, case), ours_as_list(case))


def ours_as_list(case: Case) -> list:
    result = ours(case)
    return [result.loss, *result.stats, *result.gradients.values()]


@compiles
@pytest.mark.parametrize(("form", "backend"), [("linear", "inductor"), ("reward", "aot_eager")])
def test_compiled_module_keeps_the_same_mean(form, backend, compiled):
    modules = [{"linear": LinearNormBTLoss, "reward": NormBTLoss}[form]().to(DEVICE) for _ in range(2)]
    functions = [modules[0], compiled(modules[1], backend=backend)]
    for step, num_pairs in enumerate((3, 3, 5, 4)):  # a second size makes the graph dynamic
        if step == 3:
            for module in modules:
                module.eval()
        case = CASES[form](num_pairs, 8, torch.float32, mu=None)
        del case.arguments["mu"]
        eager, traced = (results(function, case) for function in functions)
        if step == 0 and backend == "inductor":  # the first mean, which weighs this batch, is a sum in Inductor's order
            torch.testing.assert_close(traced, eager)
        else:
            assert_same_bits(traced, eager)
        assert_same_bits(*(dict(module.state_dict()) for module in modules))
    assert modules[1].num_updates == 3


@compiles
@pytest.mark.parametrize("bad", [{"pairs": [[0, -1]]}, {"pairs": [[0, 8]]}, {"last_token": [-1] * 8}], ids=str)
def test_compiled_code_refuses_rows_that_do_not_exist(bad):
    """As eager code does: compiled indexing would wrap -1 around to the last row."""
    if torch.device(DEVICE).type != "cpu":
        pytest.skip("on a GPU such a pair is NaN")
    arguments = {name: torch.tensor(value) for name, value in bad.items()}
    hidden = randn(8, 3, 4) if "last_token" in bad else randn(8, 4)
    compiled = torch.compile(pair_distance, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=next(iter(bad))):
        compiled(hidden, **arguments)


# --- torch.func, export, make_fx -----------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """A body, so that hidden states are computed, and a head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 1)

    def forward(self, x):
        return OURS["linear"](self.body(x), self.head.weight, 1.5, bias=self.head.bias, center_coef=0.05)


@pytest.fixture
def model_and_gradients():
    """A model, its input, and the gradients of its parameters as plain eager autograd gives them."""
    model, x = Model().to(DEVICE), randn(8, 5, dtype=torch.float32)
    model(x).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return model, x, gradients


def loss_of_parameters(model, x, parameters):
    return torch.func.functional_call(model, parameters, (x,))


SECOND, FORWARD_MODE = "cannot be differentiated twice", "no forward-mode derivative"
TRANSFORMS = {
    "jvp": (FORWARD_MODE, lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "jacfwd": (FORWARD_MODE, lambda f, x: torch.func.jacfwd(f)(x)),
    "jvp of grad": (FORWARD_MODE, lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,))),
    "grad of grad": (SECOND, lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x)),
    "grad of jvp": (FORWARD_MODE, lambda f, x: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x,))[1])(x)),
}


def dual(f, x):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", [*TRANSFORMS, "dual tensors"])
@pytest.mark.parametrize("form", ["linear", "reward"])
def test_derivatives_that_are_no_backward_are_refused_and_never_zero(transform, form):
    case = CASES[form]()
    name, *others = case.inputs
    message, take = TRANSFORMS.get(transform, (FORWARD_MODE, dual))

    def loss_of(first):
        return OURS[form](**{name: first} | {other: case.inputs[other] for other in others}, **case.arguments)

    with pytest.raises(RuntimeError, match=message):
        take(loss_of, case.inputs[name])


def test_no_grad_inside_nested_transforms_is_kept():
    case = linear_case()

    def with_constant_loss(hidden):
        with torch.no_grad():
            loss = OURS["linear"](hidden, case.inputs["weight"], bias=case.inputs["bias"], **case.arguments)
        return (hidden**2).sum() * loss

    def gradient_sum(hidden):
        return torch.func.grad(with_constant_loss)(hidden).sum()

    expected = torch.full_like(case.inputs["hidden"], 2 * ours(case).loss)
    torch.testing.assert_close(torch.func.grad(gradient_sum)(case.inputs["hidden"]), expected)


@pytest.mark.parametrize("trained", ["body", "head", ""], ids=["body alone", "head alone", "all"])
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=compiles)])
def test_func_grad_is_autograds(trained, backend, model_and_gradients):
    model, x, expected = model_and_gradients
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wanted = {name: p for name, p in parameters.items() if name.startswith(trained)}
    gradient = torch.func.grad(lambda some: loss_of_parameters(model, x, {**parameters, **some}))
    gradients = (torch.compile(gradient, backend=backend) if backend else gradient)(wanted)
    torch.testing.assert_close(gradients, {name: expected[name] for name in wanted}, rtol=1e-5, atol=1e-6)


@compiles
def test_an_exported_model_trains(model_and_gradients):
    model, x, expected = model_and_gradients
    exported = torch.export.export(model, (x,)).module()
    exported(x).backward()
    gradients = {name: parameter.grad for name, parameter in exported.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_function_differentiates(pre_dispatch, model_and_gradients):
    model, x, expected = model_and_gradients
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    traced = make_fx(lambda given: loss_of_parameters(model, x, given), pre_dispatch=pre_dispatch)(parameters)
    if not pre_dispatch:  # below autograd there is nothing left to differentiate: the traced gradient is what counts
        traced = make_fx(torch.func.grad(lambda given: loss_of_parameters(model, x, given)))(parameters)
        gradients = traced(parameters)
    else:
        gradients = torch.autograd.grad(traced(parameters), list(parameters.values()))
        gradients = dict(zip(parameters, gradients, strict=True))
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


# --- shapes that are symbols -------------------------------------------------------------------------------------


class Head(torch.nn.Module):
    """A body, so that the number of pairs is a symbol inside the graph, and a head of (1, H)."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(5, 6, device=DEVICE)
        self.head = torch.nn.Linear(6, 1, device=DEVICE)

    def forward(self, rows, margin):
        hidden = self.body(rows)
        return linear_normbt_loss(hidden, self.head.weight, 1.5, bias=self.head.bias, margin=margin)


@pytest.mark.skipif(BACKEND == "triton-interpreter", reason="checks are host code: one backend is enough")
def test_dynamic_shapes_are_checked_as_fixed_ones_are():
    model = Head()
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    for num_pairs in (4, 7, 1):
        rows, margin = randn(2 * num_pairs, 5, dtype=torch.float32), randn(num_pairs, 1, dtype=torch.float32)
        torch.testing.assert_close(compiled(rows, margin), model(rows, margin))
    with pytest.raises(Exception, match=r"margin.* must be \(P,\)"):  # torch 2.11 quotes the message in pieces
        compiled(randn(8, 5, dtype=torch.float32), randn(3, 1, dtype=torch.float32))
