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
import torch.nn.functional as F
from torch import Tensor

from normbt_kernels.ops._triton import tl, triton
from normbt_kernels.ops.backend import FP_FUSION, on_device, triton_dtype, uses_kernels
from normbt_kernels.ops.ema import EMA, add_to_pending, add_to_pending_, move_mu, move_mu_
from normbt_kernels.ops.launch import cdiv
from normbt_kernels.ops.pairs import (
    RowArguments,
    RowPairs,
    Vector,
    accumulate_dtype,
    cast,
    load_each,
    load_tile,
    locate_pairs,
)

# Rows of the (4, P) table of per-pair statistics, and entries of the (3,) statistics of the batch.
DISTANCE, WEIGHT, CHOSEN_REWARD, REJECTED_REWARD = range(4)
MEAN_DISTANCE, BT_LOSS, ACCURACY = range(3)
# What each program leaves behind before its part of the head's gradient: sums of the loss, the distance, the BT loss
# and the pairs in order.
NUM_SUMS = 4


class LossOptions(NamedTuple):
    """The constants of the loss (design symbols: s, center_coef, eps, max_weight, power) and its reduction."""

    label_smoothing: float
    center_coef: float
    eps: float
    max_weight: float | None
    power: float
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
        inputs = self.chosen_rewards, self.rejected_rewards, self.head_weight, self.head_bias
        return accumulate_dtype(rows.chosen, rows.rejected, *inputs)

    def block(self, pairs: slice | None) -> "Scores":
        """Of some of the pairs; None for all."""
        if pairs is None:
            return self
        return Scores(
            *(None if tensor is None else tensor[pairs] for tensor in self[:2]),
            self.head_weight,
            self.head_bias,
            *(None if tensor is None else tensor[pairs] for tensor in self[4:]),
        )


class Mu(NamedTuple):
    """What the weights are measured by: a number, a tensor, or this batch's own mean.

    If none of them: the mu of `ema`, and each pair weighs 1 as long as there is none.
    """

    value: float | None = None
    tensor: Tensor | None = None  # ()
    ema: EMA | None = None  # takes up this batch's distances, whatever weighs it, unless its `pending` is None
    own_mean: bool = False  # distances first, their mean, then the ordinary pass: the rows are read twice

    @property
    def takes_up_distances(self) -> bool:
        return self.ema is not None and self.ema.pending is not None


