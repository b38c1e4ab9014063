"""NormBT in the Hugging Face `Trainer`.

data set of {chosen, rejected, prompt?, margin?, pair_weight?}: text or messages
  -> rows {chosen_ids, rejected_ids, margin?, pair_weight?}
  -> PreferenceCollator: one padded batch of 2B sequences, all chosen, then all rejected
  -> model(**batch), reading what enters the scalar head
  -> fused head:  LinearNormBTLoss on those rows and the head's weight: rewards and margins in fp32, whatever the logits
     reward form: NormBTLoss on the model's own rewards and those rows, where the weight is not a plain, whole tensor
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from normbt_kernels.data.checkpoints import (
    load_model,
    load_training_tokenizer,
    position_limit,
    tokenizer_of,
    vocabulary_size,
)
from normbt_kernels.data.collator import PreferenceCollator
from normbt_kernels.data.tokens import LeftOut
from normbt_kernels.integrations.checkpoint import LossInCheckpoints
from normbt_kernels.integrations.head import HeadReader, compile_anew, find_head, text_config
from normbt_kernels.integrations.pooled_head import PooledHead
from normbt_kernels.integrations.shortcuts import install_shortcuts, packing_for
from normbt_kernels.integrations.trainer_data import PairsInTrainer
from normbt_kernels.integrations.trainer_metrics import PairAccuracy, TrainTotals
from normbt_kernels.integrations.trainer_steps import LossInSteps, check_arguments
from normbt_kernels.modules import DistanceEMA, LinearNormBTLoss, NormBTLoss

logger = logging.get_logger(__name__)


# --- the trainer ---------------------------------------------------------------------------------------------------


class NormBTTrainer(LossInSteps, LossInCheckpoints, PairsInTrainer, Trainer):
    """`Trainer` for reward models, with NormBT as its loss.

    It takes any model whose final layer is a Linear with one output (encoder or decoder classifiers with
    `num_labels=1`). Data sets hold `chosen` and `rejected` as text or as lists of `{role, content}` messages, which the
    tokenizer's chat template lays out, with or without a `prompt` before them. They may hold the numbers `margin`
    (subtracted from the pair's difference of rewards) and `pair_weight` (multiplied with its loss). Token ids are
    welcome too, as `chosen_ids` and `rejected_ids`. The rewards of decoders are read where the saved model scores: at
    the rightmost token that is not the pad token. The first batches compare them with the model's own.

    If the head's weight is a plain, whole tensor on this rank (one device, DDP), the head is fused with the loss and
    gives fp32 rewards. Otherwise the rewards are the model's own, and the loss reads only the distance from the hidden
    states. A sharded head (FSDP, ZeRO-3) then gives fp32 rewards by `PooledHead`; a head that is quantised or has LoRA
    gives its own. The log says which form is used, and why.

    `mu` moves once for each optimizer step, by the mean over the pairs of all its micro-batches and ranks. The `mu`
    from before the step weighs them all, so accumulation does not change what is trained. DDP and FSDP average the
    gradients. By default accelerate (`even_batches`) gives every rank as many pairs, so gradients and `mu` are those of
    one process on the joined batch. Each rank reads its own batches: `dispatch_batches` is turned off, because it would
    cut a batch between chosen and rejected sequences.

    Logs `mu`, `mean_distance`, `min_weight`, `mean_weight`, `max_weight`, `bt_loss` (unweighted, comparable between
    losses), `accuracy` and `margin` over all pairs since the last log, with one copy to the host. Evaluation adds
    `eval_loss`, `eval_accuracy`, `eval_margin` and `eval_bt_loss`. Choose `eval_bt_loss` for `metric_for_best_model`:
    no mu weighs it, while `eval_loss` measures each checkpoint by its own mu. Between logs the host reads no loss:
    `logging_nan_inf_filter`, for which Trainer would read it, is turned off. If a loss is not finite, `bt_loss` shows
    it, and `loss` counts the last finite one in its place. Every checkpoint holds the state of the loss: a resumed run
    continues with it, and the best model is evaluated with it.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class: as in `Trainer`; without a
            collator, `PreferenceCollator` of the tokenizer (or of the processor's tokenizer). The model may be the name
            of a checkpoint, and then needs no tokenizer. With `model_init` instead of a model, each model that it
            makes is trained with a copy of the loss, `self.pair_loss`.
        loss: a module with the call of `LinearNormBTLoss` (the default if the head can be fused), or a `NormBTLoss`
            (the default otherwise; a `LinearNormBTLoss` is then turned into one).
        max_length: pairs with a sequence of more tokens (by default the tokenizer's `model_max_length`), or of more
            tokens than the model has positions for, are left out and counted in the log.
        truncate: cut such sequences instead, at the side where the tokenizer cuts.
        keep_identical: train on pairs with the same tokens on both sides too. By default they are left out and counted
            in the log.
        late_pooling, padding_free: as in `install_shortcuts`, with batches that the collator packs.
        compute_metrics: receives the predictions `(chosen_rewards, rejected_rewards, distance)`, each `(P,)`.
        **kwargs: everything else that `Trainer` takes.

    Raises:
        TypeError: the loss is none of these modules.
        ValueError: the model has no scalar head; the data are not preference pairs (the message names the row); the
            loss gives no single number; the head cannot be fused, and the loss needs its weight; Liger would replace
            the model's forward; or the process would drive several GPUs by `nn.DataParallel`. In `train`:
            `apply_normbt` is on the model too. At the first batch that shows it: the model pools in another way.
    """

    # The loss is a mean over the pairs of a micro-batch: Trainer divides it by the accumulation steps (5.17 does so
    # because the batches have no labels to count).
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: nn.Module | None = None,
        max_length: int | None = None,
        truncate: bool = False,
        keep_identical: bool = False,
        late_pooling: bool = False,
        padding_free: bool = False,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = PairAccuracy,
        **kwargs: Any,
    ):
        check_loss(loss)
        if isinstance(model, str | os.PathLike):
            processing_class = processing_class or load_training_tokenizer(str(model))
            model = load_model(str(model), tokenizer_of(processing_class), "float32", new_head=True)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("pass the tokenizer as processing_class, or a data_collator")
            data_collator = PreferenceCollator(tokenizer_of(processing_class))
        if compute_metrics is PairAccuracy:
            compute_metrics = PairAccuracy()  # each trainer has its own, which may keep batches
        self._given_loss, self._shortcuts = loss, {"late_pooling": late_pooling, "padding_free": padding_free}
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        check_arguments(self.args)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func is not called: pass the loss as loss=, which sees what the head reads")
        self.args.logging_nan_inf_filter = False
        self.accelerator.dataloader_config.dispatch_batches = False
        find_head(self.model)  # or fails, before the data are read
        if isinstance(data_collator, PreferenceCollator):
            limit = data_collator.tokenizer.model_max_length if max_length is None else max_length
            self.left_out = LeftOut(min(limit, position_limit(self.model) or limit), keep_identical)
            self.truncate, self.vocabulary = truncate, vocabulary_size(self.model)
            self.train_dataset = self._tokenized(self.train_dataset, "train_dataset")
            self.eval_dataset = self._tokenized(self.eval_dataset, "eval_dataset")
        self._follow(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in `Trainer`; the new model is trained with a loss of its own."""
        model = super().call_model_init(trial)
        if hasattr(self, "pair_loss"):  # the first model, which __init__ follows, comes before
            self._follow(model)
        return model

    def _follow(self, model: nn.Module) -> None:
        """Makes the loss for `model`, and a reader of its head.

        Raises:
            ValueError: as the constructor, about the model.
        """
        head, collator = find_head(model), self.data_collator
        if warning := head.warning():
            logger.warning(warning)
        if isinstance(collator, PreferenceCollator):
            # Trainer gives the model the tokenizer's pad token only in `train`, and decoders need it to evaluate.
            config = text_config(head.owner)
            if config is not None:
                config.pad_token_id = collator.tokenizer.pad_token_id
        reason = self._why_not_fused(head.module)
        loss = self._given_loss if self.model_init is None else copy.deepcopy(self._given_loss)
        self.pair_loss, self.fused = loss_and_form(loss, reason)
        self.pair_loss.to(self.args.device)
        if self.fused:
            logger.info(f"NormBT is fused with the head {head.name!r}, whose weight is a plain, whole tensor")
        else:
            logger.info(f"NormBT takes the model's own rewards: {reason or 'the loss given does not take the weight'}")
        in_fp32 = not self.fused and type(head.module) is nn.Linear
        if in_fp32:
            head.module.__class__ = PooledHead
        self.head, self.head_reader = head.module, HeadReader(head, pool=in_fp32)
        compile_anew()
        if any(self._shortcuts.values()):
            install_shortcuts(model, **self._shortcuts)
        if self._shortcuts["padding_free"] and isinstance(collator, PreferenceCollator):
            self.data_collator = replace(collator, packing=packing_for(model, self.args.device))
        self._totals = TrainTotals(self.args.device)
        self._finite_loss = torch.zeros((), device=self.args.device)

    def _why_not_fused(self, head: nn.Module) -> str | None:
        """What keeps the loss from reading the head's weight beside the model's forward; None if nothing does."""
        if self.is_fsdp_enabled or self.is_fsdp_xla_enabled:
            return "FSDP shards the head"
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            return "ZeRO-3 partitions the head"
        if type(head).forward is not nn.Linear.forward:
            return f"the head is a {type(head).__name__}, which is more than its weight"
        if type(head.weight) is not nn.Parameter or head.weight.shape != (1, head.in_features):
            return f"the head's weight is a {type(head.weight).__name__} of shape {tuple(head.weight.shape)}"
        return None

    # --- loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one batch as `PreferenceCollator` makes it, with the model's outputs if asked for.

        Raises:
            ValueError: the batch holds an odd number of sequences; or the model gives not one reward for each, or does
                not call its head.
        """
        loss, outputs, stats = self._loss_outputs_stats(model, inputs)
        if model.training:
            self._totals.add(stats)
        return (loss, outputs) if return_outputs else loss

    def _terms(self, outputs: Any, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows, self.head.weight, self.head.bias) if self.fused else super()._terms(outputs, rows)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`; returns the loss to be logged, or the last one that was finite."""
        loss = super().training_step(*args, **kwargs)
        self._finite_loss = torch.where(loss.isfinite(), loss, self._finite_loss)
        return self._finite_loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None, Tensor | None]:
        """Loss, `(chosen_rewards, rejected_rewards, distance)` each `(P,)`, and labels that say only that pairs
        have none: `Trainer` computes metrics only where it sees labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, _, stats = self._loss_outputs_stats(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        predictions = (stats.chosen_rewards, stats.rejected_rewards, stats.distance)
        return loss, predictions, torch.zeros_like(stats.distance)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.control.should_log and "loss" in logs:  # Trainer's own log, which is due, and not an evaluation
            logs |= self._totals.drain(self.accelerator.gather, getattr(self.pair_loss, "mu", None))
        super().log(logs, start_time)


# --- the loss ------------------------------------------------------------------------------------------------------


def check_loss(loss: Any) -> None:
    """
    Raises:
        TypeError: `loss` is none of what `NormBTTrainer` takes.
        ValueError: it gives no single number to minimise.
    """
    if not (loss is None or isinstance(loss, NormBTLoss) or _takes_head(loss)):
        raise TypeError(f"loss must be a module called like LinearNormBTLoss(), or a NormBTLoss(): got {loss!r}")
    if isinstance(loss, DistanceEMA) and loss.options.reduction == "none":
        raise ValueError("a training step minimises one number: the loss needs reduction='mean', not 'none'")


def _takes_head(loss: Any) -> bool:
    if not isinstance(loss, nn.Module):
        return False
    try:
        inspect.signature(loss.forward).bind("rows", "weight", "bias", return_stats=True)
    except TypeError:
        return False
    return True


def loss_and_form(loss: nn.Module | None, why_not_fused: str | None) -> tuple[nn.Module, bool]:
    """The loss to use, and whether it takes the head's weight (fused) or rewards.

    Raises:
        ValueError: the head cannot be fused, and `loss` is not known to take rewards.
    """
    if why_not_fused is None:
        loss = LinearNormBTLoss() if loss is None else loss
        return loss, not isinstance(loss, NormBTLoss)
    if loss is None:
        return NormBTLoss(), False
    if isinstance(loss, LinearNormBTLoss):
        twin = NormBTLoss(loss.beta, **loss.options._asdict(), process_group=loss.process_group)
        twin.load_state_dict(loss.state_dict())
        return twin, False
    if not isinstance(loss, NormBTLoss):
        raise ValueError(f"{type(loss).__name__} needs the head's weight, but {why_not_fused}: pass a NormBTLoss")
    return loss, False
