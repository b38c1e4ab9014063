"""Pairs from the standard library: one fault each, the same ones each time, and no function in two splits."""

import ast
import difflib
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("transformers")

from normbt_kernels.commands.train_job import user_job
from normbt_kernels.data import stdlib_faults
from normbt_kernels.data.preferences import load_preferences
from normbt_kernels.data.stdlib_faults import faults, functions, split_pairs
from tests.processes import Command

SPLITS = ("train", "validation", "test")
KINDS = ("operator", "off by one", "swapped arguments", "wrong variable", "dropped return")


@pytest.fixture(scope="module")
def pairs():
    return {split: split_pairs(split, 0) for split in SPLITS}


def faulty_versions(source):
    """Every fault of a function, by kind, as source."""
    versions = {}
    for i, (kind, _) in enumerate(faults(ast.parse(source), random.Random(0))):
        tree = ast.parse(source)
        list(faults(tree, random.Random(0)))[i][1]()
        versions.setdefault(kind, set()).add(ast.unparse(tree))
    return versions


def test_each_kind_of_fault_is_what_it_says():
    source = "def f(a, b):\n    if a < b and a in g(a, b):\n        return a + 2\n    return max(a, b)"
    versions = faulty_versions(source)
    assert versions["operator"] == {
        source.replace("a < b", "a >= b"),
        source.replace("and", "or"),
        source.replace("a in g", "a not in g"),
        source.replace("a + 2", "a - 2"),
    }
    assert versions["off by one"] <= {source.replace("2", "1"), source.replace("2", "3")}
    assert versions["swapped arguments"] == {source.replace("g(a, b)", "g(b, a)")}  # max(b, a) would be no fault
    assert versions["dropped return"] == {source.replace("return a + 2", "a + 2"), source.replace("return max", "max")}
    assert source.replace("if a <", "if b <") in versions["wrong variable"]
    assert len(versions["wrong variable"]) == 8  # each use of a or b
    assert set(versions) == set(KINDS)
    assert faulty_versions("def f(self):\n    return") == faulty_versions("def f(self):\n    return None") == {}


