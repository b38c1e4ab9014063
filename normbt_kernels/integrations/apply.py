"""NormBT in a trainer of somebody else's: the loss stays plain Bradley-Terry, and its gradient becomes NormBT's.

    forward    rho = ||h_c - h_r||_2, w = min(mu / (rho + eps), max_weight)        logits pass through as they are
    backward   with g the gradient of a pair's two rewards:
                   (g_c - g_r)/2  is multiplied by w       a function of r_c - r_r: BT with margin or label smoothing
                   (g_c + g_r)/2  is left alone            a function of r_c + r_r: the centering term

A hook on the head reads its input and hooks the gradient of its output; nothing else of the model is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from normbt_kernels.checks import LAYOUTS, row_pairs
from normbt_kernels.integrations.head import NUM_CHECKED, Head, ModelInputs, compile_anew, each_at, find_head
from normbt_kernels.integrations.optimizer_steps import follow_optimizer_of
from normbt_kernels.modules import DistanceEMA, inside_backward
from normbt_kernels.ops.pairs import RowPairs, cast

Index = tuple[Tensor, Tensor] | None  # of the scored rows, (N, ...), in (N, S, ...); None: all rows are scored
Scale = Callable[[Tensor], Tensor]  # gradient of a batch's logits under BT -> the same under NormBT


def apply_normbt(
    model: nn.Module,
    layout: str = "halves",
    beta: float = 0.9,
    eps: float = 1e-6,
    max_weight: float | None = 100.0,
    head: nn.Linear | None = None,
    power: float = 1.0,
) -> None:
    """Turns the Bradley-Terry loss with which any trainer trains `model` into NormBT: one line before training.

    The trainer's logged loss stays plain BT and the logits stay the same bit for bit. In backward, the antisymmetric
    part of each pair's reward gradient is multiplied by the pair's NormBT weight. So BT with a margin or with label
    smoothing becomes exactly NormBT, and a centering term stays as it is.

    Each forward in training mode that needs gradients is a micro-batch of pairs. The `mu` from before an optimizer step
    weighs all its micro-batches. When the step is over, `mu` moves once, by the mean over all their pairs and all ranks
    (`NormBTLoss` describes the first step and distances that are not finite). Any optimizer of this process that holds
    a parameter of the model ends the step: that of Trainer, accelerate (also with `accumulate`), DeepSpeed, or your own
    loop. Until one exists, each forward is a step, and one that is made after the first forward counts from its first
    step on. If the optimizer keeps copies of the parameters, name it with `<head>.normbt.follow(optimizer)`.

    Any number of forwards may come before a backward, and backwards may come in any order. Activation checkpoints may
    be around the layers, and around the head if they are not reentrant. In eval mode and without gradients nothing
    happens: neither `mu` nor a gradient changes, and any number of sequences is welcome.

    Decoders are read at the token that transformers' classifiers score: the rightmost one that is not the pad token.
    The first 16 backwards check that the gradient reaches no other token. They also check that the two gradients of a
    pair cancel up to a multiple of r_c + r_r (centering), as they do if the layout is right. The host waits for the
    device in these checks.

    `mu` and `num_updates` are buffers of a submodule `normbt` of the head. They are saved and restored with the model,
    whose own keys stay as they were. `from_pretrained` without this package loads the checkpoint and reports two
    unexpected keys (three in the middle of an accumulation, because of the pending sums). A checkpoint without them
    leaves `mu` as it is. With peft, the head in `modules_to_save` carries them in the adapter; you may call this before
    or after `get_peft_model`.

    Args:
        model: the reward model, bare or wrapped (peft, DDP, `fully_shard`, `torch.compile`, which gets a graph break
            at the head).
        layout: which sequences of a batch are a pair: "halves" (i and i + N/2; TRL, OpenRLHF) or "interleaved" (2i and
            2i + 1; RLHFlow), the chosen one first. Or "apart": the chosen ones pass the model in one forward, the
            rejected ones in the next; the loss may then have no centering term.
        beta: decay of the EMA, in [0, 1).
        eps: added to the distance, >= 0.
        max_weight: cap on the weights, None for no cap.
        head: the scalar head. Default: the last `Linear` with one output.
        power: of the weight, as in `normbt_loss`.

    Raises:
        ValueError: the model has no scalar head or has NormBT already, or an argument is out of range. Later, in the
            forward or backward that shows it: an odd number of sequences; a layout that does not match the batches; a
            forward that does not call the head (Liger, Unsloth); a model that scores other tokens; replicas of
            `nn.DataParallel`.
        RuntimeError: in forward, differentiation in forward mode; in backward, a gradient that is differentiated again
            (a gradient penalty), or a reentrant checkpoint around the head.

    Warns:
        UserWarning: the head is frozen, as under LoRA without `modules_to_save`. After 16 steps: no gradient has come
            to the head, as when the loss reads another one.
    """
    if applied_to(model):
        raise ValueError(f"NormBT is already applied to this {type(model).__name__}: call remove_normbt(model) first")
    found = find_head(model, head)
    head = found.linear()
    if layout not in (*LAYOUTS, "apart"):
        raise ValueError(f"layout must be one of {(*LAYOUTS, 'apart')}, got {layout!r}")
    weights = PairWeights(layout, beta, eps, max_weight, power)
    if warning := found.warning():
        warnings.warn(warning, stacklevel=2)
    weights.attach(head, found)


def remove_normbt(model: nn.Module) -> None:
    """Undoes `apply_normbt`: the model is as before and trains with plain BT again. `mu` is lost.

    Raises:
        ValueError: NormBT is not applied to this model.
    """
    applied = applied_to(model)
    if not applied:
        raise ValueError(f"NormBT is not applied to this {type(model).__name__}")
    for head, weights in applied:
        weights.detach(head)


def applied_to(model: nn.Module) -> list[tuple[nn.Module, PairWeights]]:
    """Every head that has NormBT, with its `PairWeights`: peft's `modules_to_save` keeps a copy of the head."""
    names = [name for name, module in model.named_modules() if isinstance(module, PairWeights)]
    return [(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)) for name in names]


