"""What can be known of the kernels without a GPU: the bytes and launches of a step, and the machine code.

    python -m bench static                          tables
    python -m bench static --json                   one JSON object
    python -m bench static --check                  fail if a figure breaks a limit or is worse than the saved one
    python -m bench static --out bench/results      write static.json and static.png, the saved figures of --check

Bytes and launches are counted as executed (bench/count.py): the Triton kernels in Triton's interpreter, access by
access, and every PyTorch operator around them at the dispatcher, forward and backward. The tables also have the floor,
which is the fewest bytes that the rows and their gradient can take, and what the same step moves in PyTorch: the
reference as it is written, NormBT and plain BT as a careful user writes them, all under autograd. The launch shapes are
those of a GPU with 132 multiprocessors. P is so large that what each of up to 1056 programs leaves behind is small
beside the rows. The figures without a limit show smaller P, where it is not.

Registers, spilled bytes, shared memory and load widths are read from the code that the compiler makes for each target
(bench/ahead_of_time.py). They depend on the version of Triton, so each version has saved figures of its own.

Limits: bytes 1.05x the floor, 2 launches forward and 2 backward (EMA update and statistics included), no spills,
16 bytes or more per load of aligned rows. With the batch's own mean, which a module with an EMA takes once in a run:
bytes 2.1x, and 5 launches forward. Explicit pairs are sorted in backward: 7 launches. (An operator counts as one.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from tqdm import tqdm

import reference
from bench.ahead_of_time import FIGURES as MACHINE_CODE
from bench.ahead_of_time import MULTIPROCESSORS, PROCESSORS, TARGETS
from bench.contenders import Case, Inputs, eager_normbt, ours, plain_bt
from bench.harness import RESULTS, print_table
from normbt_kernels import LinearNormBTLoss, NormBTLoss, linear_normbt_loss, normbt_loss, pair_distance
from normbt_kernels.files import write_json
from normbt_kernels.ops import backend
from normbt_kernels.ops.pairs import RowPairs
from normbt_kernels.results import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BYTES = 1.05  # of the floor
MAX_LAUNCHES = 2  # forward, and again backward
# Distances first, then their mean, then the ordinary pass.
MAX_BYTES_OWN_MEAN = 2.1
MAX_LAUNCHES_OWN_MEAN = 5
MAX_LAUNCHES_SORTING = 7  # backward of many explicit pairs, which PyTorch sorts
MIN_LOAD_BYTES = 16
UNALIGNED = ("linear, odd H", "linear, columns apart")  # in bench/ahead_of_time.py
FIGURES = ("bytes", "floor_bytes", "launches_forward", "launches_backward")
TARGET_FIGURES = ("registers", "spill_bytes", "load_bytes")
CONTENDERS = ("ours", "reference", "eager", "bt")
LABELS = {"ours": "NormBT, ours", "eager": "NormBT, eager", "bt": "plain BT, eager"}


# Of `python -m bench static --quick`.
QUICK = ["normbt_loss", "linear_normbt_loss, 512 pairs", "pair_distance"], ["sm_90"]

FEW_PAIRS = (
    "With few pairs to a program, the partial gradient of the head that each program leaves behind (H fp32 values, "
    "written once and read once) weighs as much as its rows. It stays in the L2 cache."
)
SEARCHED = (
    "Each row looks through all of the few pairs for its own. Their numbers and gradients, 24 bytes a pair, stay in "
    "the L2 cache."
)
LONG_ROWS = (
    "Rows that one program's registers cannot hold (32 KB; 16 KB with centering) are read a second time for the head's "
    "gradient."
)


OWN_MEAN = {"max_bytes": MAX_BYTES_OWN_MEAN, "max_launches": (MAX_LAUNCHES_OWN_MEAN, MAX_LAUNCHES)}


@dataclass(frozen=True)
class Entry:
    """A step of ours on a case, what it must move at the least, and the same step in PyTorch."""

    case: Case
    run: Callable[[Inputs], Tensor]
    floor_bytes: int
    contenders: dict[str, Callable[[Inputs], Tensor]]
    no_limit: str | None = None  # why bytes and launches have none
    max_bytes: float = MAX_BYTES
    max_launches: tuple[int, int] = (MAX_LAUNCHES, MAX_LAUNCHES)  # forward, backward

    @property
    def shape(self) -> str:
        sequence = f", S={self.case.sequence_length}" if self.case.entry == "pooled" else ""
        return f"P={self.case.num_pairs}, N={self.case.num_rows}{sequence}, H={self.case.hidden_size}, bf16"


def entries() -> dict[str, Entry]:
    """Every entry point, to be run once: its modules change as they run."""

    def case(kind: str, num_pairs: int, hidden_size: int, sequence_length: int = 1) -> Case:
        return Case(kind, num_pairs, hidden_size, torch.bfloat16, sequence_length)

    def read(c: Case) -> int:
        """Each pair reads its two rows, also where they serve in other pairs."""
        return 2 * c.num_pairs * c.hidden_size * c.dtype.itemsize

    def reward(run: Callable[[Inputs], Tensor], mu: bool = True) -> Entry:
        def as_written(x: Inputs) -> Tensor:
            return reference.normbt_loss(*x[1:5], x.mu if mu else None)

        c = case("reward", 1024, 4096)
        contenders = {"reference": as_written, "eager": eager_normbt, "bt": plain_bt}
        return Entry(c, run, read(c), contenders, **({} if mu else OWN_MEAN))

    def linear(
        run: Callable[[Inputs], Tensor] = ours, c: Case | None = None, pairs: str = "halves", mu: bool = True,
        no_limit: str | None = None,
    ) -> Entry:  # fmt: skip
        def as_written(x: Inputs) -> Tensor:
            options = {"pairs": pairs if x.pairs is None else x.pairs, "last_token": x.last_token}
            return reference.linear_normbt_loss(x.hidden, x.head, x.mu if mu else None, **options)

        c = c or case("linear", 12288, 2048)
        contenders = {"reference": as_written, "eager": eager_normbt, "bt": plain_bt}
        limits = {} if mu else OWN_MEAN
        if c.entry == "kwise":
            limits = {"max_launches": (MAX_LAUNCHES, MAX_LAUNCHES_SORTING)}
        return Entry(c, run, read(c) + c.floor_bytes()["backward"], contenders, no_limit, **limits)

    def alone(c: Case, no_limit: str | None = None) -> Entry:
        """Without the contenders in PyTorch, whose fp32 copies of so many long rows take gigabytes."""
        return Entry(c, ours, read(c), {}, no_limit)

    reward_ema, linear_ema, new_ema = NormBTLoss(), LinearNormBTLoss(), LinearNormBTLoss()
    for ema in (reward_ema, linear_ema):  # as after a first batch
        ema.load_state_dict({"mu": torch.tensor(1.0), "num_updates": torch.tensor(1)})
    distances = case("frozen", 1024, 4096)
    distances_in_torch = {
        "reference": lambda x: reference.pair_distance(x.hidden),
        "eager": lambda x: torch.linalg.vector_norm(torch.sub(*x.hidden.chunk(2)), dim=-1),
    }
    return {
        "normbt_loss": reward(ours),
        "normbt_loss, mu=None": reward(lambda x: normbt_loss(*x[1:5], None), mu=False),
        "NormBTLoss": reward(lambda x: reward_ema(*x[1:5], return_stats=True)[0]),
        "linear_normbt_loss": linear(),
        "linear_normbt_loss, frozen backbone": linear(c=case("frozen", 16384, 2048)),
        "linear_normbt_loss, pooled": linear(c=case("pooled", 256, 512, 128)),
        "linear_normbt_loss, interleaved": linear(
            lambda x: linear_normbt_loss(x.hidden, x.head, x.mu, pairs="interleaved"), pairs="interleaved"
        ),
        "linear_normbt_loss, explicit pairs": linear(c=case("kwise", 49152, 1024)),
        "LinearNormBTLoss": linear(lambda x: linear_ema(x.hidden, x.head, return_stats=True)[0]),
        "pair_distance": Entry(distances, lambda x: pair_distance(x.hidden), read(distances), distances_in_torch),
        "linear_normbt_loss, mu=None": linear(
            lambda x: linear_normbt_loss(x.hidden, x.head, None), case("linear", 8192, 2048), mu=False
        ),
        "LinearNormBTLoss, its first batch": linear(
            lambda x: new_ema(x.hidden, x.head), case("linear", 8192, 2048), mu=False
        ),
        "linear_normbt_loss, H=16384": alone(case("frozen", 8192, 16384)),
        "linear_normbt_loss, H=512": linear(c=case("linear", 16384, 512), no_limit=FEW_PAIRS),
        "linear_normbt_loss, 64 pairs": linear(c=case("linear", 64, 4096), no_limit=FEW_PAIRS),
        "linear_normbt_loss, 1026 explicit pairs": linear(c=case("kwise", 1026, 4096), no_limit=SEARCHED),
        "linear_normbt_loss, 512 pairs": linear(c=case("linear", 512, 4096), no_limit=FEW_PAIRS),
        "linear_normbt_loss, H=32768": alone(case("frozen", 512, 32768), no_limit=LONG_ROWS),
    }


def count_entry(entry: Entry) -> dict[str, Any]:
    from bench.count import count_step  # in a process with TRITON_INTERPRET=1

    torch.manual_seed(0)
    inputs = entry.case.make_inputs(torch.device("cpu"), copy=False)
    figures, traffic = count_step(entry.run, inputs)
    return {
        **figures,
        "floor_bytes": entry.floor_bytes,
        "shape": entry.shape,
        "no_limit": entry.no_limit,
        "max_bytes": entry.max_bytes,
        "max_launches": entry.max_launches,
        "contenders": {name: count_step(run, inputs)[0] for name, run in entry.contenders.items()},
        "traffic": {access: size for access, size in traffic.items() if size >= entry.floor_bytes / 1000},
    }


def count_for_parent() -> None:
    """The worker: reads the names of entries from stdin, and answers each with its count in one line of JSON."""
    steps = entries()
    # As on a GPU, where nobody looks at the values of `pairs` and `last_token`.
    with (
        patch.object(backend, "INTERPRETED", PROCESSORS["sm_90"]),
        patch.object(RowPairs, "check_range", lambda rows: None),
    ):
        for name in sys.stdin:
            print(json.dumps(count_entry(steps[name.rstrip("\n")])), flush=True)


class CountingProcess:
    """A process whose Triton interprets: ours cannot be, because Triton decides when it is imported."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> CountingProcess:
        return self

    def count(self, name: str) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.static", "--count-for-parent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            )
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"counting {name!r} failed:\n{self._errors.read()}")
        return json.loads(answer)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
        self._errors.close()


