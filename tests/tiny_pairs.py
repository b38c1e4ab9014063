"""Tokenised pairs for the models of `tiny_classifiers.py`, and tokenizers whose tokens are whole words."""

import torch

from tests.tiny_classifiers import VOCABULARY

EOS = 1
WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(5, VOCABULARY))]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos>' }}{% endfor %}"


def word_tokenizer(words, chat_template=CHAT_TEMPLATE, **options):
    """A tokenizer that splits a text at its spaces; a word that is not one of `words` is `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options |= {"unk_token": "<unk>", "chat_template": chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def make_tokenizer(padding_side="right"):
    return word_tokenizer(WORDS, pad_token="<pad>", eos_token="<eos>", padding_side=padding_side)


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
