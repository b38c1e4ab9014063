"""`normbt train` over several runs: what is in the folder is continued or refused, and the comparison is of the same
pairs."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from normbt_kernels.commands import run_folder
from normbt_kernels.commands import train_report as report
from normbt_kernels.data.look import look
from normbt_kernels.data.tokens import LeftOut, Prepared, check_known
from normbt_kernels.errors import UserError
from normbt_kernels.files import disk_trouble
from tests.test_evaluate import make_rows, make_tokenizer, save
from tests.test_train_cli import run_cli, write_jsonl
from tests.tiny_classifiers import make_model

FEW = ["--max-steps", 2, "--use-cpu", "--disable-tqdm", True, "--report-to", "none", "--per-device-train-batch-size", 4]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, empty_figures):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", rows())
    return save(make_model(), tmp_path / "model", pad_token="<pad>")


def rows(seed=0):
    return [{name: row[name] for name in ("chosen", "rejected")} for row in make_rows(40, seed=seed)]


def train(*arguments, out="out", dataset="pairs.jsonl"):
    common = ["--model", "model", "--dataset", dataset, "--output-dir", out, "--eval-fraction", 0.25, *FEW]
    return run_cli("train", *common, *arguments)


# --- continued or refused ------------------------------------------------------------------------------------------


def test_a_run_is_not_continued_with_other_pairs_another_model_or_other_options(checkpoint, tmp_path, capsys):
    assert train("--loss", "bt") == 0
    results = (tmp_path / "out" / "results.json").read_text()

    def refused(reason, *arguments):
        assert train("--loss", "bt", "normbt", *arguments) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert "to continue: " not in said  # the same command would be refused again
        assert (tmp_path / "out" / "results.json").read_text() == results

    refused("out already holds results.json: continue that run with --resume-from-checkpoint last")
    (tmp_path / "out" / "results.json").unlink()
    refused_without_results = "out already holds run.json"
    assert train("--loss", "bt", "normbt") == 2
    assert refused_without_results in capsys.readouterr().err
    (tmp_path / "out" / "results.json").write_text(results)
    resume = ("--resume-from-checkpoint", "last")
    refused("out was trained with learning_rate = 5e-05, not 0.5", *resume, "--learning-rate", 0.5)
    refused("out was trained with beta = 0.9, not 0.5", *resume, "--beta", 0.5)

    swapped = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows()]
    write_jsonl(tmp_path / "pairs.jsonl", swapped)
    refused("out was trained with held-out pairs = ", *resume)
    write_jsonl(tmp_path / "pairs.jsonl", rows())
    torch.manual_seed(9)
    other = make_model()
    other.score.weight.data.add_(1)
    save(other, tmp_path / "model", pad_token="<pad>")
    refused("out was trained with model = ", *resume)


@pytest.mark.parametrize(
    ("name", "is_trial"),
    [
        *((name, True) for name in ("bt", "normbt-margin-out", "bt-lr1e-05-seed42", "normbt-seed43")),
        *((name, False) for name in ("normbt_kernels", "bts", "bt-notes")),
    ],
)
def test_other_folders_in_an_output_folder_are_no_run(tmp_path, name, is_trial):
    (tmp_path / name).mkdir()
    run_folder.check(tmp_path, None)  # empty
    (tmp_path / name / "file").write_text("")
    with pytest.raises(UserError, match=f"already holds {name}: ") if is_trial else nullcontext():
        run_folder.check(tmp_path, None)


def test_a_checkpoint_of_another_model_is_not_continued(checkpoint, tmp_path, capsys):
    assert train("--loss", "bt", "--save-steps", 1) == 0
    (tmp_path / "out" / "bt" / "finished.npz").unlink()
    resume = ("--save-steps", 1, "--resume-from-checkpoint", "out/bt/checkpoint-1")
    for losses, out in ((["normbt"], "out"), (["bt", "normbt"], "out"), (["bt"], "other")):
        assert train("--loss", *losses, *resume, out=out) == 2
        assert "out/bt/checkpoint-1: no checkpoint of " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert train("--loss", "bt", *resume) == 0


def test_a_stopped_run_says_how_to_continue_and_continues(checkpoint, tmp_path, capsys, monkeypatch):
    from normbt_kernels.commands import train as command

    ours = command.make_loss

    def stopped(name, options):
        if name == "normbt":
            raise KeyboardInterrupt
        return ours(name, options)

    monkeypatch.setattr(command, "make_loss", stopped)
    assert train("--loss", "bt", "normbt") == 130
    error = capsys.readouterr().err
    assert "normbt: interrupted" in error
    line = error.strip().splitlines()[-1]
    assert line.startswith("to continue: normbt train --model model")
    assert line.endswith("--resume-from-checkpoint last")
    monkeypatch.setattr(command, "make_loss", ours)
    assert run_cli(*line.removeprefix("to continue: normbt ").split()) == 0
    assert "bt is trained already" in capsys.readouterr().out


def test_a_run_of_several_processes_is_not_continued_by_one(checkpoint, capsys, monkeypatch):
    """A step of two processes has the pairs of two batches."""
    from transformers import TrainingArguments

    from normbt_kernels.commands import train as command

    def stopped(name, options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "world_size", 2)
        patch.setattr(command, "make_loss", stopped)
        assert train() == 130
    assert "to continue: give the same command again, with --resume-from-checkpoint last" in capsys.readouterr().err
    assert train("--resume-from-checkpoint", "last") == 2
    assert "out was trained with processes = 2, not 1" in capsys.readouterr().err


def test_numbers_may_be_infinite(checkpoint, capsys):
    infinite = ("--max-weight", "inf", "--max-grad-norm", "inf")
    assert train(*infinite) == 0
    assert train(*infinite, "--resume-from-checkpoint", "last") == 0
    assert "normbt is trained already" in capsys.readouterr().out
    assert train("--max-weight", "inf", "--resume-from-checkpoint", "last") == 2
    assert "out was trained with max_grad_norm = Infinity, not 1.0" in capsys.readouterr().err


def test_all_held_out_pairs_are_judged_even_if_training_drops_its_last_batch(checkpoint, tmp_path):
    assert train("--dataloader-drop-last", True, "--eval-strategy", "steps", "--eval-steps", 1) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["groups"][0]["num_pairs"] == 10
    assert "eval_accuracy" in results["losses"]["normbt"]["history"][0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--prediction-loss-only True", "leave out --prediction-loss-only True: the report needs all rewards at once"),
        ("--eval-use-gather-object True", "leave out --eval-use-gather-object True"),
        ("--eval-do-concat-batches False", "leave out --eval-do-concat-batches False"),
        ("--batch-eval-metrics True", "leave out --batch-eval-metrics True"),
        ("--label-smoothing-factor 0.1", "use --loss bt-smoothing or normbt-smoothing, with --label-smoothing"),
    ],
)
def test_options_of_trainer_that_leave_nothing_to_report_are_refused(checkpoint, tmp_path, capsys, option, message):
    assert train(*option.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_the_run_continues(checkpoint, capsys):
    """A limit on the size of a file, in the middle of a run: what a full disk does to whoever writes."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))  # less than the model, more than run.json
    try:
        assert train() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith(("normbt: error: ", "to continue: "))]
    assert "cannot be written" in said[0]
    assert "Traceback" not in error
    assert said[1].endswith("--resume-from-checkpoint last")
    assert run_cli(*said[1].removeprefix("to continue: normbt ").split()) == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "x"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_every_librarys_word_for_a_full_disk_is_understood(error):
    assert "cannot be written" in disk_trouble(error)
    assert disk_trouble(RuntimeError("shape mismatch")) is None


