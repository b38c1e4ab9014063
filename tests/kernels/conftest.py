"""Every test starts from the same seed; the judge `reference` and the shared `cases` are importable from anywhere."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]


def pytest_report_header():
    from cases import BACKEND, DEVICE

    return f"normbt-kernels: backend {BACKEND} on {DEVICE}"


@pytest.fixture(autouse=True)
def _seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and pytest-xdist already uses the cores
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
