"""The one pass over row pairs: distance, weight, loss and its gradient, with one read of each row.

    delta = h_c - h_r      rho = ||delta||_2      d = v . delta, or r_c - r_r of given rewards
    z = d - margin         w = min(mu / (rho + eps), max_weight)           (NormBT, section 3; w is a constant)
    l = -[(1-s) log sigma(z) + s log sigma(-z)] = softplus(-z) + s z
    loss_p = q w l + center_coef (r_c + r_r)^2
    dloss_p/dr_c = g + k   dloss_p/dr_r = -g + k   g = q w (s - sigma(-z))   k = 2 center_coef (r_c + r_r)

mu is known before the batch, so g is known as soon as a pair has been read, and the head's gradient
sum_p (g delta + k (h_c + h_r)) is accumulated while the rows are still in registers: backward reads no rows.

Where mu is this batch's own mean (none is given, or an EMA has no value yet, which only the device knows), the pass
goes by provisional weights 1 / (rho + eps), and leaves behind what a weight multiplies. The reduction, which knows the
mean, weighs each pair, and multiplies the head's gradient by the mean. Only the pairs that the cap then holds are read
again, to mend their part in it. (With centering, which no weight may touch, all of them are.)

Bytes: reads 2*P*H*s once. Rows too long for the registers of one program (`LaunchShape.block_hidden`) are read twice.
Launches: rows, then a reduction of the programs' partial sums in a fixed order, so the same inputs give the
same bits. The reduction also updates the EMA, and lists for each row the explicit pairs that it serves in.
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
from normbt_kernels.ops.pairs import (
    PairArguments,
    RowPairs,
    Vector,
    accumulate_dtype,
    load_tile,
    locate_pairs,
)

# Rows of the (6, P) table of per-pair results.
DISTANCE, WEIGHT, CHOSEN_REWARD, REJECTED_REWARD, CHOSEN_GRADIENT, REJECTED_GRADIENT = range(6)
# Entries of the (5,) table of batch results. The last two are what ranks add up to share one mean.
MEAN_DISTANCE, BT_LOSS, ACCURACY, DISTANCE_SUM, NUM_PAIRS = range(5)
# What each program leaves behind: sums of loss, distance, BT loss, correct pairs and bias gradient; its least distance;
# and whether mu was known.
NUM_PARTIALS = 7
# How many of its pairs are listed for each row: enough for 17 answers to a prompt, all ranked against each other.
ROW_ENTRIES = 16


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
    row_entries: Tensor  # (1 + ROW_ENTRIES, N) int32: which pairs each row serves in; (0,) if not asked for


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
def weigh(distance, mu, EPS: tl.constexpr, MAX_WEIGHT: tl.constexpr):
    """w = min(mu / (rho + eps), max_weight); a NaN distance stays NaN, which tl.minimum would not let it."""
    weight = mu / (distance + EPS)
    if MAX_WEIGHT is not None:
        weight = tl.where(weight > MAX_WEIGHT, MAX_WEIGHT, weight)
    return weight


@triton.jit
def weigh_provisionally(distance, EPS: tl.constexpr, CENTER_COEF: tl.constexpr):
    """What stands for the weight in the head's gradient until mu is known, and then is multiplied by mu.

    Finite where the distance is 0. With centering, which no weight may multiply, the head's gradient is nothing else.
    """
    if CENTER_COEF != 0:
        weight = tl.zeros_like(distance)
    else:
        weight = 1.0 / (distance + EPS)
        weight = tl.where(weight > 1e30, 1e30, weight)
    return weight


@triton.jit
def must_mend(distance, mean, EPS: tl.constexpr, CENTER_COEF: tl.constexpr, MAX_WEIGHT: tl.constexpr):
    """Whether mean times the provisional weight is not the weight: a pair at this distance, or a nearer one."""
    if CENTER_COEF != 0:
        mends = distance < float("inf")
    elif MAX_WEIGHT is None:
        mends = distance < 0
    else:
        mends = mean > MAX_WEIGHT * (distance + EPS)
    return mends


@triton.jit
def accumulate_head_gradient(
    rows, gradient_ptr, upstream_ptr, upstream_stride, slot,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums g delta + k (h_c + h_r) over this program's pairs into `slot`, one block of columns after the other.

    Returns the sum of 2 k, which is the bias's gradient.
    """
    num_pairs = tl.cast(rows.num_pairs, tl.int64)
    bias_gradient = tl.zeros([BLOCK_P], ACC)
    for start in range(0, rows.hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], ACC)
        for block in range(tl.program_id(0), tl.cdiv(rows.num_pairs, BLOCK_P), tl.num_programs(0)):
            pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
            in_range = pair < num_pairs
            chosen_offset, rejected_offset, exists = locate_pairs(rows, pair)
            chosen_gradient = tl.load(gradient_ptr + pair, mask=in_range, other=0.0)
            rejected_gradient = tl.load(gradient_ptr + num_pairs + pair, mask=in_range, other=0.0)
            if upstream_ptr is not None:
                upstream_gradient = tl.load(upstream_ptr + pair * upstream_stride, mask=in_range, other=0.0).to(ACC)
                chosen_gradient *= upstream_gradient
                rejected_gradient *= upstream_gradient
            chosen = load_tile(rows, rows.chosen, chosen_offset, exists, columns, ACC)
            rejected = load_tile(rows, rows.rejected, rejected_offset, exists, columns, ACC)
            gradient = 0.5 * (chosen_gradient - rejected_gradient)
            centering = 0.5 * (chosen_gradient + rejected_gradient)
            part = gradient[:, None] * (chosen - rejected) + centering[:, None] * (chosen + rejected)
            total += tl.sum(part, axis=0)
            if start == 0:
                bias_gradient += 2.0 * centering
        tl.store(slot + columns, total, mask=columns < rows.hidden_size)
    return tl.sum(bias_gradient)


