"""Runs every benchmark, one after the other, into one folder: `--quick` is meant for ten minutes on one GPU.

Each runs in its own process, so a failure costs no other benchmark its figures, even if it leaves the GPU unusable to
that process. The exit status is 1 if any failed; the last lines say which did, and how long each took.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time

from bench.__main__ import SUBCOMMANDS
from bench.harness import RESULTS, describe_device, print_table

BENCHMARKS = [name for name in SUBCOMMANDS if name not in ("tune", "quality", "pretrained", "bf16-margins", "all")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip", nargs="+", choices=BENCHMARKS, default=())


def run(options: argparse.Namespace) -> int:
    folder = options.out or RESULTS / describe_device(options.device)["slug"]
    common = ["--device", str(options.device), "--out", str(folder), *(["--quick"] if options.quick else [])]
    if options.threads:
        common += ["--threads", str(options.threads)]
    outcomes = []
    for name in BENCHMARKS:
        if name in options.skip:
            continue
        if importlib.util.find_spec(f"bench.{name.replace('-', '_')}") is None:
            outcomes.append((name, "not here", None))
            continue
        print(f"\n# python -m bench {name}", flush=True)
        start = time.monotonic()
        status = subprocess.run([sys.executable, "-m", "bench", name, *common], check=False).returncode
        outcomes.append((name, "done" if status == 0 else f"failed with status {status}", time.monotonic() - start))
    print()
    print_table(["benchmark", "outcome", "seconds"], outcomes)
    return int(any(outcome.startswith("failed") for _, outcome, _ in outcomes))