class PairWeights(DistanceEMA):
    """The weights of each batch that passes a head, and their EMA; the submodule `normbt` of that head."""

    def __init__(self, layout: str, beta: float, eps: float, max_weight: float | None, power: float):
        super().__init__(beta, eps, max_weight, power=power)
        self.layout = layout
        self._chosen: Apart | None = None  # of layout "apart", until the rejected rows come
        self._backwards_to_check = NUM_CHECKED
        self._steps_without_gradient = 0  # until the first gradient comes
        self._gradient_came = False
        self._knows_optimizers = False
        self._waits_for_weights = False

    def attach(self, head: nn.Linear, found: Head) -> None:
        self._head_name = found.name
        self.to(head.weight.device).train(head.training)
        self._inputs = ModelInputs(found.owner)
        # This hook runs first: a pooled head's own hook expands the (N, 1) rewards that it needs.
        self._hook = head.register_forward_hook(self._after_head, prepend=True, with_kwargs=True)
        head.normbt = self
        compile_anew()

    def detach(self, head: nn.Linear) -> None:
        self._hook.remove()
        self._inputs.remove()
        del head.normbt

    def _after_head(self, head: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], logits: Tensor) -> None:
        inputs = self._inputs.take()
        if self.training:
            weigh = self._weigh_outside_graph if is_dynamo_compiling() else self._weigh
            weigh(head, args[0] if args else kwargs["input"], inputs, logits)

    def _weigh(self, head: nn.Module, hidden: Tensor, inputs: Mapping[str, Any], logits: Tensor) -> None:
        """Hooks the gradient of the logits, (N, S, 1) or (N, 1), if they will get one."""
        if "_is_replica" in vars(head):
            raise ValueError(
                "nn.DataParallel splits the pairs of a batch: start one process per GPU (torchrun or accelerate "
                "launch), or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        # Outside of its levels nothing has a tangent, and to ask takes as long as an operator.
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:
            raise RuntimeError(
                "apply_normbt weighs gradients in backward, and forward-mode differentiation has none: use NormBTLoss"
            )
        if not logits.requires_grad:
            return
        if inside_backward():
            # A checkpoint repeats the forward: for its tensors alone, or to run backward through it (reentrant).
            logits.register_hook(_refuse_reentrant_checkpoint)
            return
        if not self._knows_optimizers:
            follow_optimizer_of(head if self._inputs.owner is None else self._inputs.owner, self)
            self._knows_optimizers = True
        token = None if hidden.dim() == 2 else self._inputs.unpadded_token(inputs, hidden)
        score = self._score_apart if self.layout == "apart" else self._score_pairs
        logits.register_hook(score(hidden.detach(), token, logits))

    # torch.compiler.disable would import half of torch with this package; this does it when it is called.
    _weigh_outside_graph = torch._disable_dynamo(_weigh)

    # --- a batch of pairs ---

    def _score_pairs(self, hidden: Tensor, token: Tensor | None, logits: Tensor) -> Scale:
        """Weighs the batch, and returns the function through which the gradient of its logits goes."""
        weight = self.weigh(row_pairs(hidden, self.layout, token))
        pooled = None if token is None else each_at(token)
        reward_sum = self._sides(_at(pooled, logits.detach())).sum(dim=0) if self._backwards_to_check > 0 else None
        return partial(self._scale_pairs, weight, pooled, reward_sum)

    def _scale_pairs(self, weight: Tensor, pooled: Index, reward_sum: Tensor | None, gradient: Tensor) -> Tensor:
        """From `gradient`, that of the logits under BT, the one under NormBT: same dtype, computed in fp32 or wider."""
        if torch.is_grad_enabled():
            _refuse_second_backward()
        if not self._gradient_came:
            self._gradient_came = True
        sides = self._sides(_at(pooled, gradient))
        if gradient.dtype != weight.dtype:
            dtype = torch.promote_types(gradient.dtype, weight.dtype)
            sides, weight = sides.to(dtype), weight.to(dtype)
        if reward_sum is not None and self._backwards_to_check > 0:
            self._check_tokens(pooled, gradient)
            self._check_pairs(*sides, reward_sum.to(sides.dtype), gradient.dtype)
        # How far a side is from the mean of both, (g_c - g_r)/2, times w; lerp keeps the digits of a small w.
        sides = torch.lerp(sides.mean(dim=0), sides, weight)
        return _replaced(gradient, pooled, sides if self.layout == "halves" else sides.T)

    def _sides(self, column: Tensor) -> Tensor:
        """(2P, 1) in the order of the layout -> (2, P), chosen and rejected."""
        return column.view(2, -1) if self.layout == "halves" else column.view(-1, 2).T

    # --- chosen and rejected apart ---

    def _score_apart(self, hidden: Tensor, token: Tensor | None, logits: Tensor) -> Scale:
        pooled = None if token is None else each_at(token)
        rows, batch = _at(pooled, hidden), self._chosen
        if batch is None:
            batch = self._chosen = Apart(rows)
        else:
            self._chosen = None
            if batch.chosen.shape != rows.shape:
                raise ValueError(
                    f"layout='apart': the chosen rows are {tuple(batch.chosen.shape)}, but the rejected rows of the "
                    f"next forward are {tuple(rows.shape)}"
                )
            batch.weight = self.weigh(RowPairs(batch.chosen, rows, None, None, "apart"))
        return partial(self._scale_apart, batch, pooled)

    def _scale_apart(self, batch: Apart, pooled: Index, gradient: Tensor) -> Tensor:
        """The gradient of one side under NormBT: that under BT times the weight, as there is no centering term."""
        if torch.is_grad_enabled():
            _refuse_second_backward()
        if not self._gradient_came:
            self._gradient_came = True
        if batch.weight is None:
            self._chosen = None  # the next forward is one on chosen sequences again
            raise ValueError(
                "layout='apart': a backward came before the forward on the rejected sequences, or an earlier forward "
                "on chosen ones had none: leave out this batch"
            )
        dtype = torch.promote_types(gradient.dtype, batch.weight.dtype)
        side = cast(_at(pooled, gradient).view(-1), dtype)
        if self._backwards_to_check > 0:
            self._check_tokens(pooled, gradient)
            if batch.gradient is not None:
                self._check_pairs(batch.gradient, side, torch.zeros_like(side), gradient.dtype)
            batch.gradient = side if batch.gradient is None else None
        return _replaced(gradient, pooled, batch.weight * side)

    def end_step(self) -> None:
        self._chosen = None  # left by a forward that was no part of the training
        if self._forwards_since_step[0] > 0 and not self._gradient_came:
            self._steps_without_gradient += 1
            if self._steps_without_gradient == NUM_CHECKED:
                warnings.warn(
                    f"in {NUM_CHECKED} steps no gradient came to the head {self._head_name!r}, so NormBT weighed none: "
                    "if the loss reads another head, pass that as head= to apply_normbt",
                    stacklevel=2,
                )
        super().end_step()

    # --- what the first backwards show ---

    def _check_tokens(self, pooled: Index, gradient: Tensor) -> None:
        if pooled is None:
            return
        others = gradient.clone()
        others[pooled] = 0
        if others.any():
            raise ValueError(
                "the loss depends on other tokens than the rightmost one that is not the pad token, at which NormBT "
                "measures the distance: the model pools differently (is its pad token also the end of the text?)"
            )

    def _check_pairs(self, chosen: Tensor, rejected: Tensor, reward_sum: Tensor, dtype: torch.dtype) -> None:
        """Under a Bradley-Terry loss the gradients of a pair cancel up to a multiple of r_c + r_r (centering)."""
        rest = chosen + rejected
        centering = (rest @ reward_sum / (reward_sum @ reward_sum)).nan_to_num(0, 0, 0).clamp(min=0)
        largest = torch.maximum(chosen.abs(), rejected.abs()).max()
        bound = (1e-3 + 4 * torch.finfo(dtype).eps) * largest
        if not 0 < largest < float("inf"):
            return
        if (rest - centering * reward_sum).abs().max() > bound:
            raise ValueError(
                f"layout={self.layout!r} does not match the batches, as the gradients of its pairs do not cancel: "
                "pass 'halves' (all chosen, then all rejected), 'interleaved' (in turn) or, without centering, 'apart' "
                "(chosen in one forward, rejected in the next) to apply_normbt, or as head= the head that the loss "
                f"reads, if that is not {self._head_name!r}"
            )
        self._backwards_to_check -= 1

    # accelerate (FSDP2, cpu_ram_efficient_loading) sends a model to the meta device, shards it, and loads weights that
    # it takes to be sharded too. mu and num_updates are no weights: they stay, and are left out of the state meanwhile.
    def _apply(self, fn, recurse=True):
        kept = dict(self._buffers), self.pending
        super()._apply(fn, recurse)
        if self.mu.is_meta and not kept[0]["mu"].is_meta:
            self._buffers.update(kept[0])
            self.pending = kept[1]
            self._waits_for_weights = True
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self._waits_for_weights:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # A checkpoint from before NormBT: mu stays as it is.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], unexpected, errors)
        self._waits_for_weights = False

    def __getstate__(self):
        return super().__getstate__() | {"_knows_optimizers": False}  # another optimizer trains a copy


@dataclass
class Apart:
    """What the forward on the chosen sequences leaves for the one on the rejected sequences."""

    chosen: Tensor  # (P, H)
    weight: Tensor | None = None  # (P,), known in the second forward
    gradient: Tensor | None = None  # (P,) of the side whose backward came first


def _at(pooled: Index, values: Tensor) -> Tensor:
    return values if pooled is None else values[pooled]


def _replaced(gradient: Tensor, pooled: Index, rows: Tensor) -> Tensor:
    """`gradient` with other values, `rows` of N in all, in the scored rows."""
    column = cast(rows.reshape(-1, 1), gradient.dtype)
    if pooled is None:
        return column
    replaced = gradient.clone()
    replaced[pooled] = column
    return replaced


def _refuse_reentrant_checkpoint(gradient: Tensor) -> None:
    raise RuntimeError(
        "the scalar head is inside a reentrant activation checkpoint: pass use_reentrant=False, or checkpoint the "
        "layers before the head only"
    )


def _refuse_second_backward() -> None:
    raise RuntimeError(
        "NormBT weighs the gradients of a loss, and cannot be differentiated twice (backward ran with "
        "create_graph=True, as it does under torch.func)"
    )
