"""bench/gpu_check.sh, as far as a machine without a GPU can prove it: stages that fail, hang, are skipped or are
interrupted never cost the summary; and the goals' table says what was measured, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import goals
from bench.gpu_check import Run, Stage, checks, measurements
from tests.processes import Command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PRINTS = "print('a line of the log')"


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def run_stages(folder: Path, *stages: Stage, total: float = 60) -> dict:
    run = Run(folder, stages, {}, total)
    run.run_at_once(stages)
    run.save(finished=True)
    return json.loads((folder / "summary.json").read_text())


def outcomes(summary: dict) -> dict[str, str]:
    return {stage["name"]: stage["outcome"] for stage in summary["stages"]}


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# --- stages --------------------------------------------------------------------------------------------------------


def test_every_stage_has_a_limit_and_an_outcome_of_its_own(tmp_path, capsys):
    started = tmp_path / "started"
    hangs = f"import os, subprocess, time; p = subprocess.Popen(['sleep', '60']); \
open({str(started)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    begin = time.monotonic()
    summary = run_stages(
        tmp_path,
        Stage("good", python(PRINTS), 20),
        Stage("bad", python(f"{PRINTS}; raise SystemExit(3)"), 20),
        Stage("hangs", python(hangs), 2),
        Stage("not there", ("/no/such/program",), 20),
        Stage("unwanted", python(PRINTS), 20, skip="no GPU"),
        Stage("cannot", python("print('Device not supported'); raise SystemExit(1)"), 20, unsupported="not supported"),
        Stage("may fail", python("raise SystemExit(1)"), 20, optional=True),
    )
    assert time.monotonic() - begin < 20
    assert outcomes(summary) == {
        "good": "passed", "bad": "failed", "hangs": "timed out", "not there": "failed", "unwanted": "skipped",
        "cannot": "skipped", "may fail": "failed",
    }  # fmt: skip
    assert summary["finished"]
    assert not summary["passed"]
    why = {stage["name"]: stage["why"] for stage in summary["stages"]}
    assert "exit status 3" in why["bad"]
    assert why["unwanted"] == "no GPU"
    assert "/no/such/program" in why["not there"]
    assert (tmp_path / "logs" / "good.log").read_text() == "a line of the log\n"
    assert capsys.readouterr().out.count("a line of the log") == 1  # of the one that failed
    assert not alive(int(started.read_text())), "what a stage started outlived it"


@pytest.mark.parametrize("optional", [False, True])
def test_only_what_is_optional_may_fail(tmp_path, optional):
    stages = Stage("good", python(PRINTS), 20), Stage("bad", python("raise SystemExit(1)"), 20, optional=optional)
    assert run_stages(tmp_path, *stages)["passed"] == optional


def test_no_time_left_is_no_pass(tmp_path):
    stages = [Stage("late", python(PRINTS), 20), Stage("optional", python(PRINTS), 20, optional=True, leaves=0)]
    summary = run_stages(tmp_path, *stages, total=10)  # of which the first leaves 20 to others
    assert outcomes(summary) == {"late": "not run", "optional": "passed"}
    assert not summary["passed"]


def test_results_of_an_earlier_run_do_not_pass_for_this_ones(tmp_path):
    stale = tmp_path / "device-checks.json"
    stale.write_text('{"checks": "of an earlier run"}')
    summary = run_stages(tmp_path, Stage("device-checks", python("raise SystemExit(1)"), 20, writes=[stale]))
    assert summary["device-checks"] is None


def test_only_what_needs_a_gpu_is_skipped_without_one(tmp_path, monkeypatch):
    stages = [*checks(tmp_path, smoke=True, gpu=False), *measurements(tmp_path, smoke=True, gpu=False)]
    needs_gpu = {"memcheck", "racecheck", "goals: graph", "flex step", "tune", "tune reward"}
    assert {s.name for s in stages if s.skip == "no GPU"} == needs_gpu
    assert len({s.name for s in stages}) == len(stages)
    at_full_size = measurements(tmp_path, smoke=False, gpu=False)
    assert {s.name for s in at_full_size if s.skip is None} == {"goals"}  # which only reads
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**37))
    with_gpu = [*checks(tmp_path, smoke=False, gpu=True), *measurements(tmp_path, smoke=False, gpu=True)]
    assert "no GPU" not in [s.skip for s in with_gpu]
    assert [s.name for s in with_gpu] == [s.name for s in stages]


# --- the command ---------------------------------------------------------------------------------------------------


def gpu_check(folder: Path, *options: str) -> Command:
    """What bench/gpu_check.sh runs, started from `folder`'s parent, with its results to `folder`."""
    return Command("bench.gpu_check", *options, cwd=folder.parent, OUT=folder.name, CUDA_VISIBLE_DEVICES="")