def test_a_file_that_may_not_be_opened_is_not_said_to_be_written():
    assert disk_trouble(PermissionError(13, "Permission denied", "weights")) == "weights: Permission denied"


def test_where_nothing_can_be_written_nothing_is_loaded(checkpoint, tmp_path, monkeypatch, capsys):
    from normbt_kernels.commands import train_job

    monkeypatch.setattr(train_job, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    for out, reason in (
        ("file", "is a file, not a folder"),
        ("file/below", "is a file"),
        ("/proc/x", "cannot be written"),
    ):
        assert train(out=out) == 2
        assert reason in capsys.readouterr().err
    write_jsonl(tmp_path / "foreign.jsonl", [{"chosen": "quite other", "rejected": "words than these"}] * 2)
    for command in (["evaluate", "model"], ["diagnose", "--model", "model"]):
        assert run_cli(*command, "--dataset", "foreign.jsonl", "--device", "cpu", "--out", tmp_path / "x.json") == 2
        assert "of the tokens are unknown to the tokenizer" in capsys.readouterr().err
        assert run_cli(*command, "--dataset", "pairs.jsonl", "--device", "cpu", "--out", "/proc/x.json") == 2
        assert "/proc cannot be written" in capsys.readouterr().err
    assert run_cli("export", "model", "file/below") == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_finished_model_keeps_no_checkpoints_unless_they_were_asked_for(checkpoint, tmp_path):
    assert train(out="plain") == 0
    assert not list((tmp_path / "plain").glob("*/checkpoint-*"))
    assert train("--save-steps", 1, out="kept") == 0
    assert len(list((tmp_path / "kept").glob("*/checkpoint-*"))) == 2


# --- the comparison ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_losses_rates_and_seeds_make_a_grid_that_is_compared_pair_by_pair(checkpoint, tmp_path, capsys):
    grid = ("--loss", "bt", "normbt", "--learning-rate", 0.01, 0.1, "--seeds", 2)
    assert train(*grid) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["losses"]) == ["bt 0.01", "normbt 0.01", "bt 0.1", "normbt 0.1"]
    assert results["seeds"] == [42, 43]
    for column in results["losses"].values():
        assert len(column["runs"]) == 2
    differences = results["groups"][0]["difference"]
    assert {name: difference["from"] for name, difference in differences.items()} == {
        "normbt 0.01": "bt 0.01",
        "normbt 0.1": "bt 0.1",
    }
    accuracy = results["groups"][0]["accuracy"]
    mean = differences["normbt 0.1"]["mean"]
    assert mean == pytest.approx(accuracy["normbt 0.1"] - accuracy["bt 0.1"])
    made_from = results["made_from"]
    assert made_from["learning_rate"] == [0.01, 0.1]
    assert {"beta", "eps", "max_weight", "power", "max_length", "model", "training pairs"} <= made_from.keys()
    assert results["command"].startswith("normbt")
    assert "NormBT 0.1 - BT 0.1" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "normbt-lr0.1-seed43")
    assert train(*grid, "--resume-from-checkpoint", "last") == 0
    assert capsys.readouterr().out.count("is trained already") == 7
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["groups"] == results["groups"]