def compile_target(target: str, *options: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "bench.ahead_of_time", target, "--json", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise RuntimeError(f"compiling for {target} failed:\n{process.stderr}")
    return json.loads(process.stdout)[target]


class Measured(NamedTuple):
    """What `count_entry` says of each entry, and what `bench.ahead_of_time` says of each target's kernels."""

    entries: dict[str, dict[str, Any]]
    targets: dict[str, dict[str, dict[str, Any]]]

    def results(self) -> dict[str, Any]:
        """The JSON object: figures that have limits, and under "details" all that explains them."""
        limited = {name: entry for name, entry in self.entries.items() if not entry["no_limit"]}
        return {
            "entries": {name: pick(entry, FIGURES) for name, entry in limited.items()},
            "targets": {
                target: {kernel: pick(figures, TARGET_FIGURES) for kernel, figures in kernels.items()}
                for target, kernels in self.targets.items()
            },
            "details": {
                "multiprocessors": MULTIPROCESSORS,
                "versions": {"torch": torch.__version__, "triton": triton.__version__},
                "entries": {
                    name: pick(entry, ("shape", "contenders", "traffic")) for name, entry in self.entries.items()
                },
                "without_limit": {
                    name: pick(entry, (*FIGURES, "no_limit"))
                    for name, entry in self.entries.items()
                    if entry["no_limit"]
                },
                "shared_bytes": {
                    target: {kernel: figures["shared_bytes"] for kernel, figures in kernels.items()}
                    for target, kernels in self.targets.items()
                },
                "null": {
                    f"{target}: {kernel}": figures["null"]
                    for target, kernels in self.targets.items()
                    for kernel, figures in kernels.items()
                    if figures["null"]
                },
            },
        }


def pick(figures: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: figures[name] for name in names}


def measure(names: Sequence[str], targets: Sequence[str]) -> Measured:
    """Counts and compiles, as many at a time as there are processors."""
    # A target takes as long as several entries.
    jobs = deque([("compile", target) for target in targets] + [("count", name) for name in names])
    done: dict[tuple[str, str], dict] = {}

    def take() -> tuple[str, str] | None:
        try:
            return jobs.popleft()
        except IndexError:
            return None

    def work(progress: tqdm) -> None:
        with CountingProcess() as process:
            for kind, name in iter(take, None):
                try:
                    done[kind, name] = process.count(name) if kind == "count" else compile_target(name)
                except BaseException:
                    jobs.clear()  # for the other threads to stop soon
                    raise
                progress.update()

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(processors, len(jobs), 8))
    with tqdm(total=len(jobs), desc="static", unit="job", leave=False) as progress, ThreadPoolExecutor(threads) as pool:
        for worker in [pool.submit(work, progress) for _ in range(threads)]:
            worker.result()
    return Measured(
        {name: done["count", name] for name in names}, {target: done["compile", target] for target in targets}
    )


