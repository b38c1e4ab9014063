"""What the README says is what happens."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from normbt_kernels.commands import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run():
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_make_commands_are_targets_that_start_from_nothing():
    commands = re.findall(r"^make \w+", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert commands == ["make demo", "make test"]
    for command in commands:
        plan = subprocess.run(
            [*command.split(), "--dry-run", "VENV=does-not-exist"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "-m venv does-not-exist" in plan.stdout
        assert "torch==2.13.0" in plan.stdout


@pytest.mark.parametrize("line", re.findall(r"^(normbt .*?)(?:  #.*)?$", "\n".join(blocks("bash")), flags=re.MULTILINE))
def test_normbt_commands_parse(line, monkeypatch, capsys, tmp_path):
    """All that a command is given is known to it. What needs a model or a data set of the reader's is not run."""
    _, name, *words = line.split()
    monkeypatch.chdir(tmp_path)
    for needs in ("evaluate", "diagnose", "export"):
        monkeypatch.setattr(cli, f"_{needs}", lambda arguments, others: print(arguments) or 0)
    assert cli.main([name, *words, *(["--help-trainer"] if name == "train" else [])]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`python -m (bench(?:\.| )\w+)", README))))
def test_bench_commands_exist(command):
    subprocess.run([sys.executable, "-m", *command.split(), "--help"], cwd=ROOT, capture_output=True, check=True)


def test_links_and_figures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_quality_figures_are_those_of_the_results():
    settings = results("quality/quality.json")["settings"]
    fine, coarse = "fine: one wrong token", "coarse: noisy style"
    rows = {
        "BT, all pairs": ("mixed", "all", "bt"),
        "BT, fine pairs": ("mixed", fine, "bt"),
        "BT, coarse pairs": ("mixed", coarse, "bt"),
        "BT with margin, all pairs": ("mixed", "all", "bt-margin"),
        "BT with margin outside, all pairs": ("mixed", "all", "bt-margin-out"),
        "BT with label smoothing, all pairs": ("mixed", "all", "bt-smoothing"),
        "BT, control without coarse pairs": ("fine-only", "all", "bt"),
    }
    quoted = {cells(line)[0]: cells(line)[1:] for line in README.splitlines() if line.startswith("| BT")}
    for what, (setting, group, loss) in rows.items():
        of = settings[setting]["groups"][group]
        (found,) = [row for row in of["difference"] if (row["loss"], row["baseline"]) == (f"norm{loss}", loss)]
        low, high = found["interval_95"]
        assert quoted[what] == [
            f"{of['accuracy'][loss]['mean']:.3f}",
            f"{of['accuracy']['norm' + loss]['mean']:.3f}",
            f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{found['p_value']:.3f}",
        ]


def results(name):
    return json.loads((ROOT / "bench/results" / name).read_text())


def plus_minus(value):
    return f"{value['mean']:.3f} ± {value['interval_95'][1] - value['mean']:.3f}"


def difference(row):
    low, high = row["interval_95"]
    return f"{row['mean']:+.3f} [{low:+.3f}, {high:+.3f}], p {row['p_value']:.3f}"


def test_accuracies_at_each_learning_rate_are_those_of_the_results():
    mixed = results("quality-rates/quality.json")["settings"]["mixed"]
    words = " ".join(README.split())
    for group in ("all", "fine: one wrong token", "coarse: noisy style"):
        assert f"{group.partition(':')[0]} pairs {difference(mixed['groups'][group]['difference'][0])}" in words
    rates = mixed["learning_rates"]
    assert {rates[loss]["chosen"] for loss in ("bt", "normbt")} == {5e-4}
    for name, loss in (("BT", "bt"), ("NormBT", "normbt")):
        accuracies = rates[loss]["validation_accuracy"].values()
        assert f"| {name} | {' | '.join(map(plus_minus, accuracies))} |" in README


def test_accuracies_on_the_standard_library_are_those_of_the_results():
    groups = results("quality-stdlib-faults/quality-stdlib-faults.json")["settings"]["mixed"]["groups"]
    for name, group in groups.items():
        if "third" not in name:
            what = "all pairs of held-out modules" if name == "all" else name
            quoted = " | ".join(plus_minus(group["accuracy"][loss]) for loss in ("bt", "normbt"))
            assert f"| {what} | {quoted} | {group['difference'][0]['mean']:+.3f} [" in README
    for loss in ("bt", "normbt"):
        assert groups["all"]["accuracy"][loss]["interval_95"][0] > 0.5  # above chance


def test_the_backbones_slope_is_that_of_the_results():
    slope = results("diagnosis/diagnosis.json")["slopes"]["backbone"]["bt"]
    assert f"to the power {slope['slope']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]" in " ".join(README.split())
