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
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.goals import median
from bench.quality_figure import label
from bench.realistic_step import LABELS as STEPS
from bench.realistic_step import OURS
from normbt_kernels.commands.train_report import LABELS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

CPU, GPU = "amd-epyc-2-cores", "nvidia-h100-80gb-hbm3"  # whose figures README quotes
BEHIND = "**behind:** "
COARSE, FINE = "coarse: noisy style", "fine: one wrong token"
GROUPS = {"all": "all", "fine": FINE, "coarse": COARSE, "closest third": "closest third"}


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


def slope_and_interval(slope: dict[str, float]) -> str:
    return f"{slope['slope']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"


def difference(group: dict[str, Any], loss: str = "normbt", baseline: str = "bt") -> dict[str, Any]:
    (found,) = [row for row in group["difference"] if (row["loss"], row["baseline"]) == (loss, baseline)]
    return found


# --- does it help? -------------------------------------------------------------------------------------------------


def powers() -> str:
    """BT and NormBT at several powers, at the learning rate that other seeds choose."""
    return compared(results("quality/quality.json")["settings"]["mixed"]["groups"], GROUPS)


def compared(groups: dict[str, Any], names: dict[str, str]) -> str:
    """Accuracy of each loss over all pairs, and its differences from others in the groups that `names` names."""
    accuracy = {loss: plus_minus(of) for loss, of in groups["all"]["accuracy"].items()}
    rows = [[LABELS["bt"], accuracy["bt"], *[""] * len(names)]]
    for row in groups["all"]["difference"]:
        loss, baseline = row["loss"], row["baseline"]
        differences = (interval(difference(groups[group], loss, baseline)) for group in names.values())
        rows.append([f"{label(loss)} less {label(baseline)}", accuracy[loss], *differences])
    return table(["loss", "accuracy", *(f"difference, {name}" for name in names)], rows)


def powers_at_own_rates() -> str:
    """The same, each at a learning rate of its own."""
    mixed = results("quality-own-rates/quality.json")["settings"]["mixed"]
    groups, rows = mixed["groups"], []
    for loss, rate in mixed["learning_rates"].items():
        accuracy = groups["all"]["accuracy"][loss]
        differences = [interval(difference(groups[name], loss)) if loss != "bt" else "" for name in GROUPS.values()]
        worst = f"{min(accuracy['seeds']):.3f}"
        rows.append([label(loss), f"{rate['chosen']:g}", plus_minus(accuracy), worst, *differences])
    header = ["loss", "learning rate", "accuracy", "worst seed", *(f"less BT, {name}" for name in GROUPS)]
    return table(header, rows)


def controls() -> str:
    """NormBT against BT in settings where the paper's reason for it is weaker."""
    mixed = results("quality/quality.json")["settings"]["mixed"]["groups"]
    settings = results("quality-controls/quality.json")["settings"]
    rows = []
    for name, groups in {
        "as above": mixed,
        "gradients not clipped": settings["no-clipping"]["groups"],
        "LayerNorm before the head": settings["layer-norm"]["groups"],
    }.items():
        accuracy = (plus_minus(groups["all"]["accuracy"][loss]) for loss in ("bt", "normbt"))
        rows.append([name, *accuracy, *(interval(difference(groups[group])) for group in GROUPS.values())])
    return table(["", "BT", "NormBT", *(f"difference, {name}" for name in GROUPS)], rows)


def losses() -> str:
    """Each loss at its best learning rate. p is corrected for all rows of the table (Bonferroni)."""
    settings = results("quality-losses/quality.json")["settings"]
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
        accuracies = (f"{LABELS[name]} {group['accuracy'][name]['mean']:.3f}" for name in (baseline, loss))
        corrected = min(1.0, len(comparisons) * found["p_value"])
        rows.append([pairs, *accuracies, interval(found), f"{found['p_value']:.3f}", f"{corrected:.3f}"])
    return table(["pairs", "baseline", "compared", "difference", "p", "p, corrected"], rows)


def rates() -> str:
    """Validation accuracy at every learning rate of the grid, whichever loss prefers which."""
    learning_rates = results("quality-rates/quality.json")["settings"]["mixed"]["learning_rates"]
    grid = learning_rates["bt"]["validation_accuracy"]
    rows = [
        [LABELS[loss], *map(plus_minus, learning_rates[loss]["validation_accuracy"].values())]
        for loss in ("bt", "normbt")
    ]
    return table(["learning rate", *(f"{float(rate):g}" for rate in grid)], rows)


def constants() -> str:
    """NormBT with one of its constants changed."""
    rows = results("quality-losses/quality.json")["sensitivity"]["rows"]
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


