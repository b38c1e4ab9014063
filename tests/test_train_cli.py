"""`normbt train` and `normbt info` as a user sees them: processes, files, messages, exit codes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from normbt_kernels.commands import cli, info
from normbt_kernels.commands import train_report as report
from normbt_kernels.data import generated
from normbt_kernels.data.preferences import load_preferences, parse_row
from normbt_kernels.data.tokens import LeftOut, prepare, tokenize
from normbt_kernels.errors import UserError
from tests.processes import Command
from tests.tiny_pairs import word_tokenizer

pytestmark = pytest.mark.usefixtures("empty_figures")  # in this process; commands draw theirs

WORDS = ["add", "two", "four", "five", "six", "user", "assistant", ":", "<s>", "</s>", "<unk>"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} </s> {% endfor %}"


def normbt(*arguments, cwd, check=True):
    """The real command in its own process."""
    command = Command("normbt_kernels", *arguments, cwd=cwd)
    command.wait()
    assert not check or command.exit_code == 0, command.output + command.errors
    return command


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory):
    """A saved causal LM without a pad token, as decoders often come."""
    tokenizer = word_tokenizer(WORDS, CHAT_TEMPLATE, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=8, eos_token_id=9, **shape))
    folder = tmp_path_factory.mktemp("causal-lm")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(num_rows):
    """Pairs of which no two are the same."""
    numbers = ["two", "four", "five", "six"]
    ends = [f"{first} {second}" for first in numbers for second in numbers]
    texts = [
        (f"add {numbers[i % 4]} {ends[i // 4]}", f"add {numbers[(i + 1) % 4]} {ends[i // 4]} two") for i in range(64)
    ]
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts[:num_rows]]


def chat_rows(num_rows):
    return [
        {
            "prompt": [{"role": "user", "content": "add two two"}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "margin": 0.5 * (i % 2),
        }
        for i, row in enumerate(text_rows(num_rows))
    ]


# --- the built-in default ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_without_arguments_compares_bt_and_normbt(tmp_path):
    (tmp_path / "normbt-demo").mkdir()  # an earlier run, which must be left alone
    command = normbt("train", "--max-steps", 10, "--eval-steps", 10, cwd=tmp_path)
    output = tmp_path / "normbt-demo-2"
    assert not list((tmp_path / "normbt-demo").iterdir())
    assert sorted(path.name for path in output.iterdir()) == ["bt", "normbt", "results.json", "results.png", "run.json"]
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((output / "results.json").read_text())
    assert list(results["losses"]) == ["bt", "normbt"]
    assert results["distance_reference"] == "bt"
    kinds = [group["kind"] for group in results["groups"]]
    assert kinds == ["", "category", "category", "distance", "distance", "distance"]
    for kind in ("category", "distance"):
        assert sum(group["num_pairs"] for group in results["groups"] if group["kind"] == kind) == 2000
    for group in results["groups"]:
        assert group["name"] in command.output
        for accuracy in group["accuracy"].values():
            assert f"{accuracy:.3f}" in command.output
    assert "One seed (42)" in command.output
    assert "10/10" in command.errors  # Trainer's progress bar

    for loss in ("bt", "normbt"):
        model = AutoModelForSequenceClassification.from_pretrained(output / loss)
        batch = AutoTokenizer.from_pretrained(output / loss)(
            ["double : 2 = 4 ;", "double : 2 = 6 ; um 7 = 14 ;"], padding=True, return_tensors="pt"
        )
        assert model(**batch).logits.shape == (2, 1)
    assert results["losses"]["bt"]["history"][0] != results["losses"]["normbt"]["history"][0]


def test_built_in_pairs_are_what_they_say():
    pairs = generated.make_pairs(400, seed="any")
    assert pairs == generated.make_pairs(400, seed="any")
    assert pairs != generated.make_pairs(400, seed="other")
    worth = generated.STYLE_WORDS
    better = 0
    for pair in pairs:
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        if pair.category.startswith("fine"):
            differing = [(c, r) for c, r in zip(chosen, rejected, strict=True) if c != r]
            assert len(differing) == 1
            assert wrong_results(chosen) == 0
            assert wrong_results(rejected) == 1
        else:
            assert wrong_results(chosen) == wrong_results(rejected) == 0
            better += sum(worth.get(word, 0) for word in chosen) > sum(worth.get(word, 0) for word in rejected)
    assert 0.7 < better / 200 < 0.95  # the labels are noisy, but they are no coin


def wrong_results(words):
    words = [word for word in words if word not in generated.STYLE_WORDS]
    return sum(int(result) != 2 * int(number) for number, result in zip(words[2::4], words[4::4], strict=True))


# --- the user's model and data -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_causal_lm_and_conversations_become_a_reward_model(tmp_path, causal_lm):
    data = write_jsonl(tmp_path / "pairs.jsonl", chat_rows(24))
    common = ("train", "--model", causal_lm, "--dataset", data, "--eval-fraction", 0.25, "--max-steps", 4)
    saving = ("--output_dir", "out", "--loss", "bt", "normbt", "--save-steps", 2, "--learning-rate", 0.01)
    command = normbt(*common, *saving, cwd=tmp_path)
    assert "its reward head is new" in command.output
    assert "has no pad token: its tokenizer gets <|pad|>" in command.output

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_eval_pairs"] == 6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "normbt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "normbt")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.num_labels == 1
    logits = model(**tokenizer(["add two </s>", "add two two four </s>"], padding=True, return_tensors="pt")).logits
    alone = model(**tokenizer(["add two </s>"], return_tensors="pt")).logits
    torch.testing.assert_close(logits[:1], alone)

    # Finished results are not overwritten; resuming from the middle reproduces them.
    refused = normbt(*common, *saving, cwd=tmp_path, check=False)
    assert refused.exit_code == 2
    assert "already holds results.json" in refused.errors
    for loss in ("bt", "normbt"):
        for file in (tmp_path / "out" / loss / "checkpoint-4").iterdir():
            file.unlink()
        (tmp_path / "out" / loss / "checkpoint-4").rmdir()
    normbt(*common, *saving, "--resume-from-checkpoint", "last", cwd=tmp_path)
    resumed = json.loads((tmp_path / "out" / "results.json").read_text())
    assert resumed["groups"] == results["groups"]
    resumed_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "normbt")
    for seen, expected in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(seen, expected)


@pytest.mark.slow
def test_reward_model_trains_on_from_parquet(tmp_path, causal_lm, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row | {"category": f"kind {i % 2}"} for i, row in enumerate(text_rows(21))]
    data, held_out = tmp_path / "pairs.parquet", tmp_path / "held-out.json"
    parquet.write_table(pyarrow.Table.from_pylist(rows[5:]), data)
    held_out.write_text(json.dumps(rows[:5]))
    for model, output in ((causal_lm, tmp_path / "first"), (tmp_path / "first" / "normbt", tmp_path / "second")):
        code = run_cli("train", "--model", model, "--dataset", data, "--eval-dataset", held_out,
                       "--output-dir", output, "--max-steps", 1, "--disable-tqdm", True, "--use-cpu")  # fmt: skip
        assert code == 0
    printed = capsys.readouterr().out
    assert printed.count("its reward head is new") == printed.count("has no pad token") == 1
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    assert [(group["name"], group["num_pairs"]) for group in results["groups"][:3]] == [
        ("all", 5),
        ("kind 0", 3),
        ("kind 1", 2),
    ]
    assert list(results["losses"]) == ["normbt"]


def run_cli(*arguments):
    """Runs the command in this process, which is quicker and shows as much."""
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"chosen": "a", "rejected": "b"}, "a", "b"),
        ({"prompt": "p ", "chosen": "a", "rejected": "b"}, "p a", "p b"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "a", "b"),
        (
            {"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "b"},
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
        ),
        (
            {
                "prompt": "p",
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
        ),
        (
            {
                "prompt": "p",
                "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
            },
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
        ),
    ],
    ids=["text", "text prompt", "no prompt", "messages + text", "text + messages", "whole conversations"],
)
def test_prompt_and_answers_join_into_whole_texts(row, chosen, rejected):
    pair = parse_row(row, "row")
    assert (pair.chosen, pair.rejected) == (chosen, rejected)


def test_text_ends_with_one_eos_and_conversations_as_the_template_says(causal_lm):
    tokenizer = AutoTokenizer.from_pretrained(causal_lm)
    text = parse_row({"chosen": "add two", "rejected": "add four </s>"}, "row")
    chat = parse_row({"prompt": [{"role": "user", "content": "add"}], "chosen": "two", "rejected": "six"}, "row")
    tokens = [
        [tokenizer.convert_ids_to_tokens(row[name].tolist()) for name in ("chosen_ids", "rejected_ids")]
        for row in tokenize([text, chat], tokenizer)
    ]
    assert tokens == [
        [["add", "two", "</s>"], ["add", "four", "</s>"]],
        [
            ["user", ":", "add", "</s>", "assistant", ":", "two", "</s>"],
            ["user", ":", "add", "</s>", "assistant", ":", "six", "</s>"],
        ],
    ]
    assert len(prepare([text, chat], tokenizer, LeftOut(3)).rows) == 1  # longer pairs are left out


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--dataset", "notes.txt"], "notes.txt: not one of .json, .jsonl, .csv"),
        (["--dataset", "broken.parquet"], "broken.parquet: not Parquet"),
        (["--dataset", "object.json"], "object.json: not a list of rows"),
        (["--dataset", "latin.jsonl"], "latin.jsonl, row 1: not UTF-8"),
        (["--dataset", "utf16.jsonl"], "utf16.jsonl, row 1: not UTF-8, in which JSON is written"),
        (["--dataset", "good.jsonl", "--model", "./no-such-folder"], "error: ./no-such-folder: no such folder"),
        (["--dataset", "missing.jsonl", "--model", "no/such/folder"], "error: no/such/folder: no such folder"),
        (["--dataset", "./no-such-folder"], "error: ./no-such-folder: no such folder"),
        (["--dataset", "good.jsonl", "--eval-fraction", "0.9"], "leaves none to train on"),
        (["--dataset", "good.jsonl", "--eval-fraction", "-1"], "--eval-fraction must be between 0 and 1, got -1.0"),
        (["--dataset", "good.jsonl", "--beta", "2"], "--beta must be in [0, 1), got 2.0"),
        (
            ["--dataset", "good.jsonl", "--learning-rate", "1", "-1"],
            "--learning-rate must be finite and >= 0, got -1.0",
        ),
        (["--dataset", "good.jsonl", "--label-smoothing", "1.5"], "--label-smoothing must be in [0, 1), got 1.5"),
        (["--dataset", "good.jsonl", "--label-smoothing", "0.1"], "choose one of them with --loss"),
        (["--dataset", "good.jsonl", "--loss", "bt", "--max-weight", "5"], "--max-weight is for the losses named"),
        (["--dataset", "good.jsonl", "--loss", "bt-margin", "--power", "2"], "--power is for the losses named normbt"),
        (["--dataset", "good.jsonl", "--dataset-split", "train[:2]"], "--dataset-split is for the hub, and good.jsonl"),
        (
            ["--dataset", "good.jsonl", "--eval-dataset", "good.jsonl", "--eval-split", "a"],
            "--eval-split is for the hub, and good.jsonl is a file",
        ),
        (["--dataset", "good.jsonl", "--dataset-config", "en"], "--dataset-config is for the hub, and good.jsonl is a"),
        (["--dataset", "good.jsonl", "--loss", "bt", "bt"], "--loss names a loss twice: bt bt"),
        (["--dataset", "good.jsonl", "--eps", "-1"], "--eps must be finite and >= 0, got -1.0"),
        (["--dataset", "good.jsonl", "--max-weight", "0"], "--max-weight must be greater than 0, got 0.0"),
        (["--dataset", "good.jsonl", "--loss", "bt", "bt-margin"], "--loss bt-margin needs pairs with the column"),
        (["--dataset", "negative.jsonl", "--loss", "normbt-margin-out"], "must not be negative: got -0.5"),
        (["--dataset", "good.jsonl", "--max-length", "0"], "--max-length must be at least 1, got 0"),
        (["--dataset", "good.jsonl", "--max-length", "1"], "longer than 1 tokens (--max-length)"),
        (["--dataset", "good.jsonl", "--resume-from-checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--dataset", "good.jsonl", "--no-such-option", "1"], "--no-such-option"),
        (["--dataset", "good.jsonl", "--load-best-model-at-end"], "save and eval strategy"),
        (["--dataset", "good.jsonl", "--report-to", "dagshub"], "--report-to dagshub: "),
        (["--dataset", "good.jsonl", "--report-to", "wnadb"], "--report-to wnadb: wnadb is not supported, only"),
        (["--dataset", "good.jsonl", "--optim", "galore_adamw"], "--optim galore_adamw: You need to install"),
        (["--dataset", "good.jsonl", "--metric-for-best-model", "acc"], "evaluation gives loss, bt_loss, accuracy"),
        (["--dataset", "good.jsonl", "--use-liger-kernel"], "pass liger_kernel_config="),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, causal_lm, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", text_rows(4))
    write_jsonl(tmp_path / "negative.jsonl", [row | {"margin": i - 0.5} for i, row in enumerate(text_rows(4))])
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "utf16.jsonl").write_text((tmp_path / "good.jsonl").read_text(), encoding="utf-16")
    (tmp_path / "latin.jsonl").write_bytes(b'{"chosen": "caf\xe9"}\n')
    assert run_cli("train", "--model", causal_lm, "--output-dir", "out", *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "normbt: error: " in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-r", "8"], "--lora-r needs --model: it changes nothing about the built-in model and pairs"),
        (["--dataset", "stdlib-faults", "--dtype", "bfloat16"], "--dtype needs --model"),
        (["--gguf-file", "q4.gguf"], "--gguf-file needs --model"),
        (["--model", "m", "--dataset", "d.jsonl", "--eval-split", "test"], "--eval-split is a split of --eval-dataset"),
        (
            ["--model", "m", "--dataset", "d.jsonl", "--eval-dataset", "e.jsonl", "--eval-fraction", "0.1"],
            "--eval-dataset is held out already",
        ),
    ],
)
def test_options_that_would_change_nothing_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_cli("train", *arguments, "--output-dir", "out") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_conversations_need_a_chat_template(tmp_path, causal_lm):
    tokenizer = AutoTokenizer.from_pretrained(causal_lm)
    tokenizer.chat_template = None
    pairs = load_preferences(str(write_jsonl(tmp_path / "chat.jsonl", chat_rows(2))), None, "train")
    with pytest.raises(UserError, match=r"chat\.jsonl, row 1: .*no chat template"):
        tokenize(pairs, tokenizer)


def test_model_and_dataset_go_together(capsys):
    assert run_cli("train", "--model", "anything") == 2
    assert "--model and --dataset go together" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistake_shows_no_traceback(tmp_path):
    command = normbt(
        "train", "--model", "m", "--dataset", "missing.jsonl", "--output-dir", "o", cwd=tmp_path, check=False
    )
    assert command.exit_code == 2
    assert command.errors == "normbt: error: missing.jsonl: no such file\n"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.slow
def test_a_resumed_comparison_does_not_train_a_finished_loss_again(tmp_path, causal_lm, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "pairs.jsonl", text_rows(24))
    common = ["train", "--model", causal_lm, "--dataset", data, "--output-dir", "out", "--max-steps", 2]
    common += ["--save-strategy", "no", "--use-cpu"]
    assert run_cli(*common, "--loss", "bt") == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    weights = tmp_path / "out" / "bt" / "model.safetensors"
    written = weights.stat().st_mtime_ns

    resumed = [*common, "--loss", "bt", "normbt", "--resume-from-checkpoint", "last"]
    assert run_cli(*resumed, "--learning-rate", 0.5) == 2
    assert "was trained with learning_rate = 5e-05, not 0.5" in capsys.readouterr().err
    assert run_cli(*resumed) == 0
    assert "bt is trained already" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert weights.stat().st_mtime_ns == written
    assert results["losses"]["bt"] == first["losses"]["bt"]
    assert list(results["losses"]) == ["bt", "normbt"]
    for before, now in zip(first["groups"], results["groups"], strict=True):
        assert before["accuracy"]["bt"] == now["accuracy"]["bt"]


def test_several_processes_need_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_cli("train") == 2
    assert "--output-dir is required where several processes train" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_run_leaves_no_results(tmp_path):
    command = Command("normbt_kernels", "train", "--output-dir", "out", cwd=tmp_path)
    command.wait_until(lambda: "/800" in command.errors)  # the bar of the first model
    os.kill(command.pid, signal.SIGINT)
    assert command.wait() == 130
    assert "normbt: interrupted" in command.errors
    assert "Traceback" not in command.errors
    assert not list((tmp_path / "out").glob("*results*"))


def test_results_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "draw", lambda results, path: path.write_bytes(b"new"))
    for name in (report.RESULTS_NAME, "results.png"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.write({}, tmp_path)
    for name in (report.RESULTS_NAME, "results.png"):
        assert (tmp_path / name).read_text() == "old"


def test_numbers_that_are_not_finite_are_null_in_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda results, path: path.write_bytes(b""))
    report.write({"loss": float("nan"), "list": [float("inf"), 1.5]}, tmp_path)
    assert json.loads((tmp_path / report.RESULTS_NAME).read_text()) == {"loss": None, "list": [None, 1.5]}
    assert sorted(path.name for path in tmp_path.iterdir()) == [report.RESULTS_NAME, "results.png"]


# --- help and info -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_names_every_option_and_imports_no_transformers(tmp_path):
    script = (
        "import sys; from normbt_kernels.commands.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'transformers' not in sys.modules"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for option in ("--model", "--dataset", "--loss", "--output-dir", "--resume-from-checkpoint", "normbt-demo"):
        assert option in process.stdout


def test_missing_transformers_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run_cli("train") == 2
    assert "pip install 'normbt-kernels[train]'" in capsys.readouterr().err


@pytest.mark.slow
def test_info_checks_the_loss_in_ten_seconds(tmp_path):
    before = os.times()
    process = subprocess.run(
        [sys.executable, "-m", "normbt_kernels", "info"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    after = os.times()  # of the processor, not of the wall: other processes must not decide a test
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10
    for word in ("normbt-kernels", "torch", "triton", "transformers", "backend: numpy", "self-check: passed"):
        assert word in process.stdout


@pytest.mark.parametrize(
    "entry", ["pair_distance", "normbt_loss", "linear_normbt_loss", "NormBTLoss", "LinearNormBTLoss"]
)
def test_info_fails_when_an_entry_point_is_wrong(monkeypatch, capsys, entry):
    if entry[0].isupper():
        original = getattr(info, entry)
        wrong = type(entry, (original,), {"forward": lambda self, *a, **k: original.forward(self, *a, **k) * 1.001})
    else:
        original = getattr(info, entry)
        wrong = lambda *args, **kwargs: original(*args, **kwargs) * 1.001  # noqa: E731
    monkeypatch.setattr(info, entry, wrong)
    assert run_cli("info") == 1
    assert f"{entry} on cpu: expected" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("normbt-kernels ")
