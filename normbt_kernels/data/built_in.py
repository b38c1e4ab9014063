"""The built-in data sets, which need no download. Each has its own small model, trained from new weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from normbt_kernels.data import STDLIB_FAULTS, generated, stdlib_faults
from normbt_kernels.data.preferences import Preference


@dataclass(frozen=True)
class BuiltIn:
    """A data set and its model. `pairs` takes "train", "validation" or "test" and a seed, on which only the training
    pairs depend. `make_model` draws new weights from torch's current seed."""

    name: str
    model_name: str
    pairs: Callable[[str, int], list[Preference]]
    make_tokenizer: Callable[[], PreTrainedTokenizerBase]
    make_model: Callable[[PreTrainedTokenizerBase], PreTrainedModel]
    training_defaults: dict[str, Any]


GENERATED = BuiltIn(
    name="built-in generated pairs",
    model_name="built-in tiny Llama",
    pairs=generated.split_pairs,
    make_tokenizer=generated.make_tokenizer,
    make_model=generated.make_model,
    training_defaults=generated.TRAINING_DEFAULTS,
)

STANDARD_LIBRARY = BuiltIn(
    name=STDLIB_FAULTS,
    model_name="built-in small Llama",
    pairs=stdlib_faults.split_pairs,
    make_tokenizer=stdlib_faults.make_tokenizer,
    make_model=stdlib_faults.make_model,
    training_defaults=stdlib_faults.TRAINING_DEFAULTS,
)


def find_built_in(dataset: str | None) -> BuiltIn | None:
    """The data set that `--dataset` names without a model: the default for None, and None for the user's own data."""
    return {None: GENERATED, STDLIB_FAULTS: STANDARD_LIBRARY}.get(dataset)
