"""What happens at the edges: no pairs, identical pairs, huge logits, non-finite rows, unusual dtypes and shapes."""

import math

import pytest
import torch
from cases import (
    BACKEND,
    CASES,
    DEVICE,
    DTYPES,
    LAYOUTS,
    UNWEIGHTED,
    Case,
    assert_as_reference,
    assert_loss_and_stats,
    assert_same_bits,
    judge,
    linear_case,
    ours,
    randn,
    reward_case,
    tolerance,
)

from normbt_kernels import LinearNormBTLoss, NormBTLoss, linear_normbt_loss, pair_distance
from normbt_kernels.ops.pair_loss import MAX_PAIRS

# Inf and NaN are what some of these tests are about; the interpreter's NumPy warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FORMS = sorted(CASES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mu", [None, 1.5, "tensor"])
def test_no_pairs_give_zero_loss_and_zero_gradients(form, reduction, mu):
    case = CASES[form](0, 5, torch.bfloat16, mu=mu, reduction=reduction, center_coef=0.1)
    loss, stats, gradients = ours(case)
    assert_same_bits(loss, torch.zeros((0,) if reduction == "none" else (), device=DEVICE))
    for name, value in stats._asdict().items():
        per_pair = name in ("chosen_rewards", "rejected_rewards", "distance", "weight")
        assert_same_bits(value, torch.zeros((0,) if per_pair else (), device=DEVICE))
    for name, gradient in gradients.items():
        assert_same_bits(gradient, torch.zeros_like(case.inputs[name]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True])
def test_no_pairs_in_every_layout(layout, pooled):
    # "explicit" has rows here, but none of them is in a pair.
    case = linear_case(0, 5, layout=layout, pooled=pooled)
    assert_as_reference(case)
    assert pair_distance(case.inputs["hidden"], case.arguments["pairs"], case.arguments["last_token"]).shape == (0,)


def test_no_pairs_leave_the_mean_alone():
    linear, reward = LinearNormBTLoss().to(DEVICE), NormBTLoss().to(DEVICE)
    rows, rewards = randn(0, 5), randn(0)
    for steps in (1, 2):  # before there is a mean, and after
        before = [value.clone() for loss in (linear, reward) for value in loss.state_dict().values()]
        linear(rows, randn(5))
        reward(rewards, rewards, rows, rows)
        assert_same_bits([value for loss in (linear, reward) for value in loss.state_dict().values()], before)
        linear(randn(4, 5), randn(5))
        reward(randn(2), randn(2), randn(2, 5), randn(2, 5))
        assert linear.num_updates == reward.num_updates == steps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pair(form, dtype):
    for mu in (None, 1.5):
        assert_as_reference(CASES[form](1, 6, dtype, mu=mu))