@triton.jit
def _pair_loss_kernel(
    rows, scores, mu_ptr, mu_value: "fp64", num_updates_ptr,  # noqa: F821
    loss_ptr, pair_table_ptr, unweighted_ptr, partial_ptr, head_partial_ptr, row_entries_ptr,
    OWN_MEAN: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr, CENTER_COEF: tl.constexpr, EPS: tl.constexpr, MAX_WEIGHT: tl.constexpr,
    MEAN: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_pairs = tl.cast(rows.num_pairs, tl.int64)
    num_blocks = tl.cdiv(rows.num_pairs, BLOCK_P)
    LINEAR: tl.constexpr = scores.head_weight.ptr is not None

    # 1. mu, unless it is this batch's own mean, which is not known yet
    mu = tl.sum(tl.full([1], mu_value, ACC))
    if mu_ptr is not None:
        mu = tl.load(mu_ptr).to(ACC)
    mu_is_known = not OWN_MEAN
    if num_updates_ptr is not None:
        mu_is_known = tl.load(num_updates_ptr) > 0

    # 2. what stays in registers for all of this program's pairs
    first_columns = tl.arange(0, BLOCK_H)
    if LINEAR and ONE_BLOCK:
        head = load_each(scores.head_weight, first_columns, first_columns < rows.hidden_size, ACC)
    if LINEAR and scores.head_bias.ptr is not None:
        bias = tl.load(scores.head_bias.ptr).to(ACC)
    head_gradient = tl.zeros([BLOCK_H], ACC)
    distance_sum = tl.zeros([BLOCK_P], ACC)
    loss_sum = tl.zeros([BLOCK_P], ACC)
    bt_loss_sum = tl.zeros([BLOCK_P], ACC)
    correct_sum = tl.zeros([BLOCK_P], ACC)
    bias_gradient = tl.zeros([BLOCK_P], ACC)
    least_distance = tl.full([BLOCK_P], float("inf"), ACC)  # but for 0, where delta is 0 whatever weighs it
    scale = 1.0
    if MEAN:
        scale = 1.0 / tl.cast(rows.num_pairs, ACC)

    for block in range(program, num_blocks, num_programs):
        pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
        in_range = pair < num_pairs
        chosen_offset, rejected_offset, exists = locate_pairs(rows, pair)

        # 3. read both rows: rho, and of a linear head d and r_r
        if ONE_BLOCK:
            chosen = load_tile(rows, rows.chosen, chosen_offset, exists, first_columns, ACC)
            rejected = load_tile(rows, rows.rejected, rejected_offset, exists, first_columns, ACC)
            delta = chosen - rejected
            if LINEAR:
                # Before the distance: the other order spills registers of sm_100 at H=16384.
                difference = tl.sum(delta * head[None, :], axis=1)
                rejected_reward = tl.sum(rejected * head[None, :], axis=1)
            distance = tl.sqrt(tl.sum(delta * delta, axis=1))
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

        # 4. the loss of each pair and its gradient, before and after the weight multiplies them
        z = difference
        if scores.margin.ptr is not None:
            z -= load_each(scores.margin, pair, in_range, ACC)
        log1p_exp, sigmoid_minus_z = log1p_exp_and_sigmoid(z)
        bt_loss = tl.where(z < 0, -z, 0.0) + log1p_exp
        if LABEL_SMOOTHING != 0:
            bt_loss += LABEL_SMOOTHING * z
        unweighted_loss = bt_loss
        unweighted_gradient = (LABEL_SMOOTHING - sigmoid_minus_z) * scale
        if scores.pair_weight.ptr is not None:
            pair_weight = load_each(scores.pair_weight, pair, in_range, ACC)
            unweighted_loss *= pair_weight
            unweighted_gradient *= pair_weight
        weight = weigh(distance, mu, EPS, MAX_WEIGHT)
        if OWN_MEAN or num_updates_ptr is not None:
            weight = tl.where(mu_is_known, weight, weigh_provisionally(distance, EPS, CENTER_COEF))
        loss = weight * unweighted_loss
        gradient = weight * unweighted_gradient
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
        if unweighted_ptr is not None:
            needed = in_range & (not mu_is_known)
            tl.store(unweighted_ptr + pair, unweighted_loss, mask=needed)
            tl.store(unweighted_ptr + num_pairs + pair, unweighted_gradient, mask=needed)
            nearer = in_range & (distance > 0) & (distance < least_distance)
            least_distance = tl.where(nearer, distance, least_distance)
        distance_sum += tl.where(in_range, distance, 0.0)
        loss_sum += tl.where(in_range, loss, 0.0)
        bt_loss_sum += tl.where(in_range, bt_loss, 0.0)
        correct_sum += tl.where(in_range & (difference > 0), 1.0, 0.0)

        # 6. the head's gradient, from the same registers
        if head_partial_ptr is not None and ONE_BLOCK:
            gradient = tl.where(in_range, gradient, 0.0)
            if CENTER_COEF != 0:
                # g delta + k (h_c + h_r), without h_c: a row less to keep in registers
                centering = tl.where(in_range, centering, 0.0)
                part = (gradient + centering)[:, None] * delta + (2.0 * centering)[:, None] * rejected
                bias_gradient += 2.0 * centering
            else:
                part = gradient[:, None] * delta
            head_gradient += tl.sum(part, axis=0)

    # 7. this program's partial sums
    bias_gradient_sum = tl.sum(bias_gradient)
    if head_partial_ptr is not None:
        slot = head_partial_ptr + program * tl.cast(rows.hidden_size, tl.int64)
        if ONE_BLOCK:
            tl.store(slot + first_columns, head_gradient, mask=first_columns < rows.hidden_size)
        else:
            tl.debug_barrier()  # what one thread wrote to the table, others read
            bias_gradient_sum = accumulate_head_gradient(
                rows, pair_table_ptr + 4 * num_pairs, None, 0, slot, BLOCK_P, BLOCK_H, ACC
            )
    partial = partial_ptr + program
    tl.store(partial, tl.sum(loss_sum))
    tl.store(partial + num_programs, tl.sum(distance_sum))
    tl.store(partial + 2 * num_programs, tl.sum(bt_loss_sum))
    tl.store(partial + 3 * num_programs, tl.sum(correct_sum))
    tl.store(partial + 4 * num_programs, bias_gradient_sum)
    if OWN_MEAN or num_updates_ptr is not None:
        tl.store(partial + 5 * num_programs, tl.min(least_distance))
    if num_updates_ptr is not None:
        # The reduction's programs cannot ask the EMA itself, which the first of them updates.
        tl.store(partial + 6 * num_programs, tl.where(mu_is_known, 1.0, 0.0).to(ACC))

    # 8. empty lists of each row's pairs, for the reduction to fill
    if row_entries_ptr is not None:
        for start in range(program * 1024, rows.num_rows, num_programs * 1024):
            row = start + tl.arange(0, 1024)
            tl.store(row_entries_ptr + row, tl.zeros([1024], tl.int32), mask=row < rows.num_rows)


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
    rows, partial_ptr, num_partials, loss_ptr, pair_table_ptr, unweighted_ptr, batch_table_ptr, mu_ptr, num_updates_ptr,
    head_partial_ptr, head_gradient_ptr, row_entries_ptr,
    OWN_MEAN: tl.constexpr, BETA: tl.constexpr,
    CENTER_COEF: tl.constexpr, EPS: tl.constexpr, MAX_WEIGHT: tl.constexpr,
    MEAN: tl.constexpr, PER_PAIR: tl.constexpr, ROW_ENTRIES: tl.constexpr, PROGRAMS: tl.constexpr,
    SCAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_pairs = tl.cast(rows.num_pairs, tl.int64)
    pair_count = tl.cast(rows.num_pairs, ACC)
    index = tl.arange(0, PROGRAMS)
    is_partial = index < num_partials
    distance_sum = tl.sum(tl.load(partial_ptr + num_partials + index, mask=is_partial, other=0.0), axis=0)
    mean_distance = distance_sum / pair_count
    mu_is_known = not OWN_MEAN
    if num_updates_ptr is not None:
        mu_is_known = tl.load(partial_ptr + 6 * num_partials) > 0

    # 1. each program: its columns of the head's gradient
    if head_gradient_ptr is not None:
        columns = program * BLOCK_H + tl.arange(0, BLOCK_H)
        total = sum_partials(head_partial_ptr, num_partials, columns, rows.hidden_size, BLOCK_K, BLOCK_H, ACC)
        if unweighted_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other on the device)
            if not mu_is_known:
                if CENTER_COEF == 0:
                    total *= mean_distance
                least = tl.load(partial_ptr + 5 * num_partials + index, mask=is_partial, other=float("inf"))
                any_mends = must_mend(tl.min(least, axis=0), mean_distance, EPS, CENTER_COEF, MAX_WEIGHT)
                for start in range(0, tl.where(any_mends, rows.num_pairs, 0), BLOCK_P):
                    pair = start + tl.arange(0, BLOCK_P)
                    distance = tl.load(pair_table_ptr + pair, mask=pair < num_pairs, other=float("inf"))
                    mends = must_mend(distance, mean_distance, EPS, CENTER_COEF, MAX_WEIGHT) & (distance > 0)
                    if tl.max(mends.to(tl.int32), axis=0) > 0:
                        weight = weigh(distance, mean_distance, EPS, MAX_WEIGHT)
                        weight -= mean_distance * weigh_provisionally(distance, EPS, CENTER_COEF)
                        gradient = tl.load(unweighted_ptr + num_pairs + pair, mask=mends, other=0.0)
                        gradient = tl.where(mends, weight * gradient, 0.0)
                        chosen_offset, rejected_offset, exists = locate_pairs(rows, pair)
                        chosen = load_tile(rows, rows.chosen, chosen_offset, exists & mends, columns, ACC)
                        rejected = load_tile(rows, rows.rejected, rejected_offset, exists & mends, columns, ACC)
                        total += tl.sum(gradient[:, None] * (chosen - rejected), axis=0)
        tl.store(head_gradient_ptr + columns, total, mask=columns < rows.hidden_size)

    # 2. each program: some of the pairs, weighed by the mean that is known now; the first sums the loss of all
    loss_sum = tl.zeros([SCAN], ACC)
    if unweighted_ptr is not None:  # noqa: SIM102
        if not mu_is_known:
            num_steps = tl.cdiv(rows.num_pairs, SCAN)
            stride = tl.where(program == 0, 1, num_programs)
            for step in range(program, num_steps, stride):
                pair = step * SCAN + tl.arange(0, SCAN)
                in_range = pair < num_pairs
                writes = in_range & (pair // SCAN % num_programs == program)
                table = pair_table_ptr + pair
                weight = weigh(tl.load(table, mask=in_range, other=1.0), mean_distance, EPS, MAX_WEIGHT)
                loss = weight * tl.load(unweighted_ptr + pair, mask=in_range, other=0.0)
                gradient = weight * tl.load(unweighted_ptr + num_pairs + pair, mask=writes, other=0.0)
                centering = tl.zeros([SCAN], ACC)
                if CENTER_COEF != 0:
                    reward_sum = tl.load(table + 2 * num_pairs, mask=in_range, other=0.0)
                    reward_sum += tl.load(table + 3 * num_pairs, mask=in_range, other=0.0)
                    loss += CENTER_COEF * reward_sum * reward_sum
                    centering = 2.0 * CENTER_COEF * reward_sum
                    if MEAN:
                        centering = centering / pair_count
                tl.store(table + 1 * num_pairs, weight, mask=writes)
                tl.store(table + 4 * num_pairs, gradient + centering, mask=writes)
                tl.store(table + 5 * num_pairs, centering - gradient, mask=writes)
                if PER_PAIR:
                    tl.store(loss_ptr + pair, loss, mask=writes)
                loss_sum += tl.where(in_range, loss, 0.0)

    # 3. each program: some of the explicit pairs, entered in the lists of their two rows
    if row_entries_ptr is not None:
        for start in range(program * SCAN, 2 * rows.num_pairs, num_programs * SCAN):
            entry = start + tl.arange(0, SCAN)
            side = entry // num_pairs
            row_ptr = rows.index_ptr + (entry % num_pairs) * rows.index_stride + side * rows.index_side_stride
            row = tl.load(row_ptr, mask=entry < 2 * num_pairs, other=-1)
            exists = (row >= 0) & (row < rows.num_rows)
            place = tl.atomic_add(row_entries_ptr + row, 1, mask=exists, sem="relaxed")
            out = row_entries_ptr + (1 + place.to(tl.int64)) * rows.num_rows + row
            tl.store(out, entry, mask=exists & (place < ROW_ENTRIES))

    # 4. the first program: the batch's results and the EMA
    if program == 0:
        partial = partial_ptr + index
        loss = tl.sum(tl.load(partial, mask=is_partial, other=0.0), axis=0)
        if unweighted_ptr is not None:
            loss = tl.where(mu_is_known, loss, tl.sum(loss_sum, axis=0))
        bt_loss = tl.sum(tl.load(partial + 2 * num_partials, mask=is_partial, other=0.0), axis=0)
        correct = tl.sum(tl.load(partial + 3 * num_partials, mask=is_partial, other=0.0), axis=0)
        tl.store(batch_table_ptr + 0, mean_distance)
        tl.store(batch_table_ptr + 1, bt_loss / pair_count)
        tl.store(batch_table_ptr + 2, correct / pair_count)
        tl.store(batch_table_ptr + 3, distance_sum)
        tl.store(batch_table_ptr + 4, pair_count)
        if head_gradient_ptr is not None:
            bias_gradient = tl.load(partial + 4 * num_partials, mask=is_partial, other=0.0)
            tl.store(head_gradient_ptr + rows.hidden_size, tl.sum(bias_gradient, axis=0))
        if not PER_PAIR:
            tl.store(loss_ptr, loss / pair_count if MEAN else loss)
        if BETA is not None:
            update_ema(mu_ptr, num_updates_ptr, mean_distance, BETA)


def _launch_pair_loss(
    rows: RowPairs, scores: Scores, mean: Mean, options: LossOptions, result: PairLossResult
) -> PairLossResult:
    shape = rows.launch_shape(centers=options.center_coef != 0)
    device, dtype = rows.chosen.device, result.pair_table.dtype
    own_mean = mean.mu is None and mean.value is None
    per_pair = options.reduction == "none"
    head_gradient = result.head_gradient if result.head_gradient.numel() > 0 else None
    row_entries = result.row_entries if result.row_entries.numel() > 0 else None

    def workspace(wanted: bool, *size: int) -> Tensor | None:
        return torch.empty(size, device=device, dtype=dtype) if wanted else None

    partial = workspace(True, NUM_PARTIALS, shape.num_programs)
    head_partial = workspace(head_gradient is not None, shape.num_programs, rows.hidden_size)
    unweighted = workspace(own_mean or mean.num_updates is not None, 2, rows.num_pairs)
    constants = {
        "OWN_MEAN": own_mean,
        "CENTER_COEF": options.center_coef,
        "EPS": options.eps,
        "MAX_WEIGHT": options.max_weight,
        "MEAN": options.reduction == "mean",
        "ACC": triton_dtype(dtype),
    }
    row_arguments = PairArguments.of(rows)
    _pair_loss_kernel[(shape.num_programs,)](
        row_arguments,
        ScoreArguments(*(Vector.of(tensor) for tensor in scores)),
        mean.mu,
        mean.value or 0.0,
        mean.num_updates,
        result.loss if per_pair else None,
        result.pair_table,
        unweighted,
        partial,
        head_partial,
        row_entries,
        LABEL_SMOOTHING=options.label_smoothing,
        ONE_BLOCK=shape.block_hidden >= rows.hidden_size,
        BLOCK_P=shape.block_rows,
        BLOCK_H=shape.block_hidden,
        num_warps=shape.num_warps,
        **constants,
    )
    block_hidden, scan = 32, 1024
    num_programs = 1
    if head_gradient is not None:
        num_programs = cdiv(rows.hidden_size, block_hidden)
    if unweighted is not None or row_entries is not None:
        num_programs = max(num_programs, min(cdiv(2 * rows.num_pairs, scan), 64))
    _finalise_kernel[(num_programs,)](
        row_arguments,
        partial,
        shape.num_programs,
        result.loss,
        result.pair_table,
        unweighted,
        result.batch_table,
        mean.mu,
        mean.num_updates,
        head_partial,
        head_gradient,
        row_entries,
        BETA=mean.beta,
        PER_PAIR=per_pair,
        ROW_ENTRIES=ROW_ENTRIES,
        PROGRAMS=next_power_of_2(shape.num_programs),
        SCAN=scan,
        BLOCK_K=512 // dtype.itemsize,
        BLOCK_P=128,  # x 32 columns: 16 bytes for each thread also where a program has 512
        BLOCK_H=block_hidden,
        num_warps=8,
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
    label_smoothing, center_coef, eps, max_weight, reduction, head_gradient, row_entries,
):  # fmt: skip
    dtype = accumulate_dtype(chosen, rejected, chosen_rewards, rejected_rewards, head_weight, head_bias)
    num_pairs = chosen.shape[0] if pairs is None else pairs.shape[0]
    return (
        chosen.new_empty((num_pairs,) if reduction == "none" else (), dtype=dtype),
        chosen.new_empty((6, num_pairs), dtype=dtype),
        chosen.new_empty(5, dtype=dtype),
        chosen.new_empty(chosen.shape[-1] + 1 if head_gradient else 0, dtype=dtype),
        chosen.new_empty((1 + ROW_ENTRIES, chosen.shape[0]) if row_entries else (0,), dtype=torch.int32),
    )


@define_op(
    "pair_loss(Tensor chosen, Tensor rejected, Tensor? pairs, Tensor? chosen_token, Tensor? rejected_token,"
    " Tensor? chosen_rewards, Tensor? rejected_rewards, Tensor? head_weight, Tensor? head_bias,"
    " Tensor? margin, Tensor? pair_weight,"
    " Tensor? mu, float? mu_value, Tensor(a!)? ema_mu, Tensor(b!)? ema_num_updates, float? beta,"
    " float label_smoothing, float center_coef, float eps, float? max_weight, str reduction, bool head_gradient,"
    " bool row_entries) -> (Tensor loss, Tensor pair_table, Tensor batch_table, Tensor head_gradient,"
    " Tensor row_entries)",
    fake=_pair_loss_fake,
)
def pair_loss(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
