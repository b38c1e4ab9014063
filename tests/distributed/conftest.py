"""The run of a single process, with which ranks are compared."""

import pytest
import torch


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """What one process trains on the joined batches, with the evaluation of its model."""
    from tests.distributed import ranks

    rows = ranks.pairs()
    trainer = ranks.make_trainer(tmp_path_factory.mktemp("single"), [rows[i] for i in ranks.FILLED], num_ranks=1)
    trainer.train()
    return ranks.state(trainer) | {"eval": ranks.evaluation(trainer)}


@pytest.fixture(scope="session")
def assert_same_training():
    """assert_same_training(of_ranks, single): parameters and mu to fp32 rounding, the same mu and logs everywhere."""

    def check(of_ranks, single):
        assert len({result["mu"].item() for result in of_ranks}) == 1, "ranks disagree on mu"
        for result in of_ranks:
            for name, expected in single.items():
                if isinstance(expected, torch.Tensor):
                    torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        for seen, expected in zip(of_ranks[0]["logs"], single["logs"], strict=True):
            assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)

    return check
