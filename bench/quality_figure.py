"""The figure of `bench quality`: accuracy by group of pairs, differences from BT, accuracy at each learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from normbt_kernels.commands.train_report import COLORS, LABELS

WIDTH = 13  # inches, of every figure
POWER_COLORS = ("#fdae6b", "#e6550d", "#31a354", "#1f6fb4", "#756bb1")


def label(contender: str) -> str:
    """ "normbt^0.5" as a person reads it."""
    loss, _, power = contender.partition("^")
    return f"{LABELS[loss]}, power {power}" if power else LABELS[loss]


def looks(contenders: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and label of each contender: losses have their own colours, powers take the next of a few."""
    powers = iter(POWER_COLORS * len(contenders))
    return {name: {"label": label(name), "color": next(powers) if "^" in name else COLORS[name]} for name in contenders}


def draw(plt: Any, results: dict[str, Any]) -> Any:
    """A row of panels for each setting, and one for the sweep of constants."""
    settings, sweep = results["settings"], results["sensitivity"]["rows"]
    heights = [_height(of["groups"]) for of in settings.values()] + ([3.0] if sweep else [])
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (setting, of) in zip(rows, settings.items(), strict=False):
        _draw_setting(row, setting, of["groups"], of["learning_rates"])
    if sweep:
        _draw_sweep(rows[-1], sweep)
    rates = results["grid"]["learning_rates"]
    at = "each loss at its own learning rate" if len(rates) > 1 else f"learning rate {rates[0]:g}"
    figure.suptitle(f"{results['dataset']} pairs, {results['seeds']} seeds, {at}")
    return figure


def _height(groups: dict[str, Any]) -> float:
    contenders = next(iter(groups.values()))["accuracy"]
    return max(2.6, 0.9 + len(groups) * max(0.3, 0.13 * len(contenders)))


def _draw_setting(figure: Any, title: str, groups: dict[str, Any], rates: dict[str, Any]) -> None:
    look = looks(list(rates))
    grid = [float(rate) for rate in next(iter(rates.values()))["validation_accuracy"]]  # none: one rate for all
    accuracy, difference, *by_rate = figure.subplots(1, 3 if grid else 2, width_ratios=(1.2, 1, 0.9) if grid else None)
    draw_groups(accuracy, difference, groups, look)
    accuracy.set_title(title, fontsize=11)
    for axis in by_rate:
        for loss, of_loss in rates.items():
            means = [value["mean"] for value in of_loss["validation_accuracy"].values()]
            axis.semilogx(grid, means, "o-", markersize=3, **look[loss])
        axis.set_xticks(grid, [f"{rate * 1e4:g}" for rate in grid])
        axis.minorticks_off()
        axis.set(xlabel="learning rate, 1e-4", ylabel="accuracy")
        axis.set_title("validation pairs", fontsize=11)
    handles, labels = accuracy.get_legend_handles_labels()
    [difference, *by_rate][-1].legend(handles, labels, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw_groups(accuracy: Any, difference: Any, groups: dict[str, Any], look: dict[str, dict[str, str]]) -> None:
    """Accuracy of every contender by group, and beside it the differences from BT; `groups` as `compare` makes them."""
    names = list(groups)[::-1]  # so that the first is on top
    _draw_points(accuracy, names, look, lambda group, loss: groups[group]["accuracy"][loss], most=1.0)
    accuracy.set_yticks(range(len(names)), names)
    accuracy.set_xlabel("test accuracy, 95% interval over seeds")

    from_bt = {
        (group, row["loss"]): row for group in names for row in groups[group]["difference"] if row["baseline"] == "bt"
    }
    compared = {loss: style for loss, style in look.items() if (names[0], loss) in from_bt}
    if not compared:
        difference.remove()
        return
    _draw_points(difference, names, compared, lambda group, loss: from_bt[group, loss])
    difference.axvline(0, color="#444444", linewidth=0.8)
    difference.set_yticks(range(len(names)), [])
    difference.set_xlabel("difference from BT, 95% interval")


def _draw_points(
    axis: Any,
    groups: Sequence[str],
    look: dict[str, dict[str, str]],
    value_of: Callable[[str, str], dict[str, Any]],
    most: float = float("inf"),
) -> None:
    """Mean and interval of each contender in each group, one above the other; no interval is drawn beyond `most`."""
    step = 0.8 / len(look)
    for place, (loss, style) in enumerate(look.items()):
        heights = [row + (len(look) - 1 - 2 * place) * step / 2 for row in range(len(groups))]
        values = [value_of(group, loss) for group in groups]
        ends = [value["interval_95"] or (value["mean"], value["mean"]) for value in values]
        axis.plot([value["mean"] for value in values], heights, "o", markersize=4, **style)
        axis.hlines(heights, [low for low, _ in ends], [min(high, most) for _, high in ends], color=style["color"])
    axis.set_ylim(-0.6, len(groups) - 0.4)


def _draw_sweep(figure: Any, sweep: Sequence[dict[str, Any]]) -> None:
    constants = list(dict.fromkeys(row["constant"] for row in sweep))
    axes = figure.subplots(1, len(constants), sharey=True)
    for axis, constant in zip(axes, constants, strict=True):
        rows = [row for row in sweep if row["constant"] == constant]
        places = range(len(rows))
        for group in rows[0]["groups"]:
            values = [row["groups"][group] for row in rows]
            means = [value["mean"] for value in values]
            lows, highs = zip(*(value["interval_95"] or (value["mean"],) * 2 for value in values), strict=True)
            axis.plot(places, means, "o-", label=group)
            axis.fill_between(places, lows, [min(high, 1.0) for high in highs], alpha=0.15)
        axis.set_xticks(places, [f"{row['value']:g}" for row in rows])
        axis.set(xlabel=f"NormBT's {constant}")
    axes[0].set_ylabel("test accuracy")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
