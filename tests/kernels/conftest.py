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


@pytest.fixture(scope="session", autouse=True)
def _interpreter_does_nothing_twice():
    """Triton's interpreter also patches `triton.language` for each device function that a kernel calls, a third of its
    time. The launch has patched what our functions see, and what Triton's own see stays patched after the first time.
    And it lists all types again to look one of them up, for each operation: a tenth of its time.
    """
    from normbt_kernels.ops._triton import INTERPRETED, tl

    if INTERPRETED:
        from triton.runtime import interpreter

        interpreter._patch_lang(tl.sum.fn)
        interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
        look_up, known = interpreter._get_np_dtype, {}

        def np_dtype(tt_dtype):
            name = tt_dtype.scalar.name
            if name not in known:
                known[name] = look_up(tt_dtype)
            return known[name]

        interpreter._get_np_dtype = np_dtype


@pytest.fixture(autouse=True)
def _seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and pytest-xdist already uses the cores
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
