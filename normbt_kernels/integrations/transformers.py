"""NormBT in the Hugging Face `Trainer`: a collator that lays pairs out, and a trainer that weighs them.

data set of {chosen, rejected, prompt?, margin?, pair_weight?}: text or messages
  -> rows {chosen_ids, rejected_ids, margin?, pair_weight?}
  -> PreferenceCollator: one padded batch of 2B sequences, all chosen, then all rejected
  -> model(**batch), reading what enters the scalar head
  -> fused head:  LinearNormBTLoss on those rows and the head's weight: rewards and margins in fp32, whatever the logits
     reward form: NormBTLoss on the model's own rewards and those rows, where the weight is not a plain, whole tensor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging

from normbt_kernels.data.collator import CONSTANTS, PreferenceCollator
from normbt_kernels.data.preferences import tokenize_dataset
from normbt_kernels.functional import NormBTStats
from normbt_kernels.integrations.checkpoint import LossInCheckpoints
from normbt_kernels.integrations.head import (
    find_head,
    find_owner,
    frozen_head_warning,
    last_token,
    refuse_fused_liger,
)
from normbt_kernels.integrations.pooled_head import pool_head
from normbt_kernels.modules import DistanceEMA, LinearNormBTLoss, NormBTLoss

logger = logging.get_logger(__name__)


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy`: the share of pairs whose chosen reward is strictly greater; `margin`: the mean difference."""
    chosen_rewards, rejected_rewards, _ = prediction.predictions
    margin = chosen_rewards - rejected_rewards
    return {"accuracy": (margin > 0).mean(), "margin": margin.mean()}


# --- the trainer ---------------------------------------------------------------------------------------------------


