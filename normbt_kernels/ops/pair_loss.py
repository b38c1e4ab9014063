"""The one pass over row pairs: distance, weight, loss and its gradient, with one read of each row.

    delta = h_c - h_r      rho = ||delta||_2      d = v . delta, or r_c - r_r of given rewards
    z = d - margin         w = min((mu / (rho + eps))^power, max_weight)   (NormBT, section 3; w is a constant)
    l = -[(1-s) log sigma(z) + s log sigma(-z)] = (1-s) softplus(-z) + s softplus(z)
    loss_p = q w l + center_coef (r_c + r_r)^2
    dloss_p/dr_c = g + k   dloss_p/dr_r = -g + k   g = q w (s - sigma(-z))   k = 2 center_coef (r_c + r_r)

mu is known before the batch, so g is known as soon as a pair has been read, and the head's gradient
sum_p (g delta + k (h_c + h_r)) is accumulated while the rows are still in registers: backward reads no rows.
(Where mu is this batch's own mean, `pair_distance` reads the rows before: `autograd.py`.)

Bytes: reads 2*P*H*s. Rows too long for the registers of one program (`LaunchShape.block_hidden`) are read twice.
Launches: the rows, then a reduction of the programs' partial sums in a fixed order, so the same inputs give the
same bits. The reduction also brings the EMA up to date.
"""

from typing import NamedTuple

import torch

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import run_on, triton_dtype, uses_kernels
from normbt_kernels.ops.closed_form import compute_pair_loss
from normbt_kernels.ops.ema import EMA, add_to_pending, move_mu
from normbt_kernels.ops.launch import cdiv
from normbt_kernels.ops.launcher import Launch, Plans, kinds
from normbt_kernels.ops.on_cpu import compute_on_cpu
from normbt_kernels.ops.pairs import (
    RowArguments,
    RowPairs,
    RowStrides,
    Vector,
    load_each,
    load_tile,
    locate_pairs,
    vector_stride,
)
from normbt_kernels.ops.terms import LossOptions, LossResult, Mu, Scores

# What each program leaves behind before its part of the head's gradient: sums of the loss, the distance, the BT loss
# and the pairs in order.
NUM_SUMS = 4
FINALISED_COLUMNS = 32  # of the head's gradient, by each program of the reduction
MAX_PAIRS = 2**31 - 2**16  # numbers of pairs fit 32 bits, also those of the tiles that follow the last
NO_EMA = EMA(None, None, None, None)


class ScoreArguments(NamedTuple):
    chosen_rewards: Vector
    rejected_rewards: Vector
    head_weight: Vector
    head_bias: Vector
    margin: Vector
    pair_weight: Vector

    @classmethod
    def named(cls, scores: tuple) -> "ScoreArguments":
        return cls._make(map(Vector._make, scores))


