"""`normbt diagnose`: gradient norms against naive loops, and the command itself."""

import json
import os
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM

from normbt_kernels import linear_normbt_loss
from normbt_kernels.commands import cli
from normbt_kernels.commands import diagnose as command
from normbt_kernels.data import generated
from normbt_kernels.data.built_in import GENERATED
from normbt_kernels.data.tokens import LeftOut, prepare, tokenize
from normbt_kernels.diagnostics import diagnose, measure
from normbt_kernels.diagnostics.measure import spread_evenly
from tests.processes import Command
from tests.tiny_classifiers import gradients, make_model
from tests.tiny_pairs import make_rows, make_tokenizer

pytestmark = pytest.mark.usefixtures("empty_figures")  # in this process; the command draws its own

EPS, MAX_WEIGHT = 1e-6, 100.0


def naive(model, rows):
    """Distances (P,), and for the head and the backbone the BT gradient norms (P,): each sequence alone, one backward
    of the BT loss per pair, parameters split by name."""
    head_name = "score." if hasattr(model, "score") else "classifier."
    distances, norms = [], {"head": [], "backbone": []}
    model.eval()
    for row in rows:
        seen = []
        hook = getattr(model, head_name[:-1]).register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
        chosen, rejected = (
            model(input_ids=torch.as_tensor(row[name])[None].long()).logits[0, 0]
            for name in ("chosen_ids", "rejected_ids")
        )
        hook.remove()
        last = [hidden[0, -1] if hidden.dim() == 3 else hidden[0] for hidden in seen]
        distances.append((last[0] - last[1]).norm().item())
        (-logsigmoid(chosen - rejected)).backward()
        found = gradients(model)
        for part in norms:
            ours = [g for name, g in found.items() if name.startswith(head_name) == (part == "head")]
            norms[part].append(torch.cat([gradient.flatten().double() for gradient in ours]).norm().item())
    return np.array(distances), {part: np.array(values) for part, values in norms.items()}


# --- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "padding_side"),
    [("llama", "right"), ("llama", "left"), ("qwen2", "right"), ("qwen2", "left"), ("bert", "right")],
)
@pytest.mark.slow
def test_gradients_agree_with_one_backward_per_pair(architecture, padding_side):
    model = make_model(architecture)
    rows = make_rows(11)
    for row in rows:  # with and without padding
        row["rejected_ids"] = row["rejected_ids"][: len(row["chosen_ids"])]
    found = diagnose(model, make_tokenizer(padding_side), rows, num_gradients=11, batch_size=4)
    distance, norms = naive(model, rows)
    exact_distance, exact_norms = naive(make_model(architecture, torch.float64), rows)
    assert_as_good_as(found.distance, distance, exact_distance)
    for part in ("head", "backbone"):
        pairs = found.members(part)
        bt, normbt = (np.exp(found.log_gradient(part, power)) for power in (0, 1))
        assert_as_good_as(bt, norms[part][pairs], exact_norms[part][pairs])
        weight, exact_weight = (np.minimum(d.mean() / (d + EPS), MAX_WEIGHT) for d in (distance, exact_distance))
        assert_as_good_as(normbt, (weight * norms[part])[pairs], (exact_weight * exact_norms[part])[pairs])


def assert_as_good_as(found, naive, exact):
    """The largest relative error is at most twice that of the naive loop in fp32, plus 4 steps of fp32."""
    error, error_of_naive = (np.abs(values / exact - 1).max() for values in (found, naive))
    assert error <= 2 * error_of_naive + 4 * np.finfo(np.float32).eps


def test_gradients_are_taken_one_pair_at_a_time():
    """So that memory holds one pair's activations, whatever `batch_size` is."""
    model, batches = make_model("llama"), {False: [], True: []}
    model.register_forward_pre_hook(
        lambda module, args, inputs: batches[torch.is_grad_enabled()].append(len(inputs["input_ids"])), with_kwargs=True
    )
    diagnose(model, make_tokenizer(), make_rows(10), num_gradients=7, batch_size=4)
    assert batches == {False: [8, 8, 4], True: [2] * 7}


