"""`normbt evaluate`: counted as RewardBench v1 counts, by the model's own logits; stopped runs continue."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from normbt_kernels.commands import cli, evaluate
from normbt_kernels.data import generated
from normbt_kernels.data.collator import PreferenceCollator
from normbt_kernels.data.tokens import num_tokens, tokenize
from normbt_kernels.evaluation import SECTIONS, accuracy, score_pairs, section_means
from normbt_kernels.resumable import map_resumable
from tests.processes import Command
from tests.tiny_classifiers import VOCABULARY, make_model
from tests.tiny_pairs import word_tokenizer

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", *(f"w{i}" for i in range(VOCABULARY - 6))]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} <eos> {% endfor %}"
NAMES = [name for weights in SECTIONS.values() for name in weights]


def make_tokenizer(**tokens):
    return word_tokenizer(WORDS, CHAT_TEMPLATE, eos_token="<eos>", **tokens)


def save(model, folder, **tokens):
    model.save_pretrained(folder)
    make_tokenizer(**tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(make_model("llama"), tmp_path_factory.mktemp("checkpoint"), pad_token="<pad>")


def make_rows(num_rows, subsets=("hep-python",), seed=0):
    """Rows in RewardBench's format: texts of 1 to 6 words."""
    rng = np.random.default_rng(seed)

    def text():
        return " ".join(f"w{i}" for i in rng.integers(0, VOCABULARY - 6, rng.integers(1, 7)))

    return [
        {"prompt": text(), "chosen": text(), "rejected": text(), "subset": subsets[i % len(subsets)], "id": i}
        for i in range(num_rows)
    ]


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def own_rewards(folder, rows, dtype=torch.float32, answer="chosen"):
    """What the model returns for each conversation, one sequence at a time, laid out here by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    texts = [f"user : {row['prompt']} <eos> assistant : {row[answer]} <eos>" for row in rows]
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in texts]


def own_accuracy(folder, rows, dtype=torch.float32):
    chosen, rejected = (own_rewards(folder, rows, dtype, answer) for answer in ("chosen", "rejected"))
    return np.mean([c > r for c, r in zip(chosen, rejected, strict=True)])


def start_cli(*arguments, cwd):
    return Command("normbt_kernels", "evaluate", *arguments, cwd=cwd)


def run_cli(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


# --- counting ------------------------------------------------------------------------------------------------------


def test_sections_are_weighted_as_computed_by_hand():
    right_of_4 = dict(zip(NAMES, [4, 2, 0, 4, 2, 1, 2, 3, 4, 0, 4, 4, 3, 2, 1, 0, 2, 4, 0, 4, 0, 4, 2], strict=True))
    subsets = [name for name in NAMES for _ in range(4)]
    chosen = [float(i < right_of_4[name]) for name in NAMES for i in range(4)]
    result = accuracy(chosen, [0.5] * len(chosen), subsets)
    assert result.subsets == {name: (4, right_of_4[name] / 4) for name in NAMES}
    # 100 + 95/2 + 0 + 28 + 40/2;  37/4 + 100/2 + 134*3/4 + 92 + 0 + 46;  100 + 75 + 77 + 62.5 + 0;  492 + 3.5 * 164
    expected = {"Chat": 195.5 / 358, "Chat Hard": 297.75 / 456, "Safety": 314.5 / 740, "Reasoning": 1066 / 1968}
    assert result.sections == pytest.approx(expected, rel=1e-12)
    assert result.overall == pytest.approx((0.546089385 + 0.652960526 + 0.425 + 0.541666667) / 4, abs=1e-9)
    assert result.overall_is == "mean of 4 sections"
    assert result.all_pairs == pytest.approx(sum(right_of_4.values()) / 92)


def test_sections_without_pairs_are_left_out():
    assert section_means({"math-prm": 0.25, "hep-go": 1.0, "mine": 0.0}) == pytest.approx(
        {"Reasoning": (984 * 0.25 + 164) / 1148}
    )
    result = accuracy([1, 1, 0, 0], [0, 2, 1, 1], ["donotanswer", "donotanswer", "mt-bench-hard", "mine"])
    assert result.sections == {"Chat Hard": 0.0, "Safety": 0.5}
    assert (result.overall, result.overall_is) == (0.25, "mean of 2 sections")


def test_unknown_subsets_count_equally_and_no_subsets_count_by_pair():
    rewards = ([1, 1, 1, 0], [0, 0, 0, 1])
    by_subset = accuracy(*rewards, ["a", "a", "a", "b"])
    assert (by_subset.overall, by_subset.overall_is, by_subset.sections) == (0.5, "mean of 2 subsets", {})
    plain = accuracy(*rewards)
    assert (plain.overall, plain.overall_is, plain.subsets) == (0.75, "all pairs", {})


def test_only_strictly_greater_is_right():
    result = accuracy([1.0, 2.0, float("nan"), 3.0], [1.0, 1.0, 0.0, 3.0])
    assert (result.all_pairs, result.num_ties, result.num_nan) == (0.25, 2, 1)


@pytest.mark.parametrize("arguments", [([1.0], [1.0, 2.0]), ([], []), ([1.0], [2.0], ["a", "b"]), ([[1.0]], [[2.0]])])
def test_lengths_must_agree(arguments):
    with pytest.raises(ValueError, match="expected"):
        accuracy(*arguments)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rewardbench_rows_are_scored_as_conversations_by_the_models_own_logits(tmp_path, checkpoint):
    rows = make_rows(60, ("hep-python", "math-prm", "llmbar-natural", "mine"))
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    command = start_cli(checkpoint, "--dataset", data, "--out", "out.json", cwd=tmp_path)
    assert command.wait() == 0, command.errors
    report = json.loads((tmp_path / "out.json").read_text())
    by_subset = {}
    for name in ("hep-python", "math-prm", "llmbar-natural", "mine"):
        by_subset[name] = own_accuracy(checkpoint, [row for row in rows if row["subset"] == name])
        assert report["subsets"][name]["accuracy"] == by_subset[name]
        assert f"{by_subset[name]:.3f}" in command.output
    reasoning = (164 * by_subset["hep-python"] + 984 * by_subset["math-prm"]) / 1148
    assert report["sections"] == pytest.approx({"Chat Hard": by_subset["llmbar-natural"], "Reasoning": reasoning})
    assert report["overall"] == pytest.approx((by_subset["llmbar-natural"] + reasoning) / 2)
    assert report["sections_left_out"] == ["Chat", "Safety"]
    assert "No pairs, and left out: Chat, Safety." in command.output
    assert "in none of RewardBench's sections, and not in overall" in command.output
    assert "60/60" in command.errors or "scoring" in command.errors  # the progress bar
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "pairs.jsonl"]


def test_bf16_ties_count_as_wrong_even_where_fp32_would_break_them(tmp_path, capsys):
    model = make_model("bert")
    model.classifier.bias.data += 20  # where bf16 knows steps of 0.125
    checkpoint = save(model, tmp_path / "model", pad_token="<pad>")
    rows = make_rows(80)
    chosen, rejected = own_rewards(checkpoint, rows), own_rewards(checkpoint, rows, answer="rejected")
    for row, better, worse in zip(rows, chosen, rejected, strict=True):
        if better < worse:  # so that fp32 has every pair right
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    reports = {}
    for dtype in ("float32", "bfloat16"):
        assert run_cli(checkpoint, "--dataset", data, "--dtype", dtype, "--out", tmp_path / f"{dtype}.json") == 0
        reports[dtype] = json.loads((tmp_path / f"{dtype}.json").read_text())
    assert (reports["float32"]["all_pairs"], reports["float32"]["num_ties"]) == (1.0, 0)

    own = [own_rewards(checkpoint, rows, torch.bfloat16, answer) for answer in ("chosen", "rejected")]
    ties = sum(c == r for c, r in zip(*own, strict=True))
    assert ties >= 5
    assert reports["bfloat16"]["num_ties"] == ties
    assert reports["bfloat16"]["all_pairs"] == np.mean([c > r for c, r in zip(*own, strict=True)]) < 1
    assert f"in bfloat16; ties, which count as wrong: {ties}" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_rows_without_subset_are_read_as_in_training(tmp_path, checkpoint, suffix):
    rows = [{name: row[name] for name in ("chosen", "rejected")} for row in make_rows(20)]
    data = tmp_path / f"pairs.{suffix}"
    if suffix == "json":
        data.write_text(json.dumps(rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), data)
    assert run_cli(checkpoint, "--dataset", data, "--out", tmp_path / "out.json", "--batch-size", 3) == 0
    report = json.loads((tmp_path / "out.json").read_text())

    tokenizer, model = make_tokenizer(), AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    rewards = [
        [model(torch.tensor([tokenizer(f"{row[side]} <eos>")["input_ids"]])).logits.item() for row in rows]
        for side in ("chosen", "rejected")
    ]
    right = np.mean([c > r for c, r in zip(*rewards, strict=True)])
    assert (report["overall"], report["overall_is"], report["subsets"]) == (right, "all pairs", {})


def test_rewards_are_those_of_each_sequence_alone_in_the_order_of_the_rows(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    rows = make_rows(23)
    ids = [
        {f"{side}_ids": tokenizer(f"{row[side]} <eos>")["input_ids"] for side in ("chosen", "rejected")} for row in rows
    ]
    rewards = score_pairs(model.train(), tokenizer, ids, batch_size=4)
    assert not model.training
    for side, found in zip(("chosen", "rejected"), rewards, strict=True):
        alone = [model(torch.tensor([row[f"{side}_ids"]])).logits.item() for row in ids]
        np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_without_a_pad_token_the_end_of_sequence_pads_as_in_rewardbench(tmp_path, checkpoint):
    folder = save(make_model("llama", pad_token_id=1), tmp_path / "model")
    rows = make_rows(50)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert run_cli(folder, "--dataset", data, "--out", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["all_pairs"] == own_accuracy(folder, rows) != own_accuracy(checkpoint, rows)  # which reads <eos>


def test_long_pairs_are_left_out_and_counted(tmp_path, checkpoint, capsys):
    rows = [row | {"prompt": "w1 " * (i % 2 * 40)} if i % 2 else row for i, row in enumerate(make_rows(10))]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert run_cli(checkpoint, "--dataset", data, "--max-length", 30, "--out", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["num_pairs"], report["num_left_out"]) == (5, 5)
    assert report["all_pairs"] == own_accuracy(checkpoint, rows[::2])
    assert "Left out 5 pairs longer than 30 tokens." in capsys.readouterr().out


# --- the built-in default, and stopping ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_the_built_in_default_needs_no_data(tmp_path, built_in_checkpoint):
    assert run_cli(built_in_checkpoint, "--batch-size", 100, "--out", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(built_in_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(built_in_checkpoint)
    for kind in ("fine: one wrong token", "coarse: noisy style"):
        pairs = [pair for pair in generated.make_pairs(2000, seed="held-out") if pair.category == kind]
        chosen, rejected = score_pairs(model, tokenizer, tokenize(pairs, tokenizer), batch_size=250)
        assert report["subsets"][kind]["num_pairs"] == 1000
        assert report["subsets"][kind]["accuracy"] == pytest.approx((chosen > rejected).mean(), abs=0.002)
    assert report["overall_is"] == "mean of 2 subsets"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
@pytest.mark.slow
def test_a_killed_run_leaves_nothing_half_written_and_is_continued(tmp_path, built_in_checkpoint, monkeypatch):
    pairs = generated.make_pairs(300, seed="any")
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": p.chosen, "rejected": p.rejected} for p in pairs])
    arguments = (built_in_checkpoint, "--dataset", data, "--batch-size", 1, "--out", "out.json")
    partial = tmp_path / ".out.json.partial"
    command = start_cli(*arguments, cwd=tmp_path)
    command.wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 20)
    command.kill()
    assert command.exit_code == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [partial.name, "pairs.jsonl"]

    kept = partial.read_bytes().splitlines(keepends=True)
    assert len(kept) < len(pairs)
    # Rewards that no model gives, so that one sees that they were read and not computed again; the last is cut off.
    kept[1:-1] = [b"[1e9, 0.0]\n"] * len(kept[1:-1])
    kept[-1] = kept[-1][:5]
    partial.write_bytes(b"".join(kept))
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "pairs.jsonl"]

    model = AutoModelForSequenceClassification.from_pretrained(built_in_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(built_in_checkpoint)
    rows = tokenize(pairs, tokenizer)
    chosen, rejected = score_pairs(model, tokenizer, rows, batch_size=1)
    right = chosen > rejected
    right[sorted(range(len(rows)), key=lambda i: -num_tokens(rows[i]))[: len(kept) - 2]] = True
    assert json.loads((tmp_path / "out.json").read_text())["all_pairs"] == pytest.approx(right.mean(), abs=1e-12)


def test_each_result_is_on_disk_before_the_next_is_begun(tmp_path):
    path = tmp_path / "partial"
    num_lines = map_resumable(lambda chunk: path.read_bytes().count(b"\n"), [[0], [1], [2]], path, "name", "")
    assert num_lines[1:] == [2, 3]  # the header, and one line for each result so far


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_writes_no_results(tmp_path, built_in_checkpoint, monkeypatch, capsys):
    collate = PreferenceCollator.__call__
    calls = []

    def interrupted(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return collate(self, rows)

    monkeypatch.setattr(PreferenceCollator, "__call__", interrupted)
    out = tmp_path / "out.json"
    assert run_cli(built_in_checkpoint, "--batch-size", 500, "--out", out) == 130
    assert "normbt: interrupted" in capsys.readouterr().err
    assert not out.exists()
    assert run_cli(built_in_checkpoint, "--batch-size", 500, "--out", out) == 0
    assert run_cli(built_in_checkpoint, "--batch-size", 500, "--out", out) == 2
    assert "exists, and nothing is overwritten: choose another --out" in capsys.readouterr().err
    assert calls == [500, 500, 500, 500, 500]  # two before, one in vain, the two that were missing
    assert json.loads(out.read_text())["num_pairs"] == 2000


def test_rewards_of_other_weights_or_pairs_are_not_continued(tmp_path, built_in_checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(built_in_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(built_in_checkpoint)
    rows = tokenize(generated.make_pairs(20, seed="any"), tokenizer)
    partial = tmp_path / "partial"
    before = score_pairs(model, tokenizer, rows, partial=partial)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[-1, -1] += 1  # one number of one matrix
    after = score_pairs(model, tokenizer, rows, partial=partial)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, score_pairs(model, tokenizer, rows))
    reversed_rows = score_pairs(model, tokenizer, rows[::-1], partial=partial)
    np.testing.assert_allclose(np.array(reversed_rows)[:, ::-1], after, rtol=1e-5)


# --- mistakes ------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "w1", "chosen": "w2", "rejected": "w3", "subset": "mine"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"prompt": "w1", "chosen": "w2", "subset": "mine"}], "pairs.jsonl, row 2: no column 'rejected'"),
        ([GOOD, GOOD, {"chosen": "w2", "rejected": "w3"}], "pairs.jsonl, row 3: no category, but other rows have one"),
        ([GOOD, "{"], "pairs.jsonl, row 2: not JSON"),
        ([GOOD, [1]], "pairs.jsonl, row 2: not an object"),
        ([], "pairs.jsonl: no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, checkpoint, capsys, rows, message):
    data = write_jsonl(tmp_path / "pairs.jsonl", [row if isinstance(row, str) else json.dumps(row) for row in rows])
    assert run_cli(checkpoint, "--dataset", data, "--out", tmp_path / "out.json") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "normbt: error: " in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--dataset", "good.jsonl", "--out", "nowhere/out.json"], "in a folder that exists"),
        (["--dataset", "good.jsonl", "--out", "out.txt"], "ends in .json"),
        (["--dataset", "good.jsonl", "--dataset-split", "test"], "--dataset-split is for the hub, and good.jsonl is a"),
        (["--dataset", "good.jsonl", "--device", "toaster"], "--device toaster: "),
        (
            ["--dataset", "good.jsonl", "--max-length", "1"],
            "none of the pairs is left: 1 of 1 pairs are longer than 1 tokens (--max-length)",
        ),
        ([], "--dataset is required"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_scored(
    tmp_path, checkpoint, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", lambda *args: pytest.fail("the model was loaded"))
    write_jsonl(tmp_path / "good.jsonl", [GOOD])
    assert run_cli(checkpoint, *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "normbt: error: " in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_models_without_a_trained_scalar_head_are_refused(tmp_path, checkpoint, capsys):
    model = make_model("llama")
    save(LlamaForCausalLM(model.config), tmp_path / "causal", pad_token="<pad>")
    save(make_model("llama", num_labels=3), tmp_path / "three", pad_token="<pad>")
    data = write_jsonl(tmp_path / "pairs.jsonl", [GOOD])
    for name, message in (("causal", "does not hold score.weight"), ("three", "has 3 labels"), ("none", "none: ")):
        assert run_cli(tmp_path / name, "--dataset", data) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--batch-size", "0"), ("--max-length", "-3"), ("--dtype", "int8")])
def test_numbers_that_make_no_sense_are_refused(checkpoint, capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        run_cli(checkpoint, option, value)
    assert stop.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.slow
def test_help_names_every_option_and_imports_no_transformers(tmp_path):
    script = (
        "import sys; from normbt_kernels.commands.cli import main\n"
        "try: main(['evaluate', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'transformers' not in sys.modules"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for word in (
        "MODEL",
        "--dataset",
        "--dataset-split",
        "--batch-size",
        "--max-length",
        "--device",
        "--dtype",
        "--out",
    ):
        assert word in process.stdout
    for word in ("strictly", "prompt, chosen, rejected and subset", "continue"):
        assert word in " ".join(process.stdout.split())
