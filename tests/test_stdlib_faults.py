"""Pairs from the standard library: one fault each, the same ones each time, and no function in two splits."""

import ast
import difflib
import random
from collections import Counter

import pytest

pytest.importorskip("transformers")

from normbt_kernels.data import stdlib_faults
from normbt_kernels.data.stdlib_faults import faults, functions, split_pairs

SPLITS = ("train", "validation", "test")
KINDS = ("operator", "off by one", "swapped arguments", "wrong variable", "dropped return")


@pytest.fixture(scope="module")
def pairs():
    with pytest.MonkeyPatch.context() as patch:  # more versions of a function are more of the same
        patch.setattr(stdlib_faults, "VERSIONS_OF_A_FUNCTION", 1)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_module_and_no_function_is_in_two_splits(pairs):
    of_split = {split: {pair.where for pair in pairs[split]} for split in SPLITS}
    chosen = {split: {pair.chosen for pair in pairs[split]} for split in SPLITS}
    texts = {split: {ast.unparse(ast.parse(text)) for text in chosen[split]} for split in SPLITS}
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not of_split[first] & of_split[second]
        assert not texts[first] & texts[second]
    counts = Counter(function.source for function in functions())
    assert max(counts.values()) == 1
    assert stdlib_faults.VERSIONS_OF_A_FUNCTION * len(pairs["train"]) > 10_000
    assert len(pairs["test"]) > 500


def test_the_tokenizer_is_trained_and_gives_back_what_it_reads(pairs):
    tokenizer = stdlib_faults.make_tokenizer()
    assert len(tokenizer) == stdlib_faults.VOCABULARY
    lengths = []
    for pair in pairs["test"]:
        ids = tokenizer(pair.chosen)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == pair.chosen
        lengths.append(len(ids))
    assert max(lengths) <= stdlib_faults.MAX_TOKENS
