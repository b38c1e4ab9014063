"""The experiment on pretrained models: its pairs are what its texts say, and it reports what its runs kept."""

import io
import json
import random
import sys
import tarfile

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from bench import pretrained, pretrained_data
from bench.__main__ import main
from normbt_kernels.data import generated

WORDS = list(generated.STYLE_WORDS)


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A source distribution as vaderSentiment's: 60 sentences of each source, two of each review."""
    rng, inner = random.Random(0), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        for word, source in zip(WORDS, pretrained_data.SOURCES, strict=False):
            texts, ratings = [], []
            for number in range(60):
                name, scores = f"{number // 2}_{number % 2}", [rng.randint(-4, 4) for _ in range(3)]
                words = " ".join([word, str(number), *rng.choices(WORDS, k=3)])  # no text occurs twice
                texts.append(f"{name}\t{sum(scores) / 3}\tdouble &#58; {words}\n")
                ratings.append(f"{name}\t{sum(scores) / 3}\t1.0\t{scores}\n")
            texts.append(f"99_1\t0.0\t{'so ' * 30}\n")
            ratings.append("99_1\t0.0\t1.0\t[0, 0, 0]\n")
            for kind, lines in (("GroundTruth", texts), ("anonDataRatings", ratings)):
                add(files, f"hutto_ICWSM_2014/{source}_{kind}.txt", b"\xef\xbb\xbf" + "".join(lines).encode())
    path = tmp_path_factory.mktemp("ratings") / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, mode="w:gz") as outer:
        add(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_sentences_have_their_own_ratings_and_long_ones_are_left_out(archive):
    sentences = pretrained_data.read_sentences(archive, max_words=20)
    assert [len(source) for source in sentences] == [60] * 4
    for sentence in sentences[0]:
        assert sentence.text.startswith("double : ")
        assert len(sentence.ratings) == 3
    halves = [(sentences[0][i].held_out, sentences[0][i + 1].held_out) for i in range(0, 60, 2)]
    assert all(first == second for first, second in halves)  # of one review
    assert {first for first, _ in halves} == {True, False}


def test_held_out_pairs_prefer_the_higher_mean_and_training_pairs_one_persons_word(archive):
    sentences = pretrained_data.read_sentences(archive, max_words=20)
    means = {sentence.text: sentence.mean for source in sentences for sentence in source}
    held_out = {sentence.text for source in sentences for sentence in source if sentence.held_out}
    test = pretrained_data.rated_pairs(sentences, True, 200, 0)
    train = pretrained_data.rated_pairs(sentences, False, 200, 0)
    assert {text for pair in test for text in (pair.chosen, pair.rejected)} <= held_out
    assert not {text for pair in train for text in (pair.chosen, pair.rejected)} & held_out
    for pair in test:
        assert means[pair.chosen] - means[pair.rejected] == pytest.approx(pair.margin)
    right = [means[pair.chosen] > means[pair.rejected] for pair in train]
    assert 0.6 < np.mean(right) < 0.95
    assert train == pretrained_data.rated_pairs(sentences, False, 200, 0)
    assert train != pretrained_data.rated_pairs(sentences, False, 200, 1)


def test_another_file_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, mode="w:gz") as outer:
        add(outer, "vaderSentiment-3.3.2/setup.py", b"")
    with pytest.raises(SystemExit, match="is not the source distribution of vaderSentiment"):
        pretrained_data.read_sentences(path, 20)


def test_rules_give_pairs_of_good_and_bad_code():
    pytest.importorskip("ruff")
    pairs = pretrained_data.rule_pairs(10_000)
    assert len(pairs) > 500
    (found,) = [pair for pair in pairs if pair.rejected == "False if a else True\n"]
    assert found.chosen == "not a\n"


@pytest.mark.slow
def test_it_reports_what_its_runs_kept(archive, tmp_path, monkeypatch, capsys):
    def load(model):
        tokenizer = generated.make_tokenizer()
        return tokenizer, generated.make_model(tokenizer)

    monkeypatch.setattr(pretrained, "load_pretrained", load)
    monkeypatch.setattr(pretrained, "rule_pairs", lambda num_pairs: generated.make_pairs(num_pairs, "code"))
    monkeypatch.setattr(sys, "argv", ["bench", "pretrained"])
    command = ["pretrained", "--ratings", archive, "--model", "minilm", "--seeds", 1, "--learning-rate", 1e-3]
    command += ["--steps", 2, "--test-pairs", 40, "--gradients", 40, "--runs", tmp_path / "runs", "--out", tmp_path]
    assert main([str(word) for word in command]) == 0
    results = json.loads((tmp_path / "pretrained.json").read_text())
    kept = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/*.json")}
    for contender in results["contenders"]:
        test = kept[f"minilm-{contender}-lr0.001-seed0"]["test"]
        accuracy = np.mean(np.array(test["test_chosen"]) > np.array(test["test_rejected"]))
        assert results["learning_rates"]["0.001"]["groups"]["all"]["accuracy"][contender]["mean"] == accuracy
    slopes = {row["point"]: row["slope"] for row in results["slopes"] if row["task"] == "ratings"}
    of_run = kept["minilm-bt-lr0.001-seed0"]["slopes"]
    assert slopes == {point: of["slope"] for point, of in of_run.items()}  # the fresh model is that before training
    assert slopes["end"] != slopes["middle"] != slopes["start"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.json")}
    assert main([str(word) for word in command]) == 0
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.json")}
