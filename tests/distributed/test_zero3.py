"""The trainer under DeepSpeed's ZeRO-3, on CPUs over gloo. Runs where deepspeed is installed:

DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
"""

from importlib.util import find_spec

import pytest
import torch

from tests.processes import run_ranks

pytestmark = pytest.mark.slow

if find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)


def test_zero3_equals_one_process_and_resumes_bitwise(tmp_path, single, assert_same_training):
    run_ranks(2, "tests.distributed.zero3", tmp_path)
    whole, resumed, by_shortcuts = (
        [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        for name in ("zero3", "zero3_resumed", "zero3_by_shortcuts")
    )
    assert_same_training(whole, single)
    assert_same_training(by_shortcuts, single)
    for rank in range(2):
        assert not whole[rank]["fused"]  # the weight is in pieces
        for name, expected in whole[rank].items():
            if isinstance(expected, torch.Tensor):
                assert torch.equal(resumed[rank][name], expected), name
