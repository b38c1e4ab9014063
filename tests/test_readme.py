"""The README tells the truth: its code runs, its commands exist, its tables are those of the result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import evidence

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 120


def test_the_fused_loss_is_the_eager_loss_that_it_replaces():
    (block,) = blocks("python")
    eager, fused = block.split("# after:")
    names = {}
    exec(compile(eager, "README.md, before", "exec"), names)
    expected = names["loss"]
    exec(compile(f"# after:{fused}", "README.md, after", "exec"), names)
    torch.testing.assert_close(names["loss"], expected)
    assert names["hidden"].grad.abs().sum() > 0


def test_the_trl_import_that_replaces_theirs_is_a_trainer_of_theirs():
    trl = pytest.importorskip("trl")
    (block,) = blocks("diff")
    old, new = {}, {}
    exec("\n".join(re.findall(r"^-(.*)", block, flags=re.MULTILINE)), old)
    exec("\n".join(re.findall(r"^\+(.*)", block, flags=re.MULTILINE)), new)
    assert old["RewardTrainer"] is trl.RewardTrainer
    assert issubclass(new["RewardTrainer"], trl.RewardTrainer)


def test_make_commands_are_targets_that_start_from_nothing():
    commands = re.findall(r"^make \w+", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert commands == ["make demo", "make test"]
    for command in commands:
        plan = subprocess.run(
            [*command.split(), "--dry-run", "VENV=does-not-exist"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "-m venv does-not-exist" in plan.stdout
        assert "torch==2.13.0" in plan.stdout


def test_tables_are_those_of_the_result_files(capsys, monkeypatch):
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", "".join(page.read_text() for page in evidence.PAGES))) == set(
        evidence.TABLES
    )
    monkeypatch.setattr(sys, "argv", ["bench.evidence", "--check"])
    assert evidence.main() == 0, capsys.readouterr().out
    monkeypatch.setitem(evidence.TABLES, "rates", lambda: "| another figure |\n")
    assert evidence.main() == 1
