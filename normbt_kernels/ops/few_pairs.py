"""The pass over a few row pairs on the CPU, in numpy: there it costs what its calls cost.

A call of numpy costs a quarter of one of PyTorch, so while all rows fit into a core's cache (`MAX_ELEMENTS`) numpy
does what `pair_loss.py` and `linear_gradient.py` describe; what follows the rows, arithmetic on (P,) vectors, in fp64.
More pairs are read by PyTorch's operators, which know threads and blocks: `closed_form.py`.
"""

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from normbt_kernels.ops.ema import EMA, move_mu_on_cpu
from normbt_kernels.ops.pairs import CACHE_ELEMENTS, RowPairs, cast
from normbt_kernels.ops.terms import LossOptions, LossResult, Mu, Scores

MAX_ELEMENTS = CACHE_ELEMENTS  # of one side
DTYPES = {torch.float32: numpy.float32, torch.float64: numpy.float64}
total_of = numpy.add.reduce  # without the Python layers of `sum`


def are_few(num_pairs: int, hidden_size: int, device: torch.device) -> bool:
    return num_pairs * hidden_size <= MAX_ELEMENTS and device.type == "cpu"


def _array(tensor: Tensor | None, dtype: torch.dtype) -> ndarray | None:
    return None if tensor is None else cast(tensor.detach(), dtype).contiguous().numpy()


def _vector(tensor: Tensor | None, dtype: torch.dtype) -> ndarray | None:
    return None if tensor is None else cast(tensor.detach(), dtype).numpy().astype(numpy.float64)


def _state(buffer: Tensor | None) -> ndarray | None:
    """The memory of an EMA's buffer."""
    return None if buffer is None else buffer.numpy()


def _gather(rows: RowPairs, dtype: torch.dtype) -> tuple[ndarray, ndarray]:
    """The chosen and the rejected rows, each (P, H)."""
    if rows.last_token is not None or {rows.chosen.dtype, rows.rejected.dtype} != {dtype}:
        chosen, rejected = rows.gather(dtype)
        return chosen.numpy(), rejected.numpy()
    pairs, every = None if rows.pairs is None else rows.pairs.numpy(), slice(0, rows.num_pairs)
    arrays = RowPairs(rows.chosen.numpy(), rows.rejected.numpy(), pairs, None, rows.layout)
    return arrays.side(0, every), arrays.side(1, every)


def _weigh(distance: ndarray, mu: Mu, ema: EMA | None, options: LossOptions) -> ndarray:
    if ema is not None and ema.num_updates > 0:
        value = ema.mu.item()
    elif ema is not None and mu.tensor is None:
        return numpy.ones_like(distance)
    else:
        value = mu.value if mu.tensor is None else mu.tensor.item()
    weight = value / (distance + options.eps)
    if options.power != 1:
        weight **= options.power
    if options.power != 0:
        weight += 0 * distance  # NaN where it is infinite, as in the kernels
    return weight if options.max_weight is None else numpy.minimum(weight, options.max_weight)


