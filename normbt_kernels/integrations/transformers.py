"""NormBT in the Hugging Face `Trainer`: a collator that lays pairs out, and a trainer that weighs them.

rows {chosen_ids, rejected_ids, margin?}
  -> PreferenceCollator: one padded batch of 2B sequences, all chosen, then all rejected
  -> model(**batch), reading what enters the scalar head
  -> LinearNormBTLoss on those rows and the head's weight: rewards and margins in fp32, whatever the logits are
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from normbt_kernels import LinearNormBTLoss
from normbt_kernels.integrations.head import HeadInput, find_head
from normbt_kernels.modules import DistanceEMA

logger = logging.get_logger(__name__)

LOSS_STATE_NAME = "normbt.pt"


@dataclass
class PreferenceCollator:
    """Pads tokenised pairs into one batch in halves layout: row i is preferred to row i + B.

    Pads on `tokenizer.padding_side` with `tokenizer.pad_token_id`. The attention mask is made from the lengths,
    so a pad token that also occurs in the text (pad == eos) does no harm.

    Args:
        tokenizer: gives the pad token and the side.
        pad_to_multiple_of: rounds the sequence length up, for tensor cores or to limit recompiles.

    Call it on rows `{"chosen_ids": [int], "rejected_ids": [int], "margin": float (optional)}`; returns int64
    `input_ids` and `attention_mask` `(2B, S)`, and fp32 `margin` `(B,)` if the rows have one.

    Raises:
        ValueError: the tokenizer has no pad token.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token first")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sequences = [torch.as_tensor(row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
        length = max(len(sequence) for sequence in sequences)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, sequence in enumerate(sequences):
            start = length - len(sequence) if self.tokenizer.padding_side == "left" else 0
            input_ids[i, start : start + len(sequence)] = sequence
            attention_mask[i, start : start + len(sequence)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return batch


def last_token(attention_mask: Tensor) -> Tensor:
    """Position of the last real token of each sequence, `(N, S)` -> `(N,)` int64, for padding on either side."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * positions).argmax(dim=1)


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy`: the share of pairs whose chosen reward is strictly greater; `margin`: the mean difference."""
    chosen_rewards, rejected_rewards, _ = prediction.predictions
    margin = chosen_rewards - rejected_rewards
    return {"accuracy": (margin > 0).mean(), "margin": margin.mean()}


class NormBTTrainer(Trainer):
    """`Trainer` for reward models, with NormBT as its loss.

    Takes any model whose final layer is an `nn.Linear` with one output, and rows as `PreferenceCollator` takes them, on
    one device or under DDP. The head's weight is read beside the model's forward: not for sharded heads (FSDP, ZeRO-3).
    The rewards of decoders are read at the last real token of the attention mask. Logs `mu`, `mean_distance`,
    `bt_loss` (unweighted, comparable between losses), `accuracy` and `margin` with the loss; evaluation adds
    `eval_loss`, `eval_accuracy` and `eval_margin`. The state of the loss is saved in every checkpoint that holds
    the optimizer, and a resumed run continues with it.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class: as in `Trainer`; without a
            collator, `PreferenceCollator(processing_class)`.
        loss: a module called as `LinearNormBTLoss` is, which is also the default.
        compute_metrics: receives the predictions `(chosen_rewards, rejected_rewards, distance)`, each `(P,)`.
        **kwargs: everything else that `Trainer` takes.

    Raises:
        ValueError: the model has no scalar head, or the process would drive several GPUs by `nn.DataParallel`.
    """

    # The loss is a mean over the pairs of a micro-batch: Trainer divides it by the accumulation steps (5.17 does so
    # because the batches have no labels to count).
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: nn.Module | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = pair_accuracy,
        **kwargs: Any,
    ):
        head = find_head(model)
        if data_collator is None and processing_class is not None:
            data_collator = PreferenceCollator(processing_class)
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
        if self.args.n_gpu > 1:  # its replicas would split the pairs and share one hook
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: start one process per GPU (torchrun or accelerate launch), "
                "or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if not head.weight.requires_grad:
            logger.warning(
                "the scalar head is frozen and will not be trained; with peft, pass task_type='SEQ_CLS' or "
                f"modules_to_save=[{self._head_name(model, head)!r}] in LoraConfig"
            )
        self.head = head
        self.head_input = HeadInput(head)
        self.pair_loss = (LinearNormBTLoss() if loss is None else loss).to(self.args.device)
        self._train_sums = TrainSums(self.args.device)

    @staticmethod
    def _head_name(model: nn.Module, head: nn.Linear) -> str:
        return next(name for name, module in model.named_modules() if module is head).rpartition(".")[2]

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "margin"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one batch `{input_ids, attention_mask, margin?}`, with the model's outputs if asked for."""
        loss, outputs, stats = self._loss_outputs_stats(model, inputs)
        if model.training:
            self._train_sums.add(stats)
        return (loss, outputs) if return_outputs else loss

    def _loss_outputs_stats(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any, Any]:
        model_inputs = {name: value for name, value in inputs.items() if name != "margin"}
        self.head_input.expect()
        outputs = model(**model_inputs)
        hidden = self.head_input.take()
        self.pair_loss.train(model.training)  # evaluation does not move mu
        loss, stats = self.pair_loss(
            hidden,
            self.head.weight,
            self.head.bias,
            last_token=last_token(inputs["attention_mask"]) if hidden.dim() == 3 else None,
            margin=inputs.get("margin"),
            return_stats=True,
        )
        return loss, outputs, stats

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
        if "loss" in logs:  # a training step, not an evaluation
            if isinstance(self.pair_loss, DistanceEMA):
                self.pair_loss.synchronize()  # so that the mu that is logged includes the last batch
            logs |= self._train_sums.drain(self.accelerator.reduce, getattr(self.pair_loss, "mu", None))
        super().log(logs, start_time)

    # The loss is saved and restored with the optimizer: both are training state, and no part of the model.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.pair_loss.state_dict()
        if self.args.should_save and state:
            torch.save(state, os.path.join(output_dir, LOSS_STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.pair_loss.state_dict():
            return
        path = os.path.join(checkpoint, LOSS_STATE_NAME)
        if os.path.isfile(path):
            self.pair_loss.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))
        else:
            logger.warning(f"{checkpoint} has no {LOSS_STATE_NAME}: mu starts anew from the next batch")


class TrainSums:
    """Statistics of the batches since the last log, summed on the device and copied to the host once per log."""

    NAMES = ("bt_loss", "accuracy", "mean_distance", "margin")

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(len(self.NAMES) + 1, device=device)  # the last entry counts pairs

    def add(self, stats: Any) -> None:
        num_pairs = stats.distance.numel()
        margin = (stats.chosen_rewards - stats.rejected_rewards).mean()
        means = torch.stack([stats.bt_loss, stats.accuracy, stats.mean_distance, margin, torch.ones_like(margin)])
        self._sums += num_pairs * means

    def drain(self, reduce: Callable[[Tensor, str], Tensor], mu: Tensor | None) -> dict[str, float]:
        """Means over all pairs of all ranks since the last call, and `mu` as it is now."""
        *sums, num_pairs, mu_now = torch.cat([reduce(self._sums, "sum"), _mu_or_nan(mu, self._sums)]).tolist()
        self._sums.zero_()
        means = {name: total / num_pairs for name, total in zip(self.NAMES, sums, strict=True)}
        return means if mu is None else means | {"mu": mu_now}


def _mu_or_nan(mu: Tensor | None, like: Tensor) -> Tensor:
    return like.new_full((1,), float("nan")) if mu is None else mu.reshape(1).to(like.dtype)