PRETRAINED = {
    "minilm": "MiniLM",
    "smollm2": "SmolLM2-135M",
    "ratings": "rated sentences",
    "rules": "good and bad code",
}
TRAINED = ("minilm-ratings", "minilm-rules", "smollm2-ratings")  # folders of results
DIAGNOSED = (*TRAINED, "smollm2-rules")


def pretrained_accuracy() -> str:
    """Pretrained models trained with each loss: at the learning rates that other seeds choose, and at every one."""
    names = ("all", "closest third")
    rows = []
    for trained in (results(f"pretrained/{folder}/pretrained.json") for folder in TRAINED):
        shown = []
        if choice := trained["choice"]:
            shown.append((", chosen", choice["seeds_reported"], choice["learning_rates"], choice["groups"]))
        for rate, of in trained["learning_rates"].items():
            shown.append(("", trained["seeds"], dict.fromkeys(trained["contenders"], float(rate)), of["groups"]))
        for chosen, seeds, rates, groups in shown:
            where = (PRETRAINED[trained["model"]], PRETRAINED[trained["texts"]], f"{seeds[0]} to {seeds[-1]}")
            accuracy = groups["all"]["accuracy"]
            bt = f"{rates['bt']:g}{chosen}"
            rows.append([*where, bt, LABELS["bt"], plus_minus(accuracy["bt"]), *[""] * len(names)])
            for row in groups["all"]["difference"]:
                loss, baseline = row["loss"], row["baseline"]
                compared = f"{label(loss)} less {label(baseline)}"
                differences = (interval(difference(groups[name], loss, baseline)) for name in names)
                rows.append([*where, f"{rates[loss]:g}{chosen}", compared, plus_minus(accuracy[loss]), *differences])
    header = ["model", "texts", "seeds", "learning rate", "loss", "accuracy"]
    return table([*header, *(f"difference, {name}" for name in names)], rows)


def pretrained_slopes() -> str:
    """How the backbone's gradient grows with the distance in real models: fresh, and while they train with BT."""
    points = {"start": "new head", "middle": "middle of training", "end": "end of training"}
    diagnosed = [row for folder in DIAGNOSED for row in results(f"pretrained/{folder}/pretrained.json")["slopes"]]
    rows = []
    for row in diagnosed:
        quarters = ", ".join(f"{of['slope']:.2f}" for of in row["slopes_by_error_quartile"])
        power = "none" if row["recommended_power"] is None else f"{row['recommended_power']:g}"
        where = (PRETRAINED[row["model"]], PRETRAINED[row["task"]], points[row["point"]])
        rows.append([*where, f"{row['accuracy']:.2f}", slope_and_interval(row["slope"]), quarters, power])
    return table(["model", "texts", "", "accuracy", "slope", "by quarter of error", "recommended power"], rows)


def slopes() -> str:
    """How the gradient of a pair grows with its distance, and who receives it."""
    diagnosis = results("diagnosis/diagnosis.json")
    shares = diagnosis["distance_quartiles"]["share_of_gradient"]
    rows = []
    for part, of_part in diagnosis["slopes"].items():
        for loss, slope in of_part.items():
            share = shares[part][loss]
            name = LABELS.get(loss, f"NormBT, power {diagnosis['powers'][loss]:g}")
            rows.append([part, name, slope_and_interval(slope), f"{share[0]:.0%}", f"{share[-1]:.0%}"])
    return table(["gradient of", "loss", "slope", "share of the closest quarter", "of the farthest"], rows)


def slopes_by_error() -> str:
    """Whether one slope describes all pairs: BT's backbone, quarter by quarter of the prediction error."""
    quarters = results("diagnosis/diagnosis.json")["slopes_by_error_quartile"]
    header = ["least error", "second quarter", "third quarter", "largest error"]
    return table(header, [map(slope_and_interval, quarters)])


# --- README's figures ----------------------------------------------------------------------------------------------


def numbers() -> str:
    """One row for each figure that matters, those in which this package is behind included."""
    header = ["what", "measured", "command ([explained](bench/README.md))"]
    return table(header, [*gpu_rows(), *quality_rows(), *static_rows(), *cpu_rows()])


