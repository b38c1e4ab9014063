"""`apply_normbt` on real ranks over gloo: two ranks train what one process trains on the joined batches."""

import gc
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from normbt_kernels import apply_normbt
from normbt_kernels.integrations.pooled_head import pool_head
from tests.processes import FORKED
from tests.tiny_classifiers import PAD, TinyDecoder

ENGINES = ("ddp", "fsdp2", "fsdp2 pooled")
PAIRS_OF_RANKS = [(1, 3), (2, 2), (4, 1)]  # unequal, at each step


def rank_batches():
    generator = torch.Generator().manual_seed(0)
    draw = lambda pairs: torch.randint(PAD, 32, (2, pairs, 6), generator=generator)  # noqa: E731
    return [[draw(pairs) for pairs in ranks] for ranks in PAIRS_OF_RANKS]


def pair_losses(model, ids):
    chosen, rejected = model(ids.flatten(0, 1))[:, 0].chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).sum()


def train_rank(engine, rank, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = TinyDecoder()
    apply_normbt(model)
    if engine == "fsdp2 pooled":
        pool_head(model)
    wrapped = DistributedDataParallel(model) if engine == "ddp" else fully_shard(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for ranks in rank_batches():
        pair_losses(wrapped, ranks[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    torch.save(full, f"{folder}/{engine}-{rank}.pt")


def rank_main(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    for engine in ENGINES:
        train_rank(engine, rank, folder)
    # gloo's threads must end before the interpreter does: nothing may hold the group when it is destroyed.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, (port, str(tmp_path)), nprocs=2, start_method=FORKED.get_start_method())
    single = TinyDecoder()
    apply_normbt(single)
    optimizer = torch.optim.SGD(single.parameters(), 0.1)
    for ranks in rank_batches():
        (pair_losses(single, torch.cat(ranks, dim=1)) / 2).backward()  # the engines average over the ranks
        optimizer.step()
        optimizer.zero_grad()
    for engine in ENGINES:
        first, second = (torch.load(tmp_path / f"{engine}-{rank}.pt") for rank in range(2))
        for name, expected in single.state_dict().items():
            assert torch.equal(first[name], second[name]), f"{engine}: ranks disagree on {name}"
            torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)