def test_the_weights_are_those_of_a_step_of_normbt():
    """One backward of the package's own loss per pair, with the same mu and cap."""
    model, rows = make_model("llama"), make_rows(5)
    found = diagnose(model, make_tokenizer(), rows, num_gradients=5, max_weight=1.2)
    assert (found.weight(1) == 1.2).any()
    assert (found.weight(1) < 1.2).any()
    for i, row in enumerate(rows):
        ids = [torch.as_tensor(row[name])[None] for name in ("chosen_ids", "rejected_ids")]
        hidden = torch.cat([model.model(input_ids=tensor).last_hidden_state[:, -1] for tensor in ids])
        linear_normbt_loss(hidden, model.score.weight, found.mu, max_weight=1.2).backward()
        norm = torch.cat([g.flatten() for name, g in gradients(model).items() if name != "score.weight"]).norm().item()
        at = found.sample.tolist().index(i)
        assert np.exp(found.log_gradient("backbone", 1))[at] == pytest.approx(norm, rel=2e-5)


def test_frozen_weights_are_no_part_of_the_gradient():
    model, rows = make_model("llama"), make_rows(12)
    model.model.embed_tokens.requires_grad_(False)
    found = diagnose(model, make_tokenizer(), rows)
    _, norms = naive(model, rows)
    np.testing.assert_allclose(np.exp(found.log_gradient("backbone", 0)), norms["backbone"][found.sample], rtol=2e-5)


def test_confident_pairs_do_not_underflow():
    model, rows = make_model("llama"), make_rows(30)
    with torch.no_grad():
        model.score.weight *= 300
    found = diagnose(model, make_tokenizer(), rows)
    assert np.abs(found.difference).max() > 200  # where 1 - sigma is 0 in fp32
    assert np.isfinite(found.log_gradient("backbone", 0)).all()
    assert found.slope("head", 0).slope == 1