def trained(correct, seed=0, rate=0.1):
    chosen = np.array(correct, dtype=np.float32)
    history = [{"step": 1, "bt_loss": 0.5}, {"step": 2, "bt_loss": 0.4}]
    return report.Trained(chosen, np.full(len(chosen), 0.5), np.arange(len(chosen)), {}, history, 1.0, rate, seed)


@pytest.fixture
def arguments(tmp_path):
    from transformers import TrainingArguments

    return TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])


def test_intervals_and_disagreements_are_as_by_hand(arguments):
    columns = {
        "bt": [trained([1, 1, 0, 0], seed=1), trained([1, 0, 0, 0], seed=2)],
        "normbt": [trained([1, 0, 1, 1], seed=1), trained([1, 1, 1, 0], seed=2)],
    }
    group = report.compare(columns, [{}] * 4, "m", "d", arguments)["groups"][0]
    assert group["accuracy"] == {"bt": 0.375, "normbt": 0.75}
    # differences of the seeds 0.25 and 0.5: mean 0.375, standard error 0.125, t(1) = 12.706
    assert group["difference"]["normbt"] == {
        "from": "bt",
        "mean": 0.375,
        "interval": pytest.approx(12.706 * 0.125),
        "disagree": 2.5,
        "right_where_they_disagree": 2.0,
    }
    one = report.compare({name: runs[:1] for name, runs in columns.items()}, [{}] * 4, "m", "d", arguments)
    # pairs 0, -1, 1, 1: standard deviation 0.9574, over 4 pairs, t(3) = 3.182
    assert one["groups"][0]["difference"]["normbt"]["interval"] == pytest.approx(3.182 * 0.957427 / 2, rel=1e-5)
    assert one["intervals_are"] == "95%, over held-out pairs"


