"""`import normbt_kernels` costs and needs next to nothing."""

import json
import subprocess
import sys

import pytest


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_import_adds_under_a_second_loads_no_trainer_and_touches_no_device():
    report = json.loads(
        run_python(
            "import json, sys, time, torch\n"
            "torch_modules = set(sys.modules)\n"
            "start = time.process_time()\n"  # not wall time: other processes must not decide a test
            "import normbt_kernels\n"
            "normbt_kernels.NormBTLoss, normbt_kernels.apply_normbt\n"  # imported when they are first used
            "seconds = time.process_time() - start\n"
            "print(json.dumps([seconds, torch.cuda.is_initialized(), sorted(set(sys.modules) - torch_modules)]))\n"
        )
    )
    seconds, cuda_initialized, modules = report
    assert seconds < 1
    assert not cuda_initialized
    assert "normbt_kernels.ops.pair_loss" in modules
    assert not {"transformers", "datasets", "accelerate", "trl", "peft", "matplotlib", "tqdm"} & set(modules)


@pytest.mark.slow
def test_package_works_without_triton_and_transformers():
    output = run_python(
        "import sys\n"
        "sys.modules['triton'] = sys.modules['transformers'] = None\n"  # importing either now raises ImportError
        "import torch, normbt_kernels\n"
        "hidden = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)\n"
        "loss = normbt_kernels.linear_normbt_loss(hidden, torch.zeros(2), mu=5.0, eps=0.0)\n"
        "loss.backward()\n"
        "print(loss.item())\n"
    )
    assert abs(float(output) - 0.693147) < 1e-6  # log 2: equal rewards, weight 5 / 5


@pytest.mark.slow
def test_apply_normbt_does_not_load_the_compiler_where_nothing_is_compiled():
    output = run_python(
        "import sys, torch\n"
        "from normbt_kernels import apply_normbt\n"
        "head = torch.nn.Linear(4, 1)\n"
        "apply_normbt(head)\n"
        "chosen, rejected = head(torch.randn(4, 4)).chunk(2)\n"
        "(chosen - rejected).sum().backward()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    assert output == "False\n"
