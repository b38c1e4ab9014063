"""When mu moves: once per optimizer step, whatever happens in between; and what its buffers survive."""

import copy
import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import INTERPRETED
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from normbt_kernels import LinearNormBTLoss, NormBTLoss, modules
from tests.processes import FORKED

MU = 3.0


def known(loss_fn):
    loss_fn.load_state_dict({"mu": torch.tensor(MU), "num_updates": torch.tensor(1)})
    return loss_fn


def rows(pairs, seed):
    return torch.randn(2 * pairs, 5, generator=torch.Generator().manual_seed(seed)) * (1 + seed)


class Loop:
    """A linear reward model trained by SGD, with the loss tied to its optimizer."""

    def __init__(self, loss_fn=None):
        torch.manual_seed(0)
        self.head = nn.Linear(5, 1)
        self.loss_fn = known(LinearNormBTLoss()) if loss_fn is None else loss_fn
        self.optimizer = torch.optim.SGD(self.head.parameters(), 0.1)
        self.loss_fn.follow(self.optimizer)

    def backward(self, *batches):
        for hidden in batches:
            self.loss_fn(hidden, self.head.weight, self.head.bias).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def state(self):
        return self.loss_fn.mu.item(), self.loss_fn.num_updates.item()


def mean(*batches):
    return torch.cat([reference.pair_distance(hidden) for hidden in batches]).mean().item()


def test_mu_stands_still_within_a_step_and_moves_by_the_mean_of_all_its_pairs():
    loop, batches = Loop(), [rows(pairs, seed=pairs) for pairs in (1, 3, 0, 2)]
    for hidden in batches:
        _, stats = loop.loss_fn(hidden, loop.head.weight, return_stats=True)
        torch.testing.assert_close(stats.weight, MU / (stats.distance + 1e-6))
        assert loop.state == (MU, 1)
    loop.step()
    assert loop.state == (pytest.approx(0.9 * MU + 0.1 * mean(*batches), rel=1e-6), 2)
    loop.step()  # with no pairs
    assert loop.state[1] == 2


def test_first_step_weighs_each_micro_batch_by_its_own_mean_and_their_mean_becomes_mu():
    loop, batches = Loop(LinearNormBTLoss()), [rows(2, 1), rows(4, 2)]
    for hidden in batches:
        _, stats = loop.loss_fn(hidden, loop.head.weight, return_stats=True)
        torch.testing.assert_close(stats.weight, mean(hidden) / (stats.distance + 1e-6))
    loop.step()
    assert loop.state == (pytest.approx(mean(*batches), rel=1e-6), 1)


def test_first_step_can_be_weighed_by_a_mean_that_was_measured_beforehand():
    loop, batches = Loop(LinearNormBTLoss()), [rows(2, 1), rows(4, 2)]
    loop.loss_fn.begin_with(reference.pair_distance(hidden) for hidden in batches)
    for hidden in batches:
        _, stats = loop.loss_fn(hidden, loop.head.weight, return_stats=True)
        torch.testing.assert_close(stats.weight, mean(*batches) / (stats.distance + 1e-6))
    loop.step()
    _, stats = loop.loss_fn(rows(2, 7), loop.head.weight, return_stats=True)
    torch.testing.assert_close(stats.weight, mean(*batches) / (stats.distance + 1e-6))


def test_evaluation_in_the_middle_of_a_step_changes_nothing():
    loop = Loop()
    loop.backward(rows(2, 1))
    loop.loss_fn.eval()
    loop.backward(rows(2, 9))
    loop.loss_fn.train()
    loop.step()
    assert loop.state[0] == pytest.approx(0.9 * MU + 0.1 * mean(rows(2, 1)), rel=1e-6)


def test_step_with_a_distance_that_is_not_finite_leaves_mu_as_it_was_however_it_is_cut():
    loop, bad = Loop(), rows(2, 1)
    bad[0, 0] = float("inf")
    loop.loss_fn(rows(2, 2), loop.head.weight)
    loop.loss_fn(bad, loop.head.weight)
    loop.step()
    assert loop.state == (MU, 1)
    loop.backward(rows(2, 3))
    loop.step()
    assert loop.state == (pytest.approx(0.9 * MU + 0.1 * mean(rows(2, 3)), rel=1e-6), 2)


