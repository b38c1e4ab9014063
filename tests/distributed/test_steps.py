"""mu moves once per optimizer step: a batch is the same batch however it is cut over micro-batches and ranks."""

import functools

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("accelerate")

from tests.distributed import steps as runs
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

ALL_WAYS = runs.FROM_THE_START + runs.WITH_A_KNOWN_MU


@functools.cache
def eager(way, steps):
    return runs.eager(None if way in runs.FROM_THE_START else torch.tensor(runs.MU), steps)


def assert_same_run(found, expected):
    torch.testing.assert_close(found["mu"], expected["mu"], rtol=1e-6, atol=0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize(("accumulation", "steps"), [(1, runs.STEPS), (64, 2)], ids=["64x1", "1x64"])
@pytest.mark.parametrize("way", ALL_WAYS, ids=lambda way: way.__name__)
def test_steps_do_not_depend_on_the_cut(way, accumulation, steps, tmp_path):
    found = way(tmp_path, runs.PAIRS // accumulation, accumulation, 1, steps)
    assert_same_run(found, eager(way, steps))
    assert found["num_updates"] == steps + (way in runs.WITH_A_KNOWN_MU)


def test_two_ranks_with_four_micro_batches_each_are_one_process(tmp_path):
    run_ranks(2, "tests.distributed.steps", tmp_path)
    for way in ALL_WAYS:
        first, second = (torch.load(tmp_path / f"{way.__name__}-{rank}.pt") for rank in range(2))
        assert_same_run(first, eager(way, runs.STEPS))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
