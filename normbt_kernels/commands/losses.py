"""The losses that `normbt train` compares: Bradley-Terry, the paper's variants of it, and NormBT on top of each.

name                      per pair, times the NormBT weight for normbt...
bt                        -log sigma(d)
bt-margin                 -log sigma(d - m)                           m: the pair's margin column
bt-margin-out             -m log sigma(d)
bt-smoothing              -(1-s) log sigma(d) - s log sigma(-d)       s: --label-smoothing
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normbt_kernels.commands.arguments import DEFAULT_SMOOTHING, TrainOptions
from normbt_kernels.errors import UserError
from normbt_kernels.modules import LinearNormBTLoss


def make_loss(name: str, options: TrainOptions) -> LinearNormBTLoss:
    """The module for one of `LOSS_NAMES`, to be called on rows that `loss_rows` made.

    Bradley-Terry is NormBT with power 0, where every weight is 1. So the trainer can turn any of them into a loss on
    rewards, where it cannot fuse the head.
    """
    smoothing = 0.0
    if name.endswith("-smoothing"):
        smoothing = DEFAULT_SMOOTHING if options.label_smoothing is None else options.label_smoothing
    if not name.startswith("normbt"):
        return LinearNormBTLoss(power=0.0, label_smoothing=smoothing, center_coef=options.center_coef)
    return LinearNormBTLoss(
        beta=options.beta,
        eps=options.eps,
        max_weight=options.max_weight,
        power=options.power,
        label_smoothing=smoothing,
        center_coef=options.center_coef,
    )


def loss_rows(name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokenised pairs with the columns that the loss `name` reads: the margin stays, becomes the weight, or goes.

    Raises:
        UserError: the loss needs margins and the pairs have none, or a negative margin would become a weight.
    """
    if "-margin" not in name:
        return [{key: value for key, value in row.items() if key != "margin"} for row in rows]
    if any("margin" not in row for row in rows):
        raise UserError(f"--loss {name} needs pairs with the column 'margin'")
    if not name.endswith("-out"):
        return list(rows)
    least = min(row["margin"] for row in rows)
    if least < 0:
        raise UserError(f"--loss {name} multiplies by the margin, which must not be negative: got {least}")
    return [
        {key: value for key, value in row.items() if key != "margin"}
        | {"pair_weight": row["margin"] * row.get("pair_weight", 1.0)}
        for row in rows
    ]
