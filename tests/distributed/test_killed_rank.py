"""A rank that dies is an error on the others, and no wait without end."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_other_rank_ends_with_an_error(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    # Without torchrun, which would end the other rank itself.
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.endless", str(tmp_path)],
            cwd=REPOSITORY,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in ranks), "a rank ended before it was killed"
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGKILL)
        errors = ranks[0].communicate(timeout=60)[1]  # twice the timeout of its process group
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode > 0, errors
    assert "Error" in errors
    assert "gloo" in errors
