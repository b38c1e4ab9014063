"""Every mistake is named: TypeError or ValueError with the argument and what was seen, before anything changes."""

import math
import re

import pytest
import torch
from cases import BACKEND, CASES, DEVICE, OURS, assert_same_bits

from normbt_kernels import LinearNormBTLoss, NormBTLoss, linear_normbt_loss, normbt_loss, pair_distance

# Checks run on the host, before any backend is chosen: once is enough.
pytestmark = pytest.mark.skipif(BACKEND == "triton-interpreter", reason="the closed form's run has these")
MODULES = {"linear": LinearNormBTLoss, "reward": NormBTLoss}
P, H, S = 3, 5, 4  # pairs, columns, positions
META = "meta"  # a second device that every machine has


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device or DEVICE)


def valid(form: str) -> dict:
    case = CASES[form](P, H, torch.float32)
    return case.inputs | {name: value for name, value in case.arguments.items() if name != "mu"}


def pooled(last_token) -> dict:
    return {"hidden": zeros(2 * P, S, H), "last_token": last_token}


def rows(*pairs, dtype=torch.int64):
    return torch.tensor(pairs, dtype=dtype, device=DEVICE)


LINEAR = [
    # what is passed, what it raises, what the message says
    ({"hidden": [[1.0]]}, TypeError, "hidden must be a tensor, got list"),
    ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
    ({"hidden": zeros(6, H, dtype=torch.int64)}, TypeError, "hidden .* torch.int64"),
    ({"hidden": zeros(6, H, dtype=torch.complex64)}, TypeError, "hidden .* torch.complex64"),
    ({"hidden": zeros(6)}, ValueError, r"hidden must be \(rows, H\).* got \(6,\)"),
    ({"hidden": zeros(6, S, H)}, ValueError, r"hidden .* last_token.* got \(6, 4, 5\)"),  # last_token is missing
    ({"hidden": zeros(6, 0), "weight": zeros(0)}, ValueError, r"hidden .* column.* got \(6, 0\)"),
    ({"hidden": zeros(7, H)}, ValueError, r"pairs='halves' needs an even number .* \(7, 5\)"),
    ({"hidden": zeros(7, H), "pairs": "interleaved"}, ValueError, r"pairs='interleaved' .* \(7, 5\)"),
    ({"weight": [1.0] * H}, TypeError, "weight must be a tensor, got list"),
    ({"weight": zeros(H, dtype=torch.int32)}, TypeError, "weight .* torch.int32"),
    ({"weight": zeros(H + 1)}, ValueError, r"weight .* H = 5 .* got \(6,\)"),
    ({"weight": zeros(H, 1)}, ValueError, r"weight .* got \(5, 1\)"),
    ({"weight": zeros(2, H)}, ValueError, r"weight .* got \(2, 5\)"),
    ({"weight": zeros(H, device=META)}, ValueError, "weight is on meta, but the hidden states are on c"),
    ({"bias": 0.5}, TypeError, "bias must be a tensor, got float"),
    ({"bias": zeros(2)}, ValueError, r"bias must be \(\) or \(1,\), got \(2,\)"),
    ({"bias": zeros(1, 1)}, ValueError, r"bias .* got \(1, 1\)"),
    ({"bias": zeros(dtype=torch.int64)}, TypeError, "bias .* torch.int64"),
    ({"bias": zeros(device=META)}, ValueError, "bias is on meta"),
    ({"pairs": "thirds"}, ValueError, "pairs must be one of .*halves.* got 'thirds'"),
    ({"pairs": None}, TypeError, "pairs .* got NoneType"),
    ({"pairs": [[0, 1]]}, TypeError, "pairs .* got list"),
    ({"pairs": rows([0, 1], dtype=torch.int32)}, TypeError, "pairs must be int64, got torch.int32"),
    ({"pairs": rows([0.0, 1.0], dtype=torch.float32)}, TypeError, "pairs must be int64, got torch.float32"),
    ({"pairs": rows([0, 1, 2])}, ValueError, r"pairs must be \(P, 2\).* got \(1, 3\)"),
    ({"pairs": rows(0, 1)}, ValueError, r"pairs must be \(P, 2\).* got \(2,\)"),
    ({"pairs": zeros(P, 2, dtype=torch.int64, device=META)}, ValueError, "pairs is on meta"),
    (pooled(None), ValueError, r"hidden .*last_token.* got \(6, 4, 5\)"),
    ({"last_token": zeros(6, dtype=torch.int64)}, ValueError, r"hidden must be \(N, S, H\).* got \(6, 5\)"),
    (pooled([0] * 6), TypeError, "last_token .* got list"),
    (pooled(zeros(6)), TypeError, "last_token .* got torch.float32"),
    (pooled(zeros(6, dtype=torch.bool)), TypeError, "last_token .* got torch.bool"),
    (pooled(zeros(P, dtype=torch.int64)), ValueError, r"last_token must be \(N,\).* got \(3,\)"),
    (pooled(zeros(6, 1, dtype=torch.int64)), ValueError, r"last_token must be \(N,\).* got \(6, 1\)"),
    (pooled(zeros(6, dtype=torch.int64, device=META)), ValueError, "last_token is on meta"),
]  # fmt: skip

