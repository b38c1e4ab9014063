"""The EMA of the mean distance: its values, what it survives, and that ranks share it."""

import copy
import os
import pickle
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import IMPLEMENTATIONS, INTERPRETED

from normbt_kernels import LinearNormBTLoss, NormBTLoss
from normbt_kernels.checks import row_pairs
from normbt_kernels.modules import DistanceEMA
from tests.processes import FORKED

BETA = 0.9


def rows_at_distance(distances, hidden_size=4):
    """Halves layout with the given distance for each pair."""
    chosen = torch.zeros(len(distances), hidden_size)
    chosen[:, 0] = torch.tensor(distances)
    return torch.cat([chosen, torch.zeros_like(chosen)])


def run(loss_fn, hidden):
    """One forward of either module on the same rows; returns the stats."""
    if isinstance(loss_fn, LinearNormBTLoss):
        return loss_fn(hidden, torch.ones(hidden.shape[1]), return_stats=True)[1]
    chosen, rejected = hidden.chunk(2)
    return loss_fn(chosen.sum(1), rejected.sum(1), chosen, rejected, return_stats=True)[1]


both_modules = pytest.mark.parametrize("module", [NormBTLoss, LinearNormBTLoss])


@both_modules
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mu_follows_the_formula_and_weighs_with_the_value_from_before(module, implementation):
    loss_fn = module(beta=np.float64(BETA), eps=0.0)
    # Means 2, 6, 1: mu = 2, then 0.9*2 + 0.1*6 = 2.4, then 0.9*2.4 + 0.1*1 = 2.26.
    for distances, mu_before, mu_after in [([1.0, 3.0], 2.0, 2.0), ([6.0], 2.0, 2.4), ([0.5, 1.5], 2.4, 2.26)]:
        with implementation():
            stats = run(loss_fn, rows_at_distance(distances))
        expected = torch.tensor([mu_before / d for d in distances])
        torch.testing.assert_close(stats.weight, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss_fn.mu, torch.tensor(mu_after), rtol=1e-6, atol=0)
    assert loss_fn.num_updates == 3
    assert (loss_fn.mu.dtype, loss_fn.num_updates.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_without_a_loss_are_those_of_the_loss(implementation, power):
    loss_fn, alone = NormBTLoss(max_weight=1.5, power=power), DistanceEMA(max_weight=1.5, power=power)
    for distances in [1.0, 3.0], [6.0, 2.0, 1.0], [0.5, float("inf")], [0.0, 4.0]:
        hidden = rows_at_distance(distances)
        with implementation():
            weight = alone.weigh(row_pairs(hidden, "halves", None))
            assert torch.equal(weight.nan_to_num(-1), run(loss_fn, hidden).weight.nan_to_num(-1))
        assert (alone.mu, alone.num_updates) == (loss_fn.mu, loss_fn.num_updates)
    assert alone.num_updates == 3  # all but the one that is not finite


@both_modules
def test_options_are_attributes(module):
    loss_fn = module(power=0.5, max_weight=None)
    assert (loss_fn.power, loss_fn.max_weight, loss_fn.reduction) == (0.5, None, "mean")
    run(loss_fn, rows_at_distance([4.0]))
    loss_fn.power = 1.0
    assert run(loss_fn, rows_at_distance([2.0])).weight == pytest.approx(2.0, rel=1e-5)
    with pytest.raises(ValueError, match="power must be finite"):
        loss_fn.power = -1.0
    assert loss_fn.power == 1


@both_modules
def test_without_gradients_mu_is_used_and_stays(module):
    """As in a validation that forgets to put the loss in eval mode."""
    loss_fn = module()
    run(loss_fn, rows_at_distance([5.0]))
    with torch.no_grad():
        stats = run(loss_fn, rows_at_distance([1.0]))
    torch.testing.assert_close(stats.weight, torch.tensor([5.0]), rtol=1e-5, atol=0)
    assert (loss_fn.mu, loss_fn.num_updates) == (5, 1)


@both_modules
def test_eval_uses_mu_and_stores_nothing(module):
    loss_fn = module().eval()
    run(loss_fn, rows_at_distance([1.0, 3.0]))
    assert (loss_fn.mu, loss_fn.num_updates) == (0, 0)
    fresh = run(loss_fn, rows_at_distance([1.0, 3.0]))
    torch.testing.assert_close(fresh.weight, torch.tensor([2.0, 2 / 3]), rtol=1e-5, atol=0)  # the batch's own mean
    run(loss_fn.train(), rows_at_distance([5.0]))
    stats = run(loss_fn.eval(), rows_at_distance([1.0]))
    torch.testing.assert_close(stats.weight, torch.tensor([5.0]), rtol=1e-5, atol=0)
    assert (loss_fn.mu, loss_fn.num_updates) == (5, 1)


@both_modules
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_batch_that_is_not_finite_shows_in_the_loss_but_never_in_mu(module, bad, first):
    loss_fn = module()
    if not first:
        run(loss_fn, rows_at_distance([2.0]))
    before = copy.deepcopy(loss_fn.state_dict())
    stats = run(loss_fn, rows_at_distance([1.0, bad]))
    assert not stats.mean_distance.isfinite()
    assert loss_fn.state_dict() == before
    run(loss_fn, rows_at_distance([4.0]))
    expected = 4.0 if first else 0.9 * 2 + 0.1 * 4
    torch.testing.assert_close(loss_fn.mu, torch.tensor(expected), rtol=1e-6, atol=0)


@both_modules
def test_empty_batch_leaves_mu_as_it_was(module):
    loss_fn = module()
    run(loss_fn, rows_at_distance([2.0]))
    run(loss_fn, rows_at_distance([]))
    assert (loss_fn.mu, loss_fn.num_updates) == (2, 1)


@both_modules
def test_resume_from_state_dict_is_bitwise(module, tmp_path):
    torch.manual_seed(0)
    batches = [torch.randn(8, 5) for _ in range(6)]
    whole, first = module(), module()
    expected = [run(whole, batch).weight for batch in batches]
    for batch in batches[:3]:
        run(first, batch)
    torch.save(first.state_dict(), tmp_path / "loss.pt")
    resumed = module()
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt"))
    for batch, weight in zip(batches[3:], expected[3:], strict=True):
        assert torch.equal(run(resumed, batch).weight, weight)
    assert torch.equal(resumed.mu, whole.mu)
    assert resumed.state_dict().keys() == {"mu", "num_updates"}


def test_mu_keeps_fp32_when_the_model_that_holds_it_is_cast():
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 1), "loss": NormBTLoss()})
    run(model["loss"], rows_at_distance([0.1]))
    mu = model["loss"].mu.clone()
    model.to(torch.bfloat16)
    assert model["head"].weight.dtype == torch.bfloat16
    assert torch.equal(model["loss"].mu, mu)


