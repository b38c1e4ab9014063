"""The kernels compile for GPUs that this machine does not have."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

READS_ROWS = ("_pair_loss_kernel", "_measure_distance_kernel", "_accumulate_head_gradient_kernel")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills_and_reads_rows_16_bytes_at_a_time(target):
    command = [sys.executable, "-m", "bench.ahead_of_time", target, "--json"]
    kernels = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)[target]
    assert {name.split(": ")[1] for name in kernels} >= {*READS_ROWS, "_finalise_kernel", "_write_gradient_kernel"}
    assert {name: figures["spill_bytes"] for name, figures in kernels.items() if figures["spill_bytes"]} == {}
    # Rows of an odd number of elements are not aligned to 16 bytes; known distances are read one by one.
    narrow = ("linear, odd H", "reward form, the batch's own mean: _pair_loss_kernel")
    rows = {n: f["load_bytes"] for n, f in kernels.items() if n.endswith(READS_ROWS) and not n.startswith(narrow)}
    assert {name: width for name, width in rows.items() if width != 16} == {}
