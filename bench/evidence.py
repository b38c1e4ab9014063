"""The tables of docs/evidence.md and README.md, made from the files in bench/results/: python -m bench.evidence

A page names the table that it wants, and this command writes it between the two comments:

    <!-- table: rates -->
    <!-- end -->

Measure again, run this command, and the pages quote the new figures. `--check` changes nothing and fails when a page
quotes something else than the files hold. A new table is one more function in TABLES.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

LOSSES = {
    "bt": "BT",
    "bt-margin": "BT with margin",
    "bt-margin-out": "BT with margin outside",
    "bt-smoothing": "BT with label smoothing",
    "normbt": "NormBT",
    "normbt-margin": "NormBT with margin",
    "normbt-margin-out": "NormBT with margin outside",
    "normbt-smoothing": "NormBT with label smoothing",
}
CPU = "amd-epyc-2-cores"  # whose figures README quotes
BEHIND = "**behind:** "
COARSE, FINE = "coarse: noisy style", "fine: one wrong token"


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *rows])


def plus_minus(value: dict[str, Any]) -> str:
    """A mean and the half-width of its 95% interval."""
    return f"{value['mean']:.3f} ± {value['interval_95'][1] - value['mean']:.3f}"


def interval(value: dict[str, Any]) -> str:
    """A difference and its 95% interval."""
    low, high = value["interval_95"]
    return f"{value['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def difference(group: dict[str, Any], loss: str = "normbt", baseline: str = "bt") -> dict[str, Any]:
    (found,) = [row for row in group["difference"] if (row["loss"], row["baseline"]) == (loss, baseline)]
    return found


# --- does it help? -------------------------------------------------------------------------------------------------


def losses() -> str:
    """Each loss at its best learning rate. p is corrected for all rows of the table (Bonferroni)."""
    settings = results("quality/quality.json")["settings"]
    mixed, control = settings["mixed"]["groups"], settings["fine-only"]["groups"]
    comparisons = [
        ("all", mixed["all"], "normbt", "bt"),
        ("fine", mixed[FINE], "normbt", "bt"),
        ("coarse", mixed[COARSE], "normbt", "bt"),
        ("closest third", mixed["closest third"], "normbt", "bt"),
        ("all", mixed["all"], "normbt-margin", "bt-margin"),
        ("all", mixed["all"], "normbt-margin-out", "bt-margin-out"),
        ("all", mixed["all"], "normbt-smoothing", "bt-smoothing"),
        ("all", mixed["all"], "bt-smoothing", "bt"),
        ("control: fine pairs alone", control["all"], "normbt", "bt"),
    ]
    rows = []
    for pairs, group, loss, baseline in comparisons:
        found = difference(group, loss, baseline)
        accuracies = (f"{LOSSES[name]} {group['accuracy'][name]['mean']:.3f}" for name in (baseline, loss))
        corrected = min(1.0, len(comparisons) * found["p_value"])
        rows.append([pairs, *accuracies, interval(found), f"{found['p_value']:.3f}", f"{corrected:.3f}"])
    return table(["pairs", "baseline", "compared", "difference", "p", "p, corrected"], rows)


def rates() -> str:
    """Validation accuracy at every learning rate of the grid, whichever loss prefers which."""
    learning_rates = results("quality-rates/quality.json")["settings"]["mixed"]["learning_rates"]
    grid = learning_rates["bt"]["validation_accuracy"]
    rows = [
        [LOSSES[loss], *map(plus_minus, learning_rates[loss]["validation_accuracy"].values())]
        for loss in ("bt", "normbt")
    ]
    return table(["learning rate", *(f"{float(rate):g}" for rate in grid)], rows)


def rates_chosen() -> str:
    """Test accuracy at the learning rates that more seeds choose."""
    mixed = results("quality-rates/quality.json")["settings"]["mixed"]
    rows = []
    for name, group in (("all", "all"), ("fine", FINE), ("coarse", COARSE)):
        of, found = mixed["groups"][group], difference(mixed["groups"][group])
        accuracies = (plus_minus(of["accuracy"][loss]) for loss in ("bt", "normbt"))
        rows.append([name, *accuracies, interval(found), f"{found['p_value']:.3f}"])
    at = {loss: f"{LOSSES[loss]} at {mixed['learning_rates'][loss]['chosen']:g}" for loss in ("bt", "normbt")}
    return table(["pairs", *at.values(), "difference", "p"], rows)


def constants() -> str:
    """NormBT with one of its constants changed."""
    rows = results("quality/quality.json")["sensitivity"]["rows"]
    return table(
        ["constant", "value", "all", "fine", "coarse"],
        [
            [
                f"`{row['constant']}`",
                f"{row['value']:g}",
                *(plus_minus(row["groups"][g]) for g in ("all", FINE, COARSE)),
            ]
            for row in rows
        ],
    )


def standard_library() -> str:
    """Functions of Python's standard library and the same with one fault, by category."""
    mixed = results("quality-stdlib-faults/quality-stdlib-faults.json")["settings"]["mixed"]
    groups = {name: group for name, group in mixed["groups"].items() if "third" not in name}
    rows = [
        [name, *(plus_minus(group["accuracy"][loss]) for loss in ("bt", "normbt")), interval(difference(group))]
        for name, group in groups.items()
    ]
    return table(["pairs", "BT", "NormBT", "difference"], rows)