def test_pairs_of_a_step_that_the_gradscaler_skips_count_with_the_next_ones():
    loop, scaler = Loop(), torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed, bad in ((1, True), (2, False)):
        loss = loop.loss_fn(rows(2, seed), loop.head.weight)
        scaler.scale(loss * (float("inf") if bad else 1)).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        assert loop.state[1] == (1 if bad else 2)
    assert loop.state[0] == pytest.approx(0.9 * MU + 0.1 * mean(rows(2, 1), rows(2, 2)), rel=1e-6)


def test_two_losses_of_one_model_move_by_their_own_pairs():
    loop, other = Loop(), known(NormBTLoss())
    other.follow(loop.optimizer)
    hidden = rows(2, 4)
    loop.backward(rows(2, 1))
    other(*(hidden @ loop.head.weight[0]).chunk(2), *hidden.chunk(2)).backward()
    loop.step()
    assert loop.state[0] == pytest.approx(0.9 * MU + 0.1 * mean(rows(2, 1)), rel=1e-6)
    assert other.mu.item() == pytest.approx(0.9 * MU + 0.1 * mean(hidden), rel=1e-6)


def test_resume_in_the_middle_of_a_step_is_bitwise():
    whole, first = Loop(), Loop()
    whole.backward(rows(2, 1), rows(3, 2))
    whole.step()
    first.backward(rows(2, 1))
    state = copy.deepcopy(first.loss_fn.state_dict())
    assert state.keys() == {"mu", "num_updates", "pending"}
    resumed = Loop(LinearNormBTLoss())
    resumed.loss_fn.load_state_dict(state, strict=True)
    resumed.head.weight.grad, resumed.head.bias.grad = first.head.weight.grad, first.head.bias.grad
    resumed.backward(rows(3, 2))
    resumed.step()
    assert resumed.state == whole.state
    assert torch.equal(resumed.head.weight, whole.head.weight)
    resumed.backward(rows(1, 1))
    resumed.loss_fn.load_state_dict({"mu": torch.tensor(1.0), "num_updates": torch.tensor(5)})  # between steps
    resumed.step()
    assert resumed.state == (1.0, 5)


def test_follow_takes_wrappers_of_an_optimizer_and_refuses_what_has_no_steps():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    loop, loss_fn = Loop(), known(LinearNormBTLoss())
    loss_fn.follow(Wrapper(Wrapper(loop.optimizer)))
    loss_fn(rows(2, 1), loop.head.weight)
    loop.step()
    assert loss_fn.num_updates == 2
    with pytest.raises(TypeError, match=r"Linear has no step hooks: set per_step = True.*end_step\(\)"):
        LinearNormBTLoss().follow(loop.head)
    with pytest.raises(RuntimeError, match=r"each forward of this loss is a step: call follow\(optimizer\)"):
        LinearNormBTLoss().end_step()


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_optimizer_that_steps_no_more_is_warned_of_once(monkeypatch, recwarn, steps_before):
    """As when another optimizer takes over, which nobody told the loss to follow."""
    monkeypatch.setattr(modules, "FORWARDS_IN_A_STEP", 3)
    loop, other = Loop(LinearNormBTLoss()), Loop(LinearNormBTLoss())
    for step in range(steps_before + 5):
        loop.backward(rows(2, seed=1))
        if step < steps_before:
            loop.step()
        other.backward(rows(2, seed=1))
        other.step()
    (warning,) = recwarn
    assert "3 forwards since the last step of the optimizer that this loss follows" in str(warning.message)


