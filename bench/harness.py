"""Shared by the benchmarks: the device and versions to which a figure belongs, tables, and files written whole."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import normbt_kernels
from normbt_kernels._version import installed
from normbt_kernels.files import write_json
from normbt_kernels.results import aligned, write_figure

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_NOTE = "measured on a CPU: these figures say nothing about a GPU"
ASSUMED_CACHE_BYTES = 64 * 2**20  # if neither the device nor the system tells


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every sub-command has."""
    parser.add_argument("--quick", action="store_true", help="a short grid")
    parser.add_argument(
        "--device", type=torch.device, default=default_device(), help="where to measure (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's); 1 if its cores are shared")
    parser.add_argument("--out", type=Path, help="folder for the results (default: bench/results/<device>)")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Report:
    """One run of a sub-command: the folder for its results, and the environment to which they belong."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name = name
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = describe_device(options.device)
        self.folder: Path = options.out or RESULTS / self.device["slug"]
        of_bench = sys.argv[1:2] and not sys.argv[1].startswith("-")  # a sub-command
        module = "bench" if of_bench else f"bench.{name.replace('-', '_')}"
        self.environment = {
            "device": self.device,
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
            "load_average_start": os.getloadavg(),
        }
        print(f"{name} on {self.device['name']}, torch {self.environment['versions']['torch']}")
        if self.device["type"] == "cpu":
            self.environment["note"] = CPU_NOTE
            print(CPU_NOTE)
            if os.getloadavg()[0] > 0.5 * self.device["cores"]:
                print(f"load average {os.getloadavg()[0]:.1f}: other work shares its cores, see --threads")

    def save(self, results: dict[str, Any]) -> None:
        """Writes `<name>.json`: the environment, then `results`."""
        environment = self.environment | {"load_average_end": os.getloadavg()}
        path = self.folder / f"{self.name}.json"
        write_json(path, {"environment": environment, **results})
        print(f"wrote {_relative(path)}")

    def save_figure(self, draw: Callable[[Any], Any]) -> None:
        """Writes `<name>.png`, which `draw(pyplot)` returns as a matplotlib figure."""
        for path in write_figure(self.folder / f"{self.name}.png", lambda path: self._draw(draw, path)):
            print(f"wrote {_relative(path)}")

    def _draw(self, draw: Callable[[Any], Any], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
        plt.rcParams.update({"grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False})
        figure = draw(plt)
        versions = self.environment["versions"]
        label = f"{self.device['name']}, torch {versions['torch']}, {self.environment['date'][:10]}"
        figure.supxlabel(label, x=0.995, ha="right", fontsize=7, color="gray")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def describe_device(device: torch.device) -> dict[str, Any]:
    """The facts about the device on which a result depends. `cache_bytes` is the last cache before memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": getattr(properties, "L2_cache_size", ASSUMED_CACHE_BYTES),
        }
    else:
        cores = os.cpu_count()
        facts = {
            "name": f"{cpu_model()}, {cores} cores",
            "cores": cores,
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cache_bytes": last_level_cache(),
        }
    slug = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
    return {"type": device.type, "slug": slug, **facts}


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=ASSUMED_CACHE_BYTES)


def versions() -> dict[str, str | None]:
    return {
        "normbt_kernels": normbt_kernels.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints `rows` in aligned columns. None, which was not measured, is a dash."""
    print(*aligned([header, *([_cell(value) for value in row] for row in rows)]), sep="\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"


def error_text(error: Exception) -> str:
    """A failed contender's entry in the results: the kind of error and its first line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]