def slopes() -> str:
    """How the gradient of a pair grows with its distance, and who receives it."""
    diagnosis = results("diagnosis/diagnosis.json")
    shares = diagnosis["distance_quartiles"]["share_of_gradient"]
    rows = []
    for part, of_part in diagnosis["slopes"].items():
        for loss, slope in of_part.items():
            share = shares[part][loss]
            found = f"{slope['slope']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"
            rows.append([part, LOSSES[loss], found, f"{share[0]:.0%}", f"{share[-1]:.0%}"])
    return table(["gradient of", "loss", "slope", "share of the closest quarter", "of the farthest"], rows)


# --- README's figures ----------------------------------------------------------------------------------------------


def numbers() -> str:
    """One row for each figure that matters, those in which this package is behind included."""
    rows = [*quality_rows(), *static_rows(), *cpu_rows()]
    rows.append(["speed and memory on a GPU", "not measured", "`bash bench/gpu_check.sh`"])
    return table(["what", "measured", "command"], rows)


def command_of(file: dict[str, Any]) -> str:
    return f"`{file['environment']['command']}`"


def quality_rows() -> list[list[str]]:
    quality, by_rate = results("quality/quality.json"), results("quality-rates/quality.json")
    library = results("quality-stdlib-faults/quality-stdlib-faults.json")["settings"]["mixed"]["groups"]
    rates = by_rate["settings"]["mixed"]["learning_rates"]
    grid = [float(rate) for rate in rates["bt"]["validation_accuracy"]]
    accuracies = (
        f"{LOSSES[loss]} " + " ".join(f"{value['mean']:.2f}" for value in rates[loss]["validation_accuracy"].values())
        for loss in ("bt", "normbt")
    )
    found = [
        f"{name.partition(': ')[2] or name} {interval(difference(library[name]))}"
        for name in ("all", "fine: wrong variable", "coarse: unrelated function")
    ]
    return [
        [
            f"held-out accuracy, NormBT minus BT, each at its best learning rate ({quality['seeds']} seeds, 95% interval)",
            interval(difference(quality["settings"]["mixed"]["groups"]["all"])),
            "`python -m bench quality`",
        ],
        [f"accuracy at learning rates {grid[0]:g} to {grid[-1]:g}", "; ".join(accuracies), "[docs/evidence.md](docs/evidence.md)"],
        ["real code, NormBT minus BT", "; ".join(found), "[docs/evidence.md](docs/evidence.md)"],
    ]  # fmt: skip