# On both sides of 0, where exp(-z) leaves fp32 (88.7) and fp64 (709.8), where it is lost beside 1 (17), and far out.
HUGE = [0.0, 1e-8, 1.0, 16.0, 18.0, 50.0, 88.0, 89.0, 104.0, 709.0, 711.0, 1e4]
LOGITS = [sign * z for z in HUGE for sign in (1, -1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
def test_huge_logits_are_exact_and_finite(form, dtype, label_smoothing):
    z = torch.tensor(LOGITS, dtype=dtype, device=DEVICE)
    zero = torch.zeros_like(z)
    options = {"label_smoothing": label_smoothing, "reduction": "none", **UNWEIGHTED}
    if form == "linear":
        inputs = {"hidden": torch.cat([z, zero])[:, None], "weight": z.new_ones(1)}
        case = Case(form, inputs, {"pairs": "halves", "last_token": None, **options})
    else:
        rows = {"chosen_hidden": randn(len(z), 3), "rejected_hidden": randn(len(z), 3)}
        case = Case(form, {"chosen_rewards": z, "rejected_rewards": zero}, {**rows, **options})
    seen, truth = ours(case), judge(case)
    assert seen.loss.isfinite().all()
    assert_loss_and_stats(seen, truth, **tolerance(dtype))
    for name, gradient in seen.gradients.items():
        torch.testing.assert_close(gradient.double(), truth.gradients[name], **tolerance(dtype))
    # Not merely small: the tail e^-z is there in its leading digits wherever the dtype can hold it.
    tail = (z > 0) & (z < 80)
    torch.testing.assert_close(seen.loss[tail].double(), truth.loss[tail], rtol=1e-4, atol=0)


@pytest.mark.parametrize("z", [1e4, -1e4])
def test_margin_alone_may_be_huge(z):
    case = reward_case(2).having(margin=torch.tensor([-z, z], device=DEVICE))
    assert_as_reference(case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("max_weight", "expected"), [(100.0, 100.0), (3.0, 3.0), (None, 1.5e6)])
def test_identical_pairs_are_capped(form, max_weight, expected):
    case = CASES[form](3, 5, torch.float32, mu=1.5, max_weight=max_weight)
    if form == "linear":
        case.inputs["hidden"][3 + 1] = case.inputs["hidden"][1]
    else:
        case.arguments["rejected_hidden"][1] = case.arguments["chosen_hidden"][1]
    result = ours(case)
    assert result.stats.distance[1] == 0
    assert result.stats.weight[1].item() == pytest.approx(expected, rel=1e-6)
    assert_as_reference(case)


def test_all_pairs_identical_and_no_mean_yet():
    # mu = 0 / (0 + eps) = 0: no weight at all, and no NaN.
    case = linear_case(3, 5, torch.float32, mu=None)
    case.inputs["hidden"][3:] = case.inputs["hidden"][:3]
    assert_as_reference(case)
    assert ours(case).loss == 0


def test_identical_pairs_without_eps_and_without_cap_are_infinite_as_in_the_paper():
    case = linear_case(2, 5, torch.float32, eps=0.0, max_weight=None, reduction="none")
    case.inputs["hidden"][2] = case.inputs["hidden"][0]
    loss, stats, _ = ours(case)
    assert stats.weight[0] == loss[0] == math.inf
    assert loss[1].isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_row_shows_in_the_loss_and_spoils_no_other_pair(bad, layout):
    case = linear_case(5, 6, torch.float32, layout=layout, reduction="none", bias=False)
    pairs = case.arguments["pairs"]
    clean = ours(case)
    # Row 0 in halves and interleaved is the chosen row of pair 0; in explicit pairs it may serve in several.
    served = (pairs == 0).any(dim=1) if layout == "explicit" else torch.arange(5, device=DEVICE) == 0
    case.inputs["hidden"][0] = math.nan  # all of the row: no 0 * inf to decide what becomes of it
    if not math.isnan(bad):
        case.inputs["hidden"][0] = torch.tensor([bad, -bad] * 3, device=DEVICE)
    spoiled = ours(case)
    assert not spoiled.loss[served].isfinite().any()
    assert_same_bits(spoiled.loss[~served], clean.loss[~served])
    assert not ours(case.having(reduction="mean")).loss.isfinite()
    assert not ours(case.having(reduction="sum")).loss.isfinite()
    # The rows that share no pair with it keep their gradients.
    shares_no_pair = spoiled.gradients["hidden"].isfinite().all(dim=1)
    assert shares_no_pair.sum() >= 4
    assert_same_bits(spoiled.gradients["hidden"][shares_no_pair], clean.gradients["hidden"][shares_no_pair])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_reward_shows_in_the_loss_and_spoils_no_other_pair(bad):
    case = reward_case(5, 6, torch.float32, reduction="none")
    clean = ours(case)
    case.inputs["rejected_rewards"][2] = bad
    spoiled = ours(case)
    others = torch.arange(5, device=DEVICE) != 2
    assert not spoiled.loss[2].isfinite()
    for name in case.inputs:
        assert_same_bits(spoiled.gradients[name][others], clean.gradients[name][others])
    assert_same_bits(spoiled.loss[others], clean.loss[others])
    assert not ours(case.having(reduction="mean")).loss.isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_never_enters_the_mean(bad):
    loss = LinearNormBTLoss().to(DEVICE)
    head = randn(5)
    loss(randn(4, 5), head)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    hidden = randn(4, 5)
    hidden[1, 2] = bad
    loss(hidden, head)
    assert_same_bits(dict(loss.state_dict()), before)


def test_nan_mu_shows_in_the_loss():
    # As a tensor its value is not looked at, for that would wait for the device.
    assert ours(linear_case().having(mu=torch.tensor(math.nan, device=DEVICE))).loss.isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_results_are_fp32_or_fp64_and_gradients_in_the_inputs_dtype(form, dtype):
    case = CASES[form](3, 5, dtype)
    loss, stats, gradients = ours(case)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {loss.dtype, *(value.dtype for value in stats)} == {expected}
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}


def test_fp64_anywhere_makes_all_arithmetic_fp64():
    rows = {"chosen_hidden": randn(3, 5, dtype=torch.float32), "rejected_hidden": randn(3, 5)}
    case = reward_case(3, 5, torch.float32)
    case = case.having(**rows)
    assert ours(case).loss.dtype == torch.float64
    assert_as_reference(case)


@pytest.mark.parametrize("form", FORMS)
def test_margins_and_weights_of_any_real_dtype_and_shape(form):
    case = CASES[form](4, 5, torch.float32)
    margin = torch.tensor([0, 1, 3, 2], device=DEVICE)
    keep = torch.tensor([True, False, True, True], device=DEVICE)
    expected = ours(case.having(margin=margin.float(), pair_weight=keep.float()))
    for shape in ((4,), (4, 1)):
        for dtype in (torch.int64, torch.int32, torch.float16, torch.float64):
            seen = ours(case.having(margin=margin.to(dtype).reshape(shape), pair_weight=keep.reshape(shape)))
            torch.testing.assert_close(seen, expected, **tolerance(torch.float32))
    assert expected.stats.weight[1] > 0  # the weight of the stats is w, without q


@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pooled"])
def test_strides_of_any_argument_change_no_bit(pooled):
    case = linear_case(5, 6, torch.float32, layout="explicit", pooled=pooled, reduction="none", margin="bfloat16")
    stepped = {name: torch.stack([case.arguments[name]] * 2, -1)[..., 0] for name in ("pairs", "margin")}
    if pooled:
        stepped["last_token"] = torch.stack([case.arguments["last_token"]] * 2, -1)[..., 0]
    weight = torch.stack([case.inputs["weight"]] * 3, -1)[..., 1]
    assert_same_bits(ours(Case("linear", case.inputs | {"weight": weight}, case.arguments | stepped)), ours(case))
    rewards = reward_case(5, 6, torch.float32, column=True)
    transposed = {name: tensor.T.contiguous().T for name, tensor in rewards.inputs.items()}
    assert_same_bits(ours(Case("reward", transposed, rewards.arguments)), ours(rewards))


def test_expanded_rows_change_no_bit():
    case = linear_case(3, 6, torch.float32)
    expanded = randn(6, 1, dtype=torch.float32).expand(6, 6)
    results = [ours(Case("linear", case.inputs | {"hidden": x}, case.arguments)) for x in (expanded, expanded.clone())]
    assert_same_bits(*results)


def test_rewards_are_not_rounded_to_the_dtype_of_the_rows():
    # Rows one bf16 step apart at a reward near 20: the rewards tie in bf16 and the loss still sees the difference.
    hidden = torch.tensor([[20.0, 2**-4], [20.0, 0.0]], dtype=torch.bfloat16, device=DEVICE)
    head = torch.ones(2, dtype=torch.bfloat16, device=DEVICE)
    _, stats = linear_normbt_loss(hidden, head, 1.0, return_stats=True)
    assert torch.equal(hidden @ head, (hidden @ head).flip(0))
    assert stats.accuracy == 1
    assert stats.chosen_rewards - stats.rejected_rewards == 2**-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rows_whose_squares_are_beyond_fp32_show_in_the_loss(form, power):
    # Their distance is infinite, and a weight of 0 would drop the pair without a word.
    case = CASES[form](3, 6, torch.float32, power=power, reduction="none")
    clean = ours(case)
    hidden = case.inputs["hidden"] if form == "linear" else case.arguments["chosen_hidden"]
    hidden[1] = 1e20
    if form == "linear":
        case.inputs["weight"].fill_(1e-20)
        clean = ours(case.having(power=0.0))
    result = ours(case)
    assert result.stats.distance[1] == math.inf
    assert result.loss.isfinite().tolist() == [True, power == 0, True]
    assert power != 0 or torch.equal(result.loss, clean.loss)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_an_infinite_margin_makes_an_infinite_loss_and_no_nan(form, label_smoothing):
    margin = torch.tensor([math.inf, 0.0, -math.inf], device=DEVICE)
    case = CASES[form](3, 5, torch.float32, label_smoothing=label_smoothing, reduction="none").having(margin=margin)
    loss, _, gradients = ours(case)
    assert loss[0] == math.inf
    assert loss[2] == (math.inf if label_smoothing else 0)
    assert_same_bits(loss[1], ours(case.having(margin=torch.zeros_like(margin))).loss[1])
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients_far_apart(trained, layout):
    # A column of a wide matrix: 2^30 elements from pair to pair, so 3 * stride does not fit into 32 bits.
    case = linear_case(4, 5, torch.float32, layout=layout, reduction="none")
    near = randn(4, dtype=torch.float32)
    far = torch.empty(3 * 2**30 + 1, device=DEVICE).as_strided((4,), (2**30,))  # never touched between the four
    far.copy_(near)
    results = []
    for upstream in (near, far):
        inputs = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in case.inputs.items()}
        loss = linear_normbt_loss(**inputs, **case.arguments)
        results.append(torch.autograd.grad(loss, [inputs[name] for name in trained], upstream))
    assert_same_bits(*results)