def compute_few_pairs(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The loss of P >= 1 pairs."""
    with numpy.errstate(all="ignore"):  # infinities and NaN go their way, as on every other device
        return _compute(rows, scores, mu, options, stats, head_gradient)


def _compute(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    dtype, num_pairs = scores.accumulate_dtype(rows), rows.num_pairs
    number, smoothing, centers = DTYPES[dtype], options.label_smoothing, options.center_coef != 0
    scale = 1 / num_pairs if options.reduction == "mean" else 1.0
    # 1. the rows: rho, d, and what else is asked for
    chosen, rejected = _gather(rows, dtype)
    delta = numpy.subtract(chosen, rejected, order="C")  # other strides would give other bits
    distance = numpy.sqrt(numpy.vecdot(delta, delta)).astype(numpy.float64)
    head, bias = _array(scores.head_weight, dtype), _vector(scores.head_bias, dtype)
    chosen_reward, rejected_reward = _vector(scores.chosen_rewards, dtype), _vector(scores.rejected_rewards, dtype)
    if head is None:
        difference = chosen_reward - rejected_reward
    else:
        difference = numpy.vecdot(delta, head).astype(numpy.float64)
        if stats or centers:
            rejected_reward = numpy.vecdot(numpy.ascontiguousarray(rejected), head).astype(numpy.float64)
            if bias is not None:
                rejected_reward += bias
            chosen_reward = rejected_reward + difference
    # 2. the loss and its gradient
    z = difference if scores.margin is None else difference - _vector(scores.margin, dtype)
    loss = bt_loss = numpy.logaddexp(0.0, -z)
    gradient = -1.0 / (1.0 + numpy.exp(z))
    if smoothing != 0:
        loss = bt_loss = (1 - smoothing) * bt_loss + smoothing * numpy.logaddexp(0.0, z)
        gradient += smoothing
    ema = None if mu.ema is None else EMA(*(_state(tensor) for tensor in mu.ema[:3]), mu.ema.beta)
    weight = pair_weight = _weigh(distance, mu, ema, options)
    if scores.pair_weight is not None:
        pair_weight = weight * _vector(scores.pair_weight, dtype)
    loss = loss * pair_weight
    gradient *= scale * pair_weight
    table = numpy.empty((2, num_pairs), number)
    table[0], table[1] = gradient, -gradient
    if centers:
        reward_sum = chosen_reward + rejected_reward
        loss += options.center_coef * reward_sum**2
        centering = 2 * options.center_coef * scale * reward_sum
        table[0], table[1] = gradient + centering, centering - gradient
    # 3. the head's gradient
    head_total = None
    if head_gradient:
        head_total = numpy.zeros(rows.hidden_size + 1, number)
        head_total[:-1] = gradient.astype(number) @ delta
        if centers:
            head_total[:-1] += centering.astype(number) @ (chosen + rejected)
            head_total[-1] = 2 * total_of(centering)
        head_total = torch.from_numpy(head_total)
    # 4. what the batch leaves behind
    if options.reduction != "none":
        loss = total_of(loss) * scale
    pair_stats = batch_stats = None
    if stats:
        pair_stats = _tensor((distance, weight, chosen_reward, rejected_reward), number)
        batch_stats = _tensor([total_of(x) / num_pairs for x in (distance, bt_loss, difference > 0)], number)
    if mu.takes_up_distances:
        ema.pending[:] += total_of(distance), num_pairs
        if ema.beta is not None:
            move_mu_on_cpu(*ema)
    return LossResult(_tensor(loss, number), torch.from_numpy(table), head_total, pair_stats, batch_stats)


def _tensor(values, number: type) -> Tensor:
    return torch.from_numpy(numpy.asarray(values, number))


def compute_few_gradients(
    gradient: Tensor, loss_gradient: Tensor, head_gradient: Tensor | None, head_weight: Tensor, interleaved: bool,
    hidden_dtype: torch.dtype, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of hidden states of which each row serves in one pair, of the head's weight and its bias."""
    needs_hidden, needs_weight, needs_bias = needs
    upstream = loss_gradient.detach().numpy()
    hidden = weight = bias = None
    with numpy.errstate(all="ignore"):
        if needs_hidden:
            coefficient = gradient.numpy() * upstream
            column = (coefficient.T if interleaved else coefficient).reshape(-1, 1)
            hidden = cast(torch.from_numpy(column * _array(head_weight, gradient.dtype)), hidden_dtype)
        if needs_weight or needs_bias:
            total = head_gradient.numpy() * upstream
            weight = cast(torch.from_numpy(total[:-1]), head_weight.dtype) if needs_weight else None
            bias = cast(torch.from_numpy(total[-1:]).reshape(()), bias_dtype) if needs_bias else None
    return hidden, weight, bias
