"""`--dataset stdlib-faults` in every command, on a part of the library: the promises do not need all of it."""

import json

import pytest

pytest.importorskip("transformers")

from normbt_kernels.commands import cli
from normbt_kernels.commands import diagnose as diagnose_command
from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.commands.train_job import user_job
from normbt_kernels.data import stdlib_faults
from normbt_kernels.data.preferences import load_preferences
from normbt_kernels.data.stdlib_faults import split_pairs
from tests.processes import Command
from tests.stdlib_digest import LEFT_OUT, digest

pytestmark = pytest.mark.usefixtures("empty_figures")

KINDS = ("operator", "off by one", "swapped arguments", "wrong variable", "dropped return")
CATEGORIES = {f"fine: {kind}" for kind in KINDS} | {"coarse: unrelated function"}


@pytest.fixture(scope="module", autouse=True)
def _a_part_of_the_library():
    cached = stdlib_faults.functions, stdlib_faults._trained_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_faults, "LEFT_OUT", LEFT_OUT)
        patch.setattr(stdlib_faults, "VERSIONS_OF_A_FUNCTION", 1)  # more of them are more of the same
        for function in cached:
            function.cache_clear()
        yield
    for function in cached:
        function.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = stdlib_faults.make_tokenizer()
    tokenizer.save_pretrained(folder)
    stdlib_faults.make_model(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_pairs_are_the_same_each_time_and_only_training_pairs_go_by_the_seed():
    command = Command("tests.stdlib_digest")
    assert command.wait() == 0, command.errors
    of_a_text, of_the_pairs = command.output.split()
    assert int(of_a_text) != hash("a text"), "sets have the same order there: unset PYTHONHASHSEED"
    assert of_the_pairs == digest()
    assert split_pairs("test", 1) == split_pairs("test", 0)
    assert split_pairs("train", 1) != split_pairs("train", 0)


@pytest.mark.slow
def test_a_users_model_is_judged_on_modules_it_was_not_trained_on(checkpoint):
    job = user_job(TrainOptions(model=checkpoint, dataset="stdlib-faults"), seed=0)
    texts = {job.tokenizer.decode(row["chosen_ids"][:-1]) for row in job.eval_rows}
    assert texts == {pair.chosen for pair in split_pairs("test", 0)}
    assert len(job.train_rows) == len(split_pairs("train", 0))
    assert load_preferences("stdlib-faults", None, "filtered") == split_pairs("test", 0)


@pytest.mark.slow
def test_train_needs_no_model_for_it(tmp_path):
    arguments = ["train", "--dataset", "stdlib-faults", "--output-dir", str(tmp_path), "--max-steps", "2"]
    assert cli.main([*arguments, "--loss", "normbt", "--eval-strategy", "no"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dataset"] == "stdlib-faults"
    assert {group["name"] for group in results["groups"] if group["kind"] == "category"} == CATEGORIES


@pytest.mark.slow
def test_diagnose_and_evaluate_take_it_by_name(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnose_command, "FEW_STEPS", 2)
    arguments = ["--dataset", "stdlib-faults", "--batch-size", "50"]
    assert cli.main(["diagnose", *arguments, "--num-gradients", "8", "--out", str(tmp_path / "diagnosis.json")]) == 0
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert diagnosis["model"] == "built-in small Llama after 2 steps of BT"
    assert diagnosis["slopes"]["head"]["bt"]["slope"] == 1
    assert {category["name"] for category in diagnosis["categories"]} >= {f"fine: {kind}" for kind in KINDS}

    assert cli.main(["evaluate", checkpoint, *arguments]) == 0
    assert "coarse: unrelated function" in capsys.readouterr().out
