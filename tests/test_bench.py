"""The benchmarks say what they measured, count what they claim to count, and never make up a figure."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

import reference
from bench import all as bench_all
from bench import contenders, scaling, speed, timing, tune
from bench.contenders import CONTENDERS, ENTRIES, Case, Inputs
from normbt_kernels.files import write_whole
from tests.processes import Command

SIZE = ["-P", "4", "-H", "8"]
# torch.compile without its C++ code, which takes a minute to compile
COMMANDS = {
    "speed": ["--entry", "reward", *SIZE, "--dtype", "fp32", "--seconds", "0.01", "--compile-backend", "aot_eager"],
    "memory": ["--entry", "linear", *SIZE, "--contender", "bt-eager", "eager", "ours"],
    "scaling": ["--entry", "kwise", "--largest", "32", "--seconds", "0.01"],
    "train-step": ["--steps", "3", "-P", "2", "-S", "8"],
}


def figures_of(value) -> list[float]:
    """All numbers in a nested result."""
    if isinstance(value, (dict, list)):
        return [x for v in (value.values() if isinstance(value, dict) else value) for x in figures_of(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The content of a sub-command's JSON, by running it."""

    def run(name: str) -> dict:
        folder = tmp_path_factory.mktemp(name)
        command = Command("bench", name, "--device", "cpu", "--threads", 1, "--out", folder, *COMMANDS[name])
        assert command.wait() == 0, command.errors
        assert {path.name for path in folder.iterdir()} <= {f"{name}.json", f"{name}.png"}
        return json.loads((folder / f"{name}.json").read_text())

    return run


