"""docs/reproduce.md, run from top to bottom: its code as it stands, its commands as bash expands them.

In the folder where it runs, the hub's models and data sets are folders of the same names, with tiny models and a few
rows in the hub's columns, which the libraries take before they would ask the hub.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
from transformers import LlamaForCausalLM

from normbt_kernels.commands import train_report
from normbt_kernels.commands.cli import main
from normbt_kernels.evaluation import SECTIONS
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import word_tokenizer

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduce.md"
MODELS = ("google/gemma-2b-it", "meta-llama/Llama-3.2-3B-Instruct")
DATA = {"unified": "unified-feedback-80k.jsonl", "skywork": "skywork-80k.jsonl"}
LOSSES = {
    "unified": ["bt", "bt-margin", "bt-margin-out", "bt-smoothing", "normbt"],
    "skywork": ["bt", "bt-smoothing", "normbt"],
}
RATES = ("2e-6", "5e-6", "1e-5")
WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", *(f"w{i}" for i in range(6, 32))]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} <eos> {% endfor %}"


def conversation(*words):
    roles = ("user", "assistant") * len(words)
    return [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]


def unified_feedback():
    """A rating may be higher on either side; ties, and what a chat template refuses, are to be left out."""
    ratings = [(1.0, 0.0), (2.0, 5.0), (3.0, 3.0), *[(0.5, 0.25)] * 12]
    rows = [
        {
            "id": str(i),
            "conv_A": conversation(f"w{i}", "w7 w8"),
            "conv_B": conversation(f"w{i}", "w9"),
            "conv_A_rating": a,
            "conv_B_rating": b,
            "num_turns": 1,
            "source": f"source {i % 2}",
        }
        for i, (a, b) in enumerate(ratings, start=6)
    ]
    rows[3]["conv_A"] = [{"role": "system", "content": "w6"}, *rows[3]["conv_A"]]
    return rows


def skywork():
    rows = [{"chosen": conversation(f"w{i}", "w7"), "rejected": conversation(f"w{i}", "w8 w9")} for i in range(6, 18)]
    rows[0]["rejected"] = rows[0]["rejected"][:1]
    return [row | {"source": "magpie"} for row in rows]


def reward_bench():
    row = {"prompt": "w6", "chosen": "w7", "rejected": "w8 w9"}
    return [row | {"subset": subset} for weights in SECTIONS.values() for subset in weights]


def save_data(folder, config, split, rows):
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: data/*\n---\n"
    )
    (folder / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "0.parquet")


def save_model(folder):
    LlamaForCausalLM(make_model("llama", num_hidden_layers=1, pad_token_id=None).config).save_pretrained(folder)
    word_tokenizer(WORDS, CHAT_TEMPLATE, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def expanded(block, folder):
    """The words of each `normbt` command that a block of bash comes to: here `normbt` only writes down its call."""
    stub, calls = folder / ".bin" / "normbt", folder / ".calls"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text("""#!/bin/sh\n{ printf '%s\\n' "$@"; echo; } >> "$CALLS"\n""")
    stub.chmod(0o755)
    calls.write_text("")
    environment = {"PATH": os.pathsep.join([str(stub.parent), os.environ["PATH"]]), "CALLS": str(calls)}
    subprocess.run(["bash", "-euc", block], cwd=folder, env=os.environ | environment, check=True)
    return [command.split("\n") for command in calls.read_text().split("\n\n")[:-1]]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The page, run in a folder: the folder, and the commands that were run."""
    folder, commands = tmp_path_factory.mktemp("reproduce"), []
    for model in MODELS:
        save_model(folder / model)
    save_data(folder / "llm-blender" / "Unified-Feedback", "all", "train", unified_feedback())
    save_data(folder / "Skywork" / "Skywork-Reward-Preference-80K-v0.2", "default", "train", skywork())
    save_data(folder / "allenai" / "reward-bench", "default", "filtered", reward_bench())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / ".cache")
        patch.setattr(train_report, "draw", lambda results, path: path.write_bytes(b""))  # has its own tests
        torch.set_num_threads(1)
        for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
            if language == "python":
                _tell_rates_apart(folder)
                exec(compile(block, PAGE.name, "exec"), {})
                continue
            for words in expanded(block, folder):
                here = ["--use-cpu", "--disable-tqdm", "True"] if words[0] == "train" else ["--device", "cpu"]
                assert main([*words, *here]) == 0, words
                commands.append(words)
    return folder, commands


def _tell_rates_apart(folder):
    """Writes other held-out accuracies into the results: those of the single pair held out here are the same."""
    rng = np.random.default_rng(0)
    for path in sorted(folder.glob("runs/*/*/*/results.json")):
        results = json.loads(path.read_text())
        results["groups"][0]["accuracy"] = {loss: float(rng.random()) for loss in results["losses"]}
        path.write_text(json.dumps(results))


def option(words, name):
    return words[words.index(name) + 1]


def test_every_model_is_trained_on_every_data_set_at_every_rate_with_every_loss(reproduced):
    folder, commands = reproduced
    trained = [words for words in commands if words[0] == "train" and option(words, "--output-dir").startswith("runs/")]
    seen = {
        (option(words, "--model"), option(words, "--dataset"), option(words, "--learning-rate")) for words in trained
    }
    assert seen == {(model, data, rate) for model in MODELS for data in DATA.values() for rate in RATES}
    assert len(trained) == len(seen)
    for model in MODELS:
        for data, losses in LOSSES.items():
            for rate in RATES:
                results = json.loads((folder / "runs" / data / Path(model).name / rate / "results.json").read_text())
                assert list(results["losses"]) == losses
                arguments = results["training_arguments"]
                assert arguments["learning_rate"] == float(rate)
                assert arguments["bf16"]
                assert arguments["gradient_checkpointing"]
                assert arguments["gradient_accumulation_steps"] * arguments["per_device_train_batch_size"] == 64


def test_the_inferred_recipe_trains_every_model_with_its_own_settings(reproduced):
    folder, _ = reproduced
    for model in MODELS:
        for data, pairs_per_step, learning_rate, epochs in (("skywork", 256, 5e-6, 1), ("unified", 24, 1e-5, 2)):
            trained = folder / "inferred" / data / Path(model).name
            results = json.loads((trained / "results.json").read_text())
            assert list(results["losses"]) == LOSSES["skywork"]
            arguments = results["training_arguments"]
            assert arguments["gradient_accumulation_steps"] * arguments["per_device_train_batch_size"] == pairs_per_step
            assert (arguments["learning_rate"], arguments["max_grad_norm"]) == (learning_rate, 5)
            assert arguments["num_train_epochs"] == epochs
            assert (trained / "normbt" / "adapter_config.json").is_file() == (data == "unified")


def test_the_data_are_the_better_and_the_worse_answer(reproduced):
    folder, _ = reproduced
    unified, skywork_pairs = ([json.loads(line) for line in (folder / name).open()] for name in DATA.values())
    assert len(unified) == 13  # of 15, without the tie and the one with a system message
    assert len(skywork_pairs) == 11  # of 12, without the one that has no answer
    by_prompt = {row["chosen"][0]["content"]: row for row in unified}
    assert (by_prompt["w6"]["chosen"][1]["content"], by_prompt["w6"]["margin"]) == ("w7 w8", 1.0)
    assert (by_prompt["w7"]["chosen"][1]["content"], by_prompt["w7"]["margin"]) == ("w9", 3.0)
    assert {row["category"] for row in unified} == {"source 0", "source 1"}
    assert {row["category"] for row in skywork_pairs} == {"magpie"}


def test_the_best_learning_rate_of_each_loss_is_scored_in_all_sections(reproduced):
    folder, commands = reproduced
    scored = {Path(words[1]) for words in commands if words[0] == "evaluate"}
    settings = [Path("runs", data, Path(model).name) for data in DATA for model in MODELS]
    assert scored == {setting / "best" / loss for setting in settings for loss in LOSSES[setting.parts[1]]}
    for path in scored:
        setting, loss = path.parents[1], path.name
        report = json.loads((folder / path / "rewardbench.json").read_text())
        assert list(report["sections"]) == list(SECTIONS)
        assert report["dtype"] == "bfloat16"
        held_out = {
            rate: json.loads((folder / setting / rate / "results.json").read_text())["groups"][0]["accuracy"][loss]
            for rate in RATES
        }
        chosen = (folder / path).resolve().parent.name
        assert held_out[chosen] == max(held_out.values())
