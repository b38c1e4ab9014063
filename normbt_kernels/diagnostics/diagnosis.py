"""Computes slopes, shares, and means by error and distance from measured errors, distances and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from normbt_kernels.diagnostics import report

PARTS = ("head", "backbone")
QUARTILES = (0.25, 0.5, 0.75)
FEWEST_PAIRS = 10  # to which a slope is fitted
# The slopes within quarters of the pairs by error may differ from that of all by this much beyond their intervals, on
# average over the gradient that the quarters receive. At slope 0.25 a pair twice as far apart has 1.2 times as much.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Slope:
    """Slope of log gradient norm on log distance at a fixed error, its 95% interval, and the pairs it is fitted to.

    Numbers are rounded to 4 decimals, and the ends of the interval outwards: otherwise the interval of an exact slope
    (BT's head) would be narrower than a rounding error.
    """

    slope: float
    low: float
    high: float
    num_pairs: int


def slope_at_fixed_error(log_norm: np.ndarray, log_distance: np.ndarray, log_error: np.ndarray) -> Slope | None:
    """Least squares of log(norm / error) on log distance, (P,) each; pairs that are not finite are left out.

    A gradient is exactly error times sensitivity, so the coefficient of log error is 1 and is not fitted. The interval
    is slope +- 1.96 standard errors that hold for unequal variances (HC3: MacKinnon and White, 1985). Returns None for
    fewer than 10 pairs, and if all distances, or all but one, are equal.
    """
    usable = np.isfinite(log_norm) & np.isfinite(log_distance)
    if usable.sum() < FEWEST_PAIRS or log_distance[usable].std() < 1e-6:
        return None
    y, x = (log_norm - log_error)[usable], log_distance[usable]
    design = np.column_stack([np.ones_like(x), x])
    inverse = np.linalg.pinv(design)
    coefficients = inverse @ y
    leverage = np.einsum("ij,ji->i", design, inverse)
    if leverage.max() > 1 - 1e-9:  # the line goes through one pair wherever it lies, so its error cannot be estimated
        return None
    residual = (y - design @ coefficients) / (1 - leverage)
    slope, spread = coefficients[-1], 1.96 * np.linalg.norm(inverse[-1] * residual)
    low, high = np.floor((slope - spread) * 1e4) / 1e4, np.ceil((slope + spread) * 1e4) / 1e4
    return Slope(round(float(slope), 4), float(low), float(high), int(usable.sum()))


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured on P pairs, and M of them with their backbone gradient. fp64 arrays on the host.

    Attributes:
        difference: `(P,)` r_chosen - r_rejected.
        distance: `(P,)` ||h_chosen - h_rejected||_2.
        sample: `(M,)` numbers of the pairs whose backbone gradient was measured.
        sensitivity: `(M,)` ||d difference / d backbone||_2; times the error it is the norm of BT's gradient.
        categories: of each pair, if the data have them.
        number: `(P,)` position of each pair in the input, counted from 1.
        num_left_out: pairs that were too long, or had the same tokens on both sides.
        eps, max_weight: of NormBT's weight.

    `print(diagnosis)` shows the table, `summary()` returns its content for JSON, `plot(path)` draws the figure.
    """

    difference: np.ndarray
    distance: np.ndarray
    sample: np.ndarray
    sensitivity: np.ndarray
    categories: list[str] | None
    number: np.ndarray
    num_left_out: int
    eps: float
    max_weight: float | None

    @property
    def mu(self) -> float:
        """Mean distance of all pairs."""
        return float(self.distance.mean())

    @property
    def log_error(self) -> np.ndarray:
        """log(1 - sigma(difference)), which does not underflow, `(P,)`."""
        return -np.logaddexp(0, self.difference)

    def weight(self, power: float) -> np.ndarray:
        """The weight of NormBT with this power, `(P,)`: 1 is the paper, 0 is BT."""
        with np.errstate(divide="ignore"):  # identical pairs, without eps
            weight = (self.mu / (self.distance + self.eps)) ** power
        return np.minimum(weight, np.inf if self.max_weight is None else self.max_weight)

    @property
    def powers(self) -> dict[str, float]:
        """The power of each loss that is compared: BT, NormBT, and the recommended power if there is one."""
        power = self.recommended_power
        return {"bt": 0.0, "normbt": 1.0} | ({} if power is None else {"recommended": power})

    @cached_property
    def recommended_power(self) -> float | None:
        """The slope of the backbone's gradient, to 2 decimals: this power of w removes the growth with the distance; 0
        if there is no growth, None if no single power describes the model (`disagreement`)."""
        if self.disagreement is not None:
            return None
        return max(0.0, round(self.slope("backbone", 0.0).slope, 2))

    @cached_property
    def quartile_slopes(self) -> list[Slope | None]:
        """Slopes of the backbone's gradient within each quarter of the sampled pairs by error."""
        return [self.slope("backbone", 0.0, members) for members in self._quarters_by_error]

    @property
    def _quarters_by_error(self) -> list[np.ndarray]:
        return _quarters(self.log_error[self.sample])[0]

    @cached_property
    def disagreement(self) -> str | None:
        """Why no power is recommended; None if one is."""
        slope, quartiles = self.slope("backbone", 0.0), self.quartile_slopes
        if slope is None or None in quartiles:
            return (
                f"the slope needs {FEWEST_PAIRS} gradients at different distances in each quarter of the pairs by "
                f"prediction error, of {len(self.sample)} in all"
            )
        masks = [np.isin(np.arange(len(self.distance)), self.sample[members]) for members in self._quarters_by_error]
        shares = self.shares("backbone", 0.0, masks)
        apart = [max(of.low - slope.slope, slope.slope - of.high, 0.0) for of in quartiles]
        if np.dot(shares, apart) <= TOLERANCE:
            return None
        return "the slopes within quarters of the pairs by prediction error are " + ", ".join(
            f"{of.slope:.2f}" for of in quartiles
        )

    @property
    def correlation(self) -> float | None:
        """Correlation of log error and log distance over the sampled pairs; None if one of them does not vary."""
        pairs = self.sample[self.distance[self.sample] > 0]
        error, distance = self.log_error[pairs], np.log(self.distance[pairs])
        if len(pairs) < 2 or min(error.std(), distance.std()) < 1e-6:
            return None
        return float(np.corrcoef(error, distance)[0, 1])

    def members(self, part: str) -> np.ndarray:
        """Numbers of the pairs whose gradient is known for `part`: "head" or "backbone"."""
        return np.arange(len(self.distance)) if part == "head" else self.sample

    def log_gradient(self, part: str, power: float) -> np.ndarray:
        """Log norm of each member's gradient with respect to `part`, under NormBT with this power (0: BT)."""
        pairs = self.members(part)
        with np.errstate(divide="ignore"):  # a pair of distance 0 gives the head no gradient
            of_difference = np.log(self.distance if part == "head" else self.sensitivity)
        return self.log_error[pairs] + of_difference + np.log(self.weight(power)[pairs])

    def slope(self, part: str, power: float, among: Any = slice(None)) -> Slope | None:
        """How the gradient of `part` grows with the distance at a fixed error, of all members or those `among` them."""
        pairs = self.members(part)
        with np.errstate(divide="ignore"):
            log_distance = np.log(self.distance[pairs])
        values = self.log_gradient(part, power), log_distance, self.log_error[pairs]
        return slope_at_fixed_error(*(value[among] for value in values))

    def shares(self, part: str, power: float, groups: Sequence[np.ndarray]) -> list[float]:
        """The share of the sum of all members' gradient norms that each group of pairs, a `(P,)` mask, receives."""
        log_norms = self.log_gradient(part, power)
        norms = np.exp(log_norms - log_norms.max())  # without the max, a model sure of all pairs gives 0 / 0
        return [float(norms[group[self.members(part)]].sum() / norms.sum()) for group in groups]

    def mean(self, part: str, power: float, group: np.ndarray) -> float | None:
        """Mean gradient norm of the members in `group`, a `(P,)` mask; None if there are none."""
        norms = np.exp(self.log_gradient(part, power))[group[self.members(part)]]
        return float(norms.mean()) if len(norms) else None

    def summary(self) -> dict[str, Any]:
        """Everything that is reported, in plain JSON types."""
        error = np.exp(self.log_error)
        by_error, error_edges = _quarters(error)
        by_distance, distance_edges = _quarters(self.distance)
        share = self._each(lambda part, power: self.shares(part, power, by_distance))
        summary = {
            "num_pairs": len(self.distance),
            "num_left_out": self.num_left_out,
            "num_gradients": len(self.sample),
            "accuracy": float((self.difference > 0).mean()),
            "mean_distance": self.mu,
            "eps": self.eps,
            "max_weight": self.max_weight,
            "powers": self.powers,
            "slopes": self._each(lambda part, power: _as_dict(self.slope(part, power))),
            "slopes_are": "least squares of log(gradient norm / error) on log distance, 95% interval by HC3",
            "slopes_by_error_quartile": [_as_dict(slope) for slope in self.quartile_slopes],
            "correlation_of_log_error_and_log_distance": self.correlation,
            "recommended_power": self.recommended_power,
            "no_power_because": self.disagreement,
            "distance_quartiles": {"edges": distance_edges, "share_of_gradient": share},
            "bins": {
                "error_edges": error_edges,
                "distance_edges": distance_edges,
                "cells": [
                    self._group(rows & columns, {"error_quartile": i + 1, "distance_quartile": j + 1})
                    for i, rows in enumerate(by_error)
                    for j, columns in enumerate(by_distance)
                ],
            },
            "categories": [self._category(name) for name in sorted(set(self.categories or []))],
            "sample": {
                "pair": self.number[self.sample].tolist(),
                "error": error[self.sample].tolist(),
                "distance": self.distance[self.sample].tolist(),
                "backbone_gradient": {
                    loss: np.exp(self.log_gradient("backbone", power)).tolist() for loss, power in self.powers.items()
                },
            },
        }
        return summary | {"sentence": report.sentence(summary)}

    def _group(self, group: np.ndarray, name: dict[str, Any]) -> dict[str, Any]:
        """The figures of one cell or category; `group` is a `(P,)` mask."""
        some = group.any()  # a cell may be empty
        return name | {
            "num_pairs": int(group.sum()),
            "num_gradients": int(group[self.sample].sum()),
            "accuracy": float((self.difference[group] > 0).mean()) if some else None,
            "mean_error": float(np.exp(self.log_error[group]).mean()) if some else None,
            "mean_distance": float(self.distance[group].mean()) if some else None,
            "mean_gradient": self._each(lambda part, power: self.mean(part, power, group)),
            "share_of_gradient": self._each(lambda part, power: self.shares(part, power, [group])[0]),
        }

    def _category(self, name: str) -> dict[str, Any]:
        return self._group(np.array([category == name for category in self.categories]), {"name": name})

    def _each(self, measure: Callable[[str, float], Any]) -> dict[str, dict[str, Any]]:
        return {part: {loss: measure(part, power) for loss, power in self.powers.items()} for part in PARTS}

    def __str__(self) -> str:
        return report.table(self.summary())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws gradient norm against distance, coloured by error, a panel per loss, as a PNG. Needs matplotlib."""
        report.draw(self.summary(), path)


def _quarters(values: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """The four quarters of `values` by size as masks, and the three values between them; ties fall into the lower."""
    edges = np.quantile(values, QUARTILES)
    quarter = np.searchsorted(edges, values, side="left")
    return [quarter == i for i in range(4)], edges.tolist()


def _as_dict(slope: Slope | None) -> dict[str, float] | None:
    return None if slope is None else dict(vars(slope))
