"""The operators are what torch.library says they are, and torch.compile traces the whole loss."""

import pytest
import torch
from cases import BACKEND, CASES, DEVICE, LAYOUTS, OURS, Case, assert_same_bits, linear_case, ours, randn

from normbt_kernels import LinearNormBTLoss, NormBTLoss, pair_distance
from normbt_kernels.ops.pair_loss import ROW_ENTRIES
from normbt_kernels.ops.pairs import split_pairs

# --- opcheck -----------------------------------------------------------------------------------------------------
# All of its tests: the schema (what is mutated, what aliases), autograd registration, the fake against the real
# operator, and ahead-of-time dispatch with dynamic shapes. No input requires grad: autograd lives in the Functions.

OPTIONS = (0.1, 0.05, 1e-6, 100.0)  # label_smoothing, center_coef, eps, max_weight


def rows_of(case: Case) -> tuple:
    return tuple(split_pairs(case.inputs["hidden"], case.arguments["pairs"], case.arguments["last_token"]))


def means() -> dict[str, tuple]:
    """mu, mu_value, ema_mu, ema_num_updates, beta."""
    mu, zero, one = randn().abs().float(), torch.tensor(0, device=DEVICE), torch.tensor(1, device=DEVICE)
    return {
        "of the batch": (None, None, None, None, None),
        "number": (None, 1.5, None, None, None),
        "tensor": (mu, None, None, None, None),
        "EMA, first batch": (None, None, torch.zeros_like(mu), zero, 0.9),
        "EMA, later batch": (None, None, mu, one, 0.9),
        "EMA, eval": (None, None, mu, one, None),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pooled"])
def test_opcheck_pair_distance(layout, pooled):
    case = linear_case(3, 5, torch.bfloat16, layout=layout, pooled=pooled)
    torch.library.opcheck(torch.ops.normbt.pair_distance.default, rows_of(case))


@pytest.mark.parametrize("mean", means())
@pytest.mark.parametrize("form", sorted(CASES))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_pair_loss(mean, form, reduction):
    margin, pair_weight = randn(3), randn(3).abs()
    if form == "linear":
        case = linear_case(3, 5, torch.float32, layout="explicit", pooled=True)
        rows = rows_of(case)
        scores = None, None, case.inputs["weight"], case.inputs["bias"], margin, pair_weight
    else:
        rows = randn(3, 5), randn(3, 5), None, None, None
        scores = randn(3), randn(3), None, None, margin, pair_weight
    head_gradient = form == "linear" and reduction == "mean"
    arguments = *rows, *scores, *means()[mean], *OPTIONS, reduction, head_gradient, False
    torch.library.opcheck(torch.ops.normbt.pair_loss.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck_linear_gradient(layout, reduction, needs):
    case = linear_case(3, 5, torch.bfloat16, layout=layout, pooled=True)
    hidden, pairs = case.inputs["hidden"], case.arguments["pairs"]
    per_pair = reduction == "none"
    row_entries = torch.zeros(1 + ROW_ENTRIES, len(hidden), dtype=torch.int32, device=hidden.device)
    upstream = randn(3, dtype=torch.float32) if per_pair else randn(dtype=torch.float32)
    arguments = (
        randn(2, 3, dtype=torch.float32), upstream, randn(0 if per_pair else 6, dtype=torch.float32), row_entries,
        case.inputs["weight"], hidden if per_pair and needs[1] else None,
        pairs if layout == "explicit" else None, layout == "interleaved", case.arguments["last_token"],
        list(hidden.shape), torch.bfloat16, torch.float32, *needs,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.normbt.linear_gradient.default, arguments)


# --- torch.compile -----------------------------------------------------------------------------------------------

compiles = pytest.mark.skipif(
    BACKEND == "triton-interpreter", reason="Inductor would have its own kernels interpreted; the operators are opaque"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


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
@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pooled"])
@pytest.mark.parametrize(("reduction", "mu"), [("mean", None), ("none", 1.5)])
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
@pytest.mark.parametrize("form", sorted(CASES))
@pytest.mark.parametrize("dynamic", [True, None])
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
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("form", sorted(CASES))
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
