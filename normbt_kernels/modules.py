"""NormBTLoss and LinearNormBTLoss: the two forms of the loss, each with the EMA of the mean distance inside."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normbt_kernels.checks import linear_inputs, loss_options, reward_inputs
from normbt_kernels.functional import NormBTStats, loss_and_stats
from normbt_kernels.ops.ema import EMA, move_mu_now
from normbt_kernels.ops.pair_distance import measure_distances
from normbt_kernels.ops.pair_loss import Mu, Scores
from normbt_kernels.ops.pairs import RowPairs


class DistanceEMA(nn.Module):
    """The loss's memory: mu <- beta*mu + (1-beta)*mean distance, on the device, frozen in eval mode.

    A batch is weighed by the mu from before it. The first batch's own mean is used for it and becomes mu. In eval
    mode mu is used and not changed; if there is none yet, the batch's own mean is used and nothing is stored. An
    empty batch, and one whose mean distance is not finite, leave mu as it was.

    With torch.distributed initialised, the mean is over the pairs of all ranks of `process_group`: sums and counts
    are added, so unequal batches are right. The reduction (two floats) starts in forward and is waited for, by the
    device, when mu is next needed, so it overlaps backward; `synchronize()` completes it earlier. In training mode
    every rank must call forward equally often; in eval mode nothing is exchanged.

    A first batch that is not finite, on GPUs: until there is a mu, each rank weighs by its own pairs' mean (the mean
    that becomes mu is shared all the same). `torch.compile` traces the module with fullgraph=True where ranks share
    nothing; the collective breaks the graph. Activation checkpointing around the module would update mu twice: put
    the loss outside.

    Buffers, both in the `state_dict`: `mu` (fp32, 0-d, 0 until there is one) and `num_updates` (int64, 0-d).
    """

    mu: Tensor
    num_updates: Tensor

    def __init__(
        self,
        beta: float = 0.9,
        eps: float = 1e-6,
        max_weight: float | None = 100.0,
        label_smoothing: float = 0.0,
        center_coef: float = 0.0,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | str | None = "default",
        power: float = 1.0,
    ):
        super().__init__()
        if not isinstance(beta, (int, float)) or isinstance(beta, bool):
            raise TypeError(f"beta must be a number, got {type(beta).__name__}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if not (process_group is None or process_group == "default" or is_group):
            raise ValueError(
                'process_group must be "default", a ProcessGroup that this rank is in, or None (local), '
                f"got {process_group!r}"
            )
        self.beta = float(beta)
        self.options = loss_options(label_smoothing, center_coef, eps, max_weight, power, reduction)
        self.process_group = process_group
        self.register_buffer("mu", torch.zeros((), dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # Sum of distances and number of pairs that have not entered mu yet.
        self.register_buffer("pending", torch.zeros(2, dtype=torch.float32), persistent=False)
        self._work: dist.Work | None = None
        self._started = False  # whether there has been a first batch, which the host knows without asking a device

    def synchronize(self) -> None:
        """Completes a reduction across ranks that is still under way, so that `mu` includes the last batch."""
        if self._work is None:
            return
        work, self._work = self._work, None
        work.wait()
        move_mu_now(self.mu, self.num_updates, self.pending, self.beta)

    def _score(self, rows: RowPairs, scores: Scores, return_stats: bool):
        """Runs the loss with the mean that weighs this batch, and updates the EMA."""
        if self.mu.device != rows.chosen.device:
            raise ValueError(
                f"mu is on {self.mu.device}, but the hidden states are on {rows.chosen.device}: "
                f"move the loss there once, with .to({str(rows.chosen.device)!r})"
            )
        self.synchronize()
        group = self._group()
        if not self.training:
            ema = EMA(self.mu, self.num_updates, None, None)
            return loss_and_stats(rows, scores, Mu(ema=ema, own_mean=not self._started), self.options, return_stats)
        first, tensor = not self._started, None
        if first and group is not None:
            # All ranks' mean must be known before the weights, so this once it is exchanged before the loss.
            distance = measure_distances(rows)
            totals = torch.stack([distance.sum(), distance.new_full((), distance.numel())])
            dist.all_reduce(totals, group=group)
            tensor = totals[0] / totals[1]
        ema = EMA(self.mu, self.num_updates, self.pending, self.beta if group is None else None)
        mu = Mu(tensor=tensor, ema=ema, own_mean=first and group is None)
        result = loss_and_stats(rows, scores, mu, self.options, return_stats)
        self._started |= rows.num_pairs > 0 or group is not None
        if group is not None:
            self._work = dist.all_reduce(self.pending, group=group, async_op=True)
        return result

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks that share the mean, None where there are none."""
        if self.process_group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        return dist.group.WORLD if self.process_group == "default" else self.process_group

    def _apply(self, fn, recurse=True):
        # mu stays fp32 through .half() and .bfloat16(): with 8 bits of mantissa, steps of 1-beta would be lost.
        self.synchronize()
        mu = self.mu
        super()._apply(fn, recurse)
        self.mu = (self.mu if mu.is_meta else mu).to(self.mu.device, torch.float32)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.synchronize()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs):
        self.synchronize()
        super()._load_from_state_dict(*args, **kwargs)
        self._started = not self.num_updates.is_meta and self.num_updates.item() > 0
        self.mu = self.mu.float()  # assign=True takes the dtype of the checkpoint

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # a group is shared, and cannot be copied
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        return twin

    def __getstate__(self):
        self.synchronize()
        return self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(
            [f"beta={self.beta}", *(f"{name}={value!r}" for name, value in self.options._asdict().items())]
        )


class NormBTLoss(DistanceEMA):
    """`normbt_loss` with its own EMA of the mean distance: a drop-in replacement of the Bradley-Terry loss.

    Args:
        beta: decay of the EMA, in [0, 1); 0.9 in the paper.
        eps, max_weight, label_smoothing, center_coef, reduction: as in `normbt_loss`.
        process_group: "default" shares the mean with all ranks wherever torch.distributed is initialised, a
            ProcessGroup with its ranks, None with nobody.
        power: as in `normbt_loss`.

    See `DistanceEMA` for what is kept, and when it changes.
    """

    def forward(
        self,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
        chosen_hidden: Tensor,
        rejected_hidden: Tensor,
        margin: Tensor | None = None,
        pair_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, NormBTStats]:
        """The loss, or (loss, stats). Arguments, results and errors as in `normbt_loss`."""
        inputs = reward_inputs(chosen_rewards, rejected_rewards, chosen_hidden, rejected_hidden, margin, pair_weight)
        return self._score(*inputs, return_stats)


class LinearNormBTLoss(DistanceEMA):
    """`linear_normbt_loss` with its own EMA of the mean distance: the score head and the loss in one pass.

    Args: as `NormBTLoss`.
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        pairs: str | Tensor = "halves",
        last_token: Tensor | None = None,
        margin: Tensor | None = None,
        pair_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, NormBTStats]:
        """The loss, or (loss, stats). Arguments, results and errors as in `linear_normbt_loss`.

        Raises:
            TypeError: `weight` is a DTensor, which no rank holds whole (FSDP2, tensor parallelism).
        """
        if hasattr(weight, "full_tensor"):
            raise TypeError(
                f"weight is sharded (a {type(weight).__name__}): use NormBTLoss on the rewards that the model computes"
            )
        inputs = linear_inputs(hidden, weight, bias, pairs, last_token, margin, pair_weight)
        return self._score(*inputs, return_stats)