def test_module_made_on_the_meta_device_can_be_materialised():
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"loss": NormBTLoss()})
    model.to_empty(device="cpu").load_state_dict({"loss.mu": torch.tensor(2.0), "loss.num_updates": torch.tensor(1)})
    assert run(model["loss"].eval(), rows_at_distance([1.0])).weight == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mu_of_a_checkpoint_of_another_dtype_is_loaded_as_fp32(dtype, assign):
    loss_fn = NormBTLoss()
    state = {"mu": torch.tensor(2.0, dtype=dtype), "num_updates": torch.tensor(1, dtype=dtype)}
    loss_fn.load_state_dict(state, assign=assign)
    assert (loss_fn.mu, loss_fn.mu.dtype) == (2, torch.float32)
    assert (loss_fn.num_updates, loss_fn.num_updates.dtype) == (1, torch.int64)
    assert (state["mu"], state["mu"].dtype) == (2, dtype)
    assert run(loss_fn.eval(), rows_at_distance([1.0])).weight == pytest.approx(2.0, rel=1e-5)


def test_mu_without_a_value_may_be_cast():
    with torch.device("meta"):
        loss_fn = NormBTLoss()
    loss_fn.mu.data = loss_fn.mu.data.bfloat16()
    assert loss_fn.to_empty(device="cpu").mu.dtype == torch.float32