# Values are looked at only where that waits for nothing; on a GPU the pair's loss is NaN instead.
LINEAR_VALUES = [
    ({"pairs": rows([0, 6])}, ValueError, r"pairs must be in \[0, 6\).* from 0 to 6"),
    ({"pairs": rows([0, 1], [-1, 2])}, ValueError, r"pairs must be in \[0, 6\).* from -1 to 2"),
    (pooled(rows(0, 1, 2, 3, 4, 0)), ValueError, r"last_token must be in \[0, 4\).* from 0 to 4"),
    (pooled(rows(0, 1, 2, 3, -1, 0)), ValueError, r"last_token must be in \[0, 4\).* from -1 to 3"),
]
if DEVICE.type == "cpu":
    LINEAR += LINEAR_VALUES

REWARD = [
    ({"chosen_hidden": None}, TypeError, "chosen_hidden must be a tensor, got NoneType"),
    ({"chosen_hidden": zeros(P, H, dtype=torch.int64)}, TypeError, "chosen_hidden .* torch.int64"),
    ({"rejected_hidden": zeros(P, S, H)}, ValueError, r"rejected_hidden must be \(rows, H\).* got \(3, 4, 5\)"),
    ({"chosen_hidden": zeros(P)}, ValueError, r"chosen_hidden .* got \(3,\)"),
    ({"rejected_hidden": zeros(P, H + 1)}, ValueError, r"chosen_hidden and rejected_hidden .* \(3, 5\) and \(3, 6\)"),
    ({"rejected_hidden": zeros(P + 1, H)}, ValueError, r"chosen_hidden and rejected_hidden .* \(3, 5\) and \(4, 5\)"),
    ({"rejected_hidden": zeros(P, H, device=META)}, ValueError, "rejected_hidden is on meta"),
    ({"chosen_hidden": zeros(P, 0)}, ValueError, r"chosen_hidden .* column.* got \(3, 0\)"),
    ({"chosen_rewards": [0.0] * P}, TypeError, "chosen_rewards must be a tensor, got list"),
    ({"chosen_rewards": zeros(P, dtype=torch.int64)}, TypeError, "chosen_rewards .* torch.int64"),
    ({"rejected_rewards": zeros(P, dtype=torch.bool)}, TypeError, "rejected_rewards .* torch.bool"),
    ({"chosen_rewards": zeros(P + 1)}, ValueError, r"chosen_rewards .* P = 3 .* got \(4,\)"),
    ({"rejected_rewards": zeros(P, 2)}, ValueError, r"rejected_rewards .* got \(3, 2\)"),
    ({"rejected_rewards": zeros(1, P)}, ValueError, r"rejected_rewards .* got \(1, 3\)"),
    ({"rejected_rewards": zeros()}, ValueError, r"rejected_rewards .* got \(\)"),
    ({"chosen_rewards": zeros(P, device=META)}, ValueError, "chosen_rewards is on meta"),
]
BOTH = [
    ({"margin": 1.0}, TypeError, "margin must be a tensor, got float"),
    ({"margin": zeros(P, dtype=torch.complex64)}, TypeError, "margin must be real, got torch.complex64"),
    ({"margin": zeros(P + 1)}, ValueError, r"margin .* P = 3 .* got \(4,\)"),
    ({"margin": zeros()}, ValueError, r"margin .* got \(\)"),
    ({"margin": zeros(1)}, ValueError, r"margin .* got \(1,\)"),
    ({"margin": zeros(P, device=META)}, ValueError, "margin is on meta"),
    ({"pair_weight": [1.0] * P}, TypeError, "pair_weight must be a tensor, got list"),
    ({"pair_weight": zeros(P, P)}, ValueError, r"pair_weight .* got \(3, 3\)"),
    ({"pair_weight": zeros(P, device=META)}, ValueError, "pair_weight is on meta"),
]
TENSORS = {"linear": LINEAR + BOTH, "reward": REWARD + BOTH}

