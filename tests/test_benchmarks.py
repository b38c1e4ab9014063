"""RewardBench 2, RM-Bench and JudgeBench: counted as their papers count, by hand; and the command, end to end."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from normbt_kernels.commands import cli
from normbt_kernels.errors import UserError
from normbt_kernels.evaluation import judgebench, rewardbench2, rm_bench
from normbt_kernels.evaluation.questions import Question
from tests.test_evaluate import save
from tests.tiny_classifiers import make_model


def question(subset, num_answers, num_right=1, name="0"):
    return Question("w1", ("w2",) * num_answers, num_right, subset, name, "row 1")


def arrays(*rewards):
    return [np.array(of_answers, dtype=np.float32) for of_answers in rewards]


def scores(report):
    return {name: of_columns for name, _, of_columns in report.rows}


# --- counting ----------------------------------------------------------------------------------------------------


def test_best_of_four_is_right_only_strictly_above_all_others():
    questions = [question("Math", 4)] * 3 + [question("Focus", 4)]
    rewards = arrays([2, 1, 0, -1], [2, 2, 0, -1], [2, 1, 3, -1], [0.5, 0, 0, 0])
    report = rewardbench2.count(questions, rewards)
    assert scores(report) == {"Math": (1 / 3,), "Focus": (1.0,)}
    assert report.overall == (pytest.approx(2 / 3),)
    assert report.num_ties == 1


def test_ties_score_by_hand():
    questions = [
        question("Ties", 3, 1, "ref:7"),  # margin 1.75 - 1 = 0.75
        question("Ties", 4, 2, "tied:7"),  # right 4 and 3, wrong 1 and 0: spread 1, margin 2
        question("Ties", 2, 1, "ref:8"),  # margin 0.5
        question("Ties", 3, 2, "tied:8"),  # right 5 and 3, wrong 2.5: spread 2, margin 0.5
        question("Ties", 2, 1, "ref:9"),  # margin -1: not accurate, and without its ties
    ]
    rewards = arrays([1.75, 1, 0], [4, 3, 1, 0], [1, 0.5], [5, 3, 2.5], [0, 1])
    by_hand = (
        0.3 * 2 / 2  # tied: both accurate
        + 0.3 * 2 / 3  # references
        + 0.2 * 1 / 2  # margin > spread: 2 > 1, but not 0.5 > 2
        + 0.2 * 0 / 2  # neither min(0.75, 2) > 1 nor min(0.5, 0.5) > 2
        + 0.01 * (math.tanh(0.75 / 1 - 1) + math.tanh(0.5 / 2 - 1)) / 2
    )
    assert rewardbench2.ties_score(questions, rewards) == pytest.approx(by_hand, abs=1e-7)
    assert scores(rewardbench2.count(questions, rewards))["Ties"] == (pytest.approx(by_hand, abs=1e-7),)


@pytest.mark.parametrize("place", [("ref:7", 1), ("tied:7", 0), ("tied:7", 2)], ids=["ref", "right", "wrong"])
def test_a_reward_in_ties_that_is_not_a_number_wins_no_comparison(place):
    questions = [
        question("Ties", *shape) for shape in ((2, 1, "ref:7"), (3, 2, "tied:7"), (2, 1, "ref:8"), (3, 2, "tied:8"))
    ]
    # prompt 7: margins 5 and 2, spread 1; prompt 8: margins 0.5, spread 2
    rewards = {"ref:7": [6, 1], "tied:7": [4, 3, 1], "ref:8": [1, 0.5], "tied:8": [5, 3, 2.5]}
    name, answer = place
    rewards[name][answer] = math.nan
    is_ref = name.startswith("ref")
    by_hand = 0.3 * (2 if is_ref else 1) / 2 + 0.3 * (1 if is_ref else 2) / 2 + 0.2 * is_ref / 2
    report = rewardbench2.count(questions, arrays(*rewards.values()))
    assert scores(report)["Ties"] == (pytest.approx(by_hand + 0.01 * math.tanh(0.5 / 2 - 1), abs=1e-7),)
    assert report.num_nan == 1


def test_rm_bench_by_hand():
    # Concise, detailed and Markdown answers. Rows of right[i, j]: chosen style i > rejected style j.
    rewards = arrays(
        [1, 2, 3, 0, 2, 4],  # 1 > 0 | 2 > 0 | 3 > 0, 3 > 2: diagonal 1, below 3 of 3, above 0; one tie
        [5, 5, 5, 0, 0, 0],  # all right
        [0, 0, 0, 1, 1, 1],  # all wrong
    )
    questions = [question("chat", 6, 3), question("safety-refuse", 6, 3), question("safety-response", 6, 3)]
    report = rm_bench.count(questions, rewards)
    assert report.columns == ("easy", "normal", "hard", "mean")
    assert scores(report)["chat"] == pytest.approx((1.0, 1 / 3, 0.0, 4 / 9))
    assert scores(report)["safety-refuse"] == (1.0, 1.0, 1.0, 1.0)
    # safety is one domain: half of it is right
    assert report.overall == pytest.approx((0.75, (1 / 3 + 0.5) / 2, 0.25, (4 / 9 + 0.5) / 2))
    assert report.overall_is == "mean of 2 domains"
    assert report.num_ties == 1


def test_judgebench_by_hand():
    questions = [question(name, 2) for name in ("math", "knowledge", "math", "math")]
    report = judgebench.count(questions, arrays([1, 0], [0, 1], [1, 1], [math.nan, 0]))
    assert scores(report) == {"knowledge": (0.0,), "math": (pytest.approx(1 / 3),)}
    assert report.overall == (0.25,)
    assert (report.num_ties, report.num_nan) == (1, 1)


# --- rows --------------------------------------------------------------------------------------------------------

TWO = {"id": "1", "prompt": "w1", "chosen": ["w2"], "rejected": ["w3", "w4", "w5"], "subset": "Math"}
RM = {"id": "1", "prompt": "w1", "chosen": ["w2", "w3", "w4"], "rejected": ["w5", "w6", "w7"], "domain": "chat"}
JUDGE = {
    "pair_id": "1",
    "source": "mmlu-pro-law",
    "question": "w1",
    "response_A": "w2",
    "response_B": "w3",
    "label": "B>A",
}


def test_the_right_answer_comes_first():
    assert judgebench.parse(JUDGE, "row 1").answers == ("w3", "w2")
    assert judgebench.parse(JUDGE | {"label": "A>B"}, "row 1").answers == ("w2", "w3")
    assert judgebench.parse(JUDGE, "row 1").subset == "knowledge"
    assert rewardbench2.parse(TWO, "row 1").answers == ("w2", "w3", "w4", "w5")
    assert rm_bench.parse(RM, "row 1").answers == ("w2", "w3", "w4", "w5", "w6", "w7")


@pytest.mark.parametrize(
    ("parse", "row", "words"),
    [
        (rewardbench2.parse, {"id": "1"}, "no column 'chosen'"),
        (rewardbench2.parse, TWO | {"rejected": []}, "needs answers in both"),
        (rewardbench2.parse, TWO | {"chosen": ["w2", "w3"]}, "Math has one right answer, got 2"),
        (rewardbench2.parse, TWO | {"subset": "Ties"}, "'ref:N' or 'tied:N', got '1'"),
        (rewardbench2.parse, TWO | {"chosen": "w2"}, "'chosen' must be a list of texts"),
        (rm_bench.parse, RM | {"chosen": ["w2"]}, "needs 3 styles on both sides, got 1 and 3"),
        (judgebench.parse, JUDGE | {"label": "tie"}, "'label' must be one of A>B, B>A, got 'tie'"),
        (judgebench.parse, JUDGE | {"source": "mine"}, "'source' must begin with one of mmlu-pro"),
        (judgebench.parse, ["w1"], "not an object with columns, but list"),
    ],
)
def test_a_row_of_something_else_is_refused_by_name(parse, row, words):
    with pytest.raises(UserError) as error:
        parse(row, "data.jsonl, row 3")
    assert words in str(error.value)
    assert str(error.value).startswith("data.jsonl, row 3: ")


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(make_model("llama"), tmp_path_factory.mktemp("checkpoint"), pad_token="<pad>")


def own_reward(checkpoint, prompt, answer):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    ids = tokenizer(f"user : {prompt} <eos> assistant : {answer} <eos>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.item()


@pytest.mark.slow
def test_the_command_scores_each_answer_by_the_models_own_logits(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    texts = [[f"w{i}" for i in rng.integers(1, 20, 5)] for _ in range(7)]
    rows = [TWO | {"id": str(n), "prompt": p, "chosen": [c], "rejected": rest} for n, (p, c, *rest) in enumerate(texts)]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, TWO | {"id": "long", "prompt": "w1 " * 90}]))
    command = ["evaluate", checkpoint, "--benchmark", "rewardbench2", "--dataset", data, "--out", out]
    assert cli.main([*map(str, command), "--max-length", "50", "--batch-size", "2"]) == 0
    report = json.loads(out.read_text())
    right = []
    for row in rows:
        chosen, *rejected = (own_reward(checkpoint, row["prompt"], text) for text in row["chosen"] + row["rejected"])
        right.append(chosen > max(rejected))
    assert 0 < sum(right) < len(right)
    assert report["overall"] == {"score": pytest.approx(np.mean(right))}
    assert report["rows"] == {"Math": {"num_questions": 7, "score": pytest.approx(np.mean(right))}}
    assert report["num_left_out"] == 1
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "RewardBench 2" in printed
    assert "Left out 1 questions longer than 50 tokens." in printed


@pytest.mark.parametrize("judged", [["--benchmark", "rm-bench"], []], ids=["benchmark", "pairs"])
def test_a_token_that_the_model_has_no_embedding_for_is_refused(tmp_path, capsys, judged):
    folder, data = save(make_model("llama", vocab_size=11), tmp_path, pad_token="<pad>"), tmp_path / "data.json"
    data.write_text(json.dumps([RM if judged else {"chosen": "w1 w2", "rejected": "w1 w5"}]))
    assert cli.main(["evaluate", str(folder), "--dataset", str(data), *judged]) == 2
    assert "'rejected_ids' has the token 11, but the model has embeddings for 11" in capsys.readouterr().err


@pytest.mark.parametrize(("benchmark", "row"), [("rm-bench", RM), ("judgebench", JUDGE)])
def test_the_command_takes_every_benchmark_by_name(checkpoint, tmp_path, capsys, benchmark, row):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([row]))
    assert cli.main(["evaluate", str(checkpoint), "--benchmark", benchmark, "--dataset", str(data)]) == 0
    assert "overall" in capsys.readouterr().out
