"""A whole training step at the lengths of real preference pairs, real trainers side by side: `train-step --realistic`.

    trl            TRL's RewardTrainer with plain BT: the choice without this package
    trl-grouped    the same, with batches of pairs of similar length
    padded         NormBTTrainer
    late           NormBTTrainer(late_pooling=True)
    padding-free   NormBTTrainer(padding_free=True)
    both           NormBTTrainer(late_pooling=True, padding_free=True)

All train one Llama on the same pairs of random tokens: its weights, gradients and optimizer are shared, so that where
they lie in memory favours nobody. They take turns batch by batch, in a new order each time. Lengths are log-normal: the
median and the deviation of the logarithm are options, chosen and rejected share half of the variance (they answer one
prompt), and lengths are cut to 4 tokens and to 16 times the median. `--log-deviation 0` makes them equal. They may also
come from a file of pairs. A step is the trainer's training_step (forward, loss, backward) and AdamW; collating, which
workers do, is not timed. The figure of a contender is its time over all batches over that of TRL, with a bootstrap
interval over batches. Peak memory is what the step with the most tokens holds above what it leaves: the activations and
what is made from them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.harness import DTYPES, Report, print_table
from bench.memory import METHODS, peak_on_cpu, peak_on_gpu
from bench.timing import synchronize

VOCABULARY, PAD = 8192, 0
LABELS = {
    "trl": "TRL, plain BT",
    "trl-grouped": "TRL, grouped by length",
    "padded": "NormBT, padded",
    "late": "late pooling",
    "padding-free": "padding-free",
    "both": "both",
}
OURS = {
    "padded": {},
    "late": {"late_pooling": True},
    "padding-free": {"padding_free": True},
    "both": {"late_pooling": True, "padding_free": True},
}
RESAMPLES = 2000

Row = dict[str, list[int]]  # chosen_ids and rejected_ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--realistic", action="store_true", help="trainers at the lengths of preference pairs")
    parser.add_argument("--contender", nargs="+", choices=LABELS, default=LABELS, help="beside trl (default: all)")
    parser.add_argument("--layers", type=int, default=8, help="of the realistic model (default: %(default)s)")
    parser.add_argument("--hidden-size", "-H", type=int, help="of it (default: 128, on a GPU 1024)")
    parser.add_argument("--median-length", type=int, help="of its sequences (default: 64, on a GPU 512)")
    parser.add_argument("--log-deviation", type=float, default=0.7, help="of their lengths (default: %(default)s)")
    parser.add_argument("--attention", help="attn_implementation of the model (default: transformers' choice)")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="of these pairs, as normbt train reads them")
    parser.add_argument("--tokenizer", metavar="PATH|ID", help="that counts the tokens of --lengths")


def run(options: argparse.Namespace) -> int:
    if options.lengths is not None and options.tokenizer is None:
        raise SystemExit("--lengths needs a --tokenizer, which counts the tokens")
    # Blocks that one contender leaves behind must not be given back and asked for again in the step of another.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    report = Report("realistic-step", options)
    gpu = options.device.type == "cuda"
    settings = {
        "layers": options.layers,
        "hidden_size": options.hidden_size or (1024 if gpu else 128),
        "dtype": options.dtype or ("bf16" if gpu else "fp32"),
        "attention": options.attention,
        "num_pairs": options.num_pairs or 8,
        "median_length": options.median_length or (512 if gpu else 64),
        "log_deviation": options.log_deviation,
        "lengths": f"{options.lengths} by {options.tokenizer}" if options.lengths else "log-normal",
        "batches": options.steps or (6 if options.quick else 24),
    }
    pairs = make_pairs(settings, options)
    names = [name for name in LABELS if name == "trl" or name in options.contender]
    batches = {name: batch_up(pairs, settings["num_pairs"], grouped=name == "trl-grouped") for name in names}
    with tempfile.TemporaryDirectory() as folder:
        shared = Shared(settings, options.device)
        contenders = {name: Contender(name, shared, folder) for name in names}
        rows = measure(contenders, batches)
    print_table(
        ["step", "s per step", "ms per token", "padding %", "peak MB", "of TRL's", "from", "to (95%)", "of its peak"],
        [
            [LABELS[row["contender"]], row["seconds_per_step"], 1e3 * row["seconds_per_token"], 100 * row["padding"],
             row["peak_bytes"] / 1e6, row["time_ratio"], *row["interval_95"], row["peak_ratio"]]
            for row in rows
        ],
    )  # fmt: skip
    report.save({"settings": settings, "memory_measured_by": METHODS["cuda" if gpu else "cpu"], "rows": rows})
    report.save_figure(lambda plt: draw(plt, rows, settings))
    return 0


# --- the pairs -----------------------------------------------------------------------------------------------------


def make_pairs(settings: dict[str, Any], options: argparse.Namespace) -> list[Row]:
    """Pairs of random tokens, as many as the batches hold."""
    rng = random.Random(0)
    count = settings["batches"] * settings["num_pairs"]
    if options.lengths is None:
        lengths = [log_normal_pair(rng, settings["median_length"], settings["log_deviation"]) for _ in range(count)]
    else:
        lengths = rng.choices(lengths_of(options.lengths, options.tokenizer), k=count)
    ids = {length: [rng.randrange(2, VOCABULARY) for _ in range(length)] for pair in lengths for length in pair}
    return [{"chosen_ids": ids[chosen], "rejected_ids": ids[rejected]} for chosen, rejected in lengths]


def log_normal_pair(rng: random.Random, median: int, deviation: float) -> tuple[int, int]:
    shared = rng.gauss(0, 1)

    def length() -> int:
        drawn = median * math.exp(deviation * (shared + rng.gauss(0, 1)) / math.sqrt(2))
        return round(min(max(drawn, 4), 16 * median))

    return length(), length()


def lengths_of(path: Path, tokenizer: str) -> list[tuple[int, int]]:
    from transformers import AutoTokenizer

    from normbt_kernels.data.preferences import load_preferences
    from normbt_kernels.data.tokens import LeftOut, prepare

    prepared = prepare(
        load_preferences(str(path), None, "train"), AutoTokenizer.from_pretrained(tokenizer), LeftOut(2**20)
    )
    return [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in prepared.rows]


def batch_up(pairs: Sequence[Row], size: int, grouped: bool) -> list[Sequence[Row]]:
    """The pairs in their order; or, as `group_by_length` does it, in the order of their longer sequence."""
    if grouped:
        pairs = sorted(pairs, key=lambda row: -max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


# --- the contenders ------------------------------------------------------------------------------------------------


class Shared:
    """The weights that all contenders train, and their optimizer."""

    def __init__(self, settings: dict[str, Any], device: torch.device):
        self.settings, self.device = settings, device
        self.parameters = dict(self._build().named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-6)

    def _build(self):
        with self.device:
            return build_model(self.settings).to(DTYPES[self.settings["dtype"]])

    def model(self):
        """A model of its own, whose hooks are nobody else's, with these weights."""
        model = self._build()
        model.load_state_dict(self.parameters, assign=True)
        return model