class LossResult(NamedTuple):
    """What is not asked for is None."""

    loss: Tensor  # (), or (P,) with reduction "none"
    gradient: Tensor  # (2, P) of the loss with respect to the chosen and the rejected rewards
    head_gradient: Tensor | None  # (H + 1,) of weight and bias for an upstream gradient of 1
    pair_stats: Tensor | None  # (4, P)
    batch_stats: Tensor | None  # (3,)

    @classmethod
    def allocate(
        cls, rows: RowPairs, dtype: torch.dtype, options: LossOptions, head_gradient: bool, stats: bool
    ) -> "LossResult":
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=rows.chosen.device)

        num_pairs = rows.num_pairs
        return cls(
            empty(num_pairs) if options.reduction == "none" else empty(),
            empty(2, num_pairs),
            empty(rows.hidden_size + 1) if head_gradient else None,
            empty(4, num_pairs) if stats else None,
            empty(3) if stats else None,
        )


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
    rows, scores, mu_ptr, num_updates_ptr, mu_value: "fp64",  # noqa: F821
    loss_ptr, gradient_ptr, pair_stats_ptr, partial_ptr,
    num_pairs, num_rows, sequence_length, hidden_size, num_columns,
    LABEL_SMOOTHING: tl.constexpr, CENTER_COEF: tl.constexpr, EPS: tl.constexpr, MAX_WEIGHT: tl.constexpr,
    POWER: tl.constexpr, MEAN: tl.constexpr, HEAD_GRADIENT: tl.constexpr, LAYOUT: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program: every num_programs-th block of BLOCK_P pairs.

    mu_ptr: () or none, and then mu_value. num_updates_ptr: () of an EMA or none; each pair weighs 1 while it is 0.
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

    for block in range(program, tl.cdiv(num_pairs, BLOCK_P), tl.num_programs(0)):
        pair = tl.cast(block, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_range = pair < num_pairs
        chosen_offset, rejected_offset, exists = locate_pairs(rows, pair, num_pairs, num_rows, sequence_length, LAYOUT)

        # 2. read both rows: rho, and of a linear head d and r_r
        if ONE_BLOCK:
            chosen = load_tile(rows.chosen, chosen_offset, exists, first_columns, hidden_size, ACC)
            rejected = load_tile(rows.rejected, rejected_offset, exists, first_columns, hidden_size, ACC)
            delta = chosen - rejected
            if LINEAR:
                # Before the distance: the other order spills registers of sm_100 at H=16384.
                difference = tl.sum(delta * head[None, :], axis=1)
                if REWARDS:
                    rejected_reward = tl.sum(rejected * head[None, :], axis=1)
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
            chosen_reward = load_each(scores.chosen_rewards, pair, in_range, ACC)
            rejected_reward = load_each(scores.rejected_rewards, pair, in_range, ACC)
            difference = chosen_reward - rejected_reward
        # A pair of rows that do not exist is NaN, also where no weight depends on its distance.
        distance = tl.where(exists, distance, float("nan"))
        difference = tl.where(exists, difference, float("nan"))

        # 3. the loss of each pair and its gradient
        z = difference
        if scores.margin.ptr is not None:
            z -= load_each(scores.margin, pair, in_range, ACC)
        log1p_exp, sigmoid_minus_z = log1p_exp_and_sigmoid(z)
        bt_loss = tl.where(z < 0, -z, 0.0)
        if LABEL_SMOOTHING != 0:  # (1-s) softplus(-z) + s softplus(z), which an infinite margin leaves infinite
            bt_loss = tl.where(z < 0, (LABEL_SMOOTHING - 1) * z, LABEL_SMOOTHING * z)
        bt_loss += log1p_exp
        weight = weigh(distance, mu, EPS, MAX_WEIGHT, POWER)
        if num_updates_ptr is not None:
            weight = tl.where(has_mu, weight, 1.0)
        loss = bt_loss
        gradient = (LABEL_SMOOTHING - sigmoid_minus_z) * scale
        if scores.pair_weight.ptr is not None:
            pair_weight = load_each(scores.pair_weight, pair, in_range, ACC)
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


def _launch_pair_loss(rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, result: LossResult) -> None:
    shape = rows.launch_shape(centers=options.center_coef != 0)
    device, dtype = rows.chosen.device, result.gradient.dtype
    has_head_gradient, has_stats = result.head_gradient is not None, result.pair_stats is not None
    per_pair, acc = options.reduction == "none", triton_dtype(dtype)
    goes_by_ema, takes_up = mu.value is None and mu.tensor is None, mu.takes_up_distances
    num_gradients = rows.hidden_size + 1 if has_head_gradient else 0
    num_columns = cdiv(NUM_SUMS + num_gradients, 16) * 16  # each program's part is aligned, as the compiler is told
    partial = torch.empty(shape.num_programs, num_columns, dtype=dtype, device=device)
    _pair_loss_kernel[(shape.num_programs,)](
        RowArguments.of(rows),
        ScoreArguments(*(Vector.of(tensor) for tensor in scores)),
        mu.ema.mu if goes_by_ema else mu.tensor,
        mu.ema.num_updates if goes_by_ema else None,
        mu.value or 0.0,
        result.loss if per_pair else None,
        result.gradient,
        result.pair_stats,
        partial,
        rows.num_pairs,
        rows.chosen.shape[0],
        rows.sequence_length,
        rows.hidden_size,
        num_columns,
        LABEL_SMOOTHING=options.label_smoothing,
        CENTER_COEF=options.center_coef,
        EPS=options.eps,
        MAX_WEIGHT=options.max_weight,
        POWER=options.power,
        MEAN=options.reduction == "mean",
        HEAD_GRADIENT=has_head_gradient,
        LAYOUT=rows.layout,
        ONE_BLOCK=shape.block_hidden >= rows.hidden_size,
        BLOCK_P=shape.block_rows,
        BLOCK_H=shape.block_hidden,
        ACC=acc,
        num_warps=shape.num_warps,
        enable_fp_fusion=FP_FUSION,
    )
    if per_pair and not (has_stats or has_head_gradient or takes_up):
        return
    block_hidden = 32
    _finalise_kernel[(cdiv(max(num_gradients, 1), block_hidden),)](
        partial,
        None if per_pair else result.loss,
        result.batch_stats,
        result.head_gradient,
        mu.ema[:3] if takes_up else None,
        shape.num_programs,
        rows.num_pairs,
        num_gradients,
        num_columns,
        BETA=mu.ema.beta if takes_up else None,
        MEAN=options.reduction == "mean",
        BLOCK_K=512 // dtype.itemsize,
        BLOCK_H=block_hidden,
        ACC=acc,
        num_warps=8,
        enable_fp_fusion=FP_FUSION,
    )


def weigh_pairs(distance: Tensor, mu: Mu, options: LossOptions) -> Tensor:
    if mu.value is None and mu.tensor is None:
        known = weigh_pairs(distance, Mu(tensor=mu.ema.mu), options)
        return torch.where(mu.ema.num_updates > 0, known, 1.0)
    weight = (mu.tensor if mu.value is None else mu.value) / (distance + options.eps)
    if options.power != 1:
        weight = weight**options.power
    if options.power != 0:
        weight.add_(distance, alpha=0)  # NaN where it is infinite, as in `weigh`
    return weight if options.max_weight is None else weight.clamp_(max=options.max_weight)


class _Pairs(NamedTuple):
    """What the closed form makes of a block of pairs, in columns of (pairs,)."""

    loss: Tensor
    gradient: Tensor  # (2, pairs)
    distance: Tensor
    # Of the statistics, if they are asked for.
    weight: Tensor | None = None
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    bt_loss: Tensor | None = None
    difference: Tensor | None = None


def _compute_block(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool,
    head: Tensor | None, head_gradient: Tensor | None, dtype: torch.dtype, scale: float,
) -> _Pairs:  # fmt: skip
    """The pass over pairs whose rows stay in a core's cache; their part of the head's gradient is added to (H + 1,)."""
    smoothing, centers = options.label_smoothing, options.center_coef != 0
    # 1. rho, d, and what else is asked for
    chosen, rejected = rows.gather(dtype)
    delta = chosen - rejected
    distance = torch.linalg.vector_norm(delta, dim=-1)
    chosen_reward = rejected_reward = None
    if head is None:
        chosen_reward, rejected_reward = cast(scores.chosen_rewards, dtype), cast(scores.rejected_rewards, dtype)
        difference = chosen_reward - rejected_reward
    else:
        # Multiply, then sum: torch sums in a cascade, which at H = 32768 is 12x closer to fp64 than a BLAS dot.
        difference = (delta * head).sum(dim=-1)
        if stats or centers:
            rejected_reward = (rejected * head).sum(dim=-1)
            if scores.head_bias is not None:
                rejected_reward += scores.head_bias
            chosen_reward = rejected_reward + difference
    # 2. the loss and its gradient
    z = difference if scores.margin is None else cast(difference - scores.margin, dtype)
    bt_loss = F.logsigmoid(z).neg_()
    sigmoid_minus_z = (-z).sigmoid_()
    if smoothing != 0:
        bt_loss = bt_loss.mul_(1 - smoothing) - smoothing * F.logsigmoid(-z)
        sigmoid_minus_z -= smoothing
    weight = pair_weight = weigh_pairs(distance, mu, options)
    if scores.pair_weight is not None:
        pair_weight = cast(weight * scores.pair_weight, dtype)
    loss = pair_weight * bt_loss
    minus_gradient = sigmoid_minus_z.mul_(pair_weight).mul_(scale)
    gradient = torch.stack((-minus_gradient, minus_gradient))
    if centers:
        reward_sum = chosen_reward + rejected_reward
        loss += options.center_coef * reward_sum**2
        centering = 2 * options.center_coef * reward_sum * scale
        gradient += centering
    # 3. the head's gradient, while the rows are in cache
    if head_gradient is not None:
        head_gradient[:-1].addmv_(delta.T, minus_gradient, alpha=-1)
        if centers:
            head_gradient[:-1].addmv_((chosen + rejected).T, centering)
            head_gradient[-1] += 2 * centering.sum()
    if stats:
        return _Pairs(loss, gradient, distance, weight, chosen_reward, rejected_reward, bt_loss, difference)
    return _Pairs(loss, gradient, distance)


def _compute_pair_loss(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The closed form in PyTorch operators: few for few pairs, and for many a block of them at a time."""
    dtype = scores.accumulate_dtype(rows)
    head = None if scores.head_weight is None else cast(scores.head_weight, dtype)
    total = rows.chosen.new_zeros(rows.hidden_size + 1, dtype=dtype) if head_gradient else None
    scale = 1 / rows.num_pairs if options.reduction == "mean" else 1.0
    done = [
        _compute_block(block, scores.block(place), mu, options, stats, head, total, dtype, scale)
        for place, block in rows.blocks()
    ]
    pairs = done[0]
    if len(done) > 1:
        columns = zip(*done, strict=True)
        pairs = _Pairs(*(None if column[0] is None else torch.cat(column, dim=-1) for column in columns))
    loss, pair_stats, batch_stats = pairs.loss, None, None
    if options.reduction != "none":
        loss = loss.mean() if options.reduction == "mean" else loss.sum()
    if stats:
        pair_stats = torch.stack((pairs.distance, pairs.weight, pairs.chosen_reward, pairs.rejected_reward))
        in_order = (pairs.difference > 0).to(dtype)
        batch_stats = torch.stack((pairs.distance, pairs.bt_loss, in_order)).mean(dim=1)
    if mu.takes_up_distances:
        add_to_pending_(mu.ema.pending, pairs.distance.sum(), rows.num_pairs)
        if mu.ema.beta is not None:
            move_mu_(*mu.ema)
    return LossResult(loss, pairs.gradient, total, pair_stats, batch_stats)


def run_pair_loss(
    rows: RowPairs, scores: Scores, mu: Mu, options: LossOptions, stats: bool, head_gradient: bool
) -> LossResult:
    """The pass, by the implementation that serves the device of the rows."""
    rows.check_range()
    if rows.num_pairs > 0 and not uses_kernels(rows.chosen.device):
        return _compute_pair_loss(rows, scores, mu, options, stats, head_gradient)
    result = LossResult.allocate(rows, scores.accumulate_dtype(rows), options, head_gradient, stats)
    if rows.num_pairs == 0:
        for tensor in result:
            if tensor is not None:
                tensor.zero_()
    else:
        with on_device(rows.chosen.device):
            _launch_pair_loss(rows, scores, mu, options, result)
    return result
