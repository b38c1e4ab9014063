"""What `diagnose` found, as a table on the terminal, one plain sentence, and a figure."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

QUARTERS = ("closest", "2nd", "3rd", "farthest")
ERRORS = ("least error", "2nd quarter by error", "3rd quarter by error", "largest error")


def labels(summary: Mapping[str, Any]) -> dict[str, str]:
    """The losses that are compared, as the reader knows them."""
    known = {"bt": "BT", "normbt": "NormBT"}
    return {loss: known.get(loss, f"power {power:g}") for loss, power in summary["powers"].items()}


def sentence(summary: Mapping[str, Any]) -> str:
    """What NormBT would change, in one sentence, and which power to train with, in another."""
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
    """Slopes, shares by distance, the decomposition, and categories, as text."""
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
    names = labels(summary).values()
    lines = [f"{'slope of log gradient norm on log distance':44}" + "".join(f"{name:>24}" for name in names)]
    for part, slopes in summary["slopes"].items():
        lines.append(f"  {part:42}" + "".join(f"{_interval(slope):>24}" for slope in slopes.values()))
    for name, slope in zip(ERRORS, summary["slopes_by_error_quartile"], strict=True):
        lines.append(f"  {'backbone, ' + name:42}{_interval(slope):>24}")
    correlation = summary["correlation_of_log_error_and_log_distance"]
    return [
        *lines,
        "  at a fixed prediction error, with its 95% interval; 1: proportional to the distance, 0: unrelated",
        f"  log error and log distance correlate at {'-' if correlation is None else f'{correlation:.3f}'}",
    ]


def _shares(summary: Mapping[str, Any]) -> list[str]:
    edges = summary["distance_quartiles"]["edges"]
    lines = [f"{'share of the gradient, by distance':44}" + "".join(f"{name:>12}" for name in QUARTERS)]
    bounds = [*(f"to {edge:.3g}" for edge in edges), f"over {edges[-1]:.3g}"]
    lines.append(f"{'':44}" + "".join(f"{bound:>12}" for bound in bounds))
    for part, shares in summary["distance_quartiles"]["share_of_gradient"].items():
        for loss, label in labels(summary).items():
            lines.append(f"  {part:10}{label:32}" + "".join(f"{share:12.1%}" for share in shares[loss]))
    return lines


def _decomposition(summary: Mapping[str, Any]) -> list[str]:
    """Mean gradient norms: error downwards, distance to the right, BT beside NormBT."""
    compared = ("bt", "normbt")
    edges = summary["bins"]["error_edges"]
    bounds = [*(f"to {edge:.3g}" for edge in edges), f"over {edges[-1]:.3g}"]
    lines = [f"{'mean gradient norm':22}{'BT, by distance':^36}  {'NormBT, by distance':^36}"]
    for part in summary["slopes"]:
        lines.append(
            f"{part + ', by error':22}" + "  ".join("".join(f"{name:>9}" for name in QUARTERS) for _ in compared)
        )
        for i, bound in enumerate(bounds):
            cells = [
                cell["mean_gradient"][part] for cell in summary["bins"]["cells"] if cell["error_quartile"] == i + 1
            ]
            blocks = ("".join(_number(cell[loss]) for cell in cells) for loss in compared)
            lines.append(f"  {bound:20}" + "  ".join(blocks))
    return lines


def _number(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.2g}"


def _categories(summary: Mapping[str, Any]) -> list[str]:
    width = max(len(category["name"]) for category in summary["categories"]) + 2
    names = labels(summary).values()
    lines = [
        f"{'':{width + 33}}{'share of head gradient':>{12 * len(names)}}{'of backbone gradient':>{12 * len(names)}}",
        f"{'category':{width}}{'pairs':>7}{'accuracy':>9}{'error':>7}{'distance':>10}"
        + "".join(f"{name:>12}" for name in names) * 2,
    ]
    for category in summary["categories"]:
        lines.append(
            f"{category['name']:{width}}{category['num_pairs']:7}{category['accuracy']:9.3f}"
            f"{category['mean_error']:7.3f}{category['mean_distance']:10.3g}"
            + "".join(f"{share:12.1%}" for of in category["share_of_gradient"].values() for share in of.values())
        )
    return lines


# --- figure ------------------------------------------------------------------------------------------------------


def can_draw() -> bool:
    """Whether matplotlib is installed; says so if not."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: it needs matplotlib (pip install 'normbt-kernels[plot]')")
        return False
    return True


def draw(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """The backbone's gradient norm against distance, one point per pair, coloured by error: a panel for each loss.

    A line has the slope fitted to one quarter of the pairs by error, and runs over these pairs alone, in the colour of
    their median error.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sample = summary["sample"]
    shown = np.array(sample["backbone_gradient"]["bt"]) > 0  # the others have no place on a logarithmic axis
    distance, error = np.array(sample["distance"])[shown], np.array(sample["error"])[shown]
    quarter = np.searchsorted(np.quantile(error, [0.25, 0.5, 0.75]), error)
    names = labels(summary)
    figure = Figure(figsize=(5 * len(names), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
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
