"""Shows what `diagnose` found: a table on the terminal, a plain sentence, and a figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normbt_kernels.results import aligned

QUARTERS = ("closest", "2nd", "3rd", "farthest")
ERRORS = ("least error", "2nd quarter by error", "3rd quarter by error", "largest error")


def labels(summary: Mapping[str, Any]) -> dict[str, str]:
    """The name of each loss."""
    known = {"bt": "BT", "normbt": "NormBT"}
    return {loss: known.get(loss, f"power {power:g}") for loss, power in summary["powers"].items()}


def sentence(summary: Mapping[str, Any]) -> str:
    """One sentence about what NormBT would change, and one about the power to train with."""
    shares = summary["distance_quartiles"]["share_of_gradient"]["backbone"]
    (near, *_, far), (near_after, *_, far_after) = shares["bt"], shares["normbt"]
    shift = (
        f"the closest quarter of these pairs would receive {near_after:.0%} of the backbone's gradient in place of "
        f"{near:.0%}, and the farthest {far_after:.0%} in place of {far:.0%}."
    )
    power, slopes = summary["recommended_power"], summary["slopes"]["backbone"]
    if power is None:
        return f"Under NormBT {shift} No single power is recommended: {summary['no_power_because']}."
    bt, normbt = (2 ** slopes[loss]["slope"] for loss in ("bt", "normbt"))
    return (
        f"At the same prediction error a pair twice as far apart has {bt:.2f} times the gradient under BT, and "
        f"{normbt:.2f} times under NormBT, where {shift} With --power {power:g} (power={power:g} in Python) the "
        f"backbone's gradient does not depend on the distance: slope {_interval(slopes['recommended'])}."
    )


def _interval(slope: Mapping[str, float] | None) -> str:
    return "-" if slope is None else f"{slope['slope']:.3f} [{slope['low']:.3f}, {slope['high']:.3f}]"


# --- table -------------------------------------------------------------------------------------------------------


def table(summary: Mapping[str, Any]) -> str:
    """Slopes, shares by distance, means by error and distance, and categories, as text."""
    left_out = f", {summary['num_left_out']} too long or identical left out" if summary["num_left_out"] else ""
    lines = [
        f"{summary['num_pairs']} pairs{left_out}; backbone gradients of {summary['num_gradients']} of them",
        f"accuracy {summary['accuracy']:.3f}, mean distance (mu) {summary['mean_distance']:.4g}",
        "",
        *_slopes(summary),
        "",
        *_shares(summary),
        "",
        *_decomposition(summary),
    ]
    if summary["categories"]:
        lines += ["", *_categories(summary)]
    return "\n".join([*lines, "", summary["sentence"]])


def _slopes(summary: Mapping[str, Any]) -> list[str]:
    rows = [["slope of log gradient norm on log distance", *labels(summary).values()]]
    rows += [[f"  {part}", *map(_interval, slopes.values())] for part, slopes in summary["slopes"].items()]
    by_error = zip(ERRORS, summary["slopes_by_error_quartile"], strict=True)
    rows += [[f"  backbone, {name}", _interval(slope)] for name, slope in by_error]
    correlation = summary["correlation_of_log_error_and_log_distance"]
    return [
        *aligned(rows),
        "  at a fixed prediction error, with its 95% interval; 1: proportional to the distance, 0: unrelated",
        f"  log error and log distance correlate at {'-' if correlation is None else f'{correlation:.3f}'}",
    ]


def _shares(summary: Mapping[str, Any]) -> list[str]:
    rows = [["share of the gradient, by distance", *QUARTERS]]
    rows.append(["", *_bounds(summary["distance_quartiles"]["edges"])])
    for part, shares in summary["distance_quartiles"]["share_of_gradient"].items():
        for loss, label in labels(summary).items():
            rows.append([f"  {part}, {label}", *(f"{share:.1%}" for share in shares[loss])])
    return aligned(rows)


def _bounds(edges: Sequence[float]) -> list[str]:
    return [*(f"to {edge:.3g}" for edge in edges), f"over {edges[-1]:.3g}"]


def _decomposition(summary: Mapping[str, Any]) -> list[str]:
    """Mean gradient norms: error downwards, distance to the right, BT beside NormBT."""
    cells = summary["bins"]["cells"]
    rows = [["mean gradient norm, by distance", "BT:", "", "", "", "NormBT:", "", "", ""]]
    for part in summary["slopes"]:
        rows.append([f"{part}, by error", *QUARTERS, *QUARTERS])
        for quartile, bound in enumerate(_bounds(summary["bins"]["error_edges"]), start=1):
            means = [cell["mean_gradient"][part] for cell in cells if cell["error_quartile"] == quartile]
            rows.append([f"  {bound}", *(_number(mean[loss]) for loss in ("bt", "normbt") for mean in means)])
    return aligned(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _categories(summary: Mapping[str, Any]) -> list[str]:
    names = list(labels(summary).values())
    space = [""] * (len(names) - 1)
    rows = [["share of the gradient", "", "", "", "", "head:", *space, "backbone:", *space]]
    rows.append(["category", "pairs", "accuracy", "error", "distance", *names, *names])
    for category in summary["categories"]:
        shares = (share for of_part in category["share_of_gradient"].values() for share in of_part.values())
        rows.append([
            category["name"], str(category["num_pairs"]), f"{category['accuracy']:.3f}",
            f"{category['mean_error']:.3f}", f"{category['mean_distance']:.3g}", *(f"{share:.1%}" for share in shares),
        ])  # fmt: skip
    return aligned(rows)


# --- figure ------------------------------------------------------------------------------------------------------


def draw(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws the backbone's gradient norm against distance: one panel per loss, one point per pair, coloured by error.

    Each line has the slope that was fitted to one quarter of the pairs by error. It spans these pairs only, in the
    colour of their median error.
    """
    from matplotlib.figure import Figure

    sample = summary["sample"]
    shown = np.array(sample["backbone_gradient"]["bt"]) > 0  # a logarithmic axis has no place for 0
    distance, error = np.array(sample["distance"])[shown], np.array(sample["error"])[shown]
    quarter = np.searchsorted(np.quantile(error, [0.25, 0.5, 0.75]), error)
    names = labels(summary)
    figure = Figure(figsize=(5 * len(names), 4.4), layout="constrained")
    axes = figure.subplots(1, len(names), sharex=True, sharey=True)
    for axis, (loss, label) in zip(axes, names.items(), strict=True):
        gradient = np.array(sample["backbone_gradient"][loss])[shown]
        points = axis.scatter(distance, gradient, c=error, s=14, cmap="viridis", vmin=0, vmax=1)
        for number, of_bt in enumerate(summary["slopes_by_error_quartile"]):
            members = quarter == number
            if of_bt is None or not members.any():
                continue
            slope, middle = of_bt["slope"] - summary["powers"][loss], np.median(error[members])
            ends = np.array([distance[members].min(), distance[members].max()])
            level = np.median(gradient[members] / (error[members] * distance[members] ** slope))
            axis.plot(ends, level * middle * ends**slope, color=points.to_rgba(middle), linewidth=1.5, zorder=0)
        slope = summary["slopes"]["backbone"][loss]
        title = (
            label if slope is None else f"{label}: slope {slope['slope']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"
        )
        axis.set(xscale="log", yscale="log", xlabel="distance $||h_{chosen} - h_{rejected}||$", title=title)
        axis.title.set_fontsize(11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("gradient norm of the backbone")
    figure.colorbar(points, ax=axes, label="prediction error $1 - \\sigma(r_{chosen} - r_{rejected})$")
    figure.savefig(path, dpi=150, format="png")