def broken_limits(measured: Measured) -> list[str]:
    broken = []
    for name, entry in measured.entries.items():
        if entry["no_limit"]:
            continue
        ratio = entry["bytes"] / entry["floor_bytes"]
        if ratio > entry["max_bytes"]:
            broken.append(f"{name}: moves {ratio:.3f} x its floor, the limit is {entry['max_bytes']}")
        for phase, limit in zip(("forward", "backward"), entry["max_launches"], strict=True):
            launches = entry[f"launches_{phase}"]
            if launches > limit:
                broken.append(f"{name}: {launches} launches {phase}, the limit is {limit}")
    for target, kernels in measured.targets.items():
        for kernel, figures in kernels.items():
            if figures["spill_bytes"]:
                broken.append(f"{target}: {kernel}: spills {figures['spill_bytes']} bytes")
            aligned = figures["reads_rows"] and not kernel.startswith(UNALIGNED)
            if kernel.endswith("walked in blocks: _pair_loss_kernel") and not figures["barrier"]:
                broken.append(f"{target}: {kernel}: gradients of other threads are read without a barrier")
            if aligned and (figures["load_bytes"] or 0) < MIN_LOAD_BYTES:
                broken.append(f"{target}: {kernel}: reads rows {figures['load_bytes']} bytes at a time")
    return broken


