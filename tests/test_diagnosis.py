"""A diagnosis: slopes against known ones, shares by hand, and the power that it recommends."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")

from normbt_kernels.diagnostics import Diagnosis
from normbt_kernels.diagnostics.diagnosis import slope_at_fixed_error

# --- slopes and shares ---------------------------------------------------------------------------------------------


def synthetic(num_pairs, seed, slope, noise=0.3):
    """Confounded as in real models: far pairs are the confident ones. Noise grows with distance."""
    rng = np.random.default_rng(seed)
    log_distance = rng.normal(size=num_pairs)
    log_error = -1 - 0.8 * log_distance + rng.normal(size=num_pairs)
    spread = noise * (0.5 + np.abs(log_distance))
    return slope * log_distance + log_error + spread * rng.normal(size=num_pairs), log_distance, log_error


def test_interval_covers_the_true_slope_as_often_as_it_says():
    slopes = [slope_at_fixed_error(*synthetic(256, seed, 0.7)) for seed in range(400)]
    assert np.mean([slope.slope for slope in slopes]) == pytest.approx(0.7, abs=0.01)
    assert 0.92 < np.mean([slope.low <= 0.7 <= slope.high for slope in slopes]) < 0.98


def test_interval_is_that_of_hc3():
    """HC3 takes each pair's residual from the fit without that pair; here they are fitted anew, one by one."""
    log_norm, x, error = synthetic(25, 3, 0.4)
    y, design = log_norm - error, np.column_stack([x, np.ones(25)])
    left_out = []
    for i in range(25):
        others = np.arange(25) != i
        left_out.append(y[i] - design[i] @ np.linalg.lstsq(design[others], y[others], rcond=None)[0])
    bread = np.linalg.inv(design.T @ design)
    covariance = bread @ design.T @ np.diag(np.square(left_out)) @ design @ bread
    expected = 1.96 * np.sqrt(covariance[0, 0])
    slope = slope_at_fixed_error(log_norm, x, error)
    assert slope.slope == pytest.approx((bread @ design.T @ y)[0], abs=6e-5)
    assert slope.high - slope.low == pytest.approx(2 * expected, abs=3e-4)


def test_no_slope_without_the_pairs_for_it():
    y, x, error = synthetic(40, 0, 1.0)
    assert slope_at_fixed_error(y[:9], x[:9], error[:9]) is None
    assert slope_at_fixed_error(y, np.zeros(40), error) is None
    assert slope_at_fixed_error(y, np.eye(40)[7], error) is None  # one pair is all there is to tell
    assert slope_at_fixed_error(y, x, np.full(40, np.log(0.5))).num_pairs == 40  # an untrained model
    y[3], x[3] = -np.inf, -np.inf  # a pair with distance 0
    assert slope_at_fixed_error(y, x, error).num_pairs == 39


def make_diagnosis(**changes):
    fields = {
        "difference": np.zeros(8),
        "distance": np.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 12.0, 14.0]),
        "sample": np.array([0, 2, 4, 6]),
        "sensitivity": np.array([1.0, 2.0, 3.0, 4.0]),
        "categories": ["near", "near", "near", "near", "far", "far", "far", "far"],
        "number": np.arange(1, 9),
        "num_left_out": 0,
        "eps": 0.0,
        "max_weight": None,
    }
    return Diagnosis(**fields | changes)