@pytest.mark.slow
def test_a_figure_grows_with_its_categories_and_always_has_a_legend(arguments, tmp_path):
    import matplotlib.image

    heights = []
    for num_categories in (2, 37):
        rows = [{"category": f"c{i % num_categories}"} for i in range(74)]
        columns = {name: [trained([i % 3 > 0 for i in range(74)])] for name in ("bt", "normbt")}
        results = report.compare(columns, rows, "m", "d", arguments)
        report.draw(results, tmp_path / "figure.png")
        heights.append(matplotlib.image.imread(tmp_path / "figure.png").shape[0])
    assert heights[1] > 2 * heights[0]
    line = next(line for line in report.table(results).splitlines() if " c36 " in line)
    assert line.split()[-2:] == ["0.5", "0.5"]  # of two pairs: no third decimal
    columns = {"normbt": [trained([1, 0] * 37)]}
    report.draw(report.compare(columns, rows, "m", "d", arguments), tmp_path / "alone.png")


# --- a look at the data --------------------------------------------------------------------------------------------


def ids(*sides):
    return {"chosen_ids": list(sides[0]), "rejected_ids": list(sides[1])}


def test_the_look_counts_what_a_person_would_want_to_know():
    tokenizer = make_tokenizer(pad_token="<pad>")
    pairs = [ids([6, 7, 8], [6]), ids([6, 7, 8], [6]), ids([6], [6, 7, 8]), ids([9, 2], [10]), ids([9], [9])]
    kept, reasons = LeftOut(3).told([*pairs, ids([6] * 4, [7])])
    assert reasons == ["1 of 6 pairs are longer than 3 tokens", "1 of 6 pairs are the same tokens on both sides"]
    data, lines = look(Prepared(kept, reasons, []), [pairs[3], ids([11], [12])], tokenizer, 3)
    assert data["repeated_pairs"] == 1
    assert data["reversed_pairs"] == 1
    assert data["held_out_pairs_trained_on"] == 1
    assert data["longer_side_chosen"] == 0.75
    assert data["unknown_tokens"] == pytest.approx(1 / 15)
    text = "\n".join(lines)
    assert "4 training pairs, 2 held-out pairs" in text
    assert "1 of 6 pairs are longer than 3 tokens" in text
    assert "held-out pairs that are training pairs too, on which accuracy says nothing: 1" in text
    assert len(lines) <= 10


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([ids([6], [6])], "1 of 1 pairs are the same tokens on both sides$"),
        ([ids([6] * 4, [7])], r"1 of 1 pairs are longer than 3 tokens \(--max-length\)$"),
    ],
)
def test_the_option_is_named_that_left_out_all_pairs(pairs, reason):
    with pytest.raises(UserError, match=f"none of the pairs is left: {reason}"):
        LeftOut(3).told(pairs)


def test_hopeless_data_are_refused():
    tokenizer = make_tokenizer(pad_token="<pad>")
    with pytest.raises(UserError, match="75% of the tokens are unknown to the tokenizer"):
        check_known([ids([2, 2, 6], [2])], tokenizer)
    same = [ids([6], [7]), ids([8], [7])]
    with pytest.raises(UserError, match="every held-out pair is a training pair too"):
        look(Prepared(same, [], []), same, tokenizer, 9)


