"""Both forms against the reference in fp64, over sizes, strides, layouts, dtypes, options and upstream gradients."""

from dataclasses import replace

import pytest
import torch
from cases import (
    BACKEND,
    DEVICE,
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    POWERS,
    STRIDES,
    VECTOR_KINDS,
    Case,
    assert_as_reference,
    assert_same_bits,
    linear_case,
    ours,
    randint,
    randn,
    reward_case,
    tolerance,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from normbt_kernels import pair_distance
from normbt_kernels.ops import autograd, backend, linear_gradient, pairs_of_rows
from normbt_kernels.ops.launch import LaunchShape, Processors
from normbt_kernels.ops.launcher import Plans
from reference import normbt as reference

search = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=50 if BACKEND == "torch" else 30,  # of each dtype
    phases=[Phase.generate],  # examples are small as they are, and shrinking would take minutes
)

# 0..20 pairs: none, fewer and more than a block of 16. 1..70 columns: below, at and beyond the blocks of 32 columns
# in which the head's gradient is summed.
SIZES = {"num_pairs": st.integers(0, 20), "hidden_size": st.integers(1, 70)}
# Few values of each: they are compile-time constants of the kernels.
OPTIONS = {
    "mu": st.sampled_from([None, 1.3, "tensor"]),
    "margin": st.sampled_from(VECTOR_KINDS),
    "pair_weight": st.sampled_from(VECTOR_KINDS),
    "label_smoothing": st.sampled_from([0.0, 0.1]),
    "center_coef": st.sampled_from([0.0, 0.05]),
    "eps": st.sampled_from([1e-6, 0.1]),
    "max_weight": st.sampled_from([100.0, 0.4, None]),
    "power": st.sampled_from(POWERS),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "stride": st.sampled_from(sorted(STRIDES)),
}
SEED = st.integers(0, 2**16)
# What may come from above: a vector with reduction "none", else a scalar.
UPSTREAM = {
    "contiguous": lambda shape: randn(*shape),
    "expanded": lambda shape: randn().expand(shape),
    "strided": lambda shape: randn(*shape, 3)[..., 1],
    "inside a larger tensor": lambda shape: randn(shape[0] + 3)[2:-1] if shape else randn(4)[3],
}


