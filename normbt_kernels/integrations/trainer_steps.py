"""The loss in the steps of a `Trainer`: computes it for a batch of pairs, and moves mu when the trainer has stepped its
optimizer, with whatever engine it does that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from normbt_kernels.data.rows import NUMBERS
from normbt_kernels.functional import NormBTStats, pair_distance
from normbt_kernels.integrations.apply import applied_to
from normbt_kernels.integrations.head import HeadReader, logits_of, refuse_fused_liger
from normbt_kernels.modules import DistanceEMA


def check_arguments(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: one process would drive several GPUs, Liger would replace the forward that calls the head, or an
            option would change nothing.
    """
    if args.n_gpu > 1:  # its replicas would split the pairs and share one hook
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: start one process per GPU (torchrun or accelerate launch), "
            "or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} smooths token labels, of which pairs have none: "
            "NormBTTrainer takes loss=LinearNormBTLoss(label_smoothing=...)"
        )
    refuse_fused_liger(args)


class LossInSteps:
    """A base class to name before `Trainer`: it computes the loss of a batch with `self.head_reader` and
    `self.pair_loss`, and moves mu once for each optimizer step.

    The mu from before a step weighs all its pairs. The first step has no mu yet. If it has several micro-batches, the
    model reads them all once beforehand, without gradients and with the random numbers of the pass that trains, and
    their mean distance weighs them. So the first step does not depend on how it is cut into micro-batches either.
    """

    pair_loss: nn.Module
    head_reader: HeadReader

    def _outputs_and_rows(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        """The model's outputs for a batch, and the rows (2B, H) that its head reads, all chosen, then all rejected."""
        num_sequences = len(inputs["last_token"] if "last_token" in inputs else inputs["input_ids"])
        if num_sequences % 2:
            raise ValueError(
                f"a batch holds all chosen sequences, then as many rejected: got {num_sequences} sequences"
            )
        self.head_reader.expect(inputs["input_ids"])
        try:
            outputs = model(**{name: value for name, value in inputs.items() if name not in NUMBERS})
        except BaseException:
            self.head_reader.forget()
            raise
        return outputs, self.head_reader.take(logits_of(outputs))

    def _terms(self, outputs: Any, rows: Tensor) -> tuple[Tensor, ...]:
        """What the loss reads of the model: its own rewards, and the rows for their distances."""
        return *logits_of(outputs).reshape(len(rows)).chunk(2), *rows.detach().chunk(2)

    def _loss_outputs_stats(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any, NormBTStats]:
        outputs, rows = self._outputs_and_rows(model, inputs)
        numbers = {name: inputs[name] for name in NUMBERS if name in inputs}
        self.pair_loss.train(model.training)  # evaluation does not move mu
        loss, stats = self.pair_loss(*self._terms(outputs, rows), **numbers, return_stats=True)
        return loss, outputs, stats

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`.

        Raises:
            ValueError: `apply_normbt` is on the model, whose gradients would be weighed twice or not at all.
        """
        if self.model is not None and applied_to(self.model):  # None where hyperparameter_search has yet to make it
            raise ValueError(
                f"{type(self).__name__} has NormBT as its loss, and apply_normbt is on its model too: call "
                "remove_normbt(model), or leave the loss to transformers.Trainer or trl.RewardTrainer"
            )
        if isinstance(self.pair_loss, DistanceEMA):
            self.pop_callback(EndStep)
            self.add_callback(EndStep(self))
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`: the micro-batches of one step. Before the first step, their mean distance is measured."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        has_ema = isinstance(self.pair_loss, DistanceEMA)
        if batches and num_batches > 1 and has_ema and not self.pair_loss.first_step_ended:
            self.pair_loss.begin_with(self._distances(batches))
        return batches, num_items

    @torch.no_grad()
    def _distances(self, batches: list[Mapping[str, Tensor]]) -> list[Tensor]:
        device, model = self.args.device, self.model_wrapped
        model.train()
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type), self.compute_loss_context_manager():
            rows = (self._outputs_and_rows(model, self._prepare_inputs(batch))[1] for batch in batches)
            return [pair_distance(each) for each in rows]


class EndStep(TrainerCallback):
    """Ends the step of the loss when the trainer has stepped its optimizer."""

    def __init__(self, trainer: LossInSteps):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.pair_loss.per_step = True
        self.trainer.pair_loss.pending.zero_()  # of gradients that the trainer has just dropped

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.pair_loss.end_step()
