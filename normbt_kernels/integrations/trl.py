"""NormBT in TRL's `RewardTrainer`: the same constructor, configuration, data, metrics and checkpoints, another loss.

    batch of 2B sequences, all chosen, then all rejected
      -> model(**batch): its rewards, and what enters its scalar head
      -> NormBTLoss on those rewards and those rows: only the distance is read from the hidden states

The loss reads nothing of the head itself, so the head may be sharded, quantised or wrapped by peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from normbt_kernels.data.tokens import check_numbers, is_identical
from normbt_kernels.errors import UserError
from normbt_kernels.functional import NormBTStats
from normbt_kernels.integrations.checkpoint import LossInCheckpoints
from normbt_kernels.integrations.head import HeadReader, compile_anew, find_head
from normbt_kernels.integrations.shortcuts import install_shortcuts
from normbt_kernels.integrations.trainer_data import SampledByLength
from normbt_kernels.integrations.trainer_steps import LossInSteps, check_arguments
from normbt_kernels.modules import NormBTLoss

logger = logging.get_logger(__name__)

# The metrics of each batch, in this order, and how the values of the ranks become one. The first six are TRL's.
METRICS = {
    "num_tokens": sum,
    "min_reward": min,
    "mean_reward": fmean,
    "max_reward": max,
    "accuracy": fmean,
    "margin": fmean,
    "bt_loss": fmean,
    "mean_distance": fmean,
    "min_weight": min,
    "mean_weight": fmean,
    "max_weight": max,
}


class CollatorWithWeights(DataCollatorForPreference):
    """TRL's collator, whose batches also hold the column `pair_weight`, if the data have it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "pair_weight" in examples[0]:
            batch["pair_weight"] = torch.tensor([pair["pair_weight"] for pair in examples], dtype=torch.float32)
        return batch