class NormBTTrainer(LossInCheckpoints, Trainer):
    """`Trainer` for reward models, with NormBT as its loss.

    Takes any model whose final layer is a Linear with one output (encoder or decoder classifiers with `num_labels=1`).
    Data sets hold `chosen` and `rejected` as text or as lists of `{role, content}` messages, laid out by the
    tokenizer's chat template, with or without a `prompt` before them; and, if wanted, the numbers `margin` (subtracted
    from the pair's difference of rewards) and `pair_weight` (multiplied with its loss). Or they hold `chosen_ids` and
    `rejected_ids`, token ids already. The rewards of decoders are read at the last real token of the attention mask,
    also where the pad token is the end-of-sequence token.

    The fused head is used where the head's weight is a plain, whole tensor on this rank (one device, DDP), and gives
    fp32 rewards. Otherwise the rewards are the model's own, and the loss reads only the distance from the hidden
    states: fp32 rewards, by `pool_head`, where the weight is sharded (FSDP, ZeRO-3); those that the head gives where it
    is quantised or LoRA is on it. The log says which form is used, and why.

    Ranks: gradients are averaged over ranks as DDP and FSDP do; `mu` is the mean over all ranks' pairs, by one
    reduction of two floats per micro-batch. accelerate's `even_batches` (its default) gives every rank as many pairs,
    so that both are what one process computes on the joined batch. Each rank reads its own batches: `dispatch_batches`
    would cut them through the middle of the pairs, and is turned off.

    Logs `mu`, `mean_distance`, `min_weight`, `mean_weight`, `max_weight`, `bt_loss` (unweighted, comparable between
    losses), `accuracy` and `margin` over all pairs since the last log, with one copy to the host; evaluation adds
    `eval_loss`, `eval_accuracy` and `eval_margin`. No step between reads the loss: `logging_nan_inf_filter`, by which
    Trainer would, is turned off. Where a loss is not finite, `bt_loss` shows it and `loss` counts the one before. The
    state of the loss is saved in every checkpoint that holds the optimizer, and a resumed run continues with it.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class: as in `Trainer`; without a
            collator, `PreferenceCollator(processing_class)`.
        loss: a module called as `LinearNormBTLoss` is (the default where the head can be fused), or a `NormBTLoss`
            (the default elsewhere, and made from a `LinearNormBTLoss`).
        max_length: pairs with a sequence of more tokens are left out of training and evaluation, and counted in the
            log; the tokenizer's `model_max_length` if None.
        compute_metrics: receives the predictions `(chosen_rewards, rejected_rewards, distance)`, each `(P,)`.
        **kwargs: everything else that `Trainer` takes.

    Raises:
        ValueError: the model has no scalar head; the data are no preference pairs (naming the row); the head cannot be
            fused, and the loss needs its weight; Liger would replace the model's forward; or the process would drive
            several GPUs by `nn.DataParallel`.
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
        max_length: int | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = pair_accuracy,
        **kwargs: Any,
    ):
        head_name, head = called_head(model)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("pass the tokenizer as processing_class, or a data_collator")
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
        _check_arguments(self.args)
        self.args.logging_nan_inf_filter = False
        self.accelerator.dataloader_config.dispatch_batches = False
        if not any(parameter.requires_grad for parameter in head.parameters()):
            logger.warning(frozen_head_warning(head_name))
        if isinstance(data_collator, PreferenceCollator):
            tokenizer = data_collator.tokenizer
            _align_padding(model, tokenizer)
            self._max_length = tokenizer.model_max_length if max_length is None else max_length
            self.train_dataset = self._tokenized(self.train_dataset, "train_dataset")
            self.eval_dataset = self._tokenized(self.eval_dataset, "eval_dataset")

        reason = self._why_not_fused(head)
        self.pair_loss, self.fused = loss_and_form(loss, reason)
        self.pair_loss.to(self.args.device)
        if self.fused:
            logger.info(f"NormBT is fused with the head {head_name!r}, whose weight is a plain, whole tensor")
        else:
            logger.info(f"NormBT takes the model's own rewards: {reason or 'the loss given does not take the weight'}")
            if type(head) is nn.Linear and find_owner(model, head) is not None:
                pool_head(model, head)  # which computes them in fp32
        self.head_name, self.head = head_name, head
        self.head_rows = HeadRows(head)
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

    # --- data ---

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", *CONSTANTS]

    def _tokenized(self, dataset: Any, name: str, whole: bool = False) -> Any:
        """`dataset` as the collator takes it: as it is if it holds token ids, or is for somebody else's collator.

        Raises:
            ValueError: a row is no pair; or pairs are too long, all of them, or one where `whole` says that all count.
        """
        if isinstance(dataset, dict):
            return {key: self._tokenized(part, f"{name}[{key!r}]") for key, part in dataset.items()}
        if dataset is None or not isinstance(self.data_collator, PreferenceCollator):
            return dataset
        if isinstance(dataset, torch.utils.data.IterableDataset) and not hasattr(dataset, "map"):
            return dataset  # a stream that might not begin anew after a look at its first row
        first = next(iter(dataset), None)
        if first is None or {"chosen_ids", "rejected_ids"} <= first.keys():
            return dataset
        with self.args.main_process_first(desc=f"tokenizing {name}"):  # the others find it in the cache
            tokenized = tokenize_dataset(dataset, self.data_collator.tokenizer, self._max_length, name)
        left_out = len(dataset) - len(tokenized) if hasattr(tokenized, "__len__") else 0
        if left_out:
            message = f"{name}: {left_out} of {len(dataset)} pairs are longer than {self._max_length} tokens"
            if whole or left_out == len(dataset):
                raise ValueError(message)
            logger.warning(f"{message}, and left out")
        return tokenized

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in `Trainer`; a data set given here may hold text or messages too."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self._tokenized(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """As in `Trainer`; the data set may hold text or messages too, but no pair longer than `max_length`: the
        predictions would not be those of the rows."""
        return super().get_test_dataloader(self._tokenized(test_dataset, "test_dataset", whole=True))

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

    def _loss_outputs_stats(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any, NormBTStats]:
        num_rows = len(inputs["attention_mask"])
        if num_rows % 2:
            raise ValueError(f"a batch holds all chosen sequences, then as many rejected: got {num_rows} sequences")
        constants = {name: inputs[name] for name in CONSTANTS if name in inputs}
        self.head_rows.expect(last_token(inputs["attention_mask"]))
        outputs = model(**{name: value for name, value in inputs.items() if name not in CONSTANTS})
        rows = self.head_rows.take()
        rewards = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if rows is None or rewards.numel() != num_rows:
            raise ValueError(
                f"expected one reward for each of {num_rows} sequences, from the head {self.head_name!r}, got logits "
                f"{tuple(rewards.shape)}, and the head was {'not ' if rows is None else ''}called: load the model "
                "with num_labels=1"
            )
        self.pair_loss.train(model.training)  # evaluation does not move mu
        if self.fused:
            terms = (rows, self.head.weight, self.head.bias)
        else:
            terms = (*rewards.reshape(num_rows).chunk(2), *rows.detach().chunk(2))
        loss, stats = self.pair_loss(*terms, **constants, return_stats=True)
        return loss, outputs, stats

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
        if "loss" in logs:  # a training step, not an evaluation
            if isinstance(self.pair_loss, DistanceEMA):
                self.pair_loss.synchronize()  # so that the mu that is logged includes the last batch
            logs |= self._totals.drain(self.accelerator.gather, getattr(self.pair_loss, "mu", None))
        super().log(logs, start_time)


def _check_arguments(args: TrainingArguments) -> None:
    if args.n_gpu > 1:  # its replicas would split the pairs and share one hook
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: start one process per GPU (torchrun or accelerate launch), "
            "or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    refuse_fused_liger(args)


def _align_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model the tokenizer's pad token if it has none, without which decoders refuse to be evaluated."""
    decoder = next((module for module in model.modules() if isinstance(module, GenericForSequenceClassification)), None)
    if decoder is None:
        return
    config = decoder.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning(
            "the pad token is the end-of-sequence token: rewards are trained at each sequence's true last token, but "
            "the saved model's own forward takes the last one that is not the pad token: better give the tokenizer a "
            "pad token of its own"
        )


