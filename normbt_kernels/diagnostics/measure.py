"""Measures preference pairs on a model: rewards and distances of all, and the backbone's gradient of a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from normbt_kernels.data.checkpoints import vocabulary_size
from normbt_kernels.data.collator import PreferenceCollator
from normbt_kernels.data.preferences import parse_row
from normbt_kernels.data.tokens import LeftOut, check_ids, tokenize_pair
from normbt_kernels.diagnostics.diagnosis import Diagnosis
from normbt_kernels.errors import UserError
from normbt_kernels.functional import linear_normbt_loss
from normbt_kernels.integrations.head import Head, HeadReader, compile_anew, find_head
from normbt_kernels.resumable import fingerprint, map_resumable


def diagnose(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Mapping[str, Any]],
    *,
    num_gradients: int = 256,
    batch_size: int = 8,
    max_length: int | None = None,
    eps: float = 1e-6,
    max_weight: float | None = 100.0,
    partial: Path | None = None,
) -> Diagnosis:
    """Measures error, distance and gradient norms of preference pairs under `model`, which is left as it was.

    First it makes one pass over all pairs without gradients. Then it measures the backbone's gradient of
    `num_gradients` pairs, spread evenly over the order of distance, one pair at a time. This needs memory for the
    activations of one pair and one gradient of the model. Dropout is off. Rewards and distances are computed in fp32
    (fp64 for an fp64 model) from the hidden states at the last real token, as in training with `NormBTTrainer`. The
    loss is BT without margins, weights or smoothing.

        diagnosis = diagnose(model, tokenizer, pairs)
        print(diagnosis)                     # slopes, shares and means as a table, and one sentence
        diagnosis.plot("diagnosis.png")

    Args:
        model: a classifier with a scalar head, on one device; gradients are taken for its weights that require them.
        tokenizer: tokenises and pads the pairs; it needs a pad token.
        pairs: rows with `chosen` and `rejected` as text or messages, optional `prompt`, `category` or `subset`; or with
            the token ids `chosen_ids` and `rejected_ids`, optional `category`.
        num_gradients: pairs whose backbone gradient is measured; all of them if there are fewer.
        batch_size: pairs per forward pass of the pass over all pairs.
        max_length: pairs with a sequence of more tokens are left out and counted, as are pairs with the same tokens on
            both sides, which have no distance.
        eps, max_weight: of NormBT's weight, as in `normbt_loss`.
        partial: keeps results as they come in two files, `partial_files(partial)`, from which the same call continues
            after a stop. The caller removes them.

    Returns:
        The `Diagnosis`: host arrays of the P pairs that are short enough and the M <= `num_gradients` sampled ones.

    Raises:
        ValueError: `num_gradients` or `batch_size` is below 1, `eps` or `max_weight` is not above 0; the model has no
            scalar head, or nothing to train but its head; a row is no preference pair (naming it); no pair is short
            enough; a reward or distance is not finite (naming the pair); all distances are 0, or all gradients.
    """
    if num_gradients < 1 or batch_size < 1:
        raise UserError(f"num_gradients and batch_size must be at least 1, got {num_gradients} and {batch_size}")
    if not eps > 0 or not (max_weight is None or max_weight > 0):
        raise UserError(f"eps and max_weight must be above 0, got {eps} and {max_weight}")
    found = find_head(model)
    head = found.linear()
    of_head = set(head.parameters())
    backbone = [weight for weight in model.parameters() if weight.requires_grad and weight not in of_head]
    if not backbone:
        raise UserError("every weight but the head's is frozen: there is no backbone gradient to measure")
    rows = _token_ids(pairs, tokenizer, vocabulary_size(model))
    if not rows:
        raise UserError("there are no pairs")
    left_out = LeftOut(math.inf if max_length is None else max_length)
    verdicts = [left_out.verdict(row) for row in rows]
    short = [i for i, verdict in enumerate(verdicts) if verdict == "kept"]
    if not short:
        raise UserError(f"no pair is left: {' and '.join(left_out.reasons(verdicts))}")
    num_left_out, rows = len(rows) - len(short), [rows[i] for i in short]

    name = None if partial is None else fingerprint(model, rows, batch_size)
    kept_rewards, kept_gradients = (None, None) if partial is None else partial_files(partial)
    with _reading(model, found) as reader:
        probe = _Probe(model, head, reader, PreferenceCollator(tokenizer), rows)
        batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
        read = map_resumable(probe.rewards_and_distance, batches, kept_rewards, name, "rewards and distances")
        chosen, rejected, distance = np.concatenate([np.array(batch) for batch in read], axis=1)
        finite = np.isfinite(chosen - rejected) & np.isfinite(distance)
        if not finite.all():
            raise UserError(f"the reward or distance of pair {short[finite.argmin()] + 1} is not finite")
        if not distance.any():
            raise UserError("chosen and rejected have the same hidden state in every pair: there is no distance")
        sample = spread_evenly(distance, num_gradients)

        def sensitivity(pair: Sequence[int]) -> float:
            return probe.gradient_norm(pair[0], backbone)

        one_by_one = [[int(i)] for i in sample]
        name = f"{name} {num_gradients}"
        norms = np.array(map_resumable(sensitivity, one_by_one, kept_gradients, name, "backbone gradients"))
    if not norms.any():
        raise UserError("no trained weight of the backbone changes a reward: there is no gradient to measure")
    return Diagnosis(
        difference=chosen - rejected,
        distance=distance,
        sample=sample,
        sensitivity=norms,
        categories=[str(row["category"]) for row in rows] if all("category" in row for row in rows) else None,
        number=np.array(short) + 1,
        num_left_out=num_left_out,
        eps=eps,
        max_weight=max_weight,
    )


def partial_files(partial: Path) -> tuple[Path, Path]:
    """The files that keep rewards with distances, and gradients, until the diagnosis is written."""
    rewards, gradients = (partial.with_name(f"{partial.name}.{name}") for name in ("rewards", "gradients"))
    return rewards, gradients


def _token_ids(
    pairs: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None
) -> list[Mapping[str, Any]]:
    rows = []
    for number, row in enumerate(pairs, start=1):
        where = f"pairs, row {number}"
        rows.append(row if "chosen_ids" in row else tokenize_pair(parse_row(dict(row), where), tokenizer))
        check_ids(rows[-1], where, vocabulary)
    return rows


def spread_evenly(distance: np.ndarray, num_sampled: int) -> np.ndarray:
    """Numbers of `num_sampled` pairs, at equal steps in the order of `distance`: each quarter has as many."""
    num_sampled = min(num_sampled, len(distance))
    steps = (np.arange(num_sampled) + 0.5) * len(distance) / num_sampled
    return np.argsort(distance, kind="stable")[steps.astype(int)]


@contextmanager
def _reading(model: nn.Module, head: Head) -> Iterator[HeadReader]:
    """A reader of the head of `model`, which is in evaluation mode meanwhile and afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    reader = HeadReader(head)
    compile_anew()
    model.eval()
    try:
        yield reader
    finally:
        reader.remove()
        for module, was_training in modes:
            module.training = was_training


