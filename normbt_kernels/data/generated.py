"""The built-in default: a reward model of 0.1M parameters and preference pairs of two kinds.

Each answer doubles two numbers and has a few style words:

    double : well 17 = 34 ; um 5 = 10 ;

    fine    the same answer with one wrong result                          never mislabelled
    coarse  the same results in another style, the better style preferred  labels drawn from Bradley-Terry

The losses that use a margin take the difference in rating: 1 for a wrong result, otherwise the difference in style.

A fine pair differs in one token, so its answers lie close together in the hidden space. A coarse pair differs in many
tokens, so its answers lie far apart. This is the situation of the paper: plain BT scales the gradient of a pair by its
distance, and the coarse pairs with their noisy labels drown the fine ones.
"""

from __future__ import annotations

import math
import random
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from normbt_kernels.data.checkpoints import new_llama
from normbt_kernels.data.preferences import Preference

NUMBERS = range(50)
STEPS = 2
# The value of each style word. The style of an answer is worth the sum of its words.
STYLE_WORDS = {
    "thanks": 1.0,
    "okay": 0.7,
    "so": 0.4,
    "well": 0.1,
    "um": -0.1,
    "like": -0.4,
    "uh": -0.7,
    "whatever": -1.0,
}
STYLE_SHARPNESS = 2.0  # P(label is right) = sigmoid(sharpness * difference in style)
MAX_STYLE_WORDS = 4

NUM_TRAIN_PAIRS = 8000
NUM_EVAL_PAIRS = 2000

# TrainingArguments of the default, unless the command line says otherwise.
TRAINING_DEFAULTS: dict[str, Any] = {
    "max_steps": 800,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 250,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 80,
    "logging_steps": 20,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


def split_pairs(split: str, seed: int) -> list[Preference]:
    """Training pairs that differ with the seed, and validation and test pairs that do not."""
    if split == "train":
        return make_pairs(NUM_TRAIN_PAIRS, f"training {seed}")
    return make_pairs(NUM_EVAL_PAIRS, {"validation": "validation", "test": "held-out"}[split])


def make_pairs(num_pairs: int, seed: str) -> list[Preference]:
    """`num_pairs` pairs, coarse and fine by turns; the same ones for the same seed."""
    rng = random.Random(seed)  # a text, because Random(-1) draws what Random(1) draws
    return [_fine_pair(rng) if i % 2 else _coarse_pair(rng) for i in range(num_pairs)]


def _fine_pair(rng: random.Random) -> Preference:
    numbers, style = _numbers(rng), _style(rng)
    right = [2 * number for number in numbers]
    wrong = list(right)
    position = rng.randrange(STEPS)
    wrong[position] = rng.choice([2 * number for number in NUMBERS if number != numbers[position]])
    places = _places(style, rng)  # the same ones in both: the pair differs in one token
    return Preference(
        _text(numbers, right, style, places),
        _text(numbers, wrong, style, places),
        margin=1.0,
        category="fine: one wrong token",
    )


def _coarse_pair(rng: random.Random) -> Preference:
    numbers = _numbers(rng)
    results = [2 * number for number in numbers]
    first, second = _style(rng), _style(rng)
    difference = sum(map(STYLE_WORDS.get, first)) - sum(map(STYLE_WORDS.get, second))
    if rng.random() > 1 / (1 + math.exp(-STYLE_SHARPNESS * difference)):
        first, second = second, first
    chosen, rejected = (_text(numbers, results, style, _places(style, rng)) for style in (first, second))
    return Preference(chosen, rejected, margin=abs(difference), category="coarse: noisy style")


def _numbers(rng: random.Random) -> list[int]:
    return [rng.choice(NUMBERS) for _ in range(STEPS)]


def _style(rng: random.Random) -> list[str]:
    return [rng.choice(list(STYLE_WORDS)) for _ in range(rng.randint(1, MAX_STYLE_WORDS))]


def _places(style: list[str], rng: random.Random) -> list[int]:
    return sorted(rng.randint(0, 4 * STEPS) for _ in style)


def _text(numbers: list[int], results: list[int], style: list[str], places: list[int]) -> str:
    answer = [word for number, result in zip(numbers, results, strict=True) for word in (number, "=", result, ";")]
    for place, word in reversed(list(zip(places, style, strict=True))):
        answer.insert(place, word)
    return " ".join(map(str, ["double", ":", *answer]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, made here: nothing is downloaded."""
    words = ["<pad>", "<eos>", "double", ":", "=", ";", *STYLE_WORDS, *map(str, range(2 * max(NUMBERS) + 1))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    """A Llama of 2 layers and 64 hidden units with a scalar head, drawn from torch's current seed."""
    return new_llama(tokenizer, hidden_size=64, intermediate_size=128, num_layers=2, max_tokens=64)