# --- the head ------------------------------------------------------------------------------------------------------


def called_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the scalar head as the model calls it: under peft the copy in `modules_to_save` that is in
    use, or the adapter layer around the `Linear`.

    Raises:
        ValueError: the model has no scalar head.
    """
    modules = dict(model.named_modules())
    path = next((name for name in reversed(modules) if getattr(modules[name], "out_features", None) == 1), "").split(
        "."
    )
    for depth, name in enumerate(path, start=1):
        module = modules[".".join(path[:depth])]
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            inside = path[depth + 2 :]  # past modules_to_save.<adapter>, where the copy is of more than the head
            return [name, *inside][-1], copies[module.active_adapters[0]].get_submodule(".".join(inside))
        if hasattr(module, "base_layer"):
            return name, module
    return path[-1], find_head(model)


class HeadRows:
    """Lets `head` see only the last token of each sequence, in the forward pass between `expect` and `take`:

        (N, S, H) -> (N, 1, H) -> head -> (N, 1, 1) -> (N, S, 1), expanded

    so that the model finds the reward of the true last token whichever one it pools, and no other is scored. Rows that
    are pooled already, (N, H), pass as they are.

    The hooks are registered once: torch.compile traces hooks when it first compiles and never looks for new ones.
    """

    def __init__(self, head: nn.Module):
        self._last_token: Tensor | None = None
        self._rows: Tensor | None = None
        self._length: int | None = None  # S, while the head sees rows of (N, S, H)
        head.register_forward_pre_hook(self._pool, with_kwargs=True)
        head.register_forward_hook(self._expand)

    def expect(self, last_token: Tensor) -> None:
        """The next forward pass is the one to pool, at `last_token` (N,)."""
        self._last_token = last_token

    def take(self) -> Tensor | None:
        """What the head saw in that forward pass, `(N, H)`, once; None if it was not called. Nothing is kept
        afterwards, so activations live no longer than their step."""
        rows, self._rows, self._last_token = self._rows, None, None
        return rows

    def _pool(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]):
        if self._last_token is None:
            return None
        self._rows = hidden = args[0] if args else kwargs["input"]
        if hidden.dim() == 2:
            return None
        self._length = hidden.shape[1]
        self._rows = hidden[torch.arange(len(hidden), device=hidden.device), self._last_token.to(hidden.device)]
        return (self._rows.unsqueeze(1),), {}

    def _expand(self, module: nn.Module, args: tuple[Tensor, ...], rewards: Tensor) -> Tensor | None:
        length, self._length = self._length, None
        return None if length is None else rewards.expand(-1, length, -1)


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


# --- logging -------------------------------------------------------------------------------------------------------


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
