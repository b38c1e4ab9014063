"""Tiny reward models of the architectures that people train, and batches of pairs for them."""

import torch
from torch import nn

VOCABULARY, PAD, HIDDEN = 32, 0, 16
DECODERS, ENCODERS = ("llama", "qwen2", "qwen3", "gemma"), ("bert", "modernbert")


def make_model(architecture="llama", dtype=torch.float32, **config):
    """A model of one or two layers with a scalar head and no dropout, the same one for the same arguments."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_labels": 1,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": 1,
        "cls_token_id": None,
        "sep_token_id": None,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if architecture in ("qwen3", "gemma"):
        sizes["head_dim"] = HIDDEN // 2
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(architecture, **sizes | config))
    return model.to(dtype).train()


def make_batch(num_pairs=3, seed=0, side="right"):
    """`input_ids`, `attention_mask` (2P, S): sequences of 3 to 8 tokens, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (2 * num_pairs, 1), generator=generator)
    lengths[0] = 8
    positions = torch.arange(8)
    mask = positions < lengths if side == "right" else positions >= 8 - lengths
    ids = torch.randint(2, VOCABULARY, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def gradients(model):
    """Returns the gradients of all parameters that have one, by name, and drops them."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


class TinyDecoder(nn.Module):
    """A classifier without transformers: mixes each token with those before it, scores the rightmost unpadded one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"pad_token_id": PAD})
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, input_ids):
        logits = self.score(torch.tanh(self.mix(self.embed(input_ids).cumsum(dim=1))))
        rightmost = ((input_ids != PAD) * torch.arange(input_ids.shape[1])).argmax(dim=1)
        return logits[torch.arange(len(input_ids)), rightmost]
