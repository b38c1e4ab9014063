"""The pass over row pairs on the CPU, in numpy: what `pair_loss.py` and `linear_gradient.py` describe.

A call of numpy costs a quarter of one of PyTorch, which decides where pairs are few. Where they are many, a block of
rows stays in a core's cache from one call to the next (`RowPairs.blocks`). All of it runs on one thread: PyTorch's
threads wait for one another in each operator, which takes longer than the work where other processes share the cores.
What follows the rows, arithmetic on (P,) vectors, is in fp64.
"""

from typing import NamedTuple

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from normbt_kernels.ops.ema import EMA, move_mu_on_cpu
from normbt_kernels.ops.pairs import CACHE_ELEMENTS, RowPairs, cast
from normbt_kernels.ops.terms import LossOptions, LossResult, Mu, Scores

DTYPES = {torch.float32: numpy.float32, torch.float64: numpy.float64}
total_of = numpy.add.reduce  # without the Python layers of `sum`
INFINITY = float("inf")
# Pairs weighed in plain numbers: a call of numpy that has left the cache takes as long as 40 divisions.
MAX_PLAIN = 128
in_silence = numpy.errstate(all="ignore")  # infinities and NaN go their way, as on every other device


def _array(tensor: Tensor | None, dtype: torch.dtype) -> ndarray | None:
    return None if tensor is None else cast(tensor.detach(), dtype).contiguous().numpy()


def _vector(tensor: Tensor | None, dtype: torch.dtype) -> ndarray | None:
    return None if tensor is None else cast(tensor.detach(), dtype).numpy().astype(numpy.float64)


def _tensor(values, number: type) -> Tensor:
    return torch.from_numpy(numpy.asarray(values, number))


def _gather(rows: RowPairs, dtype: torch.dtype) -> tuple[ndarray, ndarray]:
    """The chosen and the rejected rows, each (P, H)."""
    if rows.last_token is not None or (rows.pairs is not None and rows.chosen.dtype != dtype):
        chosen, rejected = rows.gather(dtype)
        return chosen.detach().numpy(), rejected.detach().numpy()
    hidden = _rows(rows.chosen, dtype)
    if rows.pairs is not None:
        pairs = rows.pairs.numpy()
        return hidden[pairs[:, 0]], hidden[pairs[:, 1]]
    if rows.layout == "halves":
        num_pairs = len(hidden) // 2
        return hidden[:num_pairs], hidden[num_pairs:]
    if rows.layout == "interleaved":
        return hidden[::2], hidden[1::2]
    return hidden, _rows(rows.rejected, dtype)


def _rows(hidden: Tensor, dtype: torch.dtype) -> ndarray:
    return cast(hidden.detach() if hidden.requires_grad else hidden, dtype).numpy()


def _subtract(chosen: ndarray, rejected: ndarray) -> ndarray:
    return numpy.subtract(chosen, rejected, order="C")  # rows of other strides would have other bits


def _norms(delta: ndarray) -> ndarray:
    return numpy.sqrt(numpy.vecdot(delta, delta)).astype(numpy.float64)


@in_silence
def distances_on_cpu(rows: RowPairs, dtype: torch.dtype) -> Tensor:
    """rho (P,) of P >= 1 pairs."""
    return _tensor(_distances(rows, dtype), DTYPES[dtype])


