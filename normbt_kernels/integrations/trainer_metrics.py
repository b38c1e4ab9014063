"""What `NormBTTrainer` logs: metrics of the held-out pairs, and statistics of the training pairs since the last log."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from normbt_kernels.functional import NormBTStats


class PairAccuracy:
    """`accuracy`: the share of pairs whose chosen reward is strictly greater; `margin`: the mean difference; `bt_loss`:
    the plain Bradley-Terry loss, which can be compared between checkpoints because no mu weighs it.

    It takes all predictions at once, as one array or as a list of batches (`eval_do_concat_batches=False`), or one
    batch after the other (`batch_eval_metrics=True`), the last with `compute_result=True`.
    """

    def __init__(self) -> None:
        self._margins: list[np.ndarray] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        batches = prediction.predictions
        for chosen_rewards, rejected_rewards, _ in batches if isinstance(batches, list) else [batches]:
            self._margins.append(np.atleast_1d(torch.as_tensor(chosen_rewards - rejected_rewards).cpu().numpy()))
        if not compute_result:
            return {}
        margin, self._margins = np.concatenate(self._margins), []
        return {"accuracy": (margin > 0).mean(), "margin": margin.mean(), "bt_loss": np.logaddexp(0, -margin).mean()}


class TrainTotals:
    """Statistics of the batches since the last log: added up on the device, copied to the host once per log."""

    MEANS = ("bt_loss", "accuracy", "mean_distance", "margin", "mean_weight")

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(len(self.MEANS) + 1, device=device)  # the last entry counts pairs
        self._range = torch.zeros(2, device=device)
        self._restart()

    def _restart(self) -> None:
        self._sums.zero_()
        self._range.fill_(float("inf"))  # least weight, and least negated weight

    def add(self, stats: NormBTStats) -> None:
        margin = (stats.chosen_rewards - stats.rejected_rewards).mean()
        weight = stats.weight
        means = (stats.bt_loss, stats.accuracy, stats.mean_distance, margin, weight.mean(), torch.ones_like(margin))
        self._sums += len(weight) * torch.stack(means)
        self._range = torch.minimum(self._range, torch.stack([weight.amin(), -weight.amax()]))

    def drain(self, gather: Callable[[Tensor], Tensor], mu: Tensor | None) -> dict[str, float]:
        """Means over all pairs of all ranks since the last call, the range of their weights, and `mu` as it is now."""
        of_rank = torch.cat([self._sums, self._range] + ([] if mu is None else [mu.reshape(1)]))
        columns = list(zip(*gather(of_rank.unsqueeze(0)).tolist(), strict=True))
        self._restart()
        *sums, num_pairs = map(sum, columns[: len(self.MEANS) + 1])
        least, least_negated = map(min, columns[len(self.MEANS) + 1 :][:2])
        logs = {name: total / num_pairs for name, total in zip(self.MEANS, sums, strict=True)}
        logs |= {"min_weight": least, "max_weight": -least_negated}
        return logs if mu is None else logs | {"mu": columns[-1][0]}