# Arguments of the functional forms and of the modules' constructors.
OPTIONS = [
    ({"reduction": "average"}, ValueError, "reduction must be one of .* got 'average'"),
    ({"reduction": None}, ValueError, "reduction .* got None"),
    ({"eps": -1e-6}, ValueError, "eps .* got -1e-06"),
    ({"eps": math.nan}, ValueError, "eps .* got nan"),
    ({"eps": math.inf}, ValueError, "eps .* got inf"),
    ({"eps": "1e-6"}, TypeError, "eps must be a number, got str"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\), got -0.1"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing .* got 1.0"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing .* got 1.5"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing .* got nan"),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
    ({"center_coef": math.inf}, ValueError, "center_coef must be finite, got inf"),
    ({"center_coef": torch.tensor(0.1)}, TypeError, "center_coef must be a number, got Tensor"),
    ({"power": -0.5}, ValueError, "power must be finite and >= 0 .* got -0.5"),
    ({"power": math.inf}, ValueError, "power .* got inf"),
    ({"power": "1"}, TypeError, "power must be a number, got str"),
    ({"max_weight": 0}, ValueError, "max_weight must be > 0 or None .* got 0"),
    ({"max_weight": -1.0}, ValueError, "max_weight .* got -1.0"),
    ({"max_weight": math.nan}, ValueError, "max_weight .* got nan"),
    ({"max_weight": "none"}, TypeError, "max_weight must be a number or None, got str"),
]
MU = [
    ({"mu": zeros(1)}, ValueError, r"mu .* got a tensor of shape \(1,\)"),
    ({"mu": zeros(P)}, ValueError, r"mu .* got a tensor of shape \(3,\)"),
    ({"mu": zeros(dtype=torch.int64)}, TypeError, "mu must be of a floating-point dtype, got torch.int64"),
    ({"mu": zeros(device=META)}, ValueError, "mu is on meta"),
    ({"mu": math.nan}, ValueError, "mu must be finite and >= 0, got nan"),
    ({"mu": math.inf}, ValueError, "mu .* got inf"),
    ({"mu": -1.0}, ValueError, "mu .* got -1.0"),
    ({"mu": "mean"}, TypeError, "mu .* got str"),
    ({"mu": True}, TypeError, "mu .* got bool"),
    ({"mu": [1.0]}, TypeError, "mu .* got list"),
]


def table(entries: dict[str, list]) -> pytest.MarkDecorator:
    """One test for each mistake of each form, called what its message says."""
    rows = [(form, *entry) for form, mistakes in entries.items() for entry in mistakes]
    names = [f"{form}: " + re.sub(r"[^\w=. -]", "", message) for form, _, _, message in rows]
    return pytest.mark.parametrize(("form", "change", "error", "message"), rows, ids=names)


@table({form: [*TENSORS[form], *OPTIONS, *MU] for form in OURS})
def test_function_names_the_argument_and_what_it_saw(form, change, error, message):
    with pytest.raises(error, match=message):
        OURS[form](**{**valid(form), "mu": 1.0, **change})


@table(TENSORS)
def test_module_names_the_argument_and_changes_nothing(form, change, error, message):
    arguments = valid(form)
    module, fresh = MODULES[form]().to(DEVICE), MODULES[form]().to(DEVICE)
    for loss in (module, fresh):
        loss(**arguments)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        module(**{**arguments, **change})
    assert_same_bits(dict(module.state_dict()), before)
    assert_same_bits(module(**arguments, return_stats=True), fresh(**arguments, return_stats=True))
    assert_same_bits(dict(module.state_dict()), dict(fresh.state_dict()))


CONSTRUCTOR = [
    *OPTIONS,
    ({"beta": True}, TypeError, "beta must be a number, got bool"),
    ({"beta": 1.0}, ValueError, "beta .* got 1.0"),
    ({"beta": -0.1}, ValueError, "beta .* got -0.1"),
    ({"beta": math.nan}, ValueError, "beta .* got nan"),
    ({"process_group": "world"}, ValueError, "process_group .* got 'world'"),
]


@table(dict.fromkeys(OURS, CONSTRUCTOR))
def test_constructor_names_the_argument_and_what_it_saw(form, change, error, message):
    with pytest.raises(error, match=message):
        MODULES[form](**change)


@pytest.mark.parametrize(
    ("change", "error", "message"), [entry for entry in LINEAR if not entry[0].keys() & {"weight", "bias"}]
)
def test_pair_distance_names_the_argument_and_what_it_saw(change, error, message):
    arguments = {name: value for name, value in valid("linear").items() if name in ("hidden", "pairs", "last_token")}
    with pytest.raises(error, match=message):
        pair_distance(**{**arguments, **change})


def test_module_on_another_device_says_so_and_changes_nothing():
    module = NormBTLoss()
    rows_elsewhere, rewards_elsewhere = zeros(P, H, device=META), zeros(P, device=META)
    with pytest.raises(ValueError, match=r"mu is on cpu, but the hidden states are on meta.*\.to\('meta'\)"):
        module(rewards_elsewhere, rewards_elsewhere, rows_elsewhere, rows_elsewhere)
    assert module.num_updates == 0


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        linear_normbt_loss(zeros(6, H), zeros(H), 1.0, zeros())
    with pytest.raises(TypeError, match="positional"):
        normbt_loss(zeros(P), zeros(P), zeros(P, H), zeros(P, H), 1.0, zeros(P))


@pytest.mark.parametrize("form", OURS)
@pytest.mark.parametrize(
    "options", [{"eps": 0}, {"label_smoothing": 0}, {"max_weight": 1}, {"power": 2}, {"mu": 0}, {"mu": 2}]
)
def test_whole_numbers_are_numbers(form, options):
    assert OURS[form](**{**valid(form), "mu": 1.0, **options}).isfinite()
