"""The one pass over row pairs: distance, weight, loss and its gradient, with one read of each row.

    delta = h_c - h_r      rho = ||delta||_2      d = v . delta, or r_c - r_r of given rewards
    z = d - margin         w = min(mu / (rho + eps), max_weight)           (NormBT, section 3; w is a constant)
    l = -[(1-s) log sigma(z) + s log sigma(-z)] = softplus(-z) + s z
    loss_p = q w l + center_coef (r_c + r_r)^2
    dloss_p/dr_c = g + k   dloss_p/dr_r = -g + k   g = q w (s - sigma(-z))   k = 2 center_coef (r_c + r_r)

mu is known before the batch, so g is known as soon as a pair has been read, and the head's gradient
sum_p (g delta + k (h_c + h_r)) is accumulated while the rows are still in registers: backward reads no rows.
Where mu is this batch's own mean, one more launch measures the distances first; without a cap and centering it
multiplies the results afterwards instead, and the rows are read once.

Bytes: reads 2*P*H*s once. A row longer than `LaunchShape.block_hidden` is loaded a second time for the head's
gradient, soon enough to be still in the L2 cache. While an EMA has no value yet (the first batch), every program
reads all rows for itself, because the host does not know that it must measure them first.
Launches: rows, then a reduction of the programs' partial sums in a fixed order, so the same inputs give the
same bits. The reduction also updates the EMA.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import on_device, triton_dtype, uses_kernels
from normbt_kernels.ops.ema import update_ema, update_ema_
from normbt_kernels.ops.launch import cdiv, next_power_of_2
from normbt_kernels.ops.library import define_op
from normbt_kernels.ops.pair_distance import launch_measure_distance
from normbt_kernels.ops.pairs import (
    PairArguments,
    RowPairs,
    Vector,
    accumulate_dtype,
    load_tile,
    locate_pairs,
    measure_distance,
)

# Rows of the (6, P) table of per-pair results.
DISTANCE, WEIGHT, CHOSEN_REWARD, REJECTED_REWARD, CHOSEN_GRADIENT, REJECTED_GRADIENT = range(6)
# Entries of the (5,) table of batch results. The last two are what ranks add up to share one mean.
MEAN_DISTANCE, BT_LOSS, ACCURACY, DISTANCE_SUM, NUM_PAIRS = range(5)


class LossOptions(NamedTuple):
    """The constants of the loss (design symbols: s, center_coef, eps, max_weight) and its reduction."""

    label_smoothing: float
    center_coef: float
    eps: float
    max_weight: float | None
    reduction: str


class Scores(NamedTuple):
    """Where rewards come from and what weighs each pair: either both rewards, or the head that makes them."""

    chosen_rewards: Tensor | None  # (P,)
    rejected_rewards: Tensor | None  # (P,)
    head_weight: Tensor | None  # (H,)
    head_bias: Tensor | None  # ()
    margin: Tensor | None  # (P,)
    pair_weight: Tensor | None  # (P,)

    def accumulate_dtype(self, rows: RowPairs) -> torch.dtype:
        return accumulate_dtype(rows.chosen, rows.rejected, *self[:4])


class Mean(NamedTuple):
    """mu, from where it is known: a tensor, a number, or neither (this batch's own mean).

    With `num_updates` it is an EMA: while no update has been made, this batch's own mean is used, and with
    `beta` the EMA is then updated in place by the mean of this batch.
    """

    mu: Tensor | None
    value: float | None
    num_updates: Tensor | None
    beta: float | None


class PairLossResult(NamedTuple):
    loss: Tensor  # (), or (P,) with reduction "none"
    pair_table: Tensor  # (6, P)
    batch_table: Tensor  # (5,)
    head_gradient: Tensor  # (H + 1,) of weight and bias for an upstream gradient of 1; (0,) if not asked for


class ScoreArguments(NamedTuple):
    chosen_rewards: Vector
    rejected_rewards: Vector
    head_weight: Vector
    head_bias: Vector
    margin: Vector
    pair_weight: Vector


@triton.jit
def log1p_exp_and_sigmoid(z):
    """log(1 + exp(-|z|)) to the last bits, and sigma(-z), neither of which overflows."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    # log(u) alone loses e to the rounding of 1 + e; scaling by e / (u - 1) puts back what was rounded away.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return log1p, tl.where(z >= 0, e, 1.0) / u


@triton.jit
def load_each(vector, pair, exists, ACC: tl.constexpr):
    return tl.load(vector.ptr + pair.to(tl.int64) * vector.stride, mask=exists, other=0.0).to(ACC)


@triton.jit
def _pair_loss_kernel(
    rows, scores, mu_ptr, mu_value: "fp64", num_updates_ptr, distance_sum_ptr,  # noqa: F821
    loss_ptr, pair_table_ptr, partial_ptr, head_partial_ptr,
    LABEL_SMOOTHING: tl.constexpr, CENTER_COEF: tl.constexpr, EPS: tl.constexpr, MAX_WEIGHT: tl.constexpr,
    MEAN: tl.constexpr, PROGRAMS: tl.constexpr, DISTANCE_KNOWN: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_pairs = tl.cast(rows.num_pairs, tl.int64)
    pair_count = tl.cast(rows.num_pairs, ACC)
    num_blocks = tl.cdiv(rows.num_pairs, BLOCK_P)
    LINEAR: tl.constexpr = scores.head_weight.ptr is not None

    # 1. mu: given; or the mean of the distances that the launch before has summed; or an EMA that, while it
    #    has no value yet, is replaced by the mean that every program then computes for itself.
    if distance_sum_ptr is not None:
        index = tl.arange(0, PROGRAMS)
        mu = tl.sum(tl.load(distance_sum_ptr + index, mask=index < num_programs, other=0.0)) / pair_count
    elif mu_ptr is not None:
        mu = tl.load(mu_ptr).to(ACC)
        if num_updates_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other on the device)
            if tl.load(num_updates_ptr) == 0:
                total = tl.zeros([BLOCK_P], ACC)
                for block in range(0, num_blocks):
                    pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
                    total += measure_distance(rows, pair, BLOCK_P, BLOCK_H, ACC)
                mu = tl.sum(total) / pair_count
    else:
        mu = tl.sum(tl.full([1], mu_value, ACC))

    # 2. what stays in registers for all of this program's pairs
    first_columns = tl.arange(0, BLOCK_H)
    if LINEAR and ONE_BLOCK:
        head = load_each(scores.head_weight, first_columns, first_columns < rows.hidden_size, ACC)
    if LINEAR and scores.head_bias.ptr is not None:
        bias = tl.load(scores.head_bias.ptr).to(ACC)
    head_gradient = tl.zeros([BLOCK_H], ACC)
    head_slot = head_partial_ptr
    if head_partial_ptr is not None:
        head_slot += program * (rows.hidden_size + 1)
        if not ONE_BLOCK:
            for start in range(0, rows.hidden_size, BLOCK_H):
                columns = start + first_columns
                tl.store(head_slot + columns, head_gradient, mask=columns < rows.hidden_size)
            tl.debug_barrier()
    distance_sum = tl.zeros([BLOCK_P], ACC)
    loss_sum = tl.zeros([BLOCK_P], ACC)
    bt_loss_sum = tl.zeros([BLOCK_P], ACC)
    correct_sum = tl.zeros([BLOCK_P], ACC)
    bias_gradient = tl.zeros([BLOCK_P], ACC)
    scale = 1.0
    if MEAN:
        scale = 1.0 / pair_count

    for block in range(program, num_blocks, num_programs):
        pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
        in_range = pair < num_pairs
        chosen_offset, rejected_offset, exists = locate_pairs(rows, pair)

        # 3. read both rows: rho, and of a linear head d and r_r
        if DISTANCE_KNOWN:
            distance = tl.load(pair_table_ptr + pair, mask=in_range, other=0.0)
        elif ONE_BLOCK:
            chosen = load_tile(rows, rows.chosen, chosen_offset, exists, first_columns, ACC)
            rejected = load_tile(rows, rows.rejected, rejected_offset, exists, first_columns, ACC)
            delta = chosen - rejected
            distance = tl.sqrt(tl.sum(delta * delta, axis=1))
            if LINEAR:
                difference = tl.sum(delta * head[None, :], axis=1)
                rejected_reward = tl.sum(rejected * head[None, :], axis=1)
        else:
            square = tl.zeros([BLOCK_P, BLOCK_H], ACC)
            delta_dot = tl.zeros([BLOCK_P, BLOCK_H], ACC)
            rejected_dot = tl.zeros([BLOCK_P, BLOCK_H], ACC)
            for start in range(0, rows.hidden_size, BLOCK_H):
                columns = start + first_columns
                chosen = load_tile(rows, rows.chosen, chosen_offset, exists, columns, ACC)
                rejected = load_tile(rows, rows.rejected, rejected_offset, exists, columns, ACC)
                delta = chosen - rejected
                square += delta * delta
                if LINEAR:
                    head = load_each(scores.head_weight, columns, columns < rows.hidden_size, ACC)
                    delta_dot += delta * head[None, :]
                    rejected_dot += rejected * head[None, :]
            distance = tl.sqrt(tl.sum(square, axis=1))
            if LINEAR:
                difference = tl.sum(delta_dot, axis=1)
                rejected_reward = tl.sum(rejected_dot, axis=1)
        if not LINEAR:
            rejected_reward = load_each(scores.rejected_rewards, pair, in_range, ACC)
            difference = load_each(scores.chosen_rewards, pair, in_range, ACC) - rejected_reward
        elif scores.head_bias.ptr is not None:
            rejected_reward += bias
        chosen_reward = rejected_reward + difference
        if not LINEAR:
            chosen_reward = load_each(scores.chosen_rewards, pair, in_range, ACC)
        distance = tl.where(exists, distance, float("nan"))

        # 4. the loss of each pair
        z = difference
        if scores.margin.ptr is not None:
            z -= load_each(scores.margin, pair, in_range, ACC)
        weight = mu / (distance + EPS)
        if MAX_WEIGHT is not None:
            # Not tl.minimum: a NaN weight must stay NaN.
            weight = tl.where(weight > MAX_WEIGHT, tl.full([BLOCK_P], MAX_WEIGHT, ACC), weight)
        scaled_weight = weight
        if scores.pair_weight.ptr is not None:
            scaled_weight *= load_each(scores.pair_weight, pair, in_range, ACC)
        log1p_exp, sigmoid_minus_z = log1p_exp_and_sigmoid(z)
        bt_loss = tl.where(z < 0, -z, 0.0) + log1p_exp
        if LABEL_SMOOTHING != 0:
            bt_loss += LABEL_SMOOTHING * z
        loss = scaled_weight * bt_loss
        gradient = scaled_weight * (LABEL_SMOOTHING - sigmoid_minus_z) * scale
        centering = tl.zeros([BLOCK_P], ACC)
        if CENTER_COEF != 0:
            reward_sum = chosen_reward + rejected_reward
            loss += CENTER_COEF * reward_sum * reward_sum
            centering = 2.0 * CENTER_COEF * reward_sum * scale

        # 5. what each pair leaves behind
        out = pair_table_ptr + pair
        tl.store(out, distance, mask=in_range)
        tl.store(out + 1 * num_pairs, weight, mask=in_range)
        tl.store(out + 2 * num_pairs, chosen_reward, mask=in_range)
        tl.store(out + 3 * num_pairs, rejected_reward, mask=in_range)
        tl.store(out + 4 * num_pairs, gradient + centering, mask=in_range)
        tl.store(out + 5 * num_pairs, centering - gradient, mask=in_range)
        if loss_ptr is not None:
            tl.store(loss_ptr + pair, loss, mask=in_range)
        distance_sum += tl.where(in_range, distance, 0.0)
        loss_sum += tl.where(in_range, loss, 0.0)
        bt_loss_sum += tl.where(in_range, bt_loss, 0.0)
        correct_sum += tl.where(in_range & (difference > 0), 1.0, 0.0)

        # 6. the head's gradient, from the same registers
        if head_partial_ptr is not None:
            gradient = tl.where(in_range, gradient, 0.0)[:, None]
            centering = tl.where(in_range, centering, 0.0)
            bias_gradient += 2.0 * centering
            if ONE_BLOCK:
                part = gradient * delta
                if CENTER_COEF != 0:
                    part += centering[:, None] * (chosen + rejected)
                head_gradient += tl.sum(part, axis=0)
            else:
                for start in range(0, rows.hidden_size, BLOCK_H):
                    columns = start + first_columns
                    chosen = load_tile(rows, rows.chosen, chosen_offset, exists, columns, ACC)
                    rejected = load_tile(rows, rows.rejected, rejected_offset, exists, columns, ACC)
                    part = gradient * (chosen - rejected)
                    if CENTER_COEF != 0:
                        part += centering[:, None] * (chosen + rejected)
                    mask = columns < rows.hidden_size
                    so_far = tl.load(head_slot + columns, mask=mask, other=0.0)
                    tl.store(head_slot + columns, so_far + tl.sum(part, axis=0), mask=mask)
                # The next pairs of this program add to the same slots, perhaps from other threads.
                tl.debug_barrier()

    # 7. this program's partial sums
    tl.store(partial_ptr + program, tl.sum(loss_sum))
    tl.store(partial_ptr + num_programs + program, tl.sum(distance_sum))
    tl.store(partial_ptr + 2 * num_programs + program, tl.sum(bt_loss_sum))
    tl.store(partial_ptr + 3 * num_programs + program, tl.sum(correct_sum))
    if head_partial_ptr is not None:
        tl.store(head_slot + rows.hidden_size, tl.sum(bias_gradient))
        if ONE_BLOCK:
            tl.store(head_slot + first_columns, head_gradient, mask=first_columns < rows.hidden_size)


@triton.jit
def sum_partials(partial_ptr, num_partials, columns, num_columns, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """Sum over rows of a (partials, columns) matrix, always in the same order."""
    total = tl.zeros([BLOCK_K, BLOCK_H], ACC)
    for start in range(0, num_partials, BLOCK_K):
        partial = start + tl.arange(0, BLOCK_K)
        mask = (partial < num_partials)[:, None] & (columns < num_columns)[None, :]
        total += tl.load(partial_ptr + partial[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _finalise_kernel(
    partial_ptr, num_partials, num_pairs, loss_ptr, batch_table_ptr, mu_ptr, num_updates_ptr,
    head_partial_ptr, head_gradient_ptr, num_columns,
    MEAN: tl.constexpr, BETA: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # 1. each program: its columns of the head's gradient
    if head_gradient_ptr is not None:
        columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = sum_partials(head_partial_ptr, num_partials, columns, num_columns, BLOCK_K, BLOCK_H, ACC)
        tl.store(head_gradient_ptr + columns, total, mask=columns < num_columns)
    # 2. the first program: the batch's results and the EMA
    if tl.program_id(0) == 0:
        index = tl.arange(0, PROGRAMS)
        mask = index < num_partials
        pairs = tl.cast(num_pairs, ACC)
        loss = tl.sum(tl.load(partial_ptr + index, mask=mask, other=0.0))
        distance = tl.sum(tl.load(partial_ptr + num_partials + index, mask=mask, other=0.0))
        bt_loss = tl.sum(tl.load(partial_ptr + 2 * num_partials + index, mask=mask, other=0.0))
        correct = tl.sum(tl.load(partial_ptr + 3 * num_partials + index, mask=mask, other=0.0))
        mean_distance = distance / pairs
        tl.store(batch_table_ptr + 0, mean_distance)
        tl.store(batch_table_ptr + 1, bt_loss / pairs)
        tl.store(batch_table_ptr + 2, correct / pairs)
        tl.store(batch_table_ptr + 3, distance)
        tl.store(batch_table_ptr + 4, pairs)
        if loss_ptr is not None:
            tl.store(loss_ptr, loss / pairs if MEAN else loss)
        if BETA is not None:
            update_ema(mu_ptr, num_updates_ptr, mean_distance, BETA)


def _launch_pair_loss(
    rows: RowPairs, scores: Scores, mean: Mean, options: LossOptions, result: PairLossResult
) -> PairLossResult:
    own_mean = mean.mu is None and mean.value is None
    if own_mean and options.max_weight is None and options.center_coef == 0:
        # Without a cap and centering, mu is a factor of everything: one read with mu = 1, and the mean at the end.
        _launch_pair_loss(rows, scores, mean._replace(value=1.0), options, result)
        scaled = [result.loss, result.pair_table[WEIGHT], result.pair_table[CHOSEN_GRADIENT:], result.head_gradient]
        torch._foreach_mul_(scaled, result.batch_table[MEAN_DISTANCE])
        return result
    shape = rows.launch_shape()
    device, dtype = rows.chosen.device, result.pair_table.dtype
    per_pair = options.reduction == "none"
    has_head_gradient = result.head_gradient.numel() > 0
    num_columns = rows.hidden_size + 1
    partial = torch.empty(4, shape.num_programs, device=device, dtype=dtype)
    head_partial = (
        torch.empty(shape.num_programs, num_columns, device=device, dtype=dtype) if has_head_gradient else None
    )
    distance_sum = torch.empty(shape.num_programs, device=device, dtype=dtype) if own_mean else None
    if own_mean:
        launch_measure_distance(rows, result.pair_table[DISTANCE], shape, distance_sum)
    constants = {
        "MEAN": options.reduction == "mean",
        "PROGRAMS": next_power_of_2(shape.num_programs),
        "ACC": triton_dtype(dtype),
    }
    _pair_loss_kernel[(shape.num_programs,)](
        PairArguments.of(rows),
        ScoreArguments(*(Vector.of(tensor) for tensor in scores)),
        mean.mu,
        mean.value or 0.0,
        mean.num_updates,
        distance_sum,
        result.loss if per_pair else None,
        result.pair_table,
        partial,
        head_partial,
        LABEL_SMOOTHING=options.label_smoothing,
        CENTER_COEF=options.center_coef,
        EPS=options.eps,
        MAX_WEIGHT=options.max_weight,
        # Rewards that are given need the rows for nothing but the distance, which is then known already.
        DISTANCE_KNOWN=own_mean and scores.head_weight is None,
        ONE_BLOCK=shape.block_hidden >= rows.hidden_size,
        BLOCK_P=shape.block_rows,
        BLOCK_H=shape.block_hidden,
        num_warps=shape.num_warps,
        **constants,
    )
    block_columns = 64
    _finalise_kernel[(cdiv(num_columns, block_columns) if has_head_gradient else 1,)](
        partial,
        shape.num_programs,
        rows.num_pairs,
        None if per_pair else result.loss,
        result.batch_table,
        mean.mu,
        mean.num_updates,
        head_partial,
        result.head_gradient if has_head_gradient else None,
        num_columns,
        BETA=mean.beta,
        BLOCK_K=32,
        BLOCK_H=block_columns,
        num_warps=4,
        **constants,
    )
    return result


def _compute_pair_loss(
    rows: RowPairs, scores: Scores, mean: Mean, options: LossOptions, result: PairLossResult
) -> PairLossResult:
    """The closed form: the same pass in PyTorch operators, over blocks of pairs that stay in cache."""
    table, dtype = result.pair_table, result.pair_table.dtype
    has_head_gradient = result.head_gradient.numel() > 0
    weight_gradient, bias_gradient = result.head_gradient[:-1], result.head_gradient[-1:]
    scale = 1 / rows.num_pairs if options.reduction == "mean" else 1.0
    linear = scores.head_weight is not None
    if linear:
        head_weight = scores.head_weight.to(dtype)
        head_bias = 0 if scores.head_bias is None else scores.head_bias.to(dtype)
        difference = torch.empty_like(table[DISTANCE])
    else:
        table[CHOSEN_REWARD], table[REJECTED_REWARD] = scores.chosen_rewards, scores.rejected_rewards
        difference = table[CHOSEN_REWARD] - table[REJECTED_REWARD]
    loss, bt_loss, gradient = torch.empty_like(table[:3])
    centering = torch.zeros_like(gradient)

    def score(block: slice, mu: Tensor | float) -> None:
        weight = mu / (table[DISTANCE, block] + options.eps)
        if options.max_weight is not None:
            weight = weight.clamp(max=options.max_weight)
        table[WEIGHT, block] = weight
        if scores.pair_weight is not None:
            weight = weight * scores.pair_weight[block]
        z = difference[block] if scores.margin is None else difference[block] - scores.margin[block]
        bt_loss[block] = -F.logsigmoid(z)
        if options.label_smoothing != 0:
            bt_loss[block] += options.label_smoothing * z
        loss[block] = weight * bt_loss[block]
        gradient[block] = weight * (options.label_smoothing - torch.sigmoid(-z)) * scale
        if options.center_coef != 0:
            reward_sum = table[CHOSEN_REWARD, block] + table[REJECTED_REWARD, block]
            loss[block] += options.center_coef * reward_sum**2
            centering[block] = 2 * options.center_coef * reward_sum * scale

    def accumulate(block: slice, chosen: Tensor, rejected: Tensor, delta: Tensor) -> None:
        weight_gradient.addmv_(delta.T, gradient[block])
        if options.center_coef != 0:
            weight_gradient.addmv_((chosen + rejected).T, centering[block])

    mu = _mean_in_hand(mean, rows.chosen.device)
    result.head_gradient.zero_()
    for block in rows.blocks():
        chosen, rejected = rows.gather(block, dtype)
        delta = chosen - rejected
        table[DISTANCE, block] = torch.linalg.vector_norm(delta, dim=-1)
        if linear:
            # Multiply, then sum: torch sums in a cascade, which at H = 32768 is 12x closer to fp64 than a BLAS dot.
            difference[block] = (delta * head_weight).sum(dim=-1)
            table[REJECTED_REWARD, block] = (rejected * head_weight).sum(dim=-1) + head_bias
            table[CHOSEN_REWARD, block] = table[REJECTED_REWARD, block] + difference[block]
        if mu is not None:
            score(block, mu)
            if has_head_gradient:
                accumulate(block, chosen, rejected, delta)
    mean_distance = table[DISTANCE].mean()
    if mu is None:
        own_mean = mean.mu is None
        score(slice(None), mean_distance if own_mean else torch.where(mean.num_updates == 0, mean_distance, mean.mu))
        for block in rows.blocks() if has_head_gradient else ():
            chosen, rejected = rows.gather(block, dtype)
            accumulate(block, chosen, rejected, chosen - rejected)

    torch.add(centering, gradient, out=table[CHOSEN_GRADIENT])
    torch.sub(centering, gradient, out=table[REJECTED_GRADIENT])
    bias_gradient.add_(2 * centering.sum())
    if options.reduction == "none":
        result.loss.copy_(loss)
    else:
        result.loss.copy_(loss.mean() if options.reduction == "mean" else loss.sum())
    result.batch_table[MEAN_DISTANCE] = mean_distance
    result.batch_table[BT_LOSS] = bt_loss.mean()
    result.batch_table[ACCURACY] = (difference > 0).to(dtype).mean()
    result.batch_table[DISTANCE_SUM] = table[DISTANCE].sum()
    result.batch_table[NUM_PAIRS] = rows.num_pairs
    if mean.beta is not None:
        update_ema_(mean.mu, mean.num_updates, mean_distance, mean.beta)
    return result


def _mean_in_hand(mean: Mean, device: torch.device) -> Tensor | float | None:
    """mu if the host can use it before the distances are known, without waiting for a device."""
    if mean.mu is None:
        return mean.value
    if mean.num_updates is None or (device.type == "cpu" and mean.num_updates.item() > 0):
        return mean.mu
    return None


def _pair_loss_fake(
    chosen, rejected, pairs, chosen_token, rejected_token,
    chosen_rewards, rejected_rewards, head_weight, head_bias, margin, pair_weight,
    mu, mu_value, ema_mu, ema_num_updates, beta,
    label_smoothing, center_coef, eps, max_weight, reduction, head_gradient,
):  # fmt: skip
    dtype = accumulate_dtype(chosen, rejected, chosen_rewards, rejected_rewards, head_weight, head_bias)
    num_pairs = chosen.shape[0] if pairs is None else pairs.shape[0]
    return (
        chosen.new_empty((num_pairs,) if reduction == "none" else (), dtype=dtype),
        chosen.new_empty((6, num_pairs), dtype=dtype),
        chosen.new_empty(5, dtype=dtype),
        chosen.new_empty(chosen.shape[-1] + 1 if head_gradient else 0, dtype=dtype),
    )


@define_op(
    "pair_loss(Tensor chosen, Tensor rejected, Tensor? pairs, Tensor? chosen_token, Tensor? rejected_token,"
    " Tensor? chosen_rewards, Tensor? rejected_rewards, Tensor? head_weight, Tensor? head_bias,"
    " Tensor? margin, Tensor? pair_weight,"
    " Tensor? mu, float? mu_value, Tensor(a!)? ema_mu, Tensor(b!)? ema_num_updates, float? beta,"
    " float label_smoothing, float center_coef, float eps, float? max_weight, str reduction, bool head_gradient)"
    " -> (Tensor loss, Tensor pair_table, Tensor batch_table, Tensor head_gradient)",
    fake=_pair_loss_fake,
)
def pair_loss(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, scores = RowPairs(*arguments[:5]), Scores(*arguments[5:11])
    rows.check_range()
    result = PairLossResult(*_pair_loss_fake(*arguments))
    mu, mu_value, ema_mu, ema_num_updates, beta = arguments[11:16]
    mean = Mean(ema_mu if mu is None else mu, mu_value, ema_num_updates, beta)
    options = LossOptions(*arguments[16:21])
    if rows.num_pairs == 0:
        for tensor in result:
            tensor.zero_()
        return tuple(result)
    if not uses_kernels(rows.chosen.device):
        return tuple(_compute_pair_loss(rows, scores, mean, options, result))
    with on_device(rows.chosen.device):
        return tuple(_launch_pair_loss(rows, scores, mean, options, result))