def headline() -> str:
    """What a call and a training step take on a GPU."""
    speed, reward, step = (results(f"{GPU}/{name}.json") for name in ("speed", "reward/speed", "realistic-step"))
    times = times_of(speed, "device") | times_of(reward, "device")
    pairs, of_linear = max(times["linear"].items())
    copy, *rivals = (of_linear[rival] / of_linear["ours"] for rival in ("copy", "eager", "compiled", "bt-eager"))
    eager, compiled, bt = (f"{ratio:.1f}" for ratio in rivals)
    given_rewards = sorted(of["ours"] / of["compiled"] for of in times["reward"].values())
    settings, steps = step["settings"], {row["contender"]: row for row in step["rows"]}
    padded, packed, grouped = (f"{steps[name]['time_ratio']:.2f}" for name in ("padded", "padding-free", "trl-grouped"))
    gpu, hidden_size = speed["environment"]["device"]["name"], speed["rows"][0]["hidden_size"]
    text = (
        f"On one {gpu} (P={pairs}, H={hidden_size}, bf16) the loss with its head reaches {copy:.0%} of a plain "
        f"copy's speed, forward and backward: {eager} times as fast as eager NormBT, {compiled} as its "
        f"`torch.compile`, {bt} as eager BT. Given rewards, it takes {given_rewards[0]:.2f} to {given_rewards[-1]:.2f} "
        f"of the GPU time of `torch.compile`. A step of a Llama ({settings['layers']} layers, "
        f"{steps['trl']['padding']:.0%} padding) takes {padded} of TRL's with BT, and {packed} without padding, "
        f"where TRL's with batches of similar lengths takes {grouped} ([the whole step](docs/whole-step.md))."
    )
    return textwrap.fill(text, 125, break_long_words=False, break_on_hyphens=False) + "\n"


def command_of(file: dict[str, Any]) -> str:
    return f"`{file['environment']['command']}`"


def times_of(speed: dict[str, Any], clock: str) -> dict[str, dict[int, dict[str, float]]]:
    """Microseconds of what was measured, by entry, number of pairs and contender."""
    times: dict[str, dict[int, dict[str, float]]] = {}
    for row in speed["rows"]:
        if row[clock]:
            times.setdefault(row["entry"], {}).setdefault(row["num_pairs"], {})[row["contender"]] = median(row, clock)
    return times


def quality_rows() -> list[list[str]]:
    quality, at_own_rates = results("quality/quality.json"), results("quality-own-rates/quality.json")
    built_in, own = quality["settings"]["mixed"]["groups"], at_own_rates["settings"]["mixed"]
    library = results("quality-stdlib-faults/quality-stdlib-faults.json")["settings"]["mixed"]["groups"]

    def differences(groups: dict[str, Any], names: dict[str, str]) -> str:
        return "; ".join(f"{name} {interval(difference(groups[group]))}" for name, group in names.items())

    page = "[docs/evidence.md](docs/evidence.md)"
    own_rates = [f"{own['learning_rates'][loss]['chosen']:g}" for loss in ("bt", "normbt")]
    of_built_in = {"all": "all", "fine": FINE, "coarse": COARSE}
    on_code = {
        "all": "all",
        "wrong variable": "fine: wrong variable",
        "unrelated function": "coarse: unrelated function",
    }
    return [
        [
            f"accuracy, NormBT minus BT, {quality['seeds']} seeds, at one learning rate for both,"
            f" {quality['grid']['learning_rates'][0]:g}",
            differences(built_in, of_built_in),
            command_of(quality),
        ],
        [
            f"the same, each at the rate that other seeds choose ({own_rates[0]} and {own_rates[1]})",
            differences(own["groups"], of_built_in),
            command_of(at_own_rates),
        ],
        ["accuracy on real code, NormBT minus BT", differences(library, on_code), page],
    ]


def static_rows() -> list[list[str]]:
    static = results("static.json")
    details, command = static["details"], "`python -m bench static`"
    floors = static["entries"] | details["without_limit"]
    linear, shown = floors["linear_normbt_loss"], details["entries"]["linear_normbt_loss"]

    def moved(contender: dict[str, Any]) -> str:
        launches = f"{contender['launches_forward']} + {contender['launches_backward']}"
        return f"{contender['bytes'] / linear['floor_bytes']:.3g} with {launches}"

    in_torch = (f"{name} {moved(shown['contenders'][key])}" for key, name in (("eager", "eager NormBT"), ("bt", "BT")))
    ratios = sorted((entry["bytes"] / entry["floor_bytes"], name) for name, entry in floors.items())
    (worst, where), few = ratios[-1], sum(ratio <= 1.05 for ratio, _ in ratios)
    return [
        [
            f"bytes over the fewest possible, with launches forward + backward (linear, {shown['shape']}; counted)",
            f"ours {moved(linear)}; {'; '.join(in_torch)}. Ours in all {len(ratios)} cases: {few} at most 1.05, the "
            f"worst {worst:.2g} ({where.removeprefix('linear_normbt_loss, ')})",
            command,
        ],
    ]


