"""The counts of `python -m bench static` are right, and a figure that gets worse is caught."""

import argparse
import json
import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch

pytest.importorskip("triton")

from bench import static
from bench.count import counting

pytestmark = pytest.mark.slow

TARGET = "sm_90"
READ_ROWS = {"_pair_loss_kernel", "_measure_distance_kernel", "_sum_head_gradient_kernel"}
SUM_PAIRS = {"_sum_searched_pairs_kernel", "_sum_sorted_pairs_kernel"}
KERNELS = READ_ROWS | SUM_PAIRS | {"_finalise_kernel", "_write_gradient_kernel"}
LIMITED, UNLIMITED = "pair_distance", "linear_normbt_loss, 64 pairs"
COMPILED = [
    "pair_distance", "linear", "linear, explicit pairs", "linear, many explicit pairs", "linear, reduction none",
    "linear, odd H",
]  # fmt: skip


def python(*arguments, **environment):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | environment).stdout


@pytest.fixture(scope="module")
def counted():
    return json.loads(python("tests.counted_kernels", TRITON_INTERPRET="1"))


@pytest.fixture(scope="module")
def measured(counted):
    """What `static.measure` gives, of fewer pairs and of as few entry points as reach every kernel."""
    entries = {entry: counted["entries"][f"{entry}, tiles read once"] for entry in (LIMITED, UNLIMITED)}
    return static.Measured(entries, {TARGET: static.compile_target(TARGET, "--entries", *COMPILED)})


# The counter of kernels


def test_kernel_bytes_are_those_of_unmasked_elements(counted):
    # 1000 of 4 x 256 elements of 2 bytes
    assert counted["kernels"]["copy"]["bytes"] == {"source_ptr read": 2000, "destination_ptr write": 2000}


def test_a_second_read_is_counted(counted):
    once, twice = (counted["kernels"][f"rows {reads}"]["bytes"] for reads in ("once", "twice"))
    assert once == {"rows.0 read": 6 * 64 * 2, "sum_ptr write": 6 * 4}
    assert twice == {"rows.0 read": 2 * 6 * 64 * 2, "sum_ptr write": 6 * 4}


def test_atomics_read_and_write_and_scalars_count(counted):
    assert counted["kernels"]["atomics"]["bytes"] == {
        "total_ptr read": 3 * 4 * 4,
        "total_ptr write": 3 * 4 * 4,
        "count_ptr read": 3 * 8,
        "count_ptr write": 3 * 8,
    }


def test_each_launch_is_counted_and_not_what_the_interpreter_does_for_it(counted):
    assert counted["kernels"]["copy"]["launches"] == {"_copy_kernel": 1}
    assert counted["kernels"]["two copies"]["launches"] == {"_copy_kernel": 2}
    assert sum(counted["kernels"]["two copies"]["bytes"].values()) == 8000


def test_mu_costs_one_launch_at_the_end_of_a_step_and_none_before(counted):
    alone, micro_batch, end = (
        counted["steps"][name]["launches"] for name in ("each forward a step", "micro-batch", "end of a step")
    )
    assert micro_batch == alone == {"_pair_loss_kernel": 1, "_finalise_kernel": 1}
    assert end == {"_move_mu_kernel": 1}


@pytest.mark.parametrize("entry", [LIMITED, UNLIMITED])
def test_a_second_read_in_the_packages_own_kernels_is_caught(counted, entry):
    once, twice = (counted["entries"][f"{entry}, tiles read {reads}"] for reads in ("once", "twice"))
    read = 2 * int(once["shape"].split("P=")[1].split(",")[0]) * int(once["shape"].split("H=")[1].split(",")[0]) * 2
    assert twice["bytes"] - once["bytes"] == read
    without_excuse = static.Measured({entry: twice | {"no_limit": None}}, {})
    assert any("x its floor" in problem for problem in static.broken_limits(without_excuse))
    saved = static.Measured({entry: once}, {}).results()
    assert any("bytes" in problem for problem in static.regressions(static.Measured({entry: twice}, {}), saved))


# The counter of operators


def matrix(*shape):
    return torch.ones(*shape, dtype=torch.float32)


def rows_gradient():
    rows = matrix(10, 8).requires_grad_()
    gathered = rows[torch.tensor([0, 0, 3])]
    upstream = matrix(3, 8)
    return lambda: torch.autograd.grad(gathered, rows, upstream)


