"""NormBT in a trainer that is not ours: the loss stays plain Bradley-Terry, its gradient becomes NormBT's.

    forward    rho = ||h_c - h_r||_2, w = min(mu / (rho + eps), max_weight)        logits pass through as they are
    backward   with g the gradient of a pair's two rewards:
                   (g_c - g_r)/2  is multiplied by w       a function of r_c - r_r: BT with margin or label smoothing
                   (g_c + g_r)/2  is left alone            a function of r_c + r_r: the centering term

A hook on the head reads its input and hooks the gradient of its output; nothing else of the model is touched.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normbt_kernels.checks import LAYOUTS
from normbt_kernels.integrations.head import ModelInputs, find_head
from normbt_kernels.modules import LinearNormBTLoss

Scale = Callable[[Tensor], Tensor]  # the gradient of a batch's logits under BT -> under NormBT


def apply_normbt(
    model: nn.Module,
    layout: str = "halves",
    beta: float = 0.9,
    eps: float = 1e-6,
    max_weight: float | None = 100.0,
    head: nn.Linear | None = None,
) -> None:
    """Turns the Bradley-Terry loss that `model` is trained with, by any trainer, into NormBT: one line before training.

    The trainer's logged loss stays plain BT, the logits stay what they are bit for bit; in backward, the
    antisymmetric part of each pair's reward gradient is multiplied by the pair's NormBT weight. So BT with a margin
    or with label smoothing becomes exactly NormBT, and a centering term is left alone.

    Each forward in training mode that needs gradients is one batch of pairs: it is weighed by the `mu` from before
    it, and updates `mu` (as `NormBTLoss` does: shared by all ranks, first batch by its own mean, batches that are
    not finite ignored). Any number of forwards may come before a backward, in any order of backwards; a forward
    repeated by activation checkpointing, of a layer or of the whole model, counts once. In eval mode and without
    gradients nothing happens: neither `mu` nor a gradient changes, and any number of sequences is welcome.

    Decoders are read at the token that transformers' classifiers score: the rightmost one that is not the pad token.
    The first backward checks that the gradient reaches no other (the only time that the host waits for the device).

    `mu` and `num_updates` are buffers of a submodule `normbt` of the head. They are saved and restored with the
    model, whose own keys stay as they were: `from_pretrained` without this package loads the checkpoint and reports
    two unexpected keys, and a checkpoint without them leaves a fresh `mu`. With peft, the head in `modules_to_save`
    carries them in the adapter; apply before or after `get_peft_model`, as fits.

    Args:
        model: the reward model, bare or wrapped (peft, DDP, `fully_shard`, `torch.compile`, which gets a graph break
            at the head).
        layout: which sequences of a batch are a pair: "halves" (i and i + N/2; TRL, OpenRLHF) or "interleaved" (2i and
            2i + 1; RLHFlow), the chosen one first.
        beta: decay of the EMA, in [0, 1).
        eps: added to the distance, >= 0.
        max_weight: cap on the weights, None for no cap.
        head: the scalar head; without it, the last `Linear` with one output.

    Raises:
        ValueError: the model has no scalar head or has NormBT already, or an argument is out of range. Later, in the
            forward or backward that shows it: an odd number of sequences; a forward that does not call the head
            (Liger, Unsloth); a model that scores other tokens; replicas of `nn.DataParallel`.

    Warns:
        UserWarning: the head is frozen, as under LoRA without `modules_to_save`.
    """
    if _applied(model):
        raise ValueError(f"NormBT is already applied to this {type(model).__name__}: call remove_normbt(model) first")
    found = find_head(model, head)
    head = found.linear()
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    weights = PairWeights(layout, beta, eps, max_weight)
    if found.warning_if_frozen():
        warnings.warn(found.warning_if_frozen(), stacklevel=2)
    weights.attach(head, found.owner)


def remove_normbt(model: nn.Module) -> None:
    """Undoes `apply_normbt`: the model is what it was, and trains with plain BT again. `mu` is lost.

    Raises:
        ValueError: NormBT is not applied to this model.
    """
    applied = _applied(model)
    if not applied:
        raise ValueError(f"NormBT is not applied to this {type(model).__name__}")
    for head, weights in applied:
        weights.detach(head)


def _applied(model: nn.Module) -> list[tuple[nn.Module, PairWeights]]:
    """Every head that holds weights, with them: peft's `modules_to_save` keeps a copy of the head beside it."""
    names = [name for name, module in model.named_modules() if isinstance(module, PairWeights)]
    return [(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)) for name in names]