@in_silence
def weights_on_cpu(rows: RowPairs, mu: Mu, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """w (P,) of P >= 1 pairs, whose distances `mu` takes up."""
    return _tensor(_weights(_distances(rows, dtype), mu, options), DTYPES[dtype])


def weights_of_differences(delta: Tensor, mu: Mu, options: LossOptions, scale: float) -> Tensor:
    """The same, times `scale`, of pairs with the differences `delta` (P, H), contiguous."""
    delta, number = delta.detach(), DTYPES[delta.dtype]
    eps, max_weight = options.eps, options.max_weight
    if delta.shape[0] > MAX_PLAIN or max_weight is None or options.power != 1 or eps == 0:
        return _tensor(scale * _weights_of_rows(delta.numpy(), mu, options), number)
    distance = torch.linalg.vector_norm(delta, dim=1).tolist()
    distance_sum, average = sum(distance), _average(mu)
    if average is None:
        weight = [scale] * len(distance)
    else:
        weight = [scale * (max_weight if (w := average / (rho + eps)) > max_weight else w) for rho in distance]
        if not distance_sum < INFINITY:
            weight = [w + 0 * rho for w, rho in zip(weight, distance, strict=True)]
    if mu.takes_up_distances:
        _take_up(distance_sum, len(distance), mu.ema)
    return _tensor(weight, number)


@in_silence
def _weights_of_rows(delta: ndarray, mu: Mu, options: LossOptions) -> ndarray:
    return _weights(_norms(delta), mu, options)


def _distances(rows: RowPairs, dtype: torch.dtype) -> ndarray:
    if rows.pairs is None and rows.chosen.numel() <= CACHE_ELEMENTS:  # a single block
        return _norms(_subtract(*_gather(rows, dtype)))
    return numpy.concatenate([_norms(_subtract(*_gather(block, dtype))) for _, block in rows.blocks()])


def _weights(distance: ndarray, mu: Mu, options: LossOptions) -> ndarray:
    distance_sum = total_of(distance).item()
    weight = _weigh(distance, distance_sum, _average(mu), options)
    if mu.takes_up_distances:
        _take_up(distance_sum, len(distance), mu.ema)
    return weight


def _average(mu: Mu) -> float | None:
    """What weighs the pairs; None if each weighs 1."""
    if mu.ema is not None:
        state = mu.ema.arrays()
        if state.num_updates.item() > 0:
            return state.mu.item()
    return mu.value if mu.tensor is None else mu.tensor.item()


def _take_up(distance_sum: float, num_pairs: int, ema: EMA) -> None:
    state = ema.arrays()
    pending_sum, pair_count = state.pending.tolist()
    if ema.beta is not None and pair_count > 0:
        state.pending[:] = 0
    distance_sum += pending_sum
    pair_count += num_pairs
    if ema.beta is None:
        state.pending[:] = distance_sum, pair_count
    else:
        move_mu_on_cpu(state, ema.beta, distance_sum, pair_count)


def _weigh(distance: ndarray, distance_sum: float, mu: float | None, options: LossOptions) -> ndarray:
    if mu is None:
        return numpy.ones_like(distance)
    weight = mu / (distance + options.eps)
    if options.power != 1:
        weight **= options.power
    if options.power != 0 and not distance_sum < INFINITY:
        weight += 0 * distance  # NaN where it is infinite, as in the kernels
    return weight if options.max_weight is None else numpy.minimum(weight, options.max_weight)


class _Pairs(NamedTuple):
    """What is made of a block of pairs, (pairs,) each."""

    loss: ndarray
    chosen_gradient: ndarray
    rejected_gradient: ndarray
    distance: ndarray
    # Of the statistics, if they are asked for.
    weight: ndarray | None = None
    chosen_reward: ndarray | None = None
    rejected_reward: ndarray | None = None
    bt_loss: ndarray | None = None
    difference: ndarray | None = None


def _compute_block(
    rows: RowPairs, scores: Scores, mu: float | None, options: LossOptions, stats: bool, dtype: torch.dtype,
    scale: float, head: ndarray | None, bias: float, head_gradient: ndarray | None,
) -> _Pairs:  # fmt: skip
    """The pass over pairs whose rows stay in a core's cache; their part of the head's gradient is added to (H + 1,)."""
    smoothing, centers = options.label_smoothing, options.center_coef != 0
    # 1. the rows: rho, d, and what else is asked for
    chosen, rejected = _gather(rows, dtype)
    delta = _subtract(chosen, rejected)
    distance = _norms(delta)
    chosen_reward = rejected_reward = None
    if head is None:
        chosen_reward, rejected_reward = _vector(scores.chosen_rewards, dtype), _vector(scores.rejected_rewards, dtype)
        difference = chosen_reward - rejected_reward
    else:
        difference = numpy.vecdot(delta, head).astype(numpy.float64)
        if stats or centers:
            rejected_reward = numpy.vecdot(numpy.ascontiguousarray(rejected), head) + bias
            chosen_reward = rejected_reward + difference
    # 2. the loss and its gradient
    z = difference if scores.margin is None else difference - _vector(scores.margin, dtype)
    bt_loss = numpy.logaddexp(0.0, -z)
    gradient = -1.0 / (1.0 + numpy.exp(z))
    if smoothing != 0:
        bt_loss = (1 - smoothing) * bt_loss + smoothing * numpy.logaddexp(0.0, z)
        gradient += smoothing
    weight = pair_weight = _weigh(distance, total_of(distance), mu, options)
    if scores.pair_weight is not None:
        pair_weight = weight * _vector(scores.pair_weight, dtype)
    loss = bt_loss * pair_weight
    gradient *= scale * pair_weight
    chosen_gradient, rejected_gradient = gradient, -gradient
    if centers:
        reward_sum = chosen_reward + rejected_reward
        loss += options.center_coef * reward_sum**2
        centering = 2 * options.center_coef * scale * reward_sum
        chosen_gradient, rejected_gradient = gradient + centering, centering - gradient
    # 3. the head's gradient, while the rows are in cache
    if head_gradient is not None:
        # Not `gradient @ delta`: BLAS has threads of its own, which wait for one another too.
        delta *= gradient.astype(delta.dtype)[:, None]
        if centers:
            delta += (chosen + rejected) * centering.astype(delta.dtype)[:, None]
            head_gradient[-1] += 2 * total_of(centering)
        head_gradient[:-1] += total_of(delta, 0)
    if stats:
        return _Pairs(
            loss, chosen_gradient, rejected_gradient, distance, weight, chosen_reward, rejected_reward, bt_loss,
            difference,
        )  # fmt: skip
    return _Pairs(loss, chosen_gradient, rejected_gradient, distance)


@in_silence
def compute_on_cpu(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The loss of P >= 1 pairs."""
    dtype, num_pairs = scores.accumulate_dtype(rows), rows.num_pairs
    number, average = DTYPES[dtype], _average(mu)
    scale = 1 / num_pairs if options.reduction == "mean" else 1.0
    head = _array(scores.head_weight, dtype)
    bias = 0.0 if scores.head_bias is None else scores.head_bias.item()
    blocks = list(rows.blocks())
    head_total = numpy.zeros(rows.hidden_size + 1, number if len(blocks) == 1 else float) if head_gradient else None
    done = [
        _compute_block(block, scores.block(place), average, options, stats, dtype, scale, head, bias, head_total)
        for place, block in blocks
    ]
    pairs = done[0]
    if len(done) > 1:
        columns = zip(*done, strict=True)
        pairs = _Pairs(*(None if column[0] is None else numpy.concatenate(column) for column in columns))
    loss, distance = pairs.loss, pairs.distance
    if options.reduction != "none":
        loss = total_of(loss) * scale
    pair_stats = batch_stats = None
    if stats:
        pair_stats = _tensor((distance, pairs.weight, pairs.chosen_reward, pairs.rejected_reward), number)
        of_batch = distance, pairs.bt_loss, pairs.difference > 0
        batch_stats = _tensor([total_of(values) / num_pairs for values in of_batch], number)
    if mu.takes_up_distances:
        _take_up(total_of(distance).item(), num_pairs, mu.ema)
    gradient = numpy.empty((2, num_pairs), number)
    gradient[0], gradient[1] = pairs.chosen_gradient, pairs.rejected_gradient
    return LossResult(
        _tensor(loss, number),
        torch.from_numpy(gradient),
        None if head_total is None else _tensor(head_total, number),
        pair_stats,
        batch_stats,
    )


def are_few(num_pairs: int, hidden_size: int, device: torch.device) -> bool:
    """Whether one thread writes the rows' gradients as soon as several would have begun."""
    return num_pairs * hidden_size <= CACHE_ELEMENTS and device.type == "cpu"


@in_silence
def compute_few_gradients(
    gradient: Tensor, loss_gradient: Tensor, head_gradient: Tensor | None, head_weight: Tensor, interleaved: bool,
    hidden_dtype: torch.dtype, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of hidden states of which each row serves in one pair, of the head's weight and its bias."""
    needs_hidden, needs_weight, needs_bias = needs
    upstream = loss_gradient.detach().numpy()
    hidden = weight = bias = None
    if needs_hidden:
        coefficient = gradient.numpy() * upstream
        column = (coefficient.T if interleaved else coefficient).reshape(-1, 1)
        hidden = cast(torch.from_numpy(column * _array(head_weight, gradient.dtype)), hidden_dtype)
    if needs_weight or needs_bias:
        total = head_gradient.numpy() * upstream
        weight = cast(torch.from_numpy(total[:-1]), head_weight.dtype) if needs_weight else None
        bias = cast(torch.from_numpy(total[-1:]).reshape(()), bias_dtype) if needs_bias else None
    return hidden, weight, bias
