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
    with pytest.raises(SystemExit, match="need --ratings FILE"):
        pretrained_data.pairs_of("ratings", None)
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, mode="w:gz") as outer:
        add(outer, "vaderSentiment-3.3.2/setup.py", b"")
    with pytest.raises(SystemExit, match="is not the source distribution of vaderSentiment"):
        pretrained_data.read_sentences(path, 20)


def test_rules_give_pairs_of_good_and_bad_code_and_whole_rules_are_held_out():
    pytest.importorskip("ruff")
    train, test = (pretrained_data.rule_pairs(held_out, 10_000, 0) for held_out in (False, True))
    assert len(train) > 1.5 * len(test) > 200
    (found,) = [pair for pair in train + test if pair.rejected == "False if a else True\n"]
    assert found.chosen == "not a\n"
    assert (found in test) == pretrained_data.is_held_out("if-expr-with-false-true")
    assert not {(pair.chosen, pair.rejected) for pair in train} & {(pair.chosen, pair.rejected) for pair in test}
    assert pretrained_data.rule_pairs(False, 50, 0) == train[:50] != pretrained_data.rule_pairs(False, 50, 1)


@pytest.fixture(scope="module")
def measured(archive, tmp_path_factory):
    """Runs the command with what is added to it, in a folder of its own, and gives the folder."""
    folder = tmp_path_factory.mktemp("measured")

    def load(model):
        tokenizer = generated.make_tokenizer()
        return tokenizer, generated.make_model(tokenizer)

    def run(*words):
        command = ["pretrained", "--ratings", archive, "--steps", 2, "--test-pairs", 40, "--gradients", 40, *words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretrained, "load_pretrained", load)
            patch.setattr(pretrained_data, "rule_pairs", lambda held_out, num, seed: generated.make_pairs(num, "code"))
            patch.setattr(sys, "argv", ["bench", "pretrained"])
            assert main([str(word) for word in [*command, "--runs", folder / "runs", "--out", folder]]) == 0
        return folder

    return run


def kept_in(folder, pattern="*"):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob(f"runs/{pattern}/*.json")}


@pytest.mark.slow
def test_it_reports_what_its_runs_kept(measured):
    command = ["--seeds", 1, "--learning-rate", 1e-3]
    folder = measured(*command)
    results, kept = json.loads((folder / "pretrained.json").read_text()), kept_in(folder)
    for contender in results["contenders"]:
        test = kept[f"{contender}-lr0.001-seed0{'-slopes' if contender == 'bt' else ''}"]["test"]
        accuracy = np.mean(np.array(test["test_chosen"]) > np.array(test["test_rejected"]))
        assert results["learning_rates"]["0.001"]["groups"]["all"]["accuracy"][contender]["mean"] == accuracy
    slopes = {row["point"]: row["slope"] for row in results["slopes"]}
    assert slopes == {"start": kept["start"]["slope"]} | {
        point: of["slope"] for point, of in kept["bt-lr0.001-seed0-slopes"]["slopes"].items()
    }
    assert slopes["end"] != slopes["middle"] != slopes["start"]
    assert results["choice"] is None
    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json")}
    measured(*command)
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json")}


@pytest.mark.slow
def test_seeds_that_choose_a_learning_rate_are_not_reported_at_it(measured):
    rates = (1e-3, 1e-5)
    folder = measured("--loss", "normbt", "--seeds", 2, "--learning-rate", *rates)
    kept = kept_in(folder)

    def accuracy(rate, seed):
        test = kept[f"normbt-lr{rate:g}-seed{seed}"]["test"]
        return np.mean(np.array(test["test_chosen"]) > np.array(test["test_rejected"]))

    choice = json.loads((folder / "pretrained.json").read_text())["choice"]
    assert (choice["seeds"], choice["seeds_reported"]) == ([1], [0])
    rate = max(rates, key=lambda rate: accuracy(rate, 1))
    assert choice["learning_rates"]["normbt"] == rate
    assert choice["groups"]["all"]["accuracy"]["normbt"]["mean"] == accuracy(rate, 0)


@pytest.mark.slow
def test_without_a_loss_it_only_diagnoses_and_texts_keep_their_runs_apart(measured):
    folder = measured("--texts", "rules", "--model", "smollm2", "--loss")
    results = json.loads((folder / "pretrained.json").read_text())
    assert (results["contenders"], results["learning_rates"]) == ([], {})
    assert list(kept_in(folder, "smollm2-rules-*")) == ["start"]
    assert [row["point"] for row in results["slopes"]] == ["start"]