def regressions(measured: Measured, saved: dict[str, Any]) -> list[str]:
    """Each figure that is worse than the saved one, and each without a saved one."""
    how_to_save = "(python -m bench static --out bench/results)"
    worse = []
    saved_counts = saved["entries"] | saved["details"]["without_limit"]
    for name, entry in measured.entries.items():
        if name not in saved_counts or saved["details"]["entries"][name]["shape"] != entry["shape"]:
            worse.append(f"{name}: no saved figures for {entry['shape']} {how_to_save}")
            continue
        for figure in ("bytes", "launches_forward", "launches_backward"):
            if entry[figure] > saved_counts[name][figure]:
                worse.append(f"{name}: {figure} {entry[figure]:,}, saved {saved_counts[name][figure]:,}")
    saved_targets = saved["targets"].get(triton.__version__)
    if saved_targets is None:
        print(f"no saved figures for Triton {triton.__version__}: targets are held to the limits only", file=sys.stderr)
        return worse
    for target, kernels in measured.targets.items():
        for kernel, figures in kernels.items():
            before = saved_targets.get(target, {}).get(kernel)
            if before is None:
                worse.append(f"{target}: {kernel}: no saved figures {how_to_save}")
                continue
            for figure, sign in (("registers", 1), ("spill_bytes", 1), ("load_bytes", -1)):
                now, then = figures[figure], before[figure]
                if then is not None and (now is None or sign * now > sign * then):
                    worse.append(f"{target}: {kernel}: {figure} {now}, saved {then}")
    return worse


def save(measured: Measured, path: Path) -> None:
    """Writes the results and their figure. Other versions of Triton keep the figures of their targets, and all
    entries theirs where none was counted: `--entries --out bench/results` adds a version."""
    results = measured.results()
    if path.exists():
        saved = json.loads(path.read_text())
        results["targets"] = saved["targets"] | {triton.__version__: results["targets"]}
        if not measured.entries:
            results = saved | {"targets": results["targets"]}
    else:
        results["targets"] = {triton.__version__: results["targets"]}
    write_json(path, results)
    if measured.entries:
        write_figure(path.with_suffix(".png"), lambda file: draw(measured).savefig(file, dpi=120))


