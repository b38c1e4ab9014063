"""What `diagnose` found, as a table on the terminal, one plain sentence, and a figure."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

LABELS = {"bt": "BT", "normbt": "NormBT"}
QUARTERS = ("closest", "2nd", "3rd", "farthest")


def sentence(summary: Mapping[str, Any]) -> str:
    """What NormBT would change, in one sentence."""
    shares = summary["distance_quartiles"]["share_of_gradient"]["backbone"]
    (near, *_, far), (near_after, *_, far_after) = shares["bt"], shares["normbt"]
    shift = (
        f"the closest quarter of these pairs would receive {near_after:.0%} of the backbone's gradient in place of "
        f"{near:.0%}, and the farthest {far_after:.0%} in place of {far:.0%}."
    )
    slopes = summary["slopes"]["backbone"]
    if slopes["bt"] is None:
        return f"Under NormBT {shift}"
    bt, normbt = (2 ** slopes[loss]["slope"] for loss in LABELS)
    return (
        f"At the same prediction error a pair twice as far apart has {bt:.2f} times the gradient under BT, and "
        f"{normbt:.2f} times under NormBT, where {shift}"
    )


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
    def text(slope: Mapping[str, float] | None) -> str:
        return "-" if slope is None else f"{slope['slope']:.3f} [{slope['low']:.3f}, {slope['high']:.3f}]"

    lines = [f"{'slope of log gradient norm on log distance':44}{'BT':>24}{'NormBT':>24}"]
    for part, slopes in summary["slopes"].items():
        lines.append(f"  {part:42}{text(slopes['bt']):>24}{text(slopes['normbt']):>24}")
    return [
        *lines,
        "  at a fixed prediction error, with its 95% interval; 1: proportional to the distance, 0: unrelated",
    ]


def _shares(summary: Mapping[str, Any]) -> list[str]:
    edges = summary["distance_quartiles"]["edges"]
    lines = [f"{'share of the gradient, by distance':44}" + "".join(f"{name:>12}" for name in QUARTERS)]
    bounds = [*(f"to {edge:.3g}" for edge in edges), f"over {edges[-1]:.3g}"]
    lines.append(f"{'':44}" + "".join(f"{bound:>12}" for bound in bounds))
    for part, shares in summary["distance_quartiles"]["share_of_gradient"].items():
        for loss, label in LABELS.items():
            lines.append(f"  {part:10}{label:32}" + "".join(f"{share:12.1%}" for share in shares[loss]))
    return lines


def _decomposition(summary: Mapping[str, Any]) -> list[str]:
    """Mean gradient norms: error downwards, distance to the right, BT beside NormBT."""
    edges = summary["bins"]["error_edges"]
    bounds = [*(f"to {edge:.3g}" for edge in edges), f"over {edges[-1]:.3g}"]
    lines = [f"{'mean gradient norm':22}{'BT, by distance':^36}  {'NormBT, by distance':^36}"]
    for part in summary["slopes"]:
        lines.append(
            f"{part + ', by error':22}" + "  ".join("".join(f"{name:>9}" for name in QUARTERS) for _ in LABELS)
        )
        for i, bound in enumerate(bounds):
            cells = [
                cell["mean_gradient"][part] for cell in summary["bins"]["cells"] if cell["error_quartile"] == i + 1
            ]
            blocks = ("".join(_number(cell[loss]) for cell in cells) for loss in LABELS)
            lines.append(f"  {bound:20}" + "  ".join(blocks))
    return lines


def _number(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.2g}"


def _categories(summary: Mapping[str, Any]) -> list[str]:
    width = max(len(category["name"]) for category in summary["categories"]) + 2
    lines = [
        f"{'':{width + 33}}{'share of head gradient':>24}{'of backbone gradient':>24}",
        f"{'category':{width}}{'pairs':>7}{'accuracy':>9}{'error':>7}{'distance':>10}"
        + "".join(f"{label:>12}" for label in LABELS.values()) * 2,
    ]
    for category in summary["categories"]:
        lines.append(
            f"{category['name']:{width}}{category['num_pairs']:7}{category['accuracy']:9.3f}"
            f"{category['mean_error']:7.3f}{category['mean_distance']:10.3g}"
            + "".join(f"{of[loss]:12.1%}" for of in category["share_of_gradient"].values() for loss in LABELS)
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
    """The backbone's gradient norm against distance, one point per pair, coloured by error: BT beside NormBT.

    The lines have the fitted slope, one for a small and one for the median error, each in its colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sample = summary["sample"]
    shown = np.array(sample["backbone_gradient"]["bt"]) > 0  # the others have no place on a logarithmic axis
    distance, error = np.array(sample["distance"])[shown], np.array(sample["error"])[shown]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (loss, label) in zip(axes, LABELS.items(), strict=True):
        gradient = np.array(sample["backbone_gradient"][loss])[shown]
        points = axis.scatter(distance, gradient, c=error, s=14, cmap="viridis", vmin=0, vmax=1)
        slope = summary["slopes"]["backbone"][loss]
        if slope is not None:
            label += f": slope {slope['slope']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}] at a fixed error"
            ends = np.array([distance.min(), distance.max()])
            level = np.median(gradient / (error * distance ** slope["slope"]))
            for at in np.quantile(error, [0.1, 0.5]):
                axis.plot(ends, level * at * ends ** slope["slope"], color=points.to_rgba(at), linewidth=1.5, zorder=0)
        axis.set(xscale="log", yscale="log", xlabel="distance $||h_{chosen} - h_{rejected}||$", title=label)
        axis.title.set_fontsize(11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("gradient norm of the backbone")
    figure.colorbar(points, ax=axes, label="prediction error $1 - \\sigma(r_{chosen} - r_{rejected})$")
    figure.savefig(path, dpi=150, format="png")