def static_rows() -> list[list[str]]:
    static = results("static.json")
    entries, details = static["entries"], static["details"]

    def moved(entry: dict[str, Any], contender: dict[str, Any]) -> str:
        launches = f"{contender['launches_forward']} + {contender['launches_backward']}"
        return f"{contender['bytes'] / entry['floor_bytes']:.3g} in {launches}"

    linear = entries["linear_normbt_loss"]
    shown = details["entries"]["linear_normbt_loss"]
    eager, bt = (shown["contenders"][name] for name in ("eager", "bt"))
    ratio = {
        name: entry["bytes"] / entry["floor_bytes"] for name, entry in (entries | details["without_limit"]).items()
    }
    near = {name for name in ratio if ratio[name] <= 1.05}
    others = sorted(ratio.keys() - near, key=ratio.get)
    kernels = [kernel for of in static["targets"].values() for target in of.values() for kernel in target.values()]
    targets = sorted({target for of in static["targets"].values() for target in of})
    return [
        [
            f"bytes moved, over the fewest possible, and launches forward + backward (linear, {shown['shape']}; counted)",
            f"ours {moved(linear, linear)}; eager NormBT {moved(linear, eager)}; plain BT {moved(linear, bt)}",
            "`python -m bench static`",
        ],
        [
            f"the same for all {len(ratio)} cases that are counted",
            f"{len(near)} at most 1.05; "
            + "; ".join(f"{name.replace('linear_normbt_loss, ', '')} {ratio[name]:.2g}" for name in others),
            "`python -m bench static`",
        ],
        [
            f"registers spilled by the compiled kernels ({', '.join(targets)}; triton {' and '.join(sorted(static['targets']))})",
            f"{sum(kernel['spill_bytes'] for kernel in kernels)} bytes",
            f"`python -m bench.ahead_of_time {' '.join(targets)}`",
        ],
    ]  # fmt: skip


def cpu_rows() -> list[list[str]]:
    margins = results(f"{CPU}/bf16-margins.json")
    settings = margins["settings"]
    hub, ours = margins["shares"].values()
    step = results(f"{CPU}/train-step.json")
    overhead = {row["contender"]: row["overhead_percent"] for row in step["rows"]}
    speed = results(f"{CPU}/speed.json")
    micros: dict[tuple[str, int], dict[str, float]] = {}
    for row in speed["rows"]:
        if row["wall"]:
            times = micros.setdefault((row["entry"], row["num_pairs"]), {})
            times[row["contender"]] = row["wall"]["both"]["median_us"]
    sizes = {entry: sorted(pairs for name, pairs in micros if name == entry) for entry, _ in micros}

    def over(contender: str, size: int) -> str:
        return ", ".join(f"{entry} {times['ours'] / times[contender]:.2g}"
                         for entry, pairs in sizes.items() for times in [micros[entry, pairs[size]]])  # fmt: skip

    def behind(contender: str, size: int) -> str:
        ratios = (micros[entry, pairs[size]] for entry, pairs in sizes.items())
        return BEHIND if any(times["ours"] > times[contender] for times in ratios) else ""

    environment = speed["environment"]
    cpu = (
        f"one thread of an {environment['device']['name'].partition(',')[0]}, torch {environment['versions']['torch']}"
    )
    smallest, largest = sizes["linear"][0], sizes["linear"][-1]
    slower_step = BEHIND if overhead["ours"] > overhead["eager"] else ""
    return [
        [
            f"pairs that rewards rounded to bf16 tie ({settings['num_pairs']} pairs with one token changed)",
            f"Hugging Face's bf16 logits {hub['tied']:.2%}; `linear_normbt_loss` {ours['tied']:.2%}",
            command_of(margins),
        ],
        [
            f"{behind('eager', -1)}our time over eager NormBT's, by entry point (P={largest}, H=2048, {cpu})",
            over("eager", -1),
            command_of(speed),
        ],
        [f"{behind('eager', 0)}the same at P={smallest}", over("eager", 0), command_of(speed)],
        [
            f"{behind('compiled', -1)}our time over that of `torch.compile` of eager NormBT, P={largest}",
            over("compiled", -1),
            command_of(speed),
        ],
        [
            f"{slower_step}a whole training step of a tiny Llama on a CPU, over plain BT's",
            f"ours {overhead['ours']:+.2f}%; eager NormBT {overhead['eager']:+.2f}%",
            command_of(step),
        ],
    ]  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "losses": losses,
    "rates": rates,
    "rates-chosen": rates_chosen,
    "constants": constants,
    "standard-library": standard_library,
    "slopes": slopes,
    "numbers": numbers,
}


def filled(page: str) -> str:
    """The page with every marked table made anew."""
    return MARKED.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}{place[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not that of the files")
    check = parser.parse_args().check
    stale = 0
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = filled(old)
        if new == old:
            continue
        stale += 1
        if check:
            print(
                f"{path.relative_to(ROOT)} quotes other figures than bench/results holds: run python -m bench.evidence"
            )
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
