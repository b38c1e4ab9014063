"""If a rank dies, the others end with an error and do not wait forever."""

import signal

import pytest

from tests.processes import started_ranks

pytestmark = pytest.mark.slow


def test_the_other_rank_ends_with_an_error(tmp_path):
    # Without torchrun, which would end the other rank itself.
    with started_ranks(2, "tests.distributed.endless", tmp_path) as (survivor, victim):
        for rank, command in enumerate((survivor, victim)):
            command.wait_until((tmp_path / str(rank)).exists)
        victim.kill()
        assert survivor.wait() > 0
        assert "Error" in survivor.errors
        assert "gloo" in survivor.errors
    assert victim.exit_code == -signal.SIGKILL
