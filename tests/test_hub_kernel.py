"""A build for the Hugging Face `kernels` package, loaded by that package from a local folder, without this one."""

import re
from pathlib import Path

import pytest

from bench.hub_kernel import build
from tests.processes import Command

pytest.importorskip("kernels")

USES_THE_KERNEL = """
import sys
from pathlib import Path

sys.modules["normbt_kernels"] = None  # not installed
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
from kernels import use_kernel_forward_from_hub

folder = Path(sys.argv[1])
kernel = get_local_kernel(folder, backend="cpu")
torch.manual_seed(0)
hidden = torch.randn(16, 32, dtype=torch.float64, requires_grad=True)
weight = torch.randn(32, dtype=torch.float64, requires_grad=True)
distance = (hidden[:8] - hidden[8:]).detach().norm(dim=-1)
pair_weight = (distance.mean() / (distance + 1e-6)).clamp(max=100)
eager = -(pair_weight * torch.nn.functional.logsigmoid((hidden[:8] - hidden[8:]) @ weight)).mean()
expected = torch.autograd.grad(eager, (hidden, weight))


@use_kernel_forward_from_hub("LinearNormBT")
class EagerLoss(torch.nn.Module):
    def forward(self, hidden, weight, mu=None):
        raise NotImplementedError


loss_fn = kernel.LinearNormBTLoss()
layer = LocalLayerRepository(folder, layer_name="LinearNormBT")
with use_kernel_mapping({"LinearNormBT": {"cpu": layer}}):
    kernelized = kernelize(EagerLoss(), mode=Mode.TRAINING, device="cpu")
for loss in (kernel.linear_normbt_loss(hidden, weight), loss_fn(hidden, weight), kernelized(hidden, weight)):
    torch.testing.assert_close(loss, eager)
    for gradient, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
torch.testing.assert_close(loss_fn.mu, distance.mean().float())
assert not hasattr(torch.ops.normbt, "pair_loss")
"""


@pytest.mark.slow
def test_kernels_package_loads_the_build_and_its_loss_is_eager_normbt(tmp_path):
    build(tmp_path / "hub")
    (tmp_path / "uses_the_kernel.py").write_text(USES_THE_KERNEL)
    command = Command("uses_the_kernel", tmp_path / "hub", cwd=tmp_path)
    assert command.wait() == 0, command.errors


@pytest.mark.slow
def test_the_page_runs_without_this_package(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs" / "hub-kernel.md").read_text()
    (folder,) = re.findall(r"^python -m bench\.hub_kernel (.+)$", page, flags=re.MULTILINE)
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    build(tmp_path / folder)
    (tmp_path / "page.py").write_text('import sys\nsys.modules["normbt_kernels"] = None\n' + block)
    command = Command("page", cwd=tmp_path)
    assert command.wait() == 0, command.errors


def test_a_folder_that_holds_builds_is_not_overwritten(tmp_path):
    build(tmp_path)
    with pytest.raises(FileExistsError):
        build(tmp_path)
