"""NormBTLoss and LinearNormBTLoss: the two forms of the loss as modules, each with its own moving average mu."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from normbt_kernels.checks import is_number, linear_inputs, loss_options, reward_inputs
from normbt_kernels.functional import NormBTStats, loss_and_stats
from normbt_kernels.ops.autograd import pair_weights
from normbt_kernels.ops.ema import EMA, ArrayCache, move_mu_now
from normbt_kernels.ops.library import PLAIN
from normbt_kernels.ops.pair_distance import measure_distances
from normbt_kernels.ops.pairs import RowPairs
from normbt_kernels.ops.terms import Mu, Scores


class Reduction(NamedTuple):
    """The sums of a step while the ranks add them, and the state that they will move."""

    work: dist.Work
    pending: Tensor
    mu: Tensor
    num_updates: Tensor


DISTRIBUTED = dist.is_available()
FORWARDS_IN_A_STEP = 1024  # more look like a step that never comes


def _option(name: str) -> property:
    """An option of the loss as an attribute of its module, checked when it is set."""

    def read(loss: DistanceEMA) -> Any:
        return getattr(loss.options, name)

    def change(loss: DistanceEMA, value: Any) -> None:
        loss.options = loss_options(**loss.options._asdict() | {name: value})

    return property(read, change)


class DistanceEMA(nn.Module):
    """The loss's memory: mu <- beta*mu + (1-beta)*mean distance, once for each optimizer step.

    The mu from before a step weighs all its pairs, in whichever micro-batch and on whichever rank they are. Then mu
    moves by their mean: sums of distances and numbers of pairs are added, so the result does not depend on how a batch
    is cut. One line says what a step is:

        loss_fn.follow(optimizer)

    Without it, each forward in training mode is a step. Eval mode and `torch.no_grad` use mu and do not change it.

    The first step has no mu from before it. The mean of each micro-batch, over all ranks, weighs that micro-batch, and
    the mean over all of them becomes mu. In eval mode without a mu, the mean of the batch weighs it and nothing is
    stored.

    A step without pairs, or with a distance that is not finite, leaves mu as it was; if it was the first, pairs weigh 1
    until there is a mu. A step that a GradScaler skips is no step: its pairs count with those of the next one. (A fused
    optimizer skips on the device, where only it looks: for mu that is a step like any other.)

    With torch.distributed initialised, the ranks of `process_group` share mu. They add two floats once a step, while
    the next forward runs; reading `mu`, `num_updates` or the `state_dict` before that waits for the sum. All ranks must
    step equally often. In the first step, and if each forward is a step, they must also call forward equally often.
    A CUDA graph cannot hold that exchange, so capturing it is refused; `torch.compile` breaks its graph there.

    An activation checkpoint around the module would repeat its forward, so backward refuses it.

    Buffers, both in the `state_dict`: `mu` (fp32, 0-d, 0 until there is one) and `num_updates` (int64, 0-d), how many
    steps have moved it. In the middle of a step the `state_dict` also has `pending` (fp32, (2,)): the sum of distances
    and the number of pairs of this rank that belong to the gradients accumulated so far.
    """

    eps, max_weight, power = map(_option, ("eps", "max_weight", "power"))

    mu: Tensor
    num_updates: Tensor
    per_step = False  # whether mu waits for `end_step`; otherwise each training forward is a step
    _reduction: Reduction | None = None

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
        if not is_number(beta):
            raise TypeError(f"beta must be a number, got {type(beta).__name__}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        is_group = DISTRIBUTED and isinstance(process_group, dist.ProcessGroup)
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
        # Each rank's own, and therefore no buffer: DDP would overwrite it with the first rank's.
        self.pending = torch.zeros(2, dtype=torch.float32)
        self._forget()

    def _forget(self) -> None:
        self._keep_exact(self._buffers["mu"])
        self._arrays = ArrayCache()
        # What the host knows without asking the device.
        self._first_step_began = self.first_step_ended = False
        self._first_mean: Tensor | None = None
        self._forwards_since_step = [0]  # in a list, because to set an attribute of a module takes a call

    def _keep_exact(self, mu: Tensor) -> None:
        self._exact_mu = mu.detach()
        self._exact_address = mu.data_ptr() if type(mu) is Tensor else 0

    def reset_parameters(self) -> None:
        """Forgets mu and the pending sums, like a new module."""
        self._settle()
        for state in (*self._buffers.values(), self.pending):
            state.zero_()
        self._forget()

    # --- steps ---

    def follow(self, optimizer: Any) -> None:
        """From now on, mu moves once for each step of `optimizer`.

        A copy of this module follows no optimizer until you call `follow` on it.

        Args:
            optimizer: a `torch.optim.Optimizer`, or an object that holds one as its `optimizer` (accelerate's,
                DeepSpeed's engine). If several train the model in turn, the first one that steps ends the step.

        Raises:
            TypeError: `optimizer` is not an optimizer.

        Warns:
            UserWarning: after 1024 forwards without a step of `optimizer`: mu waits for it.
        """
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(
                f"{type(optimizer).__name__} has no step hooks: set per_step = True on the loss, and call its "
                "end_step() after each step"
            )
        self._forwards_since_step[0] = 0
        ema = weakref.ref(self)
        optimizer.register_step_post_hook(lambda *_: None if ema() is None else ema().end_step())
        self.per_step = True

    def end_step(self) -> None:
        """Moves mu by the pairs since the last step, if there are any. `follow` calls it after the optimizer's step.

        Raises:
            RuntimeError: each forward of this loss is a step.
        """
        if not self.per_step:
            raise RuntimeError("each forward of this loss is a step: call follow(optimizer), or set per_step = True")
        self._move()

    def begin_with(self, distances: Iterable[Tensor]) -> None:
        """Weighs the first step by the mean of `distances` (P,), those of its micro-batches, measured beforehand.

        All ranks must call it. mu will be the mean of what the step itself measures.
        """
        self._first_mean = self._mean_of(distances, self._group())

    @torch.no_grad()
    def _move(self) -> None:
        self._settle()
        self.first_step_ended |= self._first_step_began
        self._first_mean = None
        self._forwards_since_step[0] = 0
        mu, num_updates, group = self._buffers["mu"], self._buffers["num_updates"], self._group()
        if group is None:
            move_mu_now(mu, num_updates, self.pending, self.beta)
            return
        # A copy moves. Some ranks read mu before the next forward and others do not, and between the two DDP gives all
        # of them the first rank's buffers: moved in place, mu could move twice.
        moved = Reduction(None, self.pending.clone(), mu.clone(), num_updates.clone())
        self.pending.zero_()
        self._reduction = moved._replace(work=dist.all_reduce(moved.pending, group=group, async_op=True))

    def _settle(self) -> None:
        """Puts right, in place, what has been done to the buffers, and moves them by the sum that was on its way."""
        mu = self._buffers["mu"]
        if mu.dtype != torch.float32:
            exact = self._exact_mu.to(mu.device)
            is_fake = mu.is_meta or type(mu) is not Tensor  # without values to compare
            if is_fake or torch.equal(exact.to(mu.dtype), mu):
                mu.data = exact  # FSDP1's MixedPrecision(buffer_dtype=...) casts without `_apply`
            else:  # another mu was assigned
                mu = self._buffers["mu"] = mu.float()
        # Only where it lies elsewhere: `detach` takes a few us of every step. What is fake has no address.
        if not is_dynamo_compiling() and type(mu) is Tensor and mu.data_ptr() != self._exact_address:
            self._keep_exact(mu)
        if self.pending.device != mu.device:  # FSDP moves buffers without `_apply`
            self.pending = _moved(self.pending, mu.device)
        if self._reduction is not None:
            self._take_up_reduction()

    @torch.no_grad()
    def _take_up_reduction(self) -> None:
        moved, self._reduction = self._reduction, None
        moved.work.wait()
        # torch.distributed.checkpoint has the optimizer make its state by a step, of no pairs, and writes what it loads
        # into the buffers before the sums of that step are here.
        had_pairs = moved.pending[1] > 0
        move_mu_now(moved.mu, moved.num_updates, moved.pending, self.beta)
        for name in ("mu", "num_updates"):
            buffer = self._buffers[name]
            buffer.copy_(torch.where(had_pairs, getattr(moved, name), buffer))

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name not in ("mu", "num_updates"):
            return value
        self._settle()
        return self._buffers[name]  # which may be another by now

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks that share the mean; None if there are no others."""
        if self.process_group is None or not (DISTRIBUTED and dist.is_initialized()):
            return None
        return dist.group.WORLD if self.process_group == "default" else self.process_group

    # --- pairs ---

    def weigh(self, rows: RowPairs) -> Tensor:
        """The weights (P,) of pairs whose loss is computed elsewhere. They count as the pairs of a forward do."""
        trains, mu, group = self._begin(rows)
        weight = pair_weights(rows, mu, self.options)
        if trains:
            self._end(rows, group)
        return weight

    def _score(self, rows: RowPairs, scores: Scores, return_stats: bool):
        trains, mu, group = self._begin(rows)
        result = loss_and_stats(rows, scores, mu, self.options, return_stats)
        if trains:
            self._end(rows, group)
        return result

    def _begin(self, rows: RowPairs) -> tuple[bool, Mu, dist.ProcessGroup | None]:
        """Whether mu will move by these pairs, what weighs them and takes up their distances, and the ranks that share
        this forward."""
        self._settle()
        trains = self.training and torch.is_grad_enabled()
        mu, num_updates = self._buffers["mu"], self._buffers["num_updates"]
        if mu.device != rows.chosen.device:
            raise ValueError(
                f"mu is on {mu.device}, but the hidden states are on {rows.chosen.device}: "
                f"move the loss there once, with .to({str(rows.chosen.device)!r})"
            )
        group = None
        if trains:
            self._count_forward()
            group = self._group()
        if group is not None and mu.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot hold the sum over ranks that moves mu: call the loss outside the graph, or give "
                "it process_group=None"
            )
        first_mean = None
        if not self.first_step_ended:
            first_mean = self._first_mean
            if first_mean is None:
                first_mean = self._mean_of([measure_distances(rows)], group)
        pending = beta = None
        if trains:
            pending, beta = self.pending, None if self.per_step or group is not None else self.beta
        # The device decides which mu weighs: the buffers may have been filled by hand.
        return trains, Mu(None, first_mean, EMA(mu, num_updates, pending, beta, self._arrays)), group

    def _end(self, rows: RowPairs, group: dist.ProcessGroup | None) -> None:
        if not self._first_step_began and (rows.num_pairs > 0 or group is not None):
            self._first_step_began = True
        if self.per_step:
            return
        if group is not None:
            self._move()
        elif not self.first_step_ended:  # mu has moved already
            self.first_step_ended = self._first_step_began

    def _count_forward(self) -> None:
        if is_dynamo_compiling():
            self._traced = []  # a side effect, which Dynamo does not let into a checkpoint
            return
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "an activation checkpoint repeats the forward of this loss in backward: call the loss outside of it"
            )
        self._forwards_since_step[0] += 1
        if self._forwards_since_step[0] == FORWARDS_IN_A_STEP and self.per_step:
            warnings.warn(
                f"{FORWARDS_IN_A_STEP} forwards since the last step of the optimizer that this loss follows: mu waits "
                "for it; follow the optimizer that steps, or call end_step() after each step",
                stacklevel=2,
            )

    def _mean_of(self, distances: Iterable[Tensor], group: dist.ProcessGroup | None) -> Tensor:
        distance = torch.cat(list(distances))
        if group is None:
            return distance.mean()
        pending = torch.stack((distance.sum(), distance.new_full((), distance.numel())))
        dist.all_reduce(pending, group=group)
        return pending[0] / pending[1]

    # --- state ---

    def _apply(self, fn, recurse=True):
        # Only the device may change: 16 bits would lose steps of 1-beta, and `to_empty` is for what is filled later.
        self._settle()
        state = dict(self._buffers)
        super()._apply(fn, recurse)
        device = self._buffers["mu"].device
        self._buffers.update({name: _moved(value, device) for name, value in state.items()})
        self.pending = _moved(self.pending, device)
        self._keep_exact(self._buffers["mu"])
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.pending.is_meta and self.pending[1] > 0:
            destination[prefix + "pending"] = self.pending

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        self._settle()
        pending = state_dict.pop(prefix + "pending", None)
        found = {name for name in self._buffers if prefix + name in state_dict}
        if found == {"num_updates"}:
            state_dict.pop(prefix + found.pop())  # of no mu; strict loading misses it
        for name in found:  # assign=True takes the dtype of the checkpoint
            if isinstance(state_dict[prefix + name], Tensor):
                state_dict[prefix + name] = state_dict[prefix + name].to(self._buffers[name].dtype)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if "mu" not in found:
            return
        mu, num_updates = self._buffers["mu"], self._buffers["num_updates"]
        if found == {"mu"}:
            num_updates.fill_(1)  # a mu counts; strict loading misses the number
        self._forget()
        self.first_step_ended = not num_updates.is_meta and num_updates.item() > 0
        self.pending = torch.zeros_like(self.pending, device=mu.device)
        if pending is not None:
            self.pending.copy_(pending)

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # a group is shared, and cannot be copied
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        return twin

    def __getstate__(self):
        self._settle()
        return {name: value for name, value in self.__dict__.items() if name not in ("per_step", "_traced")}

    def extra_repr(self) -> str:
        return ", ".join(
            [f"beta={self.beta}", *(f"{name}={value!r}" for name, value in self.options._asdict().items())]
        )