class Contender:
    """A trainer of the shared weights."""

    def __init__(self, name: str, shared: Shared, folder: str):
        model, device = shared.model(), shared.device
        arguments = {
            "output_dir": folder,
            "use_cpu": device.type == "cpu",
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        tokenizer = make_tokenizer()
        if name in OURS:
            from transformers import TrainingArguments

            from normbt_kernels.integrations.transformers import NormBTTrainer

            args = TrainingArguments(**arguments)
            self.trainer = NormBTTrainer(model, args, processing_class=tokenizer, train_dataset=[], **OURS[name])
        else:
            from datasets import Dataset
            from trl import RewardConfig, RewardTrainer

            args = RewardConfig(**arguments, bf16=False, gradient_checkpointing=False, max_length=None)
            some = Dataset.from_list([{"chosen_ids": [2, 3], "rejected_ids": [4]}])
            self.trainer = RewardTrainer(model, args, processing_class=tokenizer, train_dataset=some)
        self.trainer.current_gradient_accumulation_steps = 1
        self.device, self.model, self.optimizer = device, model, shared.optimizer

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.trainer.data_collator(list(rows))

    def forward_backward(self, batch: dict[str, Any]) -> None:
        self.trainer.training_step(self.model, dict(batch))

    def step(self, batch: dict[str, Any]) -> float:
        """Its seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        self.forward_backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay allocated, and out of the peak
        synchronize(self.device)
        return time.perf_counter() - start

    def peak(self, batch: dict[str, Any]) -> int:
        """Bytes that forward and backward of the batch hold at once."""
        return (peak_on_gpu if self.device.type == "cuda" else peak_on_cpu)(lambda: self.forward_backward(batch))[0]


def build_model(settings: dict[str, Any]):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    hidden_size = settings["hidden_size"]
    heads = max(2, hidden_size // 64)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=hidden_size * 43 // 16, num_hidden_layers=settings["layers"],
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=VOCABULARY, max_position_embeddings=2**16,
        num_labels=1, pad_token_id=PAD, use_cache=False, attn_implementation=settings["attention"],
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def make_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": 1}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


# --- the measurement -----------------------------------------------------------------------------------------------


def measure(contenders: dict[str, Contender], batches: dict[str, list[Sequence[Row]]]) -> list[dict[str, Any]]:
    collated = {name: [contenders[name].collate(rows) for rows in batches[name]] for name in contenders}
    largest = {name: max(collated[name], key=lambda batch: batch["input_ids"].numel()) for name in contenders}
    # The first step compares shortcuts, allocates gradients and AdamW's moments. On a GPU the first batch of each shape
    # also asks the driver for memory: without this, an H100 took 0.06 to 0.26 s for steps of one size.
    for name, contender in contenders.items():
        for batch in collated[name][: None if contender.device.type == "cuda" else 1]:
            contender.step(batch)
    peak = {name: contender.peak(largest[name]) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    for i in tqdm(range(len(collated["trl"])), unit="batch"):
        shuffle(order)
        for name in order:
            seconds[name].append(contenders[name].step(collated[name][i]))
    tokens = sum(len(ids) for rows in batches["trl"] for row in rows for ids in row.values())
    return [
        {
            "contender": name,
            "seconds_per_step": sum(seconds[name]) / len(seconds[name]),
            "seconds_per_token": sum(seconds[name]) / tokens,
            "padding": 1 - tokens / sum(batch["input_ids"].numel() for batch in collated[name]),
            "peak_bytes": peak[name],
            "time_ratio": sum(seconds[name]) / sum(seconds["trl"]),
            "interval_95": interval(seconds[name], seconds["trl"]),
            "peak_ratio": peak[name] / peak["trl"],
            "seconds": seconds[name],
        }
        for name in contenders
    ]


def interval(own: list[float], plain: list[float]) -> tuple[float, float]:
    """95% interval of sum(own) / sum(plain), by a bootstrap over batches. Batches grouped by length are other ones than
    plain's, and drawn by themselves."""
    rng, batches = random.Random(0), range(len(own))
    ratios = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(batches, k=len(batches))
        ratios.append(sum(own[i] for i in drawn) / sum(plain[i] for i in drawn))
    ratios.sort()
    return ratios[round(0.025 * (RESAMPLES - 1))], ratios[round(0.975 * (RESAMPLES - 1))]


def draw(plt, rows: list[dict[str, Any]], settings: dict[str, Any]):
    """Time with its interval, and peak memory, as shares of TRL's."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
    for row in rows:
        label, color = LABELS[row["contender"]], "#1f6fb4" if row["contender"] in OURS else "#b0b0b0"
        low, high = row["interval_95"]
        error = [[max(0, row["time_ratio"] - low)], [max(0, high - row["time_ratio"])]]
        axes[0].barh(label, row["time_ratio"], color=color, xerr=error)
        axes[0].annotate(f"  {row['time_ratio']:.2f}", (high, label), va="center", fontsize=9)
        axes[1].barh(label, row["peak_ratio"], color=color)
        axes[1].annotate(f"  {row['peak_ratio']:.2f}", (row["peak_ratio"], label), va="center", fontsize=9)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("time of a step over TRL's (95% interval)")
    axes[1].set_xlabel("peak memory of forward and backward over TRL's")
    for axis in axes:
        axis.margins(x=0.15)
        axis.grid(axis="y", visible=False)
    padding = next(row["padding"] for row in rows if row["contender"] == "trl")
    figure.suptitle(
        f"Llama of {settings['layers']} layers, H={settings['hidden_size']}, {settings['dtype']}, "
        f"{2 * settings['num_pairs']} sequences, {settings['lengths']} lengths, {100 * padding:.0f}% padding",
        fontsize=10,
    )
    return figure