VECTORS = ("margin", "pair_weight", "chosen_rewards", "rejected_rewards", "weight", "last_token", "pairs")


@pytest.mark.parametrize("name", VECTORS)
def test_the_entries_of_any_vector_may_lie_far_apart(name):
    # The last entry's offset is at least 2^31 elements. Of the memory between them no page is ever touched.
    if name.endswith("rewards"):
        case = reward_case(4, 4, torch.float32, margin="strided", pair_weight="strided")
    else:
        layout = "explicit" if name == "pairs" else "halves"
        options = {"margin": "strided", "pair_weight": "strided", "pooled": True, "layout": layout}
        case = linear_case(4, 4, torch.float32, **options)
    near = (case.inputs | case.arguments)[name]
    if name == "last_token":
        near = near.to(torch.int32)
    stride = math.ceil(2**31 / (len(near) - 1))
    far = torch.empty(2**31 + stride, dtype=near.dtype, device=DEVICE)
    far = far.as_strided(near.shape, (stride, 1)[: near.dim()]).copy_(near)
    results = []
    for vector in (near, far):
        inputs, arguments = (
            {key: vector if key == name else value for key, value in of.items()} for of in (case.inputs, case.arguments)
        )
        results.append(ours(Case(case.form, inputs, arguments)))
    assert_same_bits(*results)


