"""What the README says is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from normbt_kernels import cli

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