STAGES = ["environment", "memcheck", "goals: graph", "goals: pooled", "goals", "tune"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of a run of the script without a GPU, its exit status, and what it printed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = os.environ | {"PYTHON": sys.executable, "OUT": folder.name, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", ROOT / "bench" / "gpu_check.sh", "--smoke", "--stages", *STAGES]
    process = subprocess.run(command, cwd=folder.parent, stdout=subprocess.PIPE, text=True, env=environment)
    return folder, process.returncode, process.stdout


def test_without_a_gpu_it_runs_what_it_can_and_makes_up_no_figure(rehearsal):
    folder, status, output = rehearsal
    summary = json.loads((folder / "summary.json").read_text())
    assert status == 0, output
    assert summary["finished"]
    assert outcomes(summary) == dict(zip(STAGES, ["passed", *["skipped"] * 2, *["passed"] * 2, "skipped"], strict=True))
    assert {stage["why"] for stage in summary["stages"] if stage["outcome"] == "skipped"} == {"no GPU"}
    assert "self-check: passed" in output
    assert {row["measured"] for row in summary["goals"]["rows"]} == {"not measured"}
    assert {row["reached"] for row in summary["goals"]["rows"]} == {None}
    assert "pooled/speed.json: measured on" in output


def test_goals_find_what_the_benchmarks_write(rehearsal):
    """The rows below are made up; the names in them are those that bench/speed.py really writes."""
    content = json.loads((rehearsal[0] / "goals" / "pooled" / "speed.json").read_text())
    shape = {"entry": "pooled", "num_pairs": 32, "hidden_size": 32, "dtype": "float32"}
    results = goals.Results("", {"speed": [content]}, [])
    assert next(results.speed("ours", "copy", **shape), None) is None  # a CPU has no clock of its own
    for row in content["rows"]:
        row["device"] = row["wall"]
    rows = next(results.speed("ours", "copy", **shape))
    assert goals.share_of_copy(shape)(results).value == rows["ours"]["share_of_copy"]["both"]
    assert goals.times_over_ours("copy", shape)(results).value > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_whole_summary(tmp_path, number):
    command = gpu_check(tmp_path, "--smoke", "--stages", "training", "goals")
    command.wait_until((tmp_path / "logs" / "training.log").exists)
    os.kill(command.pid, number)
    assert command.wait(30) == 130
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert outcomes(summary) == {"training": "interrupted", "goals": "waiting"}
    assert summary["interrupted"]
    assert not summary["finished"]
    assert not summary["passed"]


def test_without_a_gpu_nothing_passes_unless_it_is_a_rehearsal(tmp_path):
    command = gpu_check(tmp_path, "--stages", "memcheck")
    assert command.wait() == 1
    assert "no GPU: nothing here says anything about one" in command.output


# --- the goals' table ----------------------------------------------------------------------------------------------

DEVICE = {"type": "cuda", "name": "A GPU that does not exist"}


def write(folder: Path, name: str, content: dict, device: dict = DEVICE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"environment": {"device": device}, **content}))


def speed(times: dict[str, float], entry="linear", num_pairs=65536, hidden_size=4096, sequence_length=1, share=None):
    """Rows as bench/speed.py writes them; wall times are ten times the device's, so that a mix-up shows."""
    return [
        {
            "entry": entry,
            "num_pairs": num_pairs,
            "hidden_size": hidden_size,
            "sequence_length": sequence_length,
            "dtype": "bfloat16",
            "contender": name,
            "device": {"both": {"median_us": us}},
            "wall": {"both": {"median_us": 10 * us if name != "ours" else 30 * us}},
            "share_of_copy": {"both": share},
        }
        for name, us in times.items()
    ]


def measured(folder: Path) -> dict[tuple[str, str], tuple[str, bool | None, str]]:
    rows = goals.table(goals.Results.read(folder))
    return {(row["what"], row["goal"]): (row["measured"], row["reached"], row["note"]) for row in rows}


def test_goals_are_ratios_of_contenders_of_one_run(tmp_path):
    large = {"ours": 100.0, "eager": 510.0, "compiled": 139.0, "bt-eager": 150.0, "copy": 91.0}
    rows = speed(large, share=0.91) + speed({"ours": 10.0, "eager": 26.0}, "pooled", 32, sequence_length=1024)
    write(tmp_path, "speed", {"rows": rows})
    # Another run, in which all is faster: none of its times may be held against those above.
    write(tmp_path / "z", "speed", {"rows": speed({"ours": 1.0, "copy": 0.9}, "frozen", share=0.89)})
    write(tmp_path / "zz", "speed", {"rows": speed({"eager": 9.0}, "frozen")})
    seen = measured(tmp_path)
    linear = "linear, P=65536, H=4096"
    assert seen.pop((linear, ">= 90% of the copy")) == ("91.00%", True, "")
    assert seen.pop((linear, ">= 5x eager NormBT")) == ("5.10x", True, "")
    assert seen.pop((linear, ">= 1.4x compiled NormBT")) == ("1.39x", False, "")
    assert seen.pop((linear, "faster than eager plain BT")) == ("1.50x", True, "")
    assert seen.pop(("pooled, N=64, S=1024, H=4096", ">= 2.5x the HF way")) == ("2.60x", True, "")
    assert seen.pop(("frozen backbone, same size", ">= 90% of the copy")) == ("89.00%", False, "")
    assert set(seen.values()) == {("not measured", None, "")}
    assert ("frozen backbone, same size", ">= 6x eager NormBT") in seen