def upstream_of(kind: str, case: Case) -> torch.Tensor:
    shape = (case.num_pairs,) if case.arguments["reduction"] == "none" else ()
    return UPSTREAM[kind](shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@search
@given(
    seed=SEED,
    upstream=st.sampled_from(sorted(UPSTREAM)),
    parameters=st.fixed_dictionaries(
        {
            **SIZES,
            **OPTIONS,
            "layout": st.sampled_from(LAYOUTS),
            "pooled": st.booleans(),
            "bias": st.booleans(),
            "row_head": st.booleans(),
            "head_dtype": st.sampled_from([None, *DTYPES]),
        }
    ),
)
def test_linear_form_is_the_reference(dtype, seed, upstream, parameters):
    torch.manual_seed(seed)
    case = linear_case(dtype=dtype, **parameters)
    assert_as_reference(case, upstream_of(upstream, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@search
@given(
    seed=SEED,
    upstream=st.sampled_from(sorted(UPSTREAM)),
    parameters=st.fixed_dictionaries(
        {**SIZES, **OPTIONS, "column": st.booleans(), "reward_dtype": st.sampled_from([None, *DTYPES])}
    ),
)
@pytest.mark.slow
def test_reward_form_is_the_reference(dtype, seed, upstream, parameters):
    torch.manual_seed(seed)
    case = reward_case(dtype=dtype, **parameters)
    assert_as_reference(case, upstream_of(upstream, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@search
@given(
    seed=SEED,
    parameters=st.fixed_dictionaries(
        {**SIZES, "layout": st.sampled_from(LAYOUTS), "pooled": st.booleans(), "stride": OPTIONS["stride"]}
    ),
)
def test_pair_distance_is_the_reference(dtype, seed, parameters):
    torch.manual_seed(seed)
    case = linear_case(dtype=dtype, **parameters)
    hidden, rows = case.inputs["hidden"].requires_grad_(), (case.arguments["pairs"], case.arguments["last_token"])
    distance = pair_distance(hidden, *rows)
    assert not distance.requires_grad
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        distance.double(), reference.pair_distance(hidden.detach().double(), *rows), **tolerance(dtype)
    )


# (num_pairs, hidden_size, dtype): each crosses a boundary of `LaunchShape`; test_sizes_cross_blocks says which.
SIZES_ACROSS_BLOCKS = [
    (1, 1, torch.float32),  # the smallest of everything
    (3, 2, torch.float32),
    (5, 3, torch.bfloat16),
    (2, 31, torch.float16),
    (17, 33, torch.float32),  # more pairs than a block of 16, and not a multiple of it
    (7, 127, torch.bfloat16),  # four blocks of 32 columns of the head's gradient, the last one not full
    (97, 2, torch.float32),  # 7 blocks of 16 pairs, the last one not full
    (29, 1000, torch.float32),  # 8 blocks of 4 pairs on the interpreter's 6 programs, which read ahead: two stride
    (3, 1025, torch.bfloat16),  # two blocks of columns where the gradient of the rows is written
    (2, 4097, torch.float64),  # rows of fp64 too long to be held ...
    (7, 8193, torch.float32),  # ... of fp32
    (7, 4097, torch.bfloat16),  # one pair to a block, on 6 programs, so one has two to sum
    (2, 16385, torch.bfloat16),  # ... of bf16
    (2, 8193, torch.bfloat16),  # ... of bf16 with centering
]


across_blocks = pytest.mark.parametrize(("num_pairs", "hidden_size", "dtype"), SIZES_ACROSS_BLOCKS, ids=str)


@across_blocks
@pytest.mark.parametrize(("mu", "center_coef"), [(None, 0.05), (1.5, 0.0)])
def test_every_block_boundary_is_crossed(num_pairs, hidden_size, dtype, mu, center_coef):
    case = linear_case(num_pairs, hidden_size, dtype, layout="explicit", mu=mu, center_coef=center_coef)
    assert_as_reference(case)


@pytest.fixture(params=["searched", "sorted"])
def _pairs_of_rows(request, monkeypatch):
    """How the kernels find the explicit pairs of each row."""
    if request.param == "sorted":
        monkeypatch.setattr(pairs_of_rows, "MAX_SEARCHED", 0)
    for module, name in ((autograd, "_passes"), (linear_gradient, "_plans")):
        monkeypatch.setattr(module, name, Plans())


@pytest.mark.usefixtures("_pairs_of_rows")
@pytest.mark.parametrize(
    ("num_pairs", "dtype", "reduction"), [(3, torch.float64, "mean"), (513, torch.bfloat16, "none")]
)
def test_rows_find_their_pairs(num_pairs, dtype, reduction):
    # One block of 512 pairs, and two, over blocks of 16 rows; the last row is in no pair, and one in half of them.
    case = linear_case(num_pairs, 2, dtype, layout="explicit", reduction=reduction)
    pairs = case.arguments["pairs"]
    pairs[::2, 0] = 1
    pairs[::2, 1].clamp_(max=0)
    case.arguments["pairs"] = pairs.T.contiguous().T  # of other strides, which the kernels cannot read
    upstream = randn(num_pairs) if reduction == "none" else None
    assert_as_reference(case, upstream)
    assert_same_bits(ours(case, upstream), ours(case, upstream))


@pytest.mark.usefixtures("_pairs_of_rows")
@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
def test_rows_in_no_pair_get_nothing_whatever_comes_from_above(upstream):
    case = linear_case(5, 3, torch.float32, layout="explicit")
    gradient = ours(case, torch.tensor(upstream, device=DEVICE)).gradients["hidden"]
    served = torch.isin(torch.arange(len(gradient), device=DEVICE), case.arguments["pairs"])
    assert 0 < served.sum() < len(served)
    assert torch.equal(gradient[~served], torch.zeros_like(gradient[~served]))
    assert not gradient[served].isfinite().any()


@across_blocks
def test_every_block_boundary_is_crossed_without_reduction(num_pairs, hidden_size, dtype):
    case = linear_case(num_pairs, hidden_size, dtype, pooled=True, center_coef=0.05, reduction="none")
    assert_as_reference(case, randn(num_pairs))


@across_blocks
def test_every_block_boundary_is_crossed_in_the_reward_form(num_pairs, hidden_size, dtype):
    assert_as_reference(reward_case(num_pairs, hidden_size, dtype, mu=None))


def test_sequences_longer_than_a_tile_of_their_gradient():
    case = linear_case(3, 5, torch.float32, pooled=True)
    hidden = randn(6, 37, 5, dtype=torch.float32)
    last_token = torch.tensor([0, 7, 8, 15, 16, 36], device=DEVICE)  # around tiles of 8 and of 16 positions
    assert_as_reference(replace(case, inputs=case.inputs | {"hidden": hidden}).having(last_token=last_token))


@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float32], ids=str)
def test_longest_rows(dtype):
    # 8 blocks of bf16, 16 of fp32
    assert_as_reference(linear_case(1, 32768, dtype))


def test_sizes_cross_blocks():
    """Keeps the sizes above honest when the launch shapes change."""

    def shape(num_pairs, hidden_size, dtype, centers=False):
        return LaunchShape.for_pairs(
            num_pairs,
            hidden_size,
            dtype.itemsize,
            backend.INTERPRETED,
            centers=centers,
            copied=hidden_size * dtype.itemsize % 16 == 0,
        )

    shapes = [(size, shape(*size)) for size in SIZES_ACROSS_BLOCKS]
    longer_than_a_block = {dtype for (_, h, dtype), launch in shapes if h > launch.block_hidden}
    assert longer_than_a_block == {torch.float64, torch.float32, torch.bfloat16}
    assert any(launch.block_hidden >= size[1] > shape(*size, centers=True).block_hidden for size, launch in shapes)
    striding = [launch.block_rows for (p, _, _), launch in shapes if p > launch.num_programs * launch.block_rows]
    assert 1 in striding
    assert max(striding) > 1
    assert {launch.num_stages for _, launch in shapes} == {1, 3}
    assert any(1 < launch.block_rows < p for (p, _, _), launch in shapes)
    assert any(h > LaunchShape.for_rows(p, h, 3).block_hidden for p, h, _ in SIZES_ACROSS_BLOCKS)


# 16 of a row's pairs are added at a time.
@pytest.mark.parametrize("num_pairs", [15, 16, 17, 129])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_in_many_pairs(num_pairs, reduction):
    case = linear_case(num_pairs, 3, torch.float32, reduction=reduction, center_coef=0.05)
    other = randint(1, 2 * num_pairs, num_pairs)
    first = torch.arange(num_pairs, device=DEVICE) % 5 == 4
    pairs = torch.stack([torch.zeros_like(other), other], dim=1)  # row 0 in each of them, on either side
    case = case.having(pairs=torch.where(first[:, None], pairs.flip(1), pairs))
    assert_as_reference(case, upstream_of("contiguous", case))


@pytest.mark.parametrize("max_weight", [None, 2.0])
@pytest.mark.parametrize("power", POWERS)
def test_own_mean_of_pairs_near_and_far(max_weight, power):
    # Distances over eight decades, some 0, and the cap holds many pairs.
    case = linear_case(70, 5, torch.float32, mu=None, max_weight=max_weight, power=power, center_coef=0.05, eps=1e-3)
    hidden = case.inputs["hidden"]
    nearness = 10.0 ** -randint(0, 9, 70, 1).float()
    nearness[::7] = 0
    hidden[70:] = hidden[:70] + nearness * randn(70, 5, dtype=torch.float32)
    assert_as_reference(case)


def test_sums_over_many_programs(monkeypatch):
    # 129 pairs on as many programs: more than the 128 partial sums that are added at a time.
    monkeypatch.setattr("normbt_kernels.ops.pairs.processors_of", lambda device: Processors(129, 0))
    assert_as_reference(linear_case(129, 2, torch.float32))
    assert_as_reference(linear_case(129, 2, torch.float32, reduction="none"), randn(129))


# Each stride fits into 32 bits, and an index times it does not: the kernels must multiply in 64. Interleaved, so that
# row 4 is row 2 of the chosen side, 2^30 elements apart.
FAR = {"rows": (2**29, 1), "columns": (1, 2**29), "positions": (5, 2**29, 1)}


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_offsets_beyond_2_to_the_31_elements(strides, reduction):
    # The 5 GiB between the few elements are never touched, so on the CPU they are never there.
    shape = (6, *(5,) * (len(strides) - 1))
    far = torch.empty(5 * 2**29 + 64, dtype=torch.float16, device=DEVICE).as_strided(shape, strides)
    near = randn(*shape, dtype=torch.float16)
    far.copy_(near)
    case = linear_case(3, 5, torch.float16, layout="interleaved", reduction=reduction)
    if len(shape) == 3:
        case = case.having(last_token=torch.tensor([4, 0, 1, 4, 3, 4], dtype=torch.int32, device=DEVICE))
    # Not against the reference: PyTorch's own matrix product crashes on such strides.
    results = [ours(Case("linear", case.inputs | {"hidden": hidden}, case.arguments)) for hidden in (far, near)]
    assert_same_bits(*results)