def test_a_dry_run_looks_and_writes_nothing(checkpoint, tmp_path, capsys):
    assert train("--dry-run") == 0
    assert "30 training pairs, 10 held-out pairs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert train("--eval-dataset", "pairs.jsonl", "--eval-fraction", 0.05, "--dry-run") == 2
    assert "every held-out pair is a training pair too" in capsys.readouterr().err


def test_held_out_pairs_are_drawn_from_those_that_are_short_enough(checkpoint, tmp_path, capsys):
    long = [row | {"chosen": "w1 " * 50} if i % 2 else row for i, row in enumerate(rows())]
    write_jsonl(tmp_path / "pairs.jsonl", long)
    assert train("--max-length", 20, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "15 training pairs, 5 held-out pairs" in printed
    assert "20 of 40 pairs are longer than 20 tokens" in printed
    assert train("--max-length", 20, "--truncate", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "30 training pairs, 10 held-out pairs" in printed
    assert "20 of 40 pairs are cut to 20 tokens" in printed


# --- options -------------------------------------------------------------------------------------------------------


def test_columns_csv_gzip_templates_and_lora_from_the_command_line(checkpoint, tmp_path, capsys):
    import csv
    import gzip

    pytest.importorskip("peft")
    with gzip.open(tmp_path / "pairs.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response_j", "response_k", "margin"])
        writer.writeheader()
        for row in make_rows(12):
            writer.writerow({"response_j": row["chosen"], "response_k": row["rejected"], "margin": "0.5"})
    columns = ("--column", "chosen=response_j", "rejected=response_k")
    lora = ("--lora-r", 2, "--lora-target", "q_proj", "v_proj", "--loss", "bt-margin")
    assert train(*columns, *lora, dataset="pairs.csv.gz") == 0
    config = json.loads((tmp_path / "out" / "bt-margin" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (2, 4, ["q_proj", "v_proj"])
    assert run_cli("evaluate", "out/bt-margin", "--dataset", "pairs.jsonl", "--device", "cpu") == 0

    assert train("--column", "chosen=nothing", out="other") == 2
    assert "pairs.jsonl, row 1: no column 'nothing' (columns: chosen, rejected)" in capsys.readouterr().err
    chat = [{"prompt": [{"role": "user", "content": "w1"}], "chosen": f"w{i}", "rejected": "w2"} for i in range(3, 9)]
    write_jsonl(tmp_path / "chat.jsonl", chat)
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    capsys.readouterr()
    assert train("--chat-template", "template.jinja", "--dry-run", dataset="chat.jsonl", out="other") == 0
    assert "median 2," in capsys.readouterr().out
    assert run_cli("export", "model", "exported", "--chat-template", "template.jinja") == 0
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.chat_template == (tmp_path / "template.jinja").read_text()


def test_power_changes_what_is_trained_and_is_on_record(checkpoint, tmp_path):
    """Power 0 is plain Bradley-Terry."""
    margins = {}
    for power in (0, 2):
        assert train("--loss", "bt", "normbt", "--power", power, "--learning-rate", 0.1, out=str(power)) == 0
        results = json.loads((tmp_path / str(power) / "results.json").read_text())
        assert results["made_from"]["power"] == power
        margins[power] = [results["losses"][loss]["metrics"]["test_margin"] for loss in ("bt", "normbt")]
    assert margins[0][1] == pytest.approx(margins[0][0], rel=1e-5)
    assert margins[2][1] != pytest.approx(margins[2][0], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        (["train", "--leraning-rate", "1"], "--learning-rate"),
        (["train", "--warmup_step", "1"], "--warmup-steps"),
        (["train", "--max-lenght", "1"], "--max-length"),
        (["evaluate", "model", "--dataste", "x"], "--dataset"),
    ],
)
def test_mistyped_options_are_asked_about(arguments, question, capsys):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(run_cli(*arguments))
    assert f"did you mean {question}?" in capsys.readouterr().err


def test_help_and_version_import_no_torch():
    for flag in ("--help", "--version"):
        script = (
            "import sys; from normbt_kernels.commands.cli import main\n"
            f"try: main(['{flag}'])\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "assert 'torch' not in sys.modules"
        )
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