class NormBTRewardMixin(LossInSteps, LossInCheckpoints, SampledByLength):
    """Makes any `RewardTrainer` train with NormBT: `class Mine(NormBTRewardMixin, MyRewardTrainer)`.

    It replaces `compute_loss`, and leaves out pairs whose two sides are the same tokens, from training and evaluation;
    everything else is the trainer's own. `margin` and `center_rewards_coefficient` act as in TRL: the margin inside the
    sigmoid, the centering unweighted. A column `pair_weight` multiplies the loss of each pair, unless you pass a
    collator of your own that leaves it out. It logs TRL's metrics, each the mean over the batches since the last log,
    and also `mu`, `mean_distance`, `bt_loss` (unweighted, comparable with TRL's `loss`) and the range and mean of the
    weights. They stay on the device until the log, which makes one copy to the host; every rank must log. Every
    checkpoint holds the state of the loss: a resumed run continues with it, and the best model is evaluated with it.
    Choose `eval_bt_loss` for `metric_for_best_model`; with several evaluation sets TRL's metrics do not name theirs,
    and only `eval_<set>_loss` does.

    `mu` moves once for each optimizer step, by the mean over the pairs of all its micro-batches and ranks. The `mu`
    from before the step weighs them all, so accumulation does not change what is trained.

    Args:
        *args, **kwargs: as the trainer takes them.
        beta, eps, max_weight, process_group, power: as in `NormBTLoss`.
        late_pooling, padding_free: as in `install_shortcuts`, which packs each batch that TRL has padded.

    Raises:
        ValueError: the model has no scalar head, Liger would replace its forward, a margin or weight is no number, or
            `label_smoothing_factor` is set. At a batch: it does not hold as many rejected sequences as chosen ones, or
            the forward bypasses the head. TRL itself refuses `num_labels` other than 1 and `nn.DataParallel`.
    """

    # For the model card.
    _name = "NormBT"
    _paper = {  # noqa: RUF012
        "title": "When Distance Distracts: Representation Distance Bias in BT-Loss for Reward Models",
        "id": "2512.06343",
    }

    def __init__(
        self,
        *args: Any,
        beta: float = 0.9,
        eps: float = 1e-6,
        max_weight: float | None = 100.0,
        process_group: dist.ProcessGroup | str | None = "default",
        late_pooling: bool = False,
        padding_free: bool = False,
        power: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator = CollatorWithWeights(**vars(self.data_collator))
        head = find_head(self.model)
        if warning := head.warning():
            logger.warning(warning)
        self.head_reader = HeadReader(head)
        compile_anew()
        if late_pooling or padding_free:
            install_shortcuts(self.model, late_pooling=late_pooling, padding_free=padding_free)
        self.pair_loss = NormBTLoss(
            beta,
            eps,
            max_weight,
            center_coef=self.args.center_rewards_coefficient or 0.0,
            process_group=process_group,
            power=power,
        ).to(self.args.device)
        self._unlogged: list[tuple[str, Tensor]] = []  # mode and (len(METRICS),) of each batch since the last log

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """As in `RewardTrainer`, but checks the columns and leaves out pairs whose sides are the same
        tokens: their distance is 0, and their weight would be its cap.

        Raises:
            ValueError: the columns are not there, a margin or weight is no number, or no pair is left.
        """
        if hasattr(dataset, "__len__") and not len(dataset):
            raise UserError(f"the {dataset_name} dataset is empty")
        columns = set(dataset.column_names or next(iter(dataset), {}))
        if not any({f"chosen{kind}", f"rejected{kind}"} <= columns for kind in ("", "_ids", "_input_ids")):
            raise ValueError(
                f"the {dataset_name} dataset needs the columns 'chosen' and 'rejected', text or messages (or token "
                f"ids, 'chosen_ids' and 'rejected_ids'); it has {', '.join(sorted(columns)) or 'none'}"
            )
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        is_stream, said = not hasattr(dataset, "__len__"), []
        if not is_stream and not len(dataset):
            raise UserError(f"the {dataset_name} dataset has no pair of at most max_length={args.max_length} tokens")

        def is_kept(pair: Mapping[str, Any], index: int) -> bool:
            where = f"the {dataset_name} dataset, row {index + 1}"
            check_numbers(pair, where)
            if not is_identical(pair):
                return True
            if is_stream and not said:
                said.append(f"{where}: the same tokens on both sides, left out like any such pair")
                logger.warning(said[0])
            return False

        kept = dataset.filter(is_kept, with_indices=True)
        if is_stream:
            return kept
        left_out = len(dataset) - len(kept)
        if not left_out:
            return dataset
        reason = f"{dataset_name} dataset: {left_out} of {len(dataset)} pairs are the same tokens on both sides"
        if not len(kept):
            raise UserError(reason)
        logger.warning(f"{reason}, and left out")
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "pair_weight" not in self._signature_columns:
            self._signature_columns.append("pair_weight")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one batch `{input_ids (2B, S), attention_mask (2B, S), margin (B,)?, pair_weight (B,)?}`, with
        the model's outputs if asked for."""
        loss, outputs, stats = self._loss_outputs_stats(model, inputs)
        self._keep_metrics(stats, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _outputs_and_rows(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        return super()._outputs_and_rows(model, {**inputs, "use_cache": False})

    def _keep_metrics(self, stats: NormBTStats, attention_mask: Tensor) -> None:
        rewards = torch.cat([stats.chosen_rewards, stats.rejected_rewards])
        margin = stats.chosen_rewards - stats.rejected_rewards
        of_batch = (
            attention_mask.sum(),
            *(rewards.amin(), rewards.mean(), rewards.amax()),
            *(stats.accuracy, margin.mean(), stats.bt_loss, stats.mean_distance),
            *(stats.weight.amin(), stats.weight.mean(), stats.weight.amax()),
        )
        mode = "train" if self.model.training else "eval"
        self._unlogged.append((mode, torch.stack([metric.float() for metric in of_batch])))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `RewardTrainer`, after the metrics since the last log were copied to the host."""
        if self._unlogged:
            self._fetch_metrics()
        super().log(logs, start_time)

    def _fetch_metrics(self) -> None:
        """Appends each batch's metrics to the lists that `RewardTrainer.log` averages."""
        modes, of_rank = zip(*self._unlogged, strict=True)
        self._unlogged = []
        of_ranks = self.accelerator.gather(torch.stack(of_rank))
        *values, mu = torch.cat([of_ranks.flatten(), self.pair_loss.mu.reshape(1)]).tolist()
        # values: (ranks, batches, metrics), row by row
        for batch, mode in enumerate(modes):
            for metric, (name, combine) in enumerate(METRICS.items()):
                value = combine(values[batch * len(METRICS) + metric :: len(modes) * len(METRICS)])
                if name != "num_tokens":
                    self._metrics[mode][name].append(value)
                elif mode == "train":
                    self._total_train_tokens += int(value) // self._tp_size
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if "train" in modes:
            self._metrics["train"]["mu"] = [mu]


class NormBTRewardTrainer(NormBTRewardMixin, RewardTrainer):
    """`trl.RewardTrainer` with NormBT as its loss: see `NormBTRewardMixin` for what it adds.

    Takes a `RewardConfig` and everything else that `RewardTrainer` takes.
    """
