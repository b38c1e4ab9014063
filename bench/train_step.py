"""What NormBT costs in a whole training step of a reward model: per cent over plain BT, with a confidence interval.

A step does what a trainer does: forward of a Hugging Face Llama with a scalar head (built from a configuration, with
random weights), the loss, backward, AdamW, and gradients dropped. The contenders take turns on the same model, each
round in another order. The host's clock runs from the call of a step until the device is done. The overhead is the
median over rounds of (a contender's step - plain BT's step of the same round), in per cent of the median step of plain
BT; its 95% interval is a bootstrap over rounds. "plain BT again" is a second plain BT in the same rounds. Its interval
must contain 0, and shows how small a difference this run can detect.

    bt       logits of the model, -log sigmoid(r_c - r_r)
    eager    the same rewards, weighed in PyTorch with a running mean distance
    ours     LinearNormBTLoss on what the head reads: rewards, distance, loss and running mean in one pass

With --realistic, `realistic_step.py` measures instead: real trainers at the lengths of preference pairs, plain BT in
TRL's beside NormBT padded, with late pooling and padding-free.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import reference
from bench import realistic_step
from bench.harness import DTYPES, Report, print_table
from bench.timing import spread, synchronize
from normbt_kernels import LinearNormBTLoss

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size
MODELS = {
    "tiny": (128, 344, 2, 4, 1024),
    "small": (768, 2048, 12, 12, 32000),
    "medium": (2048, 5632, 22, 32, 32000),
}
LABELS = {"bt": "plain BT", "bt-again": "plain BT again", "eager": "NormBT, eager", "ours": "NormBT, ours"}
COLORS = {"bt-again": "#b0b0b0", "eager": "#e08a3c", "ours": "#1f6fb4"}
RESAMPLES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-size", choices=MODELS, help="(default: small, 0.1B, on a GPU; tiny on a CPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="of model and optimizer (default: bf16; CPU: fp32)")
    parser.add_argument("--num-pairs", "-P", type=int, metavar="P", help="in a step (default: 8; CPU: 4)")
    parser.add_argument("--sequence-length", "-S", type=int, metavar="S", help="(default: 512; CPU: 64)")
    parser.add_argument("--steps", type=int, help="timed, of each contender (default: 100, --quick: 40)")
    realistic_step.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.realistic:
        return realistic_step.run(options)
    report = Report("train-step", options)
    gpu = options.device.type == "cuda"
    size = options.model_size or ("small" if gpu else "tiny")
    dtype = DTYPES[options.dtype or ("bf16" if gpu else "fp32")]
    num_pairs = options.num_pairs or (8 if gpu else 4)
    length = options.sequence_length or (512 if gpu else 64)
    num_steps = options.steps or (40 if options.quick else 100)

    torch.manual_seed(0)
    with options.device:  # where a billion random weights take a moment
        model = build_model(size, length).to(dtype)
    batch = make_batch(num_pairs, length, model.config, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    losses = make_losses(model, options.device)

    def step(name: str) -> float:
        synchronize(options.device)
        start = time.perf_counter()
        losses[name](batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(options.device)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in losses}
    order = list(losses)
    for _ in range(3):
        for name in order:
            step(name)
    shuffle = random.Random(0).shuffle
    for _ in tqdm(range(num_steps), unit="round"):
        shuffle(order)
        for name in order:
            seconds[name].append(step(name))

    rows = [compare(name, seconds) for name in losses]
    print_table(
        ["step", "median ms", "q1", "q3", "overhead %", "from", "to (95%)"],
        [
            [LABELS[row["contender"]], *(row["seconds"][key] * 1e3 for key in ("median", "q1", "q3")),
             row["overhead_percent"], *(row["interval_95_percent"] or (None, None))]
            for row in rows
        ],
    )  # fmt: skip
    settings = {
        "model_size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).split(".")[1],
        "num_pairs": num_pairs,
        "sequence_length": length,
    }
    report.save({"settings": settings, "rows": rows})
    report.save_figure(lambda plt: draw(plt, rows, settings))
    return 0


def build_model(size: str, length: int):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    hidden_size, intermediate_size, layers, heads, vocab_size = MODELS[size]
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocab_size, max_position_embeddings=length,
        num_labels=1, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).train()


def make_batch(num_pairs: int, length: int, config: Any, device: torch.device) -> dict[str, Tensor]:
    """Sequences of random tokens and lengths, padded on the right, in halves layout."""
    last_token = torch.randint(length // 2, length, (2 * num_pairs,))
    attention_mask = (torch.arange(length) <= last_token[:, None]).long()
    input_ids = torch.randint(1, config.vocab_size, (2 * num_pairs, length)) * attention_mask
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def make_losses(model, device: torch.device) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """The forward pass with each loss, from a batch to a scalar."""
    from normbt_kernels.integrations.head import HeadReader, find_head

    reader = HeadReader(find_head(model))
    head = find_head(model).linear()
    fused = LinearNormBTLoss().to(device)
    running_mean: list[Tensor] = []  # of the eager contender, empty before the first batch

    def forward(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        reader.expect(batch["input_ids"])
        rewards = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        return rewards, reader.take(rewards)

    def bt(batch: dict[str, Tensor]) -> Tensor:
        chosen_rewards, rejected_rewards = forward(batch)[0].chunk(2)
        return -F.logsigmoid(chosen_rewards - rejected_rewards).mean()

    def eager(batch: dict[str, Tensor]) -> Tensor:
        rewards, rows = forward(batch)
        chosen_rewards, rejected_rewards = rewards.chunk(2)
        chosen, rejected = rows.detach().chunk(2)
        distance = torch.linalg.vector_norm(chosen - rejected, dim=-1)
        mean = distance.float().mean()
        mu = running_mean[0] if running_mean else mean
        running_mean[:] = [0.9 * mu + 0.1 * mean]
        return -(reference.normbt_weight(distance, mu) * F.logsigmoid(chosen_rewards - rejected_rewards)).mean()

    def ours(batch: dict[str, Tensor]) -> Tensor:
        rows = forward(batch)[1]
        return fused(rows, head.weight, head.bias)

    return {"bt": bt, "bt-again": bt, "eager": eager, "ours": ours}


def compare(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """One contender against plain BT, round by round."""
    row = {
        "contender": name,
        "seconds": spread(seconds[name]),
        "overhead_percent": None,
        "interval_95_percent": None,
    }
    if name == "bt":
        return row
    rounds = [(own - plain, plain) for own, plain in zip(seconds[name], seconds["bt"], strict=True)]

    def overhead(sample: list[tuple[float, float]]) -> float:
        return 100 * statistics.median(d for d, _ in sample) / statistics.median(plain for _, plain in sample)

    rng = random.Random(0)
    resampled = sorted(overhead(rng.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    interval = (resampled[round(0.025 * (RESAMPLES - 1))], resampled[round(0.975 * (RESAMPLES - 1))])
    return row | {"overhead_percent": overhead(rounds), "interval_95_percent": interval}


def draw(plt, rows: list[dict[str, Any]], settings: dict[str, Any]):
    """Overhead in per cent, with its interval."""
    figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for row in (row for row in rows if row["overhead_percent"] is not None):
        name, overhead, (low, high) = row["contender"], row["overhead_percent"], row["interval_95_percent"]
        error = [[max(0, overhead - low)], [max(0, high - overhead)]]
        axis.errorbar(
            overhead, LABELS[name], xerr=error, fmt="o", color=COLORS[name], capsize=4, linewidth=2, markersize=7
        )
        axis.annotate(
            f"{overhead:+.2f}%", (overhead, LABELS[name]), xytext=(0, 8), textcoords="offset points", ha="center"
        )
    axis.axvline(0, color="gray", linewidth=1)
    axis.invert_yaxis()
    axis.margins(y=0.35)
    axis.set_xlabel("time of a training step over plain BT, %  (95% interval)")
    plain = next(row for row in rows if row["contender"] == "bt")["seconds"]["median"] * 1e3
    axis.set_title(
        f"Llama of {settings['parameters'] / 1e6:,.3g}M parameters, {settings['dtype']}, P={settings['num_pairs']}, "
        f"S={settings['sequence_length']}: plain BT takes {plain:,.3g} ms",
        fontsize=10,
    )
    return figure
