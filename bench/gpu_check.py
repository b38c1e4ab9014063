"""Checks, measures and compares with the goals on the GPU of this machine: what bench/gpu_check.sh runs.

Each stage is a process of its own with a time limit of its own, and fails by itself. First the checks, all at once,
since no time is measured; then the measurements, one after the other and alone on the GPU. What is not installed is not
needed: the stage that wants it says "skipped". FOLDER/summary.json is written anew, whole, whenever a stage begins or
ends, so it shows how far a killed run came.

    FOLDER/summary.json        every stage, each device check, the training comparison, the goals
    FOLDER/*.json, *.png       what `python -m bench all --quick` measured
    FOLDER/goals/              the sizes of the goals that are in no quick grid
    FOLDER/logs/               what each stage printed

The exit status is 0 if every stage passed, or was skipped for want of something optional; 1 if one did not, or there is
no GPU; 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS, default_device, describe_device, versions
from normbt_kernels.files import write_json

TOTAL_SECONDS = 585  # by default; a stage gets what is left of these, if that is less than its own limit
ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
KERNEL_TESTS = sorted(ROOT.glob("tests/kernels/test_*.py"))
SANITIZED = (PYTHON, "tests/kernels/device_checks.py", "a_little_of_everything")
NO_GPU = "no GPU"
NO_TRL = "trl, whose trainer it is compared with, is not installed"
SUMMARISED = ("device-checks", "training", "goals")  # whose results are part of the summary


@dataclass
class Stage:
    name: str
    command: Sequence[str]
    limit: float  # in seconds
    writes: Sequence[Path] = ()  # those of an earlier run are removed, lest they pass for this one's
    skip: str | None = None  # why it is not run
    note: str | None = None  # what it leaves out
    leaves: float = 20  # seconds of the total for what comes after
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = False  # neither its end at the time limit nor its failure counts
    unsupported: str | None = None  # what it prints where this machine cannot do it
    # what became of it
    outcome: str = "waiting"
    why: str | None = None
    seconds: float | None = None

    @property
    def passed(self) -> bool:
        return self.outcome in ("passed", "skipped") or (self.optional and self.outcome != "interrupted")

    def end(self, outcome: str, why: str | None = None) -> None:
        self.outcome, self.why = outcome, why
        print(f"  {self.name}: {outcome}{f': {why}' if why else ''}", flush=True)

    def describe(self) -> dict[str, Any]:
        facts = {"name": self.name, "outcome": self.outcome, "why": self.why, "seconds": self.seconds}
        return facts | {"limit": self.limit, "optional": self.optional, "command": list(self.command)}


# --- what is run ---------------------------------------------------------------------------------------------------


def checks(out: Path, smoke: bool, gpu: bool) -> list[Stage]:
    """Stages that measure no time."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    no_sanitizer = None if sanitizer else "compute-sanitizer is not installed"
    environment = 'command -v nvidia-smi >/dev/null && nvidia-smi; exec "$0" -m normbt_kernels info'
    device_checks = out / "device-checks.json"
    return [
        Stage("environment", ("bash", "-c", environment, PYTHON), 60),
        Stage(
            "device-checks",
            (PYTHON, "tests/kernels/device_checks.py", "--json", str(device_checks)),
            200,
            writes=[device_checks],
        ),
        kernel_tests(smoke, gpu),
        Stage(
            "training",
            (PYTHON, "-m", "bench.training_parity", "--steps", "200", "--out", str(out)),
            150,
            writes=[out / "training-parity.json"],
            environment={"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]},
        ),
        *(
            Stage(
                tool,
                (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options, *SANITIZED),
                200,
                skip=no_sanitizer if gpu else NO_GPU,
                # each tensor an allocation of its own, so that a step beyond its end is seen
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                unsupported="Device not supported",
            )
            # Calls that a library makes to see whether they fail are no errors.
            for tool, options in {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}.items()
        ),
    ]


def kernel_tests(smoke: bool, gpu: bool) -> Stage:
    """tests/kernels, but for the device checks, which are a stage of their own."""
    left_out = {"test_device_checks": "a stage of its own"}
    if smoke:
        left_out |= {path.stem: "--smoke" for path in KERNEL_TESTS if path.stem not in ("test_graph_safety", *left_out)}
    if not installed("hypothesis"):
        left_out["test_against_reference"] = "hypothesis is not installed"
    workers = min((os.cpu_count() or 1) - 2, 12)
    if gpu:
        workers = min(workers, torch.cuda.get_device_properties(0).total_memory // (8 * 2**30))
    options = ["-q", "-p", "no:cacheprovider"]
    if workers > 1 and not smoke and installed("xdist"):
        options += ["-n", str(workers), "--dist", "worksteal"]
    else:
        left_out = dict.fromkeys(("test_against_reference", "test_gradcheck"), "too long for one process") | left_out
    paths = [f"tests/kernels/{path.name}" for path in KERNEL_TESTS if path.stem not in left_out]
    return Stage(
        "kernel-tests",
        (PYTHON, "-m", "pytest", *options, *paths),
        240,
        skip=None if installed("pytest") else "pytest is not installed; the device checks do without it",
        note="without " + ", ".join(f"{name} ({why})" for name, why in left_out.items()),
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # the workers are processes already
    )


def measurements(out: Path, smoke: bool, gpu: bool) -> list[Stage]:
    """Stages that have the GPU for themselves: sizes of the goals that are in no quick grid, then all benchmarks."""
    pairs, hidden, ends = (["64"], ["32"], ["8", "128"]) if smoke else (["65536"], ["4096"], ["1024", "16384"])
    few, small, length = (["8"], ["16", "64"], "8") if smoke else (["8", "64", "256"], ["2048", "8192"], "1024")
    shape = ("--steps", "1", "--layers", "2", "--hidden-size", "32") if smoke else ("--steps", "16")
    model = ("--model-size", "tiny", "--steps", "3") if smoke else ("--model-size", "medium", "--steps", "40")
    no_gpu = None if gpu else NO_GPU
    no_use = None if gpu or smoke else NO_GPU

    def benchmark(
        name: str, module: Sequence[str], *options: str, limit: float = 60, skip: str | None = no_use
    ) -> Stage:
        folder = out / "goals" / name
        command = (PYTHON, "-m", *module, "--quick", *options, "--out", str(folder))
        written = f"{module[-1].removeprefix('bench.').replace('_', '-')}.json"
        return Stage(f"goals: {name}", command, limit, writes=[folder / written], skip=skip)

    speed, memory, rows = ("bench", "speed"), ("bench", "memory"), ("-P", *pairs, "-H", *hidden)
    return [
        benchmark(
            "small", speed, "--seconds", "0.7", "--entry", "linear", "-P", *few, "-H", *small,
            "--contender", "bt-eager", "eager", "ours", "ours-graph", limit=90,
        ),
        benchmark("graph", ("bench.graph_step",), "-P", *few, "-H", *small, skip=no_gpu),
        benchmark("long-rows", speed, "--entry", "linear", *rows, *ends, "--contender", "ours", "copy"),
        benchmark(
            "pooled", speed, "--entry", "pooled", "-P", "32", "-H", *hidden, "-S", length,
            "--contender", "eager", "ours", "copy",
        ),
        benchmark("memory", memory, "--entry", "linear", *rows, "--contender", "bt-eager", "eager", "ours"),
        Stage(
            "bench all",
            # static needs no GPU, nor triton 3.6's interpreter every numpy: CI runs it. The others are stages below.
            (PYTHON, "-m", "bench", "all", "--quick", "--out", str(out),
             "--skip", "static", "host", "scaling", *(["speed", "memory"] if smoke else [])),
            400,
            writes=[out / f"{name}.json" for name in ("speed", "memory", "train-step")],
            skip=no_use,
        ),
        Stage(
            "larger step",  # of a model whose host does not limit it
            (PYTHON, "-m", "bench", "train-step", "--out", str(out / "larger-step"), *model),
            90,
            writes=[out / "larger-step" / "train-step.json"],
            skip=no_use,
            optional=True,
        ),
        Stage("goals", (PYTHON, "-m", "bench.goals", str(out)), 30, writes=[out / "goals.json"], leaves=0),
        # What follows has no goal on a GPU yet, and takes what time is left.
        Stage(
            "host",
            (PYTHON, "-m", "bench", "host", "--rounds", "3" if smoke else "100", "--out", str(out)),
            90,
            writes=[out / "host.json"],
            skip=no_use,
            leaves=0,
            optional=True,
        ),
        Stage(
            "realistic step",
            (PYTHON, "-m", "bench", "train-step", "--realistic", "--out", str(out), *shape),
            120,
            writes=[out / "realistic-step.json"],
            skip=no_use if installed("trl") else NO_TRL,
            leaves=0,
            optional=True,
        ),
        Stage(
            "scaling",
            (PYTHON, "-m", "bench", "scaling", "--quick", "--out", str(out)),
            120,
            writes=[out / "scaling.json"],
            skip="--smoke" if smoke else no_gpu,
            leaves=0,
            optional=True,
        ),
        *(
            Stage(
                name,
                (PYTHON, "-m", "bench", "tune", "--quick", "--entry", entry, "-P", "64", "65536", "-H", "4096",
                 "--out", str(folder)),
                120,
                writes=[folder / "tune.json"],
                skip=no_gpu,
                leaves=0,
                optional=True,
            )
            for name, entry, folder in (("tune", "linear", out), ("tune reward", "reward", out / "tune-reward"))
        ),
        Stage(
            "flex step",  # which PyTorch compiles first, and on a CPU does not train
            (PYTHON, "-m", "bench", "train-step", "--realistic", "--attention", "flex_attention",
             "--contender", "padding-free", "--out", str(out / "flex-step"), "--steps", "4"),
            150,
            writes=[out / "flex-step" / "realistic-step.json"],
            skip=no_gpu if installed("trl") else NO_TRL,
            leaves=0,
            optional=True,
        ),
    ]  # fmt: skip


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- running it ----------------------------------------------------------------------------------------------------


class Run:
    """Stages, and the summary that is whole at every moment."""

    def __init__(self, out: Path, stages: Sequence[Stage], environment: dict[str, Any], total: float):
        self.out, self.stages, self.environment = out, stages, environment
        self.begin = time.monotonic()
        self.deadline = self.begin + total
        self.processes: dict[str, tuple[Stage, subprocess.Popen, float]] = {}
        self.interrupted = False
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.save(finished=False)

    def log(self, stage: Stage) -> Path:
        return self.out / "logs" / f"{stage.name.replace(': ', '-').replace(' ', '-')}.log"

    def run_at_once(self, stages: Sequence[Stage]) -> None:
        """Runs `stages` side by side until each has ended, by itself, at its limit, or because of `interrupt`."""
        try:
            for stage in stages:
                self._start(stage)
            while self.processes:
                time.sleep(0.1)
                for stage, process, start in list(self.processes.values()):
                    if self.interrupted:
                        self._end(stage, ("interrupted", None))
                    elif process.poll() is not None:
                        self._end(stage, self._verdict(stage, process.returncode))
                    elif time.monotonic() > min(start + stage.limit, self.deadline - stage.leaves):
                        self._end(stage, ("timed out", f"after {time.monotonic() - start:.0f} s"))
        finally:  # of an error in here
            for stage, _, _ in list(self.processes.values()):
                self._end(stage, ("interrupted", None))

    def interrupt(self, *_: Any) -> None:
        """Only notes that Ctrl-C or SIGTERM came, so that no stage is lost between its start and its record."""
        self.interrupted = True

    def _start(self, stage: Stage) -> None:
        for path in stage.writes:
            path.unlink(missing_ok=True)
        if stage.skip is not None:
            stage.end("skipped", stage.skip)
        elif time.monotonic() > self.deadline - stage.leaves - 5:
            stage.end("skipped" if stage.optional else "not run", "no time left")
        else:
            try:
                with open(self.log(stage), "w") as log:
                    process = subprocess.Popen(
                        stage.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                        env=os.environ | OFFLINE | stage.environment, start_new_session=True,
                    )  # fmt: skip
                self.processes[stage.name] = stage, process, time.monotonic()
                stage.outcome = "running"
            except OSError as error:
                stage.end("failed", str(error))
        self.save(finished=False)

    def _verdict(self, stage: Stage, status: int) -> tuple[str, str | None]:
        if status == 0:
            return "passed", stage.note
        if stage.unsupported and stage.unsupported in self.log(stage).read_text(errors="replace"):
            return "skipped", f"it says {stage.unsupported!r}"
        return "failed", f"exit status {status}, see {self.log(stage)}"

    def _end(self, stage: Stage, verdict: tuple[str, str | None]) -> None:
        _, process, start = self.processes.pop(stage.name)
        with contextlib.suppress(ProcessLookupError):  # it, and whatever it left running
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stage.seconds = round(time.monotonic() - start, 1)
        stage.end(*verdict)
        if stage.outcome in ("failed", "timed out"):
            print_indented(self.log(stage), last=25)
        self.save(finished=False)

    def passed(self) -> bool:
        return all(stage.passed for stage in self.stages)

    def save(self, finished: bool, **facts: Any) -> None:
        results = {stage.name: stage.writes[0] for stage in self.stages if stage.name in SUMMARISED}
        summary = {
            "finished": finished,
            "passed": finished and self.passed(),
            **facts,
            "environment": self.environment,
            "seconds": round(time.monotonic() - self.begin, 1),
            "stages": [stage.describe() for stage in self.stages],
            **{name: json.loads(path.read_text()) if path.exists() else None for name, path in results.items()},
        }
        write_json(self.out / "summary.json", summary)


def print_indented(path: Path, last: int | None = None) -> None:
    lines = path.read_text(errors="replace").splitlines()
    for line in lines[-last:] if last else lines:
        print(f"    {line}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bash bench/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="for the results (default: $OUT, bench/results/<device>)")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to rehearse it; without a GPU that is no fault"
    )
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of the whole (default: %(default)s)")
    options = parser.parse_args(arguments)

    gpu = torch.cuda.is_available()
    environment = {"device": describe_device(default_device()), "versions": versions(), "smoke": options.smoke}
    out = options.folder or Path(os.environ.get("OUT") or RESULTS / environment["device"]["slug"])
    out = out.resolve()
    groups = [checks(out, options.smoke, gpu), *([stage] for stage in measurements(out, options.smoke, gpu))]
    names = [stage.name for group in groups for stage in group]
    if unknown := set(options.stages or ()) - set(names):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(map(repr, names))}")
    groups = [[stage for stage in group if stage.name in (options.stages or names)] for group in groups]

    print(f"{environment['device']['name']}; results to {out}", flush=True)
    run = Run(out, [stage for group in groups for stage in group], environment, options.seconds)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.interrupt)
    for group in groups:
        if not run.interrupted:
            run.run_at_once(group)
    if run.interrupted:
        run.save(finished=False, interrupted=True)
        print(f"interrupted; so far: {run.out / 'summary.json'}")
        return 130
    passed = run.passed() and (gpu or options.smoke)
    run.save(finished=True, passed=passed)
    report(run)
    print("all passed" if passed else "NOT ALL PASSED", "" if gpu else "(no GPU: nothing here says anything about one)")
    return 0 if passed else 1


def report(run: Run) -> None:
    for name in ("environment", "goals"):
        if any(stage.name == name and stage.outcome == "passed" for stage in run.stages):
            print()
            print_indented(run.out / "logs" / f"{name}.log")
    print()
    for stage in run.stages:
        seconds = "-" if stage.seconds is None else f"{stage.seconds:.1f}"
        print(f"{stage.name:18}{stage.outcome:12}{seconds:>8} s  {stage.why or ''}".rstrip())
    print(f"\nwrote {run.out / 'summary.json'} ({time.monotonic() - run.begin:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