def test_a_number_is_no_state():
    with pytest.raises(RuntimeError, match=r"expected torch\.Tensor"):
        NormBTLoss().load_state_dict({"mu": 2.0, "num_updates": 1})


def test_mu_that_is_assigned_counts_in_any_dtype():
    loss_fn = NormBTLoss()
    run(loss_fn, rows_at_distance([3.0]))
    loss_fn.mu = torch.tensor(4.0, dtype=torch.bfloat16)
    loss_fn.mu.fill_(2.0)  # what is read is what is kept
    assert (loss_fn.mu, loss_fn.mu.dtype) == (2, torch.float32)
    assert run(loss_fn.eval(), rows_at_distance([1.0])).weight == pytest.approx(2.0, rel=1e-5)


def test_copy_and_pickle_keep_the_state():
    loss_fn = NormBTLoss(beta=0.5, max_weight=7.0)
    run(loss_fn, rows_at_distance([2.0]))
    for twin in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        run(twin, rows_at_distance([4.0]))
        assert twin.mu == 3
    assert loss_fn.mu == 2


def test_loss_on_another_device_than_its_mu_says_what_to_do():
    hidden = torch.empty(4, 3, device="meta")
    with pytest.raises(ValueError, match=r"mu is on cpu, but the hidden states are on meta.*\.to\('meta'\)"):
        LinearNormBTLoss()(hidden, torch.empty(3, device="meta"))


# Ranks. Real processes over gloo, compared with one process that sees the joined batch.

# Pairs of each rank at each step: unequal, a rank with nothing, and a batch that is not finite on one rank only.
PAIRS = [(3, 5), (1, 4), (0, 6), (2, 2)]
BAD_STEP = 1


def rank_batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = [[torch.randn(2, pairs, 7, generator=generator) for pairs in ranks] for ranks in PAIRS]
    batches[BAD_STEP][1][0, 0, 0] = float("inf")
    return batches


def loss_sum_and_gradient(loss_fn, rows, weight):
    """Sum of the losses of the pairs in `rows` (2, P, H) and its gradient with respect to the head."""
    weight = weight.clone().requires_grad_()
    loss = loss_fn(rows.reshape(-1, rows.shape[-1]), weight)
    loss.backward()
    return loss.detach(), weight.grad


def rank_main(rank, port, folder, orders):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    traces = []
    for batches in orders:
        loss_fn = copy.deepcopy(LinearNormBTLoss(reduction="sum", process_group=dist.group.WORLD))
        local = LinearNormBTLoss(reduction="sum", process_group=None)
        trace = []
        for ranks in batches:
            loss, gradient = loss_sum_and_gradient(loss_fn, ranks[rank], torch.ones(7))
            run(local, ranks[rank].reshape(-1, 7))
            trace.append((loss, gradient, loss_fn.state_dict()["mu"].clone(), local.mu.clone()))
        traces.append(trace)
    torch.save(traces, f"{folder}/{rank}.pt")
    group_of_rank_0 = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="a ProcessGroup that this rank is in"):
            LinearNormBTLoss(process_group=group_of_rank_0)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="ranks exchange sums on the host: one backend is enough")
def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    bad_later = rank_batches()
    bad_first = [bad_later[BAD_STEP], *bad_later[:BAD_STEP], *bad_later[BAD_STEP + 1 :]]
    orders = bad_later, bad_first
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, (port, str(tmp_path), orders), nprocs=2, start_method=FORKED.get_start_method())
    traces = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    for batches, (first, second) in zip(orders, traces, strict=True):
        single = LinearNormBTLoss(reduction="sum")
        for step, ranks in enumerate(batches):
            loss, gradient = loss_sum_and_gradient(single, torch.cat(ranks, dim=1), torch.ones(7))
            torch.testing.assert_close(first[step][0] + second[step][0], loss, rtol=1e-6, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(first[step][1] + second[step][1], gradient, rtol=1e-5, atol=1e-6, equal_nan=True)
            assert torch.equal(first[step][2], second[step][2]), "ranks disagree on mu"
            torch.testing.assert_close(first[step][2], single.mu, rtol=1e-6, atol=0)
        assert not torch.equal(first[-1][3], second[-1][3]), "process_group=None must keep the mean local"