def check_environment(result: dict, name: str) -> None:
    environment = result["environment"]
    assert environment["device"]["type"] == "cpu"
    assert "CPU" in environment["note"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["command"].startswith(f"python -m bench {name}")
    assert environment["date"].startswith("20")
    assert len(environment["load_average_start"]) == len(environment["load_average_end"]) == 3


@pytest.mark.slow
def test_speed_times_every_contender_by_the_same_work(results):
    result = results("speed")
    check_environment(result, "speed")
    rows = {row["contender"]: row for row in result["rows"]}
    assert set(rows) == set(CONTENDERS)
    assert rows.pop("ours-graph")["skipped"]
    for name, row in rows.items():
        assert row["error"] is None
        assert row["device"] is None
        phases = {"forward", "both"} if name == "copy" else {"forward", "backward", "both"}
        assert set(row["wall"]) == phases
        assert min(figures_of([row["wall"], row["gb_per_s"], row["share_of_copy"]])) > 0
    assert rows["bt-eager"]["gb_per_s"] is rows["bt-compiled"]["gb_per_s"] is None  # given rewards, BT reads no rows
    assert rows["ours"]["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-5)
    assert rows["compiled"]["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-5)
    assert rows["bt-compiled"]["loss"] == pytest.approx(rows["bt-eager"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_memory_counts_the_gradients_that_everybody_allocates(results):
    result = results("memory")
    check_environment(result, "memory")
    rows = {row["contender"]: row for row in result["rows"]}
    assert set(rows) == {"bt-eager", "eager", "ours"}
    for row in rows.values():
        assert row["error"] is None
        assert row["gradient_bytes"] == 4 * (2 * 4 * 8 + 8)
        assert row["peak_above_inputs_bytes"] >= row["gradient_bytes"]


@pytest.mark.slow
def test_scaling_fits_every_sweep(results):
    result = results("scaling")
    check_environment(result, "scaling")
    sweeps = {(s["contender"], s["varied"]) for s in result["slopes"]}
    assert sweeps == {(name, varied) for name in ("eager", "ours") for varied in ("num_pairs", "hidden_size")}
    assert min(figures_of([row["wall"] for row in result["rows"]])) > 0


@pytest.mark.slow
def test_realistic_step_runs_every_trainer_on_the_same_pairs(tmp_path):
    sizes = ["--steps", "2", "-P", "4", "--layers", "2", "-H", "32", "--median-length", "8"]
    folder = tmp_path / "results"
    command = Command("bench", "train-step", "--realistic", "--device", "cpu", "--threads", 1, "--out", folder, *sizes)
    assert command.wait() == 0, command.errors
    result = json.loads((folder / "realistic-step.json").read_text())
    check_environment(result, "train-step --realistic")
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows.keys() == {"trl", "trl-grouped", "padded", "late", "padding-free", "both"}
    assert rows["both"]["padding"] < rows["padded"]["padding"] == rows["trl"]["padding"]
    assert rows["trl-grouped"]["padding"] <= rows["trl"]["padding"]
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["interval_95"][0] <= row["time_ratio"] <= row["interval_95"][1]
        assert row["peak_bytes"] > 0


@pytest.mark.slow
def test_train_step_compares_every_loss_with_plain_bt(results):
    pytest.importorskip("transformers")
    result = results("train-step")
    check_environment(result, "train-step")
    rows = {row["contender"]: row for row in result["rows"]}
    assert set(rows) == {"bt", "bt-again", "eager", "ours"}
    assert rows.pop("bt")["overhead_percent"] is None
    for row in rows.values():
        low, high = row["interval_95_percent"]
        assert low <= row["overhead_percent"] <= high
        assert min(figures_of(row["seconds"])) > 0


@pytest.mark.parametrize(
    ("entry", "forward", "backward"),
    [
        # P=6, H=10, S=3, bf16: 2*P*H*s = 2*6*10*2 = 240; the pooled gradient is written for each of 12*3 positions;
        # 6 pairs of "kwise" are the 4 answers of one prompt: 4*10*2 = 80.
        ("reward", 240, 0),
        ("linear", 240, 240),
        ("frozen", 240, 0),
        ("pooled", 240, 720),
        ("kwise", 80, 80),
    ],
)
def test_floors_are_those_computed_by_hand(entry, forward, backward):
    case = Case(entry, 6, 10, torch.bfloat16, 3)
    assert case.floor_bytes() == {"forward": forward, "backward": backward, "both": forward + backward}
    inputs = case.make_inputs(torch.device("cpu"))
    assert inputs.source.nbytes + inputs.destination.nbytes == forward + backward


@pytest.mark.parametrize("entry", ENTRIES)
def test_contenders_compute_the_same_loss_and_gradients(entry):
    torch.manual_seed(0)
    inputs = Case(entry, 6, 10, torch.float64, 3).make_inputs(torch.device("cpu"))
    if entry == "reward":
        expected = reference.normbt_loss(*inputs[1:5], inputs.mu)
    else:
        pairs = "halves" if inputs.pairs is None else inputs.pairs
        expected = reference.linear_normbt_loss(
            inputs.hidden, inputs.head, inputs.mu, pairs=pairs, last_token=inputs.last_token
        )
    gradients = torch.autograd.grad(expected, inputs.leaves())
    for function in (contenders.eager_normbt, contenders.ours):
        loss = function(inputs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs.leaves()), gradients)
    # plain BT is the same without the weights
    distance = torch.linalg.vector_norm(torch.sub(*contenders.rows_of(inputs)), dim=-1)
    chosen_rewards, rejected_rewards = contenders.rewards_of(inputs)
    per_pair = torch.nn.functional.softplus(rejected_rewards - chosen_rewards)
    torch.testing.assert_close(contenders.plain_bt(inputs), per_pair.mean())
    torch.testing.assert_close((inputs.mu / (distance + 1e-6) * per_pair).mean(), expected)


def fails(inputs: Inputs) -> torch.Tensor:
    raise RuntimeError("out of\nluck")


def measure(case: Case) -> dict[str, dict]:
    rows = speed.measure_case(case, ("eager", "ours", "copy"), torch.device("cpu"), 2**10, 0.01)
    return {row["contender"]: row for row in rows}


def test_failed_contender_leaves_an_error_and_no_figure(monkeypatch):
    broken = contenders.Contender("broken", fails, "red")
    monkeypatch.setitem(CONTENDERS, "eager", broken)
    rows = measure(Case("linear", 4, 8, torch.float32))
    assert rows["eager"]["error"] == "RuntimeError: out of"
    assert rows["eager"]["wall"] is rows["eager"]["gb_per_s"] is rows["eager"]["share_of_copy"] is None
    assert rows["ours"]["error"] is None
    assert rows["ours"]["wall"]["both"]["median_us"] > 0


def test_contender_that_fails_late_is_dropped_with_its_figures():
    calls = iter([{"both": 1.0}] * 4)
    figures, errors = timing.take_turns({"late": lambda: next(calls), "good": lambda: {"both": 2.0}}, 0)
    assert list(figures) == ["good"]
    assert figures["good"]["both"]["median"] == 2.0
    assert errors == {"late": "StopIteration: "}


def test_size_that_does_not_fit_is_skipped_and_said_so(monkeypatch):
    monkeypatch.setattr(speed, "free_bytes", lambda device: 1000)
    rows = measure(Case("pooled", 4, 8, torch.float32, 4))
    assert all("memory" in row["skipped"] and row["wall"] is None for row in rows.values())


def test_buffers_exceed_the_cache_and_fit_the_memory():
    assert timing.number_of_buffers(2**20, cache_bytes=50 * 2**20, free_bytes=2**40) == timing.MAX_BUFFERS
    assert timing.number_of_buffers(10 * 2**20, cache_bytes=50 * 2**20, free_bytes=2**40) == 10
    assert timing.number_of_buffers(2**30, cache_bytes=50 * 2**20, free_bytes=2**40) == 1
    assert timing.number_of_buffers(10 * 2**20, cache_bytes=50 * 2**20, free_bytes=35 * 2**20) == 3


def test_slope_is_the_exponent():
    assert scaling.slope([(10, 5.0), (100, 50.0), (1000, 500.0)]) == pytest.approx(1)
    assert scaling.slope([(10, 5.0), (100, 500.0)]) == pytest.approx(2)
    assert scaling.slope([(10, 5.0)]) is None
    assert scaling.powers(8, 100) == [8, 32, 100]


def test_interrupted_write_leaves_the_file_before_and_no_other(tmp_path):
    path = tmp_path / "speed.json"
    write_whole(path, lambda path: path.write_text("whole"))

    def interrupted(path):
        path.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_all_goes_on_past_a_failure_and_names_it(monkeypatch, tmp_path, capsys):
    ran = []

    def fake_run(command, check):
        ran.append(command[3])
        return argparse.Namespace(returncode=int(command[3] == "memory"))

    monkeypatch.setattr(bench_all.subprocess, "run", fake_run)
    options = argparse.Namespace(out=tmp_path, device=torch.device("cpu"), quick=True, threads=None, skip=["static"])
    assert bench_all.run(options) == 1
    assert ran == ["speed", "memory", "scaling", "train-step", "host"]
    assert "failed with status 1" in capsys.readouterr().out


# Tuning


@pytest.mark.slow
def test_tune_times_each_shape_and_proposes_constants(tmp_path):
    command = [sys.executable, "-m", "bench", "tune", "--device", "cpu", "-P", "5", "-H", "16", "--dtype", "fp32"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([*command, "--seconds", "0.01", "--out", tmp_path], check=True, capture_output=True, env=environment)
    result = json.loads((tmp_path / "tune.json").read_text())
    check_environment(result, "tune")
    for phase, constants in tune.CONSTANTS.items():
        rows = [row for row in result["rows"] if row["phase"] == phase]
        assert len({row["shape"] for row in rows}) == len(rows) >= 1
        assert all(row["median_us"] > 0 for row in rows)
        proposal = result["proposals"][phase]
        assert 1 <= proposal["cost"] <= proposal["cost_today"]
        assert all(value in constants[name] for name, value in proposal["constants"].items())


def test_tune_proposes_what_is_fastest_over_all_sizes(monkeypatch):
    device, cases = torch.device("cpu"), [Case("linear", p, 64, torch.float32) for p in (40, 400)]
    best = {"tile_bytes": 8192, "register_bytes": 128, "warps_per_multiprocessor": 16, "stages": 4}
    times = {}
    for case in cases:
        shapes = {s: tune.shape_of(case, "forward", s, device) for s in tune.settings("forward")}
        fastest = shapes[tuple(best.values())]
        times[str(case)] = {shape: 1.0 if shape == fastest else 1.5 for shape in shapes.values()}
    proposal = tune.propose("forward", cases, times, device)
    assert proposal["cost"] == 1.0
    assert proposal["cost_today"] == pytest.approx(1.5)
    for case in cases:
        shape = tune.shape_of(case, "forward", tuple(proposal["constants"].values()), device)
        assert times[str(case)][shape] == 1.0


@pytest.mark.slow
def test_tune_refuses_a_device_without_kernels():
    command = Command("bench", "tune", "--device", "cpu")
    assert command.wait() == 1
    assert "nothing to tune on cpu" in command.errors