def test_fine_pairs_differ_by_one_fault_and_still_parse(pairs):
    fine = [pair for pair in pairs["test"] if pair.category.startswith("fine")]
    assert {pair.category for pair in fine} == {f"fine: {kind}" for kind in KINDS}
    similarities = []
    for pair in fine:
        assert pair.chosen != pair.rejected
        chosen, rejected = ast.parse(pair.chosen), ast.parse(pair.rejected)
        similarities.append(difflib.SequenceMatcher(None, pair.chosen, pair.rejected, autojunk=False).ratio())
        if pair.category == "fine: dropped return":
            returns = [sum(isinstance(node, ast.Return) for node in ast.walk(tree)) for tree in (chosen, rejected)]
            assert returns[0] == returns[1] + 1
    assert min(similarities) > 0.5
    assert sorted(similarities)[len(fine) // 10] > 0.85  # all but a tenth share nearly all of their characters


def test_coarse_pairs_put_one_docstring_over_two_functions(pairs):
    own = {function.source: function.summary for function in functions()}
    coarse = [pair for pair in pairs["test"] if pair.category.startswith("coarse")]
    assert len(coarse) > 100
    for pair in coarse:
        summary, chosen = pair.chosen.split("\n", 1)
        other_summary, rejected = pair.rejected.split("\n", 1)
        assert summary == other_summary == f"# {own[chosen]}"
        assert own[rejected] != own[chosen]


def test_no_module_and_no_function_is_in_two_splits(pairs):
    of_split = {split: {pair.where for pair in pairs[split]} for split in SPLITS}
    texts = {split: {ast.unparse(ast.parse(pair.chosen)) for pair in pairs[split]} for split in SPLITS}
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not of_split[first] & of_split[second]
        assert not texts[first] & texts[second]
    counts = Counter(function.source for function in functions())
    assert max(counts.values()) == 1
    assert len(pairs["train"]) > 10_000
    assert len(pairs["test"]) > 500


PRINT_DIGEST = """
import hashlib
from normbt_kernels.data.stdlib_faults import functions, split_pairs, stdlib_tokenizer
facts = functions(), split_pairs("test", 0), sorted(stdlib_tokenizer().get_vocab().items())
print(hashlib.sha256(repr(facts).encode()).hexdigest())
"""


@pytest.mark.slow
def test_pairs_are_the_same_each_time_and_only_training_pairs_go_by_the_seed(pairs, capsys):
    exec(PRINT_DIGEST, {})
    here = capsys.readouterr().out
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    elsewhere = subprocess.run([sys.executable, "-c", PRINT_DIGEST], env=environment, capture_output=True, text=True)
    assert elsewhere.stdout == here, elsewhere.stderr
    assert split_pairs("test", 1) == pairs["test"]
    assert split_pairs("train", 1) != pairs["train"]


def test_the_tokenizer_is_trained_and_gives_back_what_it_reads(pairs):
    tokenizer = stdlib_faults.stdlib_tokenizer()
    assert len(tokenizer) == stdlib_faults.VOCABULARY
    lengths = []
    for pair in pairs["test"]:
        ids = tokenizer(pair.chosen)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == pair.chosen
        lengths.append(len(ids))
    assert max(lengths) <= stdlib_faults.MAX_TOKENS


def test_a_users_model_is_judged_on_modules_it_was_not_trained_on(pairs, tmp_path):
    from normbt_kernels.commands.arguments import TrainOptions

    tokenizer = stdlib_faults.stdlib_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    stdlib_faults.stdlib_model(tokenizer).save_pretrained(tmp_path)
    job = user_job(TrainOptions(model=str(tmp_path), dataset="stdlib-faults"), seed=0)
    texts = {tokenizer.decode(row["chosen_ids"][:-1]) for row in job.eval_rows}
    assert texts == {pair.chosen for pair in pairs["test"]}
    assert len(job.train_rows) == len(pairs["train"])
    assert load_preferences("stdlib-faults", None, "filtered") == pairs["test"]


@pytest.mark.slow
def test_train_needs_no_model_for_it(tmp_path):
    arguments = ["train", "--dataset", "stdlib-faults", "--output-dir", "out", "--max-steps", "2", "--loss", "normbt"]
    command = Command("normbt_kernels", *arguments, "--eval-strategy", "no", cwd=tmp_path)
    assert command.wait() == 0, command.errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["dataset"] == "stdlib-faults"
    names = {group["name"] for group in results["groups"] if group["kind"] == "category"}
    assert names == {f"fine: {kind}" for kind in KINDS} | {"coarse: unrelated function"}


@pytest.mark.slow
def test_diagnose_and_evaluate_take_it_by_name(tmp_path, monkeypatch, capsys):
    from normbt_kernels.commands import cli
    from normbt_kernels.commands import diagnose as command

    monkeypatch.setattr(command, "FEW_STEPS", 2)
    arguments = ["--dataset", "stdlib-faults", "--batch-size", "50"]
    assert cli.main(["diagnose", *arguments, "--num-gradients", "8", "--out", str(tmp_path / "diagnosis.json")]) == 0
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert diagnosis["model"] == "built-in small Llama after 2 steps of BT"
    assert diagnosis["slopes"]["head"]["bt"]["slope"] == 1
    assert {category["name"] for category in diagnosis["categories"]} >= {f"fine: {kind}" for kind in KINDS}

    tokenizer = stdlib_faults.stdlib_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    stdlib_faults.stdlib_model(tokenizer).save_pretrained(tmp_path / "model")
    assert cli.main(["evaluate", str(tmp_path / "model"), *arguments]) == 0
    assert "coarse: unrelated function" in capsys.readouterr().out