def test_copy_follows_no_optimizer():
    loop = Loop()
    loop.backward(rows(2, 1))
    twin = copy.deepcopy(loop.loss_fn)
    assert twin.state_dict().keys() == {"mu", "num_updates", "pending"}
    twin(rows(2, 2), loop.head.weight)
    assert twin.num_updates == 2
    loop.step()
    assert (twin.num_updates, loop.loss_fn.num_updates) == (2, 2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.slow
def test_checkpoint_around_the_loss_is_refused_in_backward(reentrant, compiled, follows):
    torch._dynamo.reset()
    loop = Loop()
    if not follows:
        loop.loss_fn = known(LinearNormBTLoss())

    def repeated(hidden):
        run = lambda hidden: loop.loss_fn(hidden.tanh(), loop.head.weight)  # noqa: E731
        return checkpoint(run, hidden, use_reentrant=reentrant)

    loss = (torch.compile(repeated, backend="aot_eager") if compiled else repeated)(rows(2, 1).requires_grad_())
    with pytest.raises(RuntimeError, match="checkpoint repeats the forward of this loss"):
        loss.backward()
    assert loop.head.weight.grad is None


# --- the buffers ---------------------------------------------------------------------------------------------------


def cast_data(loss_fn):  # as FSDP1's MixedPrecision(buffer_dtype=...) does
    loss_fn._buffers["mu"].data = loss_fn._buffers["mu"].data.bfloat16()


def cast_buffer(loss_fn):
    loss_fn._buffers["mu"] = loss_fn._buffers["mu"].bfloat16()


@pytest.mark.parametrize("cast", [cast_data, cast_buffer])
def test_mu_that_was_cast_behind_the_module_is_what_it_was(cast):
    loss_fn = LinearNormBTLoss(beta=0.999)
    loss_fn(rows(3, 1), torch.ones(5))
    mu = loss_fn.mu.clone()
    cast(loss_fn)
    assert torch.equal(loss_fn.state_dict()["mu"], mu)
    cast(loss_fn)
    loss_fn(rows(3, 2), torch.ones(5))
    torch.testing.assert_close(loss_fn.mu, 0.999 * mu + 0.001 * mean(rows(3, 2)))


def test_memory_that_was_never_filled_is_no_mu():
    with torch.device("meta"):
        loss_fn = LinearNormBTLoss()
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        loss_fn.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert (loss_fn.mu, loss_fn.num_updates) == (0, 0)
    loss_fn(rows(3, 1), torch.ones(5))
    kept = loss_fn.mu.clone()
    assert torch.equal(loss_fn.to_empty(device="cpu").mu, kept)
    loss_fn.reset_parameters()
    assert (loss_fn.mu, loss_fn.num_updates) == (0, 0)
    _, stats = loss_fn(rows(3, 2), torch.ones(5), return_stats=True)
    torch.testing.assert_close(stats.weight, mean(rows(3, 2)) / (stats.distance + 1e-6))


def test_mu_without_a_number_of_updates_counts_and_a_number_without_mu_does_not():
    loss_fn = LinearNormBTLoss()
    loss_fn.load_state_dict({"mu": torch.tensor(MU)}, strict=False)
    assert (loss_fn.mu, loss_fn.num_updates) == (MU, 1)
    other = LinearNormBTLoss()
    other.load_state_dict({"num_updates": torch.tensor(4)}, strict=False)
    assert (other.mu, other.num_updates) == (0, 0)
    for state in ({"mu": torch.tensor(MU)}, {"num_updates": torch.tensor(4)}):
        with pytest.raises(RuntimeError, match="Missing key"):
            LinearNormBTLoss().load_state_dict(state)


# --- ranks ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """One that computes its own loss, so that DDP gives every rank the first one's buffers before each forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss_fn = nn.Linear(5, 1, bias=False), known(LinearNormBTLoss())

    def forward(self, hidden):
        return self.loss_fn(hidden, self.head.weight)


def rank_main(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = Model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.loss_fn.follow(optimizer)
    seen = []
    for step in range(3):
        for micro_batch in range(2):
            wrapped(rows(1 + rank, 10 * step + 2 * micro_batch + rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == step % 2:  # one rank alone, as it logs or saves
            seen.append((step, model.loss_fn.mu.item(), model.loss_fn.state_dict()["num_updates"].item()))
    torch.save((seen, model.loss_fn.mu, model.loss_fn.num_updates), f"{folder}/{rank}.pt")
    time.sleep(0.2)  # gloo's thread needs the GIL to let go of its tensors, and the end of its group would wait with it
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="ranks wait and read on the host: one backend is enough")
def test_ranks_read_the_mu_of_all_steps_whoever_reads_it_and_move_it_once(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, (port, str(tmp_path)), nprocs=2, start_method=FORKED.get_start_method())
    expected = [MU]
    for step in range(3):
        batches = [rows(1 + rank, 10 * step + 2 * part + rank) for part in range(2) for rank in range(2)]
        expected.append(0.9 * expected[-1] + 0.1 * mean(*batches))
    for rank in range(2):
        seen, mu, num_updates = torch.load(tmp_path / f"{rank}.pt")
        assert mu.item() == pytest.approx(expected[3], rel=1e-6)
        assert num_updates == 4
        for step, read, updates in seen:
            assert (read, updates) == (pytest.approx(expected[step + 1], rel=1e-6), step + 2)