def test_the_model_is_left_as_it_was():
    model = make_model("llama").train()
    model.model.layers[0].eval()
    model.score.weight.grad = torch.ones_like(model.score.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diagnose(model, make_tokenizer(), make_rows(12))
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert not model.score._forward_pre_hooks
    assert torch.equal(model.score.weight.grad, torch.ones_like(model.score.weight))
    assert all(parameter.grad is None for parameter in model.model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_bf16_models_are_read_in_fp32():
    model = make_model("llama", torch.bfloat16)
    ids = torch.randint(2, 32, (80, 7), generator=torch.Generator().manual_seed(0))
    rows = [
        {"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in zip(ids[:40], ids[40:], strict=True)
    ]
    found = diagnose(model, make_tokenizer(), rows, num_gradients=10, batch_size=40)
    with torch.no_grad():
        hidden = model.eval().model(ids).last_hidden_state[:, -1]
        rewards = hidden.float() @ model.score.weight[0].float()
        logits = model(ids).logits.float().squeeze(1)
    np.testing.assert_allclose(found.difference, rewards[:40] - rewards[40:], atol=2e-6)
    assert np.abs(found.difference - (logits[:40] - logits[40:]).numpy()).max() > 1e-3
    assert (found.sensitivity > 0).all()


def test_the_sample_is_spread_over_the_distances():
    distance = np.random.default_rng(0).permutation(1000).astype(float)
    sample = spread_evenly(distance, 40)
    assert np.bincount((distance[sample] // 250).astype(int)).tolist() == [10, 10, 10, 10]
    assert sorted(spread_evenly(distance[:7], 40)) == list(range(7))
    assert len(set(spread_evenly(distance, 999))) == 999


def test_text_and_token_ids_give_the_same():
    tokenizer = generated.make_tokenizer()
    torch.manual_seed(0)
    model = generated.make_model(tokenizer)
    pairs = generated.make_pairs(24, seed="any")
    texts = [{"chosen": pair.chosen, "rejected": pair.rejected, "subset": pair.category} for pair in pairs]
    ids = tokenize(pairs, tokenizer)
    first, second = (diagnose(model, tokenizer, rows, num_gradients=6) for rows in (texts, ids))
    assert first.summary() == second.summary()
    assert {category["name"] for category in first.summary()["categories"]} == {pair.category for pair in pairs}


def train_only_what_is_unused(model):
    model.requires_grad_(False)
    model.unused = torch.nn.Linear(2, 2)
    model.score.requires_grad_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.model.requires_grad_(False), "every weight but the head's is frozen"),
        (lambda model: model.score.weight.data.fill_(float("nan")), "the reward or distance of pair 1 is not finite"),
        (lambda model: model.model.norm.weight.data.zero_(), "the same hidden state in every pair"),
        (train_only_what_is_unused, "no trained weight of the backbone changes a reward"),
        (lambda model: setattr(model, "score", torch.nn.Linear(16, 2)), "no Linear layer with one output"),
    ],
)
def test_models_that_cannot_be_diagnosed(change, message):
    model = make_model("llama")
    change(model)
    with pytest.raises(ValueError, match=message):
        diagnose(model, make_tokenizer(), make_rows(4))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "there are no pairs"),
        ([{"chosen": "a"}], {}, "pairs, row 1: no column 'rejected'"),
        ([{"chosen_ids": [5, 32], "rejected_ids": [6]}], {}, "row 1: 'chosen_ids' has the token 32, but the model has"),
        (make_rows(3), {"max_length": 2}, "3 of 3 pairs are longer than 2 tokens"),
        (make_rows(3), {"num_gradients": 0}, "at least 1, got 0 and 8"),
        (make_rows(3), {"eps": 0.0}, "above 0, got 0.0 and 100.0"),
        (make_rows(3), {"max_weight": -1.0}, "above 0, got 1e-06 and -1.0"),
    ],
)
def test_pairs_that_cannot_be_diagnosed(rows, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(make_model("llama"), make_tokenizer(), rows, **options)


# --- the command ---------------------------------------------------------------------------------------------------


def run_cli(*arguments):
    return cli.main(["diagnose", *map(str, arguments)])


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    """`normbt diagnose`, in its own process."""
    folder = tmp_path_factory.mktemp("built_in")
    process = Command("tests.diagnosis_of_few_pairs", cwd=folder)
    assert process.wait() == 0, process.errors
    return folder, process, json.loads((folder / "normbt-diagnosis.json").read_text())


@pytest.mark.slow
def test_on_the_built_in_model_the_heads_slope_is_1_under_bt_and_0_under_normbt(built_in):
    _, process, report = built_in
    head, backbone = report["slopes"]["head"], report["slopes"]["backbone"]
    assert head["bt"]["slope"] == 1
    assert head["bt"]["high"] - head["bt"]["low"] <= 0.0002
    assert head["normbt"]["slope"] == pytest.approx(0, abs=2e-3)  # a pair or two reach the cap
    assert head["bt"]["num_pairs"] == head["normbt"]["num_pairs"] == 1000
    # Measured, not known: but the gradient of the backbone grows with the distance, and its interval says how sure.
    assert 0 < backbone["bt"]["low"] < backbone["bt"]["slope"] < backbone["bt"]["high"]
    assert backbone["normbt"]["slope"] == pytest.approx(backbone["bt"]["slope"] - 1, abs=2e-3)
    assert backbone["bt"]["num_pairs"] == report["num_gradients"] == 256
    assert report["recommended_power"] == pytest.approx(backbone["bt"]["slope"], abs=0.005)
    assert backbone["recommended"]["low"] <= 0 <= backbone["recommended"]["high"]
    for slopes in (head, backbone):
        for slope in slopes.values():
            assert f"{slope['slope']:.3f} [{slope['low']:.3f}, {slope['high']:.3f}]" in process.output


@pytest.mark.slow
def test_the_built_in_diagnosis_is_whole_in_table_json_and_figure(built_in):
    folder, process, report = built_in
    assert sorted(path.name for path in folder.iterdir()) == ["normbt-diagnosis.json", "normbt-diagnosis.png"]
    assert (folder / "normbt-diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert "backbone gradients" in process.errors  # the progress bar
    assert process.output.splitlines()[-3] == report["sentence"]
    factor = 2 ** report["slopes"]["backbone"]["bt"]["slope"]
    assert f"a pair twice as far apart has {factor:.2f} times the gradient under BT" in report["sentence"]
    assert [category["name"] for category in report["categories"]] == ["coarse: noisy style", "fine: one wrong token"]
    assert report["categories"][0]["accuracy"] > 0.75  # it is trained
    for category in report["categories"]:
        row = next(line for line in process.output.splitlines() if line.startswith(category["name"]))
        for part in ("head", "backbone"):
            for loss in ("bt", "normbt", "recommended"):
                assert f"{category['share_of_gradient'][part][loss]:.1%}" in row
    shares = report["distance_quartiles"]["share_of_gradient"]
    for part in ("head", "backbone"):
        for loss in ("bt", "normbt", "recommended"):
            assert sum(shares[part][loss]) == pytest.approx(1)
            assert sum(category["share_of_gradient"][part][loss] for category in report["categories"]) == pytest.approx(
                1
            )
    assert shares["backbone"]["bt"][0] < shares["backbone"]["recommended"][0] < shares["backbone"]["normbt"][0]
    assert sum(cell["num_pairs"] for cell in report["bins"]["cells"]) == 1000
    assert sum(cell["num_gradients"] for cell in report["bins"]["cells"]) == 256


def test_the_built_in_model_is_trained_with_plain_bt(monkeypatch):
    """Without the margins that its pairs have."""
    calls = []

    class Watched(command.LinearNormBTLoss):
        def forward(self, hidden, weight, bias=None, **options):
            loss, stats = super().forward(hidden, weight, bias, **options)
            calls.append((hidden.double() @ weight[0].double(), loss.double()))
            return loss, stats

    monkeypatch.setattr(command, "LinearNormBTLoss", Watched)
    monkeypatch.setattr(command, "FEW_STEPS", 2)
    monkeypatch.setattr(generated, "NUM_TRAIN_PAIRS", 64)
    command._half_trained(GENERATED, generated.make_tokenizer(), "cpu")
    assert len(calls) == 2
    for rewards, loss in calls:
        chosen, rejected = rewards.chunk(2)
        torch.testing.assert_close(loss, -logsigmoid(chosen - rejected).mean(), rtol=1e-6, atol=0)


def write_pairs(path, num_pairs=40):
    pairs = generated.make_pairs(num_pairs, seed="any")
    rows = [{"chosen": pair.chosen, "rejected": pair.rejected, "subset": pair.category} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_checkpoint_and_a_file(tmp_path, built_in_checkpoint, capsys):
    data = write_pairs(tmp_path / "pairs.jsonl")
    options = ("--num-gradients", 12, "--max-length", 14, "--out", tmp_path / "mine.json")
    assert run_cli("--model", built_in_checkpoint, "--dataset", data, *options) == 0
    report = json.loads((tmp_path / "mine.json").read_text())
    assert report["num_pairs"] + report["num_left_out"] == 40
    assert report["num_left_out"] > 0
    left_out = f"{report['num_left_out']} too long or identical left out; backbone gradients of 12"
    assert left_out in capsys.readouterr().out
    assert (tmp_path / "mine.png").exists()

    tokenizer, model = generated.make_tokenizer(), make_built_in_model()
    rows = prepare(generated.make_pairs(40, seed="any"), tokenizer, LeftOut(14)).rows
    expected = diagnose(model, tokenizer, rows, num_gradients=12)
    sample, expected = report["sample"], expected.summary()["sample"]
    assert {name: sample[name] for name in sample if name != "pair"} == {
        name: expected[name] for name in sample if name != "pair"
    }
    # A pair's number is its place in the file, and the ones left out are counted.
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lengths = [
        max(len(tokenizer(lines[number - 1][side])["input_ids"]) for side in ("chosen", "rejected"))
        for number in sample["pair"]
    ]
    assert sample["pair"] != expected["pair"]
    assert max(lengths) <= 14


def make_built_in_model():
    torch.manual_seed(0)
    return generated.make_model(generated.make_tokenizer())


def test_a_causal_lm_is_diagnosed_with_a_new_head(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generated, "NUM_EVAL_PAIRS", 40)
    tokenizer = generated.make_tokenizer()
    LlamaForCausalLM(make_built_in_model().config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    assert run_cli("--model", tmp_path / "lm", "--num-gradients", 4, "--out", tmp_path / "lm.json") == 0
    assert "its reward head is new" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
@pytest.mark.slow
def test_a_killed_run_is_continued(tmp_path, built_in_checkpoint, monkeypatch):
    arguments = (
        "--model",
        built_in_checkpoint,
        "--dataset",
        write_pairs(tmp_path / "pairs.jsonl", 60),
        "--num-gradients",
        60,
    )
    partial = tmp_path / ".out.json.partial.gradients"
    process = Command("normbt_kernels", "diagnose", *arguments, "--out", "out.json", cwd=tmp_path)
    process.wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 10)
    process.kill()
    assert not list(tmp_path.glob("out.*"))
    num_kept = partial.read_bytes().count(b"\n") - 1
    assert num_kept < 60

    measured = []
    monkeypatch.setattr(
        measure._Probe,
        "gradient_norm",
        lambda self, pair, weights, original=measure._Probe.gradient_norm: (
            measured.append(pair) or original(self, pair, weights)
        ),
    )
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments, "--out", "out.json") == 0
    assert len(measured) == 60 - num_kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png", "pairs.jsonl"]
    assert run_cli(*arguments, "--out", "again.json") == 0
    continued, whole = (json.loads((tmp_path / name).read_text())["sample"] for name in ("out.json", "again.json"))
    assert continued["pair"] == whole["pair"]
    assert continued["backbone_gradient"]["bt"] == pytest.approx(whole["backbone_gradient"]["bt"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "good.jsonl"], "--dataset needs a --model"),
        (["--model", "MODEL", "--dataset", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--model", "MODEL", "--dataset", "bad.jsonl"], "bad.jsonl, row 2: no column 'rejected'"),
        (["--model", "./nowhere", "--dataset", "good.jsonl"], "./nowhere: "),
        (["--model", "MODEL", "--dataset", "good.jsonl", "--max-length", "2"], "4 of 4 pairs are longer than 2 tokens"),
        (
            ["--model", "MODEL", "--dataset", "bad.jsonl", "--dataset-split", "a"],
            "--dataset-split is for the hub, and bad",
        ),
        (["--out", "results.txt"], "ends in .json"),
        (["--device", "toaster"], "--device toaster: "),
    ],
)
def test_mistakes_are_said_in_one_line_before_any_work(
    tmp_path, built_in_checkpoint, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_half_trained", lambda *args: pytest.fail("a model was trained"))
    monkeypatch.setattr(command, "load_model", lambda *args: pytest.fail("a model was loaded"))
    write_pairs(tmp_path / "good.jsonl", 4)
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a"}\n')
    assert run_cli(*(built_in_checkpoint if argument == "MODEL" else argument for argument in arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "normbt: error: " in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.glob("normbt-diagnosis*"))


def test_without_matplotlib_there_is_no_figure(tmp_path, built_in_checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    assert run_cli("--model", built_in_checkpoint, "--dataset", data, "--out", tmp_path / "out.json") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "pairs.jsonl"]
    assert "no figure: it needs matplotlib" in capsys.readouterr().out


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    options = (
        "model",
        "dataset",
        "dataset-split",
        "num-gradients",
        "batch-size",
        "max-length",
        "device",
        "dtype",
        "out",
    )
    for word in (*(f"--{option} " for option in options), "normbt-diagnosis.json", "category or subset", "to continue"):
        assert word in printed