def gpu_rows() -> list[list[str]]:
    names = "speed", "reward/speed", "goals/small/speed", "realistic-step"
    large, reward, few, step = (results(f"{GPU}/{name}.json") for name in names)
    times = times_of(large, "device") | times_of(reward, "device")  # given rewards, backward is one launch since
    most = max(times["linear"])
    shares = []
    for entry, of_entry in times.items():
        num_pairs, of = max(of_entry.items())
        if num_pairs < most:  # more did not fit
            continue
        rivals = ["eager", "compiled"]
        if entry != "reward":  # BT on given rewards reads no rows
            rivals.append("bt-eager")
        ratios = [of["ours"] / of[rival] for rival in rivals]
        shown = ", ".join(f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}" for ratio in ratios)
        shares.append(f"{entry} {shown} and {of['copy'] / of['ours']:.0%}")
    sizes: dict[tuple[int, int], dict[str, float]] = {}
    for row in few["rows"]:
        sizes.setdefault((row["num_pairs"], row["hidden_size"]), {})[row["contender"]] = median(row, "wall")

    def range_of(rival: str) -> str:
        ratios = [of["ours"] / of[rival] for of in sizes.values()]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    environment, pairs = large["environment"], sorted({num_pairs for num_pairs, _ in sizes})
    versions = environment["versions"]
    gpu = f"{environment['device']['name']} (torch {versions['torch']}, triton {versions['triton']})"
    settings, steps = step["settings"], {row["contender"]: row for row in step["rows"]}

    def of_trl(contender: str) -> str:
        low, high = steps[contender]["interval_95"]
        return f"{steps[contender]['time_ratio']:.2f} [{low:.2f}, {high:.2f}]"

    return [
        [
            f"our time on an {gpu}, by the device's clock, over that of eager NormBT, its `torch.compile` and eager "
            "BT, and our speed over a copy's; bold where behind; "
            f"P={most}, H={large['rows'][0]['hidden_size']}, bf16 (reward: given rewards, where BT reads no rows; "
            "linear: with the head; frozen: only the head trained; kwise: explicit pairs)",
            "; ".join(shares),
            f"{command_of(large)}; reward: {command_of(reward)}",
        ],
        [
            f"time of a call from Python on the same GPU, P={pairs[0]} to {pairs[-1]}, linear",
            f"{range_of('eager')} of eager NormBT's, {range_of('bt-eager')} of eager BT's",
            command_of(few),
        ],
        [
            f"a whole training step on the same GPU over that of TRL with BT (Llama, {settings['layers']} layers, "
            f"H={settings['hidden_size']}, {settings['dtype']}, {steps['trl']['padding']:.0%} padding)",
            "; ".join(f"{STEPS[contender]} {of_trl(contender)}" for contender in OURS),
            command_of(step),
        ],
    ]


def cpu_rows() -> list[list[str]]:
    margins, step, speed = (results(f"{CPU}/{name}.json") for name in ("bf16-margins", "train-step", "speed"))
    hub, ours = margins["shares"].values()
    overhead = {row["contender"]: row["overhead_percent"] for row in step["rows"]}
    times = times_of(speed, "wall")

    def ratio_row(what: str, contender: str, *sizes: Callable[[Iterable[int]], int]) -> list[str]:
        """Our time over the contender's, at the smallest or the largest number of pairs of each entry, or at both."""
        ratios = {
            entry: [of[size(of)]["ours"] / of[size(of)][contender] for size in sizes] for entry, of in times.items()
        }
        mark = BEHIND if max(max(of) for of in ratios.values()) > 1 else ""
        measured = ", ".join(f"{entry} {' and '.join(f'{r:.2g}' for r in of)}" for entry, of in ratios.items())
        pairs = " and ".join(str(size(times["linear"])) for size in sizes)
        return [f"{mark}{what}, P={pairs}", measured, command_of(speed)]

    environment = speed["environment"]
    cpu = (
        f"one thread of an {environment['device']['name'].partition(',')[0]}, torch {environment['versions']['torch']}"
    )
    return [
        [
            f"pairs that rewards rounded to bf16 tie ({margins['settings']['num_pairs']} pairs, one token changed)",
            f"Hugging Face's bf16 logits {hub['tied']:.2%}; `linear_normbt_loss` {ours['tied']:.2%}",
            command_of(margins),
        ],
        ratio_row(f"our time over eager NormBT's ({cpu})", "eager", min, max),
        ratio_row("on the same CPU, our time over that of `torch.compile` of eager NormBT", "compiled", max),
        [
            f"{BEHIND if overhead['ours'] > overhead['eager'] else ''}on the same CPU, a training step of a tiny "
            "Llama, over BT's",
            f"ours {overhead['ours']:+.2f}%; eager NormBT {overhead['eager']:+.2f}%",
            command_of(step),
        ],
    ]


TABLES: dict[str, Callable[[], str]] = {
    "powers": powers,
    "powers-at-own-rates": powers_at_own_rates,
    "controls": controls,
    "losses": losses,
    "rates": rates,
    "constants": constants,
    "standard-library": standard_library,
    "pretrained-accuracy": pretrained_accuracy,
    "pretrained-slopes": pretrained_slopes,
    "slopes": slopes,
    "slopes-by-error": slopes_by_error,
    "headline": headline,
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