@pytest.mark.parametrize("rejected", [torch.bfloat16, torch.float64], ids=str)
def test_the_two_sides_may_have_two_dtypes(rejected):
    case = reward_case(dtype=torch.float32)
    assert_as_reference(case.having(rejected_hidden=case.arguments["rejected_hidden"].to(rejected)))


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch's operators and numpy number pairs with 64 bits")
def test_more_pairs_than_the_kernels_number_are_refused():
    rows = torch.zeros(1, 1, device=DEVICE).expand(2 * MAX_PAIRS + 2, 1)
    with pytest.raises(ValueError, match=f"at most {MAX_PAIRS} pairs in one call, got {MAX_PAIRS + 1}"):
        linear_normbt_loss(rows, torch.ones(1, device=DEVICE), 1.0)


@pytest.mark.skipif(BACKEND == "torch", reason="launch shapes are those of kernels")
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_the_loss_is_the_same_to_the_bit_whatever_is_trained(trained):
    case = linear_case(200, 24, torch.float32)
    alone = {name: x.detach().requires_grad_(name == trained) for name, x in case.inputs.items()}
    assert_same_bits(
        linear_normbt_loss(**alone, **case.arguments).detach(),
        linear_normbt_loss(**case.inputs, **case.arguments).detach(),
    )