def test_shares_means_and_categories_by_hand():
    summary = make_diagnosis().summary()  # mu = 5, the mean of all pairs and not of the sample; every error 1/2
    assert summary["mean_distance"] == 5
    share = summary["distance_quartiles"]["share_of_gradient"]
    assert share["head"]["bt"] == pytest.approx([1 / 20, 2 / 20, 4 / 20, 13 / 20])
    assert share["head"]["normbt"] == pytest.approx([0.25] * 4)
    assert share["backbone"]["bt"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    normbt = np.array([5, 5, 15 / 4, 20 / 12])
    assert share["backbone"]["normbt"] == pytest.approx(normbt / normbt.sum())
    far, near = summary["categories"]
    assert (far["name"], far["num_pairs"], far["num_gradients"], far["mean_distance"]) == ("far", 4, 2, 8.5)
    assert near["share_of_gradient"]["head"]["bt"] == pytest.approx(3 / 20)
    assert near["share_of_gradient"]["backbone"]["bt"] == pytest.approx(0.3)
    cells = {(cell["error_quartile"], cell["distance_quartile"]): cell for cell in summary["bins"]["cells"]}
    assert len(cells) == 16
    assert cells[1, 4]["mean_gradient"]["head"] == pytest.approx({"bt": 6.5, "normbt": 2.5})
    assert cells[1, 4]["mean_gradient"]["backbone"] == pytest.approx({"bt": 2.0, "normbt": 10 / 12})
    assert cells[2, 4]["mean_gradient"]["head"] == {"bt": None, "normbt": None}
    assert summary["sentence"] == (
        "Under NormBT the closest quarter of these pairs would receive 32% of the backbone's gradient in place of 10%, "
        "and the farthest 11% in place of 40%. No single power is recommended: the slope needs 10 gradients at "
        "different distances in each quarter of the pairs by prediction error, of 4 in all."
    )


def test_max_weight_caps_the_weight():
    assert make_diagnosis(max_weight=3.0).weight(1).tolist() == pytest.approx(
        [3, 3, 2.5, 2.5, 1.25, 1.25, 5 / 12, 5 / 14]
    )


def test_pairs_without_a_distance_count_in_shares_and_not_in_slopes():
    numbers = np.arange(21)
    fields = {"difference": np.zeros(21), "distance": numbers.astype(float), "sample": numbers, "number": numbers + 1}
    found = make_diagnosis(**fields, sensitivity=np.ones(21), categories=None, eps=1e-6, max_weight=100.0)
    assert found.slope("head", 0).num_pairs == 20
    json.dumps(found.summary(), allow_nan=False)


# --- the recommended power -----------------------------------------------------------------------------------------


def confounded_diagnosis(slopes, num_pairs=400, seed=0):
    """Far pairs are the confident ones, and the sensitivity grows by `slopes` in the four quarters by error."""
    rng = np.random.default_rng(seed)
    log_distance = rng.normal(scale=0.5, size=num_pairs)
    difference = 3 * log_distance + rng.normal(scale=0.3, size=num_pairs)
    quarter = np.searchsorted(np.quantile(-difference, [0.25, 0.5, 0.75]), -difference)
    log_sensitivity = np.array(slopes)[quarter] * log_distance + rng.normal(scale=0.05, size=num_pairs)
    return make_diagnosis(
        difference=difference,
        distance=np.exp(log_distance),
        sample=np.arange(num_pairs),
        sensitivity=np.exp(log_sensitivity),
        categories=None,
        number=np.arange(1, num_pairs + 1),
    )


def test_the_recommended_power_leaves_the_gradient_unrelated_to_the_distance():
    found = confounded_diagnosis([0.6] * 4)
    summary = found.summary()
    assert summary["recommended_power"] == pytest.approx(0.6, abs=0.03)
    assert summary["no_power_because"] is None
    recommended = summary["slopes"]["backbone"]["recommended"]
    assert recommended["low"] <= 0 <= recommended["high"]
    assert abs(np.polyfit(np.log(found.distance), np.log(found.sensitivity * found.weight(0.6)), 1)[0]) < 0.03
    assert f"With --power {summary['recommended_power']:g} " in summary["sentence"]
    assert summary["correlation_of_log_error_and_log_distance"] < -0.9  # and yet: the error's coefficient is known
    shares = summary["distance_quartiles"]["share_of_gradient"]["backbone"]
    assert shares["bt"][0] < shares["recommended"][0] < shares["normbt"][0]
    assert f"power {summary['recommended_power']:g}" in str(found)


def test_no_power_is_recommended_where_the_quarters_by_error_disagree():
    found = confounded_diagnosis([-4.6, -0.6, 0.6, 2.7])
    summary = found.summary()
    assert summary["recommended_power"] is None
    assert summary["powers"] == {"bt": 0.0, "normbt": 1.0}
    slopes = [slope["slope"] for slope in summary["slopes_by_error_quartile"]]
    assert slopes == pytest.approx([-4.6, -0.6, 0.6, 2.7], abs=0.2)
    assert "No single power is recommended: the slopes within quarters of the pairs" in summary["sentence"]
    assert all(f"{slope:.2f}" in summary["sentence"] for slope in slopes)
    assert "twice as far apart" not in summary["sentence"]
    assert "--power" not in str(found)


def test_a_gradient_that_shrinks_with_the_distance_wants_plain_bt():
    assert confounded_diagnosis([-0.5] * 4).recommended_power == 0


def test_few_gradients_recommend_nothing():
    summary = confounded_diagnosis([0.6] * 4, num_pairs=36).summary()
    assert summary["recommended_power"] is None
    assert "needs 10 gradients" in summary["no_power_because"]


@pytest.mark.slow
def test_lines_run_over_their_own_points(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, **style: lines.append((x, y)) or plot(axis, x, y, **style))
    found = confounded_diagnosis([0.6] * 4)
    found.plot(tmp_path / "figure.png")
    error = found.log_error
    quarter = np.searchsorted(np.quantile(error, [0.25, 0.5, 0.75]), error)
    ends = [(found.distance[quarter == i].min(), found.distance[quarter == i].max()) for i in range(4)]
    assert [tuple(x) for x, _ in lines] == ends * 3  # BT, NormBT and the recommended power