class PairWeights(LinearNormBTLoss):
    """The weights of each batch that passes a head, and their EMA; the submodule `normbt` of that head."""

    def __init__(self, layout: str, beta: float, eps: float, max_weight: float | None):
        super().__init__(beta, eps, max_weight)
        self.layout = layout
        self._first_passes = FirstPasses()
        self._gradient_checked = False
        self._waits_for_weights = False

    def attach(self, head: nn.Linear, owner: nn.Module | None) -> None:
        self.to(head.weight.device).train(head.training)
        self._inputs = ModelInputs(owner)
        # First, because a pooled head's own hook expands the (N, 1) rewards that are wanted here.
        self._hook = head.register_forward_hook(self._after_head, prepend=True, with_kwargs=True)
        head.normbt = self

    def detach(self, head: nn.Linear) -> None:
        self._hook.remove()
        self._inputs.remove()
        del head.normbt

    def _after_head(self, head: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], logits: Tensor) -> None:
        inputs = self._inputs.take()
        if self.training:
            self._weigh(head, args[0] if args else kwargs["input"], inputs, logits)

    @torch._disable_dynamo  # torch.compiler.disable, which would import half of torch with this package
    def _weigh(self, head: nn.Module, hidden: Tensor, inputs: Mapping[str, Any], logits: Tensor) -> None:
        """Hooks the gradient of the logits, (N, S, 1) or (N, 1), if there will be one."""
        if getattr(head, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel splits the pairs of a batch: start one process per GPU (torchrun or accelerate "
                "launch), or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if torch._C._current_graph_task_id() != -1:  # a checkpoint repeats this forward inside backward
            scale = self._first_passes.recall()
            if scale is not None:
                logits.register_hook(scale)
        elif logits.requires_grad:
            logits.register_hook(self._score_batch(hidden, inputs))
        elif _will_be_repeated():
            self._first_passes.keep(self._score_batch(hidden, inputs))

    def _score_batch(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Scale:
        """Weighs the batch, updates mu, and returns what the gradient of its logits goes through."""
        token = None if hidden.dim() == 2 else self._inputs.unpadded_token(inputs, hidden)
        no_head = hidden.new_zeros(hidden.shape[-1])  # the rewards do not matter here
        _, stats = self(hidden.detach(), no_head, pairs=self.layout, last_token=token, return_stats=True)
        return partial(self._scale, stats.weight, token)

    def _scale(self, weight: Tensor, token: Tensor | None, gradient: Tensor) -> Tensor:
        """The gradient of the logits under NormBT, in its own dtype, from that under BT; computed in fp32 or wider."""
        pooled = (slice(None),) if token is None else (torch.arange(len(token), device=token.device), token)
        if not self._gradient_checked:
            self._check_gradient(pooled, gradient)
        dtype = torch.promote_types(gradient.dtype, weight.dtype)
        pairs = gradient[pooled].to(dtype)
        chosen, rejected = pairs.view(2, -1) if self.layout == "halves" else pairs.view(-1, 2).T
        symmetric, antisymmetric = (chosen + rejected) / 2, weight * (chosen - rejected) / 2
        pairs = torch.stack([symmetric + antisymmetric, symmetric - antisymmetric])
        scaled = gradient.clone()
        scaled[pooled] = (pairs if self.layout == "halves" else pairs.T).reshape(-1, 1).to(gradient.dtype)
        return scaled

    def _check_gradient(self, pooled: tuple, gradient: Tensor) -> None:
        others = gradient.clone()
        others[pooled] = 0
        if others.any():
            raise ValueError(
                "the loss depends on other tokens than the rightmost one that is not the pad token, at which NormBT "
                "measures the distance: the model pools differently (is its pad token also the end of the text?)"
            )
        self._gradient_checked = True

    # accelerate (FSDP2, cpu_ram_efficient_loading) sends a model to the meta device, shards it, and loads weights that
    # it takes to be sharded too. mu and num_updates are no weights: they stay, and are not named meanwhile.
    def _apply(self, fn, recurse=True):
        kept = self.mu, self.num_updates
        super()._apply(fn, recurse)
        if self.mu.is_meta and not kept[0].is_meta:
            self.mu, self.num_updates = kept
            self._waits_for_weights = True
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self._waits_for_weights:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # A checkpoint from before NormBT: mu stays as it is.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], unexpected, errors)
        self._waits_for_weights = False


class FirstPasses:
    """What the batches under reentrant checkpoints are scaled by, kept from the first pass for the one in backward.

    The first pass runs without gradients, in the order of forwards, and weighs the batch; the second runs inside
    backward, whenever the engine comes to it, and has the graph. Autograd numbers each node when it makes it, so that
    the passes of a checkpoint are those with the next numbers after the number of its node.
    """

    MAX_WAITING = 1024  # each is one weight per pair

    def __init__(self):
        self._passes: deque[tuple[int, Scale]] = deque(maxlen=self.MAX_WAITING)
        self._checkpoint: tuple[int, int] | None = None
        self._repeated = 0

    def keep(self, scale: Scale) -> None:
        self._passes.append((torch._C._autograd._get_sequence_nr(), scale))

    def recall(self) -> Scale | None:
        """The scale of the pass that is being repeated; None where the checkpoint is not reentrant, and the graph of
        the first pass, with its hook, is the one that runs."""
        if not self._passes:
            return None
        node = torch._C._current_autograd_node()._sequence_nr()
        if len(self._passes) == self.MAX_WAITING and self._passes[0][0] > node:
            raise ValueError(f"more than {self.MAX_WAITING} forwards under reentrant checkpoints await their backward")
        checkpoint = torch._C._current_graph_task_id(), node
        self._repeated = self._repeated + 1 if checkpoint == self._checkpoint else 0
        self._checkpoint = checkpoint
        within = [scale for number, scale in self._passes if number > node]
        return within[self._repeated] if self._repeated < len(within) else None

    def __reduce__(self):
        return FirstPasses, ()  # a copy of the model has none of its graphs


def _will_be_repeated() -> bool:
    """Whether this is the forward of an autograd.Function, run without gradients to be repeated with them in backward,
    as reentrant checkpoints do. `torch.no_grad` leaves forward-mode differentiation on; such a forward does not."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