def draw(measured: Measured) -> Figure:
    """Bars of bytes over the floor, one group for each entry."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 * len(measured.entries) + 1), layout="constrained")
    axes = figure.subplots()
    right = 5.0  # the few bars beyond it end there, and say how long they are
    bars = {"ours": "#1f6fb4", "eager": "#e08a3c", "bt": "#b0b0b0"}
    for bar, (contender, color) in enumerate(bars.items()):
        ratios = {i: ratio(entry, contender) for i, entry in enumerate(measured.entries.values())}
        ratios = {i: value for i, value in ratios.items() if value is not None}
        places = [i + 0.27 * (bar - 1) for i in ratios]
        axes.barh(places, [min(r, right) for r in ratios.values()], 0.25, color=color, label=LABELS[contender])
        for place, value in zip(places, ratios.values(), strict=True):
            axes.annotate(f" {value:.2f}", (min(value, right), place), va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    labels = [f"{name}\n{entry['shape']}" for name, entry in measured.entries.items()]
    axes.set(xlim=(0, right), ylim=(len(labels) - 0.4, -0.6), yticks=range(len(labels)))
    axes.set_yticklabels(labels, fontsize=7)
    axes.set_xlabel("bytes through global memory, forward and backward, over the floor")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(bars), frameon=False, fontsize=8)
    return figure


def of(entry: dict[str, Any], contender: str) -> dict[str, int] | None:
    return entry if contender == "ours" else entry["contenders"].get(contender)


def ratio(entry: dict[str, Any], contender: str) -> float | None:
    figures = of(entry, contender)
    return figures and figures["bytes"] / entry["floor_bytes"]


def print_tables(measured: Measured) -> None:
    if measured.entries:
        print(f"Bytes moved over the floor, and launches forward+backward; {MULTIPROCESSORS} multiprocessors")
        rows = []
        for name, entry in measured.entries.items():
            row = [name + "*" * bool(entry["no_limit"]), entry["shape"], entry["floor_bytes"]]
            for contender in CONTENDERS:
                figures, times = of(entry, contender), ratio(entry, contender)
                row.append(times and f"{times:.3f}")
                row.append(figures and f"{figures['launches_forward']}+{figures['launches_backward']}")
            rows.append(row)
        print_table(["entry", "shape", "floor", *(head for name in CONTENDERS for head in (name, ""))], rows)
        for reason in dict.fromkeys(filter(None, (entry["no_limit"] for entry in measured.entries.values()))):
            print(f"* no limit: {reason}")
    for target, kernels in measured.targets.items():
        print(f"\n{target}, Triton {triton.__version__}")
        print_table(["kernel", *MACHINE_CODE], [[name, *pick(k, MACHINE_CODE).values()] for name, k in kernels.items()])
        for name, figures in kernels.items():
            if figures["null"]:
                print(f"{name}: {figures['null']}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="count three entries, compile for one target")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--check", action="store_true", help="fail if a limit is broken or a saved figure was better")
    parser.add_argument("--saved", type=Path, default=RESULTS / "static.json", help="this file's: %(default)s")
    parser.add_argument("--out", type=Path, help="folder to write static.json and static.png to (default: none)")
    parser.add_argument("--entries", nargs="*", default=list(entries()), help="count only these (default: all)")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), help="compile only for these (default: all)")
    parser.add_argument("--count-for-parent", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    """Raises SystemExit if --check finds something."""
    if options.count_for_parent:
        count_for_parent()
        return
    for what, wanted, known in (("entry", options.entries, entries()), ("target", options.targets, TARGETS)):
        for name in wanted:
            if name not in known:
                raise SystemExit(f"no {what} {name!r}; there are {', '.join(map(repr, known))}")
    saved = json.loads(options.saved.read_text()) if options.check else {}
    if options.quick:
        options.entries, options.targets = QUICK
    measured = measure(options.entries, options.targets)
    if options.json:
        print(json.dumps(measured.results()))
    else:
        print_tables(measured)
    problems = broken_limits(measured)
    if options.check:
        problems += regressions(measured, saved)
    if options.out:
        save(measured, options.out / "static.json")
    if problems:
        print("\n" + "\n".join(problems), file=sys.stderr)
        if options.check:
            raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
