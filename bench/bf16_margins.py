"""How many pairs lose their order when a bf16 reward model rounds its rewards?

A Hugging Face sequence classifier in bf16 returns bf16 logits: 8 bits of mantissa, steps of 0.125 between 16
and 32. Two answers whose rewards are closer than a step tie, or flip. `linear_normbt_loss` takes the same bf16
hidden states and head, but subtracts the rows before the product and accumulates in fp32. The judge is fp64
arithmetic on the same bf16 numbers, so only the rounding of the rewards is measured, not that of the model.

The pairs are fine-grained: a random sequence of 128 tokens, and the same with one token changed. The head of the random
model is shifted and scaled until the rewards have the given mean and standard deviation, as those of trained models do.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bench.harness import Report, print_table
from normbt_kernels import linear_normbt_loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-pairs", "-P", type=int, metavar="P", help="(default: 2000, --quick: 200)")
    parser.add_argument("--hidden-size", "-H", type=int, default=256, metavar="H", help="(default: %(default)s)")
    parser.add_argument("--mean", type=float, default=8.0, help="mean reward (default: %(default)s)")
    parser.add_argument("--std", type=float, default=4.0, help="standard deviation of the rewards (default: 4)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    report = Report("bf16-margins", options)
    settings = {
        "num_pairs": options.num_pairs or (200 if options.quick else 2000),
        "hidden_size": options.hidden_size,
        "mean": options.mean,
        "std": options.std,
        "seed": options.seed,
    }
    shares = measure(**settings, device=options.device)
    print_table(
        ["share of pairs", "tied", "flipped"],
        [[name, f"{order.tied:.2%}", f"{order.flipped:.2%}"] for name, order in shares.items()],
    )
    report.save({"settings": settings, "shares": {name: order._asdict() for name, order in shares.items()}})
    return 0


class Order(NamedTuple):
    """Shares of pairs, against the order of the fp64 rewards."""

    tied: float
    flipped: float


def order(difference: torch.Tensor, true_difference: torch.Tensor) -> Order:
    tied = difference == 0
    flipped = ~tied & (difference.sign() != true_difference.sign())
    return Order(tied.double().mean().item(), flipped.double().mean().item())


def tiny_llama(hidden_size: int, seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def fine_pairs(num_pairs: int, length: int, vocab_size: int) -> torch.Tensor:
    """Token ids (2P, length) in halves: each rejected sequence differs from its chosen one in one token."""
    chosen = torch.randint(1, vocab_size, (num_pairs, length))
    rejected = chosen.clone()
    position = torch.randint(0, length - 1, (num_pairs,))
    rejected[torch.arange(num_pairs), position] = torch.randint(1, vocab_size, (num_pairs,))
    return torch.cat([chosen, rejected])


@torch.no_grad()
def measure(
    num_pairs: int = 2000,
    length: int = 128,
    hidden_size: int = 256,
    mean: float = 8.0,
    std: float = 4.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Order]:
    """Ties and flips of Hugging Face's bf16 logits and of `linear_normbt_loss`, on the same model and pairs."""
    model = tiny_llama(hidden_size, seed).to(device)
    input_ids = fine_pairs(num_pairs, length, model.config.vocab_size).to(device)
    rows = []
    model.score.register_forward_pre_hook(lambda module, args: rows.append(args[0][:, -1]))

    def score() -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards of all sequences and the rows that the head read, a few sequences at a time."""
        rows.clear()
        rewards = [model(input_ids=block).logits.squeeze(-1) for block in input_ids.split(64)]
        return torch.cat(rewards), torch.cat(rows)

    rewards, hidden = score()
    unit = hidden.mean(0)
    model.score.weight *= std / rewards.std()
    model.score.weight += (mean - rewards.mean() * std / rewards.std()) * unit / unit.square().sum()

    model.to(torch.bfloat16)
    logits, hidden = score()
    truth = hidden.double() @ model.score.weight.double().squeeze(0)
    _, stats = linear_normbt_loss(hidden, model.score.weight, mu=1.0, return_stats=True)

    def difference(values):
        return values[:num_pairs] - values[num_pairs:]

    ordered = difference(truth) != 0  # a token replaced by itself is a pair without an order
    ours = stats.chosen_rewards - stats.rejected_rewards
    return {
        "Hugging Face bf16 logits": order(difference(logits)[ordered], difference(truth)[ordered]),
        "linear_normbt_loss": order(ours[ordered], difference(truth)[ordered]),
    }