@triton.jit
def log1p_exp_and_sigmoid(z):
    """log(1 + exp(-|z|)) to the last bits, and sigma(-z), neither of which overflows."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    # log(u) alone loses e to the rounding of 1 + e; scaling by e / (u - 1) puts back what was rounded away.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return log1p, tl.where(z >= 0, e, 1.0) / u


@triton.jit
def weigh(distance, mu, EPS: tl.constexpr, MAX_WEIGHT: tl.constexpr, POWER: tl.constexpr):
    """w = min((mu / (rho + eps))^power, max_weight); NaN for a distance that is not finite.

    A sum of squares beyond the dtype makes an infinite distance: a weight of 0 would drop the pair without a word.
    """
    weight = mu / (distance + EPS)
    if POWER == 0:
        weight = tl.full(weight.shape, 1.0, weight.dtype)
    elif POWER == 0.5:
        weight = tl.sqrt(weight)
    elif POWER != 1:
        weight = tl.exp2(POWER * tl.log2(weight))
    if MAX_WEIGHT is not None:
        weight = tl.where(weight > MAX_WEIGHT, MAX_WEIGHT, weight)  # not tl.minimum: NaN stays NaN
    if POWER != 0:
        weight = tl.where(distance == float("inf"), float("nan"), weight)
    return weight


@triton.jit
def accumulate_head_gradient(
    rows, gradient_ptr, upstream, slot_ptr, num_pairs, num_rows, sequence_length, hidden_size,
    LAYOUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums g delta + k (h_c + h_r) over this program's pairs, one block of columns after the other.

    gradient_ptr: (2, P). upstream: (P,), or none, which stands for 1. slot_ptr: (H + 1,), receives the sum and
    then the bias's gradient, the sum of 2 k.
    """
    bias_gradient = tl.zeros([BLOCK_P], ACC)
    for start in range(0, hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], ACC)
        for block in range(tl.program_id(0), tl.cdiv(num_pairs, BLOCK_P), tl.num_programs(0)):
            pair = tl.cast(block, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
            in_range = pair < num_pairs
            chosen_offset, rejected_offset, exists = locate_pairs(
                rows, pair, num_pairs, num_rows, sequence_length, LAYOUT
            )
            chosen_gradient = tl.load(gradient_ptr + pair, mask=in_range, other=0.0)
            rejected_gradient = tl.load(gradient_ptr + num_pairs + pair, mask=in_range, other=0.0)
            if upstream is not None:
                upstream_gradient = load_each(upstream, pair, in_range, ACC)
                chosen_gradient *= upstream_gradient
                rejected_gradient *= upstream_gradient
            chosen = load_tile(rows.chosen, chosen_offset, exists, columns, hidden_size, ACC)
            rejected = load_tile(rows.rejected, rejected_offset, exists, columns, hidden_size, ACC)
            gradient = 0.5 * (chosen_gradient - rejected_gradient)
            centering = 0.5 * (chosen_gradient + rejected_gradient)
            part = gradient[:, None] * (chosen - rejected) + centering[:, None] * (chosen + rejected)
            total += tl.sum(part, axis=0)
            if start == 0:
                bias_gradient += 2.0 * centering
        tl.store(slot_ptr + columns, total, mask=columns < hidden_size)
    tl.store(slot_ptr + hidden_size, tl.sum(bias_gradient))


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "sequence_length"])
def _pair_loss_kernel(
    rows, scores, mu_ptr, num_updates_ptr, first_mu_ptr, mu_value: "fp64",  # noqa: F821
    loss_ptr, gradient_ptr, pair_stats_ptr, partial_ptr,
    num_pairs, num_rows, sequence_length, hidden_size, num_columns,
    LABEL_SMOOTHING: tl.constexpr, CENTER_COEF: tl.constexpr, EPS: tl.constexpr, MAX_WEIGHT: tl.constexpr,
    POWER: tl.constexpr, MEAN: tl.constexpr, HEAD_GRADIENT: tl.constexpr, LAYOUT: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program: every num_programs-th block of BLOCK_P pairs.

    mu_ptr: () or none, and then mu_value. num_updates_ptr: () of an EMA or none; while it is 0, first_mu_ptr () is mu,
    or, if that is none, each pair weighs 1.
    loss_ptr: (P,) of reduction "none", or none. gradient_ptr: (2, P). pair_stats_ptr: (4, P), or none.
    partial_ptr: (programs, num_columns), of which the first NUM_SUMS columns are sums, and the next H + 1 the
    gradient of the head and its bias.
    """
    program = tl.program_id(0)
    LINEAR: tl.constexpr = scores.head_weight.ptr is not None
    # Nothing else asks for the rewards of a linear head: the loss goes by their difference.
    REWARDS: tl.constexpr = CENTER_COEF != 0 or pair_stats_ptr is not None

    # 1. what stays in registers for all of this program's pairs
    mu = tl.sum(tl.full([1], mu_value, ACC))
    if mu_ptr is not None:
        mu = tl.load(mu_ptr).to(ACC)
    has_mu = True
    if num_updates_ptr is not None:
        has_mu = tl.load(num_updates_ptr) > 0
    if first_mu_ptr is not None:
        mu = tl.where(has_mu, mu, tl.load(first_mu_ptr).to(ACC))
    first_columns = tl.arange(0, BLOCK_H)
    if LINEAR and ONE_BLOCK:
        head = load_each(scores.head_weight, first_columns, first_columns < hidden_size, ACC)
    if LINEAR and scores.head_bias.ptr is not None:
        bias = tl.load(scores.head_bias.ptr).to(ACC)
    head_gradient = tl.zeros([BLOCK_H], ACC)
    bias_gradient = tl.zeros([BLOCK_P], ACC)
    loss_sum = tl.zeros([BLOCK_P], ACC)
    distance_sum = tl.zeros([BLOCK_P], ACC)
    bt_loss_sum = tl.zeros([BLOCK_P], ACC)
    in_order_sum = tl.zeros([BLOCK_P], ACC)
    scale = 1.0
    if MEAN:
        scale = 1.0 / tl.cast(num_pairs, ACC)

    for block in tl.range(program, tl.cdiv(num_pairs, BLOCK_P), tl.num_programs(0), num_stages=STAGES):
        pair = (block * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)  # in 32 bits: MAX_PAIRS
        in_range = pair < num_pairs
        chosen_offset, rejected_offset, exists = locate_pairs(rows, pair, num_pairs, num_rows, sequence_length, LAYOUT)

        # 2. read both rows: rho, and of a linear head d and r_r. First what each pair has besides, which then arrives
        # while the rows are reduced.
        if not LINEAR:
            chosen_reward = load_each(scores.chosen_rewards, pair, in_range, ACC)
            rejected_reward = load_each(scores.rejected_rewards, pair, in_range, ACC)
        if scores.margin.ptr is not None:
            margin = load_each(scores.margin, pair, in_range, ACC)
        if scores.pair_weight.ptr is not None:
            pair_weight = load_each(scores.pair_weight, pair, in_range, ACC)
        if ONE_BLOCK:
            chosen = load_tile(rows.chosen, chosen_offset, exists, first_columns, hidden_size, ACC)
            rejected = load_tile(rows.rejected, rejected_offset, exists, first_columns, hidden_size, ACC)
            if LINEAR and REWARDS:
                rejected_reward = tl.sum(rejected * head[None, :], axis=1)
            delta = chosen - rejected
            if LINEAR:
                # Before the distance: the other order spills registers of sm_100 at H=16384.
                difference = tl.sum(delta * head[None, :], axis=1)
            distance = tl.sqrt(tl.sum(delta * delta, axis=1))
        else:
            square = tl.zeros([BLOCK_P, BLOCK_H], ACC)
            delta_dot = tl.zeros([BLOCK_P, BLOCK_H], ACC)
            rejected_dot = tl.zeros([BLOCK_P, BLOCK_H], ACC)
            for start in range(0, hidden_size, BLOCK_H):
                columns = start + first_columns
                chosen = load_tile(rows.chosen, chosen_offset, exists, columns, hidden_size, ACC)
                rejected = load_tile(rows.rejected, rejected_offset, exists, columns, hidden_size, ACC)
                delta = chosen - rejected
                square += delta * delta
                if LINEAR:
                    head = load_each(scores.head_weight, columns, columns < hidden_size, ACC)
                    delta_dot += delta * head[None, :]
                    if REWARDS:
                        rejected_dot += rejected * head[None, :]
            distance = tl.sqrt(tl.sum(square, axis=1))
            if LINEAR:
                difference = tl.sum(delta_dot, axis=1)
                if REWARDS:
                    rejected_reward = tl.sum(rejected_dot, axis=1)
        if LINEAR and REWARDS:
            if scores.head_bias.ptr is not None:
                rejected_reward += bias
            chosen_reward = rejected_reward + difference
        if not LINEAR:
            difference = chosen_reward - rejected_reward
        # A pair of rows that do not exist is NaN, also where no weight depends on its distance.
        distance = tl.where(exists, distance, float("nan"))
        difference = tl.where(exists, difference, float("nan"))

        # 3. the loss of each pair and its gradient
        z = difference
        if scores.margin.ptr is not None:
            z -= margin
        log1p_exp, sigmoid_minus_z = log1p_exp_and_sigmoid(z)
        bt_loss = tl.where(z < 0, -z, 0.0)
        if LABEL_SMOOTHING != 0:  # (1-s) softplus(-z) + s softplus(z), which an infinite margin leaves infinite
            bt_loss = tl.where(z < 0, (LABEL_SMOOTHING - 1) * z, LABEL_SMOOTHING * z)
        bt_loss += log1p_exp
        weight = weigh(distance, mu, EPS, MAX_WEIGHT, POWER)
        if num_updates_ptr is not None and first_mu_ptr is None:
            weight = tl.where(has_mu, weight, 1.0)
        loss = bt_loss
        gradient = (LABEL_SMOOTHING - sigmoid_minus_z) * scale
        if scores.pair_weight.ptr is not None:
            loss *= pair_weight
            gradient *= pair_weight
        loss *= weight
        gradient *= weight
        centering = tl.zeros([BLOCK_P], ACC)
        if CENTER_COEF != 0:
            reward_sum = chosen_reward + rejected_reward
            loss += CENTER_COEF * reward_sum * reward_sum
            centering = 2.0 * CENTER_COEF * reward_sum * scale

        # 4. what each pair leaves behind
        tl.store(gradient_ptr + pair, gradient + centering, mask=in_range)
        tl.store(gradient_ptr + num_pairs + pair, centering - gradient, mask=in_range)
        if loss_ptr is not None:
            tl.store(loss_ptr + pair, loss, mask=in_range)
        if pair_stats_ptr is not None:
            stats_ptr = pair_stats_ptr + pair
            stride = tl.cast(num_pairs, tl.int64)
            tl.store(stats_ptr, distance, mask=in_range)
            tl.store(stats_ptr + 1 * stride, weight, mask=in_range)
            tl.store(stats_ptr + 2 * stride, chosen_reward, mask=in_range)
            tl.store(stats_ptr + 3 * stride, rejected_reward, mask=in_range)
        loss_sum += tl.where(in_range, loss, 0.0)
        distance_sum += tl.where(in_range, distance, 0.0)
        bt_loss_sum += tl.where(in_range, bt_loss, 0.0)
        in_order_sum += tl.where(in_range & (difference > 0), 1.0, 0.0)

        # 5. the head's gradient, from the same registers
        if HEAD_GRADIENT and ONE_BLOCK:
            gradient = tl.where(in_range, gradient, 0.0)
            if CENTER_COEF != 0:
                # g delta + k (h_c + h_r), without h_c: a row less to keep in registers
                centering = tl.where(in_range, centering, 0.0)
                part = (gradient + centering)[:, None] * delta + (2.0 * centering)[:, None] * rejected
                bias_gradient += 2.0 * centering
            else:
                part = gradient[:, None] * delta
            head_gradient += tl.sum(part, axis=0)

    # 6. what this program leaves behind
    slot_ptr = partial_ptr + program * tl.cast(num_columns, tl.int64)
    tl.store(slot_ptr, tl.sum(loss_sum))
    tl.store(slot_ptr + 1, tl.sum(distance_sum))
    tl.store(slot_ptr + 2, tl.sum(bt_loss_sum))
    tl.store(slot_ptr + 3, tl.sum(in_order_sum))
    if HEAD_GRADIENT:
        slot_ptr += 4
        if ONE_BLOCK:
            tl.store(slot_ptr + first_columns, head_gradient, mask=first_columns < hidden_size)
            tl.store(slot_ptr + hidden_size, tl.sum(bias_gradient))
        else:
            tl.debug_barrier()  # what one thread wrote to the table, others read
            accumulate_head_gradient(
                rows, gradient_ptr, None, slot_ptr, num_pairs, num_rows, sequence_length, hidden_size,
                LAYOUT, BLOCK_P, BLOCK_H, ACC,
            )  # fmt: skip


@triton.jit
def sum_partials(
    partial_ptr, num_partials, columns, exists, num_columns,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of some columns (BLOCK_H,) of a (partials, num_columns) matrix, always in the same order."""
    total = tl.zeros([BLOCK_K, BLOCK_H], ACC)
    for start in range(0, num_partials, BLOCK_K):
        partial = start + tl.arange(0, BLOCK_K).to(tl.int64)
        place = partial[:, None] * num_columns + columns[None, :]
        total += tl.load(partial_ptr + place, mask=(partial < num_partials)[:, None] & exists[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["num_partials", "num_pairs"])
def _finalise_kernel(
    partial_ptr, loss_ptr, batch_stats_ptr, head_gradient_ptr, ema,
    num_partials, num_pairs, num_gradients, num_columns,
    BETA: tl.constexpr, MEAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds up what the programs of `_pair_loss_kernel` left behind.

    partial_ptr: (partials, num_columns). loss_ptr: (), or none with reduction "none". batch_stats_ptr: (3,), or none.
    head_gradient_ptr: (num_gradients,), H + 1 of them, or none. ema: pointers to mu, num_updates, pending, or none.
    """
    # 1. each program: its columns of the head's gradient
    if head_gradient_ptr is not None:
        columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        exists = columns < num_gradients
        total = sum_partials(partial_ptr + 4, num_partials, columns, exists, num_columns, BLOCK_K, BLOCK_H, ACC)
        tl.store(head_gradient_ptr + columns, total, mask=exists)
    # 2. the first program: the batch's results and the EMA
    if tl.program_id(0) == 0:
        which = tl.arange(0, 4)
        sums = sum_partials(partial_ptr, num_partials, which, which < 4, num_columns, BLOCK_K, 4, ACC)
        pair_count = tl.cast(num_pairs, ACC)
        distance_sum = tl.sum(tl.where(which == 1, sums, 0.0))
        if loss_ptr is not None:
            loss = tl.sum(tl.where(which == 0, sums, 0.0))
            tl.store(loss_ptr, loss / pair_count if MEAN else loss)
        if batch_stats_ptr is not None:
            tl.store(batch_stats_ptr + which - 1, sums / pair_count, mask=which > 0)
        if ema is not None:
            add_to_pending(ema[2], distance_sum, pair_count)
            if BETA is not None:
                move_mu(ema[0], ema[1], ema[2], BETA)


class PairLossPlan:
    """Both launches of a pass, and what it allocates."""

    def __init__(self, rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool):
        dtype, num_pairs, hidden_size = scores.accumulate_dtype(rows), rows.num_pairs, rows.hidden_size
        if num_pairs > MAX_PAIRS:
            raise ValueError(f"at most {MAX_PAIRS} pairs in one call, got {num_pairs}")
        shape = rows.launch_shape(dtype, options.center_coef != 0, scores.head_weight is not None)
        per_pair, mean, acc = options.reduction == "none", options.reduction == "mean", triton_dtype(dtype)
        num_gradients = hidden_size + 1 if head_gradient else 0
        num_columns = cdiv(NUM_SUMS + num_gradients, 16) * 16  # each program's part is aligned, as the compiler is told
        self.asked_for = num_pairs, hidden_size, options, stats, head_gradient
        self.memory = {"dtype": dtype, "device": rows.chosen.device}
        self.partials = shape.num_programs, num_columns
        self.per_pair, self.takes_up = per_pair, mu.takes_up_distances
        self.row_strides, self.score_strides = RowStrides(rows), [vector_stride(tensor) for tensor in scores]
        self.sizes = num_pairs, rows.chosen.shape[0], rows.sequence_length, hidden_size, num_columns
        self.sums = shape.num_programs, num_pairs, num_gradients, num_columns
        self.pass_over_pairs = Launch(
            _pair_loss_kernel,
            (shape.num_programs, 1, 1),
            shape.num_warps,
            self._pass_arguments,
            {0: RowArguments.named, 1: ScoreArguments.named},
            LABEL_SMOOTHING=options.label_smoothing,
            CENTER_COEF=options.center_coef,
            EPS=options.eps,
            MAX_WEIGHT=options.max_weight,
            POWER=options.power,
            MEAN=mean,
            HEAD_GRADIENT=head_gradient,
            LAYOUT=rows.layout,
            ONE_BLOCK=shape.block_hidden >= hidden_size,
            BLOCK_P=shape.block_rows,
            BLOCK_H=shape.block_hidden,
            ACC=acc,
            STAGES=shape.num_stages,
        )
        self.finalise = None
        if stats or head_gradient or self.takes_up or not per_pair:
            self.finalise = Launch(
                _finalise_kernel,
                (cdiv(max(num_gradients, 1), FINALISED_COLUMNS), 1, 1),
                8,
                self._finalise_arguments,
                {},
                BETA=mu.ema.beta if self.takes_up else None,
                MEAN=mean,
                BLOCK_K=512 // dtype.itemsize,
                BLOCK_H=FINALISED_COLUMNS,
                ACC=acc,
            )

    def _pass_arguments(
        self, chosen, rejected, pairs, last_token,
        chosen_rewards, rejected_rewards, head_weight, head_bias, margin, pair_weight,
        mu, num_updates, first_mu, loss, gradient, pair_stats, partials, mu_value,
    ) -> tuple:  # fmt: skip
        scores = chosen_rewards, rejected_rewards, head_weight, head_bias, margin, pair_weight
        return (
            self.row_strides.arguments(chosen, rejected, pairs, last_token),
            tuple(zip(scores, self.score_strides, strict=True)),
            mu, num_updates, first_mu, mu_value, loss, gradient, pair_stats, partials, *self.sizes,
        )  # fmt: skip

    def _finalise_arguments(self, partials, loss, batch_stats, head_gradient, *ema) -> tuple:
        return partials, loss, batch_stats, head_gradient, ema or None, *self.sums

    def run(self, rows: RowPairs, scores: Scores, mu: Mu) -> LossResult:
        result = LossResult.allocate(*self.asked_for, **self.memory)
        partials = torch.empty(self.partials, **self.memory)
        ema = mu.ema
        self.pass_over_pairs(
            (
                *rows[:4],
                *scores,
                *((mu.tensor, None, None) if ema is None else (ema.mu, ema.num_updates, mu.tensor)),
                result.loss if self.per_pair else None,
                result.gradient,
                result.pair_stats,
                partials,
            ),
            mu.value or 0.0,
        )
        if self.finalise is not None:
            loss = None if self.per_pair else result.loss
            self.finalise(
                (partials, loss, result.batch_stats, result.head_gradient, *(ema[:3] if self.takes_up else ()))
            )
        return result


_plans: Plans[PairLossPlan] = Plans()


def _launch_pair_loss(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The pass by the kernels, of P >= 1 pairs."""
    rows, ema = rows.for_kernels(), mu.ema or NO_EMA
    inputs = (rows.chosen, rows.rejected, rows.pairs, rows.last_token, *scores, mu.tensor, *ema[:3])
    kind = rows.chosen.device, rows.layout, options, stats, head_gradient, ema.beta, kinds(inputs)
    plan = _plans.find(kind, PairLossPlan, rows, scores, mu, options, stats, head_gradient)
    return run_on(rows.chosen.device, plan.run, rows, scores, mu)


def run_pair_loss(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The pass, by the implementation that serves the device of the rows."""
    rows.check_range()
    device = rows.chosen.device
    if rows.num_pairs == 0:
        memory = {"dtype": scores.accumulate_dtype(rows), "device": device}
        result = LossResult.allocate(0, rows.hidden_size, options, stats, head_gradient, **memory)
        for tensor in result:
            if tensor is not None:
                tensor.zero_()
        return result
    run = compute_on_cpu if device.type == "cpu" else compute_pair_loss
    if uses_kernels(device):
        run = _launch_pair_loss
    return run(rows, scores, mu, options, stats, head_gradient)