def test_small_sizes_are_judged_by_the_worst_and_only_if_both_ends_were_measured(tmp_path):
    calls, graph = (f"P=8..256, H=2048..8192, {what}" for what in ("wall time of the call", "one CUDA graph"))
    sizes = [(p, h) for p in (8, 256) for h in (2048, 8192)]
    # Wall times: ours 30 * 1, eager 10 * 10 (once 10 * 5), plain BT 10 * 4.
    rows = [row for p, h in sizes for row in speed(
        {"ours": 1.0, "eager": 5.0 if (p, h) == (256, 2048) else 10.0, "bt-eager": 4.0}, num_pairs=p, hidden_size=h
    )]  # fmt: skip
    graphs = [
        {"num_pairs": p, "hidden_size": h, "step": {"median_us": 9.0 + p / 64}, "empty": {"median_us": 5.0}}
        for p, h in sizes
    ]
    write(tmp_path, "speed", {"rows": rows[:-3]})
    write(tmp_path, "graph-step", {"rows": graphs[:-1]})
    assert measured(tmp_path)[calls, "<= eager plain BT"] == ("not measured", None, "")
    assert measured(tmp_path)[graph, "<= 2x two empty kernels"] == ("not measured", None, "")
    write(tmp_path, "speed", {"rows": rows})
    write(tmp_path, "graph-step", {"rows": graphs})
    seen = measured(tmp_path)
    assert seen[calls, "<= 1/3 of eager NormBT"] == ("0.60x", False, "at P=256, H=2048, the worst of 4 sizes")
    assert seen[calls, "<= eager plain BT"][:2] == ("0.75x", True)
    assert seen[graph, "<= 2x two empty kernels"][:2] == ("2.60x", False)


def test_memory_training_step_and_other_hidden_sizes(tmp_path):
    memory = {"case": "linear P=65536 H=4096 bfloat16", "contender": "ours", "error": None,
              "input_bytes": 1000, "peak_beyond_gradients_bytes": 21}  # fmt: skip
    write(tmp_path, "memory", {"rows": [memory]})
    rows = [
        {"contender": "bt-again", "interval_95_percent": [-0.1, 0.1]},
        {"contender": "ours", "interval_95_percent": [-0.6, -0.4], "overhead_percent": -0.51},
    ]
    write(tmp_path, "train-step", {"settings": {"parameters": 110_000_000, "dtype": "bfloat16"}, "rows": rows})
    shares = {1024: 0.80, 4096: 0.96, 16384: 0.90}
    write(tmp_path, "speed", {"rows": [
        row for h, share in shares.items() for row in speed({"ours": 1.0, "copy": 1.0}, hidden_size=h, share=share)
    ]})  # fmt: skip
    seen = measured(tmp_path)
    assert seen["memory above inputs and gradients", "<= 2% of the inputs"] == ("2.10%", False, "")
    assert seen["training step, 0.1B, bf16", "within +-0.5% of plain BT"] == ("-0.51%", False, "95%: -0.60% to -0.40%")
    assert seen["H=16384", ">= 90% of the share at 4096"] == ("93.75%", True, "90.0% beside 96.0%")
    assert seen["H=1024", ">= 90% of the share at 4096"] == ("83.33%", False, "80.0% beside 96.0%")
    rows[0]["interval_95_percent"] = [0.05, 0.1]
    write(tmp_path, "train-step", {"settings": {"parameters": 110_000_000, "dtype": "bfloat16"}, "rows": rows})
    assert "not to be trusted" in measured(tmp_path)["training step, 0.1B, bf16", "within +-0.5% of plain BT"][2]
    for parameters, found in ((1_000_000, "not measured"), (1_200_000_000, "-0.51%")):
        write(tmp_path, "train-step", {"settings": {"parameters": parameters, "dtype": "bfloat16"}, "rows": rows})
        assert measured(tmp_path)["training step, 0.1B, bf16", "within +-0.5% of plain BT"][0] == "not measured"
        assert measured(tmp_path)["training step, 1.2B, bf16", "within +-0.5% of plain BT"][0] == found


def test_a_cpus_figures_are_left_out_and_two_gpus_are_refused(tmp_path):
    rows = speed({"ours": 100.0, "eager": 510.0, "copy": 91.0}, share=0.91)
    write(tmp_path, "speed", {"rows": rows}, {"type": "cpu", "name": "a CPU"})
    assert set(measured(tmp_path).values()) == {("not measured", None, "")}
    assert goals.Results.read(tmp_path).left_out == ["speed.json: measured on a CPU, which is no GPU"]
    for name in ("one", "another"):
        write(tmp_path / name, "speed", {"rows": rows}, {"type": "cuda", "name": name})
    with pytest.raises(ValueError, match="several GPUs: another, one"):
        goals.Results.read(tmp_path)
