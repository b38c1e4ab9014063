"""A reward model trained in bf16 by `NormBTTrainer`, and by the reference in the same Trainer: do they stay together?

    python -m bench.training_parity --out DIR [--steps N]

It makes three runs from the same start over the same batches: NormBT in PyTorch (reference/) in fp32, which is the
truth, the same in bf16 (autocast), and ours in bf16. In the losses of all steps and in how far all parameters moved,
ours may be at most twice as far from the truth as the reference in bf16, plus one bf16 step. Otherwise the exit status
is 1. The model is a Llama built from a configuration and trained by plain SGD, under which rounding errors do not grow
as under Adam.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

import reference
from bench.harness import Report, add_common_arguments, print_table
from normbt_kernels.integrations.transformers import NormBTTrainer

VOCABULARY, PAD = 512, 0
BF16_STEP = 2.0**-8
SIZES = {  # hidden_size, intermediate_size, layers, heads, longest sequence
    "cuda": (128, 352, 4, 4, 32),
    "cpu": (32, 64, 2, 2, 12),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    report = Report("training-parity", options)
    *sizes, length = SIZES[options.device.type]
    model, rows = build_model(*sizes, length), make_rows(8 * options.steps, length)

    runs = {
        "reference, fp32": train(EagerNormBTTrainer, model, rows, options, bf16=False),
        "reference, bf16": train(EagerNormBTTrainer, model, rows, options, bf16=True),
        "ours, bf16": train(NormBTTrainer, model, rows, options, bf16=True),
    }
    truth, eager, ours = runs.values()
    judged = {
        name: {
            "reference": distance(eager[name], truth[name]),
            "ours": distance(ours[name], truth[name]),
            "ours from reference": distance(ours[name], eager[name]),
            "bound": 2 * distance(eager[name], truth[name]) + BF16_STEP,
        }
        for name in truth
    }
    as_close = all(figures["ours"] <= figures["bound"] for figures in judged.values())
    trains = eager["losses"][-10:].mean() < eager["losses"][:10].mean()  # else they might agree in doing nothing
    columns = ("reference", "ours", "bound", "ours from reference")
    print_table(
        ["relative distance from fp32", *columns],
        [[name, *(f"{figures[column]:.2e}" for column in columns)] for name, figures in judged.items()],
    )
    print(f"loss of the first and last steps: {eager['losses'][:10].mean():.3f}, {eager['losses'][-10:].mean():.3f}")
    print("ours is as close as the reference" if as_close else "OURS IS FURTHER AWAY THAN THE REFERENCE")
    report.save({
        "steps": options.steps,
        "parameters": model.num_parameters(),
        "as_close_as_reference": as_close,
        "loss_went_down": bool(trains),
        "relative_distance": judged,
        "losses": {name: run["losses"].tolist() for name, run in runs.items()},
    })  # fmt: skip
    report.save_figure(lambda plt: draw(plt, {name: run["losses"] for name, run in runs.items()}))
    return 0 if as_close and trains else 1


class EagerNormBTTrainer(Trainer):
    """NormBT as a user would write it in a Trainer: the head's input by a hook, the loss of the reference."""

    loss_is_scaled_for_ga = False

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.ema = reference.DistanceEMA()
        model.score.register_forward_pre_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.hidden = inputs[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen_rewards, rejected_rewards = model(**inputs).logits[:, 0].float().chunk(2)
        rows = reference.pool(self.hidden.float(), inputs["attention_mask"].sum(1) - 1)
        distance = reference.pair_distance(rows)
        mu = self.ema.weight_mean(distance)
        self.ema.update(distance)
        return reference.normbt_loss(chosen_rewards, rejected_rewards, *rows.chunk(2), mu)


def train(trainer_class: type[Trainer], model: PreTrainedModel, rows: list, options: argparse.Namespace, bf16: bool):
    """The loss of each step, and what each parameter moved, of a copy of `model`."""
    trained = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=8, optim="sgd", learning_rate=0.02,
            lr_scheduler_type="constant", bf16=bf16, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            use_cpu=options.device.type == "cpu",
        )  # fmt: skip
        trainer = trainer_class(trained, arguments, data_collator=collate, train_dataset=rows)
        trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses) == options.steps
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    after = torch.cat([parameter.detach().cpu().flatten() for parameter in trained.parameters()])
    return {"losses": losses, "movement of the parameters": after - before}


def build_model(hidden_size: int, intermediate_size: int, layers: int, heads: int, length: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=VOCABULARY, max_position_embeddings=length,
        num_labels=1, pad_token_id=PAD, initializer_range=0.6 / hidden_size**0.5, use_cache=False,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def make_rows(num_pairs: int, length: int) -> list[dict[str, list[int]]]:
    """Pairs of random tokens, of which the chosen sequence has more from the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(0)

    def sequence(lowest: int) -> list[int]:
        size = int(torch.randint(length // 2, length, (), generator=generator))
        return torch.randint(lowest, VOCABULARY, (size,), generator=generator).tolist()

    return [{"chosen_ids": sequence(VOCABULARY // 4), "rejected_ids": sequence(PAD + 1)} for _ in range(num_pairs)]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """In halves layout, padded on the right."""
    sequences = [torch.tensor(row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def distance(seen: Tensor, truth: Tensor) -> float:
    """Over all steps, or all parameters: a single one would be judged by luck."""
    return ((seen - truth).norm() / truth.norm()).item()


def draw(plt, losses: dict[str, Tensor]):
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        axis.plot(range(1, len(values) + 1), values, style, linewidth=1.4, label=name)
    axis.set(xlabel="step", ylabel="NormBT loss")
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
