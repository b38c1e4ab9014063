"""Tokenised pairs for the models of `tiny_classifiers.py`, and a tokenizer of their vocabulary."""

import torch

from tests.tiny_classifiers import VOCABULARY

EOS = 1


def make_tokenizer(padding_side="right"):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side, **tokens)


def make_rows(num_pairs, columns=(), seed=0):
    """Pairs of different lengths, each sequence ending in <eos>, with numbers from 0.5 to 1.5 in `columns`."""
    generator = torch.Generator().manual_seed(seed)

    def ids():
        length = int(torch.randint(3, 9, (), generator=generator))
        return [*torch.randint(2, VOCABULARY, (length,), generator=generator).tolist(), EOS]

    return [
        {"chosen_ids": ids(), "rejected_ids": ids()} | {column: 0.5 * (1 + i % 3) for column in columns}
        for i in range(num_pairs)
    ]