class _Probe:
    """Measures pairs of `rows` on the model: rewards, distances, and the gradient of the difference of rewards."""

    def __init__(
        self, model: nn.Module, head: nn.Linear, reader: HeadReader, collate: PreferenceCollator, rows: Sequence[Any]
    ):
        self.model, self.head, self.reader, self.collate, self.rows = model, head, reader, collate, rows

    @torch.no_grad()
    def rewards_and_distance(self, pairs: Sequence[int]) -> list[list[float]]:
        """Chosen rewards, rejected rewards and distances, three lists of numbers."""
        hidden = self._hidden(pairs)
        _, stats = linear_normbt_loss(hidden, self.head.weight, 1.0, bias=self.head.bias, return_stats=True)
        return torch.stack([stats.chosen_rewards, stats.rejected_rewards, stats.distance]).tolist()

    @torch.enable_grad()
    def gradient_norm(self, pair: int, weights: Sequence[Tensor]) -> float:
        """`||d(r_chosen - r_rejected)/d weights||`, summed in fp32 at least."""
        chosen, rejected = self._hidden([pair])
        wide = torch.promote_types(chosen.dtype, torch.float32)
        difference = (chosen - rejected).to(wide) @ self.head.weight[0].to(wide)
        gradients = torch.autograd.grad(difference, weights, materialize_grads=True)
        norms = [torch.linalg.vector_norm(gradient, dtype=wide) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms)).item()

    def _hidden(self, pairs: Sequence[int]) -> Tensor:
        """The rows that the head reads of all chosen, then all rejected sequences, (2P, H)."""
        batch = self.collate([self.rows[i] for i in pairs])
        inputs = {name: batch[name].to(self.head.weight.device) for name in ("input_ids", "attention_mask")}
        self.reader.expect(inputs["input_ids"])
        return self.reader.take(self.model(**inputs).logits)
