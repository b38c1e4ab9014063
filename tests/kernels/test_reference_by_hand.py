"""The judge, judged: the reference against numbers worked out by hand for one example of two pairs.

pair 0: h_c = (3, 4)   h_r = (0, 0)    delta = (3, 4)     rho = 5
pair 1: h_c = (1, 1)   h_r = (6, 13)   delta = (-5, -12)  rho = 13
v = (0.5, 0.25)  bias = 1:   r_c = (3.5, 1.75)   r_r = (1, 7.25)   d = (2.5, -5.5)   r_c + r_r = (4.5, 9)
margin = (1.5, -4.5):        z = (1, -1)
eps = 0 and mu = 65:         w = (13, 5)          mu of the batch: (5 + 13) / 2 = 9, w = (9/5, 9/13)
softplus(-1) = log(1 + e^-1) = 0.3132616875182228     softplus(1) = 1 + softplus(-1) = 1.3132616875182228
sigma(-1) = 0.2689414213699951                        sigma(1) = 0.7310585786300049
"""

import pytest
import torch

from reference import normbt as reference

HIDDEN = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [6.0, 13.0]], dtype=torch.float64)
HEAD = torch.tensor([0.5, 0.25], dtype=torch.float64)
BIAS = torch.tensor(1.0, dtype=torch.float64)
MARGIN = torch.tensor([1.5, -4.5], dtype=torch.float64)
A, B = 0.3132616875182228, 1.3132616875182228  # -log sigma(1), -log sigma(-1)

EXPECTED = {
    # name: (options, the two pairs' losses)
    "weights only": ({}, (13 * A, 5 * B)),
    "no margin": ({"margin": None}, (13 * 0.07888973429254963, 5 * 5.504078443270571)),  # softplus(-2.5), softplus(5.5)
    "pair_weight": ({"pair_weight": torch.tensor([2.0, 0.5])}, (26 * A, 2.5 * B)),
    # z = 1: 0.9 A + 0.1 B; z = -1: 0.9 B + 0.1 A
    "label_smoothing": ({"label_smoothing": 0.1}, (13 * (0.9 * A + 0.1 * B), 5 * (0.9 * B + 0.1 * A))),
    # 4.5^2 = 20.25 and 9^2 = 81, weighted by nothing
    "center_coef": ({"center_coef": 0.01}, (13 * A + 0.2025, 5 * B + 0.81)),
    "center_coef and pair_weight": (
        {"center_coef": 0.01, "pair_weight": torch.tensor([2.0, 0.5])},
        (26 * A + 0.2025, 2.5 * B + 0.81),
    ),
    "eps": ({"eps": 1.5}, (10 * A, 65 / 14.5 * B)),
    "cap on the first": ({"max_weight": 7.0}, (7 * A, 5 * B)),
    "no cap": ({"mu": 6500.0, "max_weight": None}, (1300 * A, 500 * B)),
    "default cap": ({"mu": 6500.0}, (100 * A, 100 * B)),
    "mu of the batch": ({"mu": None}, (1.8 * A, 9 / 13 * B)),
    "mu tensor": ({"mu": torch.tensor(65.0)}, (13 * A, 5 * B)),
}


def options_of(options):
    return {"mu": 65.0, "margin": MARGIN, "eps": 0.0, **options}


@pytest.mark.parametrize(("options", "losses"), EXPECTED.values(), ids=EXPECTED)
def test_losses_by_hand(options, losses):
    for reduction, expected in (("none", losses), ("sum", sum(losses)), ("mean", sum(losses) / 2)):
        seen = reference.linear_normbt_loss(HIDDEN, HEAD, bias=BIAS, **options_of(options), reduction=reduction)
        torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("options", [options for options, _ in EXPECTED.values()], ids=EXPECTED)
def test_both_forms_and_all_layouts_are_one_loss(options):
    options = options_of(options)
    expected = reference.linear_normbt_loss(HIDDEN, HEAD, bias=BIAS, **options)
    rewards = HIDDEN @ HEAD + BIAS
    sequences = torch.full((4, 3, 2), 7.0, dtype=torch.float64)
    sequences[range(4), [1, 0, 2, 1]] = HIDDEN
    same = [
        reference.normbt_loss(rewards[:2], rewards[2:, None], HIDDEN[:2], HIDDEN[2:], **options),
        reference.linear_normbt_loss(HIDDEN[[0, 2, 1, 3]], HEAD[None], bias=BIAS[None], pairs="interleaved", **options),
        reference.linear_normbt_loss(HIDDEN, HEAD, bias=BIAS, pairs=torch.tensor([[0, 2], [1, 3]]), **options),
        reference.linear_normbt_loss(sequences, HEAD, bias=BIAS, last_token=torch.tensor([1, 0, 2, 1]), **options),
    ]
    for seen in same:
        torch.testing.assert_close(seen, expected, rtol=1e-14, atol=0)


def test_gradients_by_hand():
    """g = w (sigma(z) - 1) / 2 = (-13 sigma(-1) / 2, -5 sigma(1) / 2); k = 2 * 0.01 * (4.5, 9) / 2 = (0.045, 0.09)."""
    g = torch.tensor([-13 * 0.2689414213699951 / 2, -5 * 0.7310585786300049 / 2], dtype=torch.float64)
    k = torch.tensor([0.045, 0.09], dtype=torch.float64)
    hidden, head, bias = (x.clone().requires_grad_() for x in (HIDDEN, HEAD, BIAS))
    reference.linear_normbt_loss(hidden, head, bias=bias, **options_of({"center_coef": 0.01})).backward()
    bounds = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(hidden.grad, torch.cat([g + k, k - g])[:, None] * HEAD, **bounds)
    # grad v = sum_p g delta + k (h_c + h_r), with h_c + h_r = (3, 4) and (7, 14)
    expected = (
        g @ torch.tensor([[3.0, 4.0], [-5.0, -12.0]]).double() + k @ torch.tensor([[3.0, 4.0], [7.0, 14.0]]).double()
    )
    torch.testing.assert_close(head.grad, expected, **bounds)
    torch.testing.assert_close(bias.grad, torch.tensor(2 * (0.045 + 0.09)).double(), rtol=1e-6, atol=0)


def test_distances_and_weights_by_hand():
    rho = reference.pair_distance(HIDDEN)
    assert rho.tolist() == [5.0, 13.0]
    assert reference.normbt_weight(rho, 65.0, 0.0).tolist() == [13.0, 5.0]
    assert reference.normbt_weight(rho, None, 0.0, None).tolist() == [1.8, 9 / 13]
    # identical pairs: the cap, or the paper's mu / eps
    zero = torch.zeros(1, dtype=torch.float64)
    assert reference.normbt_weight(zero, 2.0, 0.5, 3.0).item() == 3.0
    assert reference.normbt_weight(zero, 2.0, 0.5, None).item() == 4.0


def test_ema_by_hand():
    ema = reference.DistanceEMA(beta=0.9)
    assert ema.weight_mean(torch.tensor([2.0, 4.0])).item() == 3.0
    ema.update(torch.tensor([2.0, 4.0]))
    assert ema.mu.item() == 3.0
    ema.update(torch.tensor([13.0]))  # 0.9 * 3 + 0.1 * 13 = 4
    torch.testing.assert_close(ema.mu, torch.tensor(4.0))
    ema.update(torch.tensor([float("inf")]))
    torch.testing.assert_close(ema.weight_mean(torch.tensor([1.0])), torch.tensor(4.0))