A, B, I = matrix(4, 8), matrix(4, 8), torch.tensor([0, 2])  # noqa: E741
OPERATORS = {
    # name: what runs, bytes read, bytes written, launches
    "pointwise": (lambda: A + B, 256, 128, 1),
    "two of them": (lambda: (A + B).neg(), 256 + 128, 256, 2),
    "scalar operand": (lambda: A * 2, 128, 128, 1),
    "cast": (lambda: A.to(torch.bfloat16), 128, 64, 1),
    "views": (lambda: A.t()[1:].unsqueeze(0).detach().reshape(-1, 2, 2).chunk(2), 0, 0, 0),
    "copy of a slice": (lambda: A[:, ::2].contiguous(), 64, 64, 1),
    "expanded operand": (lambda: A[0].expand(4, 8) + B, 32 + 128, 128, 1),
    "allocation": (lambda: torch.empty(4, 8), 0, 0, 0),
    "filled allocation": (lambda: torch.zeros(4, 8), 0, 128, 1),
    "in place": (lambda: A.clone().add_(B), 128 + 256, 256, 2),
    "overwritten": (lambda: torch.empty(4, 8).copy_(A), 128, 128, 1),
    "out=": (lambda: torch.mul(A, B, out=torch.empty(4, 8)), 256, 128, 1),
    "product": (lambda: A @ B.T, 256, 64, 1),
    "reduction": (lambda: A.sum(dim=1), 128, 16, 1),
    "host read": (lambda: A.sum().item(), 128 + 4, 4, 2),
    "gather": (lambda: A[I], 64 + 16, 64, 1),  # two rows and their numbers, not the whole of A
    # zeros (10, 8), then three rows added to what is there: read the rows, their numbers, and the places
    "gradient of a gather": (rows_gradient(), 96 + 24 + 96, 320 + 96, 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_bytes_are_those_by_hand(name):
    run, read, written, launches = OPERATORS[name]
    with counting() as count:
        run()
    by_direction = {writes: sum(n for access, n in count.bytes.items() if access.writes == writes) for writes in (0, 1)}
    assert (by_direction[0], by_direction[1], count.total_launches) == (read, written, launches)


# What is made of the counts


def test_every_kernel_compiles_without_spills_and_reads_rows_16_bytes_at_a_time(measured):
    """Each kernel once, for one target; `make static` holds all their variants to the same limits."""
    kernels = measured.targets[TARGET]
    assert {name.split(": ")[1] for name in kernels} == KERNELS
    assert {name: figures["spill_bytes"] for name, figures in kernels.items() if figures["spill_bytes"]} == {}
    # Rows of an odd number of elements are not aligned to 16 bytes.
    rows = {n: f["load_bytes"] for n, f in kernels.items() if f["reads_rows"] and not n.startswith("linear, odd H")}
    assert {name.split(": ")[1] for name in rows} == READ_ROWS
    assert {name: width for name, width in rows.items() if width != 16} == {}


def test_json_is_one_object_of_the_documented_shape(measured, monkeypatch, capsys):
    monkeypatch.setattr(static, "measure", lambda entries, targets: measured)
    monkeypatch.setattr(sys, "argv", ["bench.static", "--json"])
    static.main()
    results = json.loads(capsys.readouterr().out)
    assert set(results) == {"entries", "targets", "details"}
    assert set(results["entries"]) == {LIMITED}
    assert set(results["entries"][LIMITED]) == {"bytes", "floor_bytes", "launches_forward", "launches_backward"}
    assert set(results["targets"]) == {TARGET}


def test_results_have_each_kernel_of_each_target_and_what_has_no_limit_apart(measured):
    results = measured.results()
    assert set(results["entries"]) == {LIMITED}
    assert set(results["details"]["without_limit"]) == {UNLIMITED}
    assert set(results["targets"]) == {TARGET}
    for figures in results["targets"][TARGET].values():
        assert set(figures) == {"registers", "spill_bytes", "load_bytes"}
        assert all(isinstance(figure, int) for figure in figures.values())
    assert any(measured.targets[TARGET][kernel]["reads_rows"] for kernel in results["targets"][TARGET])
    json.dumps(results, allow_nan=False)


def check(measured, saved, monkeypatch, capsys):
    """What `--check` says against `saved`, and its exit status."""
    monkeypatch.setattr(static, "measure", lambda entries, targets: measured)
    parser = argparse.ArgumentParser()
    static.add_arguments(parser)
    status = 0
    try:
        static.run(parser.parse_args(["--check", "--json", "--saved", str(saved)]))
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err


BETTER = {
    "fewer bytes": (("entries", LIMITED, "bytes"), -4),
    "fewer bytes where there is no limit": (("details", "without_limit", UNLIMITED, "bytes"), -4),
    "fewer launches": (("entries", LIMITED, "launches_forward"), -1),
    "fewer registers": (("targets", static.triton.__version__, TARGET, "pair_distance", "registers"), -1),
    "wider loads": (("targets", static.triton.__version__, TARGET, "pair_distance", "load_bytes"), 16),
}


@pytest.mark.parametrize("change", BETTER)
def test_check_fails_when_a_saved_figure_was_better(measured, tmp_path, monkeypatch, capsys, change):
    monkeypatch.setattr(static, "MAX_BYTES", 10)  # the limits have their own test
    monkeypatch.setattr(static, "MAX_LAUNCHES", 10)
    static.save(measured, tmp_path / "static.json")
    assert check(measured, tmp_path / "static.json", monkeypatch, capsys) == (0, "")

    saved = json.loads((tmp_path / "static.json").read_text())
    path, difference = BETTER[change]
    figures = saved
    for key in path[:-1]:
        figures = next(value for name, value in figures.items() if name.startswith(key))
    figures[path[-1]] += difference
    (tmp_path / "better.json").write_text(json.dumps(saved))
    status, problems = check(measured, tmp_path / "better.json", monkeypatch, capsys)
    assert status == 1
    assert len(problems.strip().splitlines()) == 1
    assert path[-1] in problems


def test_limits_hold_whatever_was_saved(measured):
    worse = deepcopy(measured)
    worse.entries[LIMITED]["bytes"] = int(1.051 * worse.entries[LIMITED]["floor_bytes"])
    worse.entries[LIMITED]["launches_backward"] = 3
    kernel = next(kernel for kernel, figures in worse.targets[TARGET].items() if figures["reads_rows"])
    worse.targets[TARGET][kernel] |= {"spill_bytes": 8, "load_bytes": 8}
    before, after = static.broken_limits(measured), static.broken_limits(worse)
    assert len(after) - len(before) == 4


def test_a_version_of_triton_without_saved_figures_is_held_to_the_limits(measured, tmp_path):
    static.save(measured, tmp_path / "static.json")
    saved = json.loads((tmp_path / "static.json").read_text())
    saved["targets"] = {"0.0": saved["targets"].pop(static.triton.__version__)}
    assert static.regressions(measured, saved) == []