def inside_backward() -> bool:
    """Whether autograd runs this code, as when an activation checkpoint repeats a forward."""
    return not is_dynamo_compiling() and torch._C._current_graph_task_id() != -1


def _moved(state: Tensor, device: torch.device) -> Tensor:
    """`state` on `device`, zero where it comes from the meta device and has no value."""
    if state.device == device:
        return state
    return torch.zeros_like(state, device=device) if state.is_meta else state.to(device)


class NormBTLoss(DistanceEMA):
    """`normbt_loss` with its own EMA of the mean distance: a drop-in replacement of the Bradley-Terry loss.

    Args:
        beta: decay of the EMA, in [0, 1); 0.9 in the paper.
        eps, max_weight, label_smoothing, center_coef, reduction: as in `normbt_loss`.
        process_group: "default" shares the mean with all ranks wherever torch.distributed is initialised, a
            ProcessGroup with its ranks, None with nobody.
        power: as in `normbt_loss`.

    All but `beta` and `process_group` are attributes too, and may be changed between two steps. See `DistanceEMA` for
    what is kept, and when it changes.
    """

    label_smoothing, center_coef, reduction = map(_option, ("label_smoothing", "center_coef", "reduction"))

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

    label_smoothing, center_coef, reduction = map(_option, ("label_smoothing", "center_coef", "reduction"))

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
        if type(weight) not in PLAIN and hasattr(weight, "full_tensor"):
            raise TypeError(
                f"weight is sharded (a {type(weight).__name__}): use NormBTLoss on the rewards that the model computes"
            )
        inputs = linear_inputs(hidden, weight, bias, pairs, last_token, margin, pair_weight)
        return self._score(*inputs, return_stats)
