"""The kernels compile for GPUs that this machine does not have."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_pair_loss_kernel",
    "_finalise_kernel",
    "_measure_distance_kernel",
    "_sum_pairs_of_rows_kernel",
    "_sum_head_gradient_kernel",
    "_write_gradient_kernel",
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills_and_reads_rows_16_bytes_at_a_time(target):
    command = [sys.executable, "-m", "bench.ahead_of_time", target, "--json"]
    kernels = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)[target]
    assert {name.split(": ")[1] for name in kernels} == KERNELS
    assert {name: figures["spill_bytes"] for name, figures in kernels.items() if figures["spill_bytes"]} == {}
    # Rows of an odd number of elements are not aligned to 16 bytes.
    rows = {n: f["load_bytes"] for n, f in kernels.items() if f["reads_rows"] and not n.startswith("linear, odd H")}
    assert {name.split(": ")[1] for name in rows} == KERNELS - {
        "_write_gradient_kernel",
        "_finalise_kernel",
        "_sum_pairs_of_rows_kernel",
    }
    assert {name: width for name, width in rows.items() if width != 16} == {}
