"""One training run in each of five ways, cut as asked: what `test_steps.py` compares, on one process and on two.

torchrun --nproc-per-node 2 -m tests.distributed.steps FOLDER
"""

import gc
import sys
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from trl import RewardConfig, RewardTrainer

import reference
from normbt_kernels import LinearNormBTLoss, apply_normbt
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from normbt_kernels.integrations.trl import NormBTRewardTrainer
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import make_rows, make_tokenizer

STEPS, PAIRS = 3, 64  # pairs of a step, of all its micro-batches and ranks
LEARNING_RATE, MU = 0.02, 3.0
ROWS = make_rows(STEPS * PAIRS)
ARGUMENTS = {
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
    "bf16": False,
}


def tiny_model():
    return make_model(num_hidden_layers=1)


def known_mu(ema):
    """As after earlier steps, for ways in which the first step is weighed by what each micro-batch holds itself."""
    ema.load_state_dict({"mu": torch.tensor(MU), "num_updates": torch.tensor(1)})
    return ema


def result(model, ema):
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"mu": ema.mu.clone(), "num_updates": ema.num_updates.clone()} | parameters


def cut(batch_size, num_ranks, steps):
    """The micro-batches of this rank, in order, each of `batch_size` rows; ranks take turns as accelerate's do."""
    rank = dist.get_rank() if num_ranks > 1 else 0
    batches = [ROWS[start : start + batch_size] for start in range(0, steps * PAIRS, batch_size)]
    return batches[rank::num_ranks]


def normbt_trainer(folder, batch_size, accumulation, num_ranks, steps):
    """From the very first step: its micro-batches are measured beforehand."""
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    options |= {"max_steps": steps}
    args = TrainingArguments(str(folder), **ARGUMENTS | options)
    trainer = NormBTTrainer(tiny_model(), args, train_dataset=ROWS, processing_class=make_tokenizer())
    trainer.train()
    return result(trainer.model, trainer.pair_loss)


def reward_trainer(trainer_class, folder, batch_size, accumulation, steps):
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    options |= {"max_steps": steps}
    args = RewardConfig(str(folder), **ARGUMENTS | options)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    dataset = datasets.Dataset.from_list(ROWS)
    return trainer_class(tiny_model(), args, train_dataset=dataset, processing_class=tokenizer)


def normbt_reward_trainer(folder, batch_size, accumulation, num_ranks, steps):
    trainer = reward_trainer(NormBTRewardTrainer, folder, batch_size, accumulation, steps)
    trainer.train()
    return result(trainer.model, trainer.pair_loss)


def applied_in_trl(folder, batch_size, accumulation, num_ranks, steps):
    trainer = reward_trainer(RewardTrainer, folder, batch_size, accumulation, steps)
    apply_normbt(trainer.model)
    known_mu(trainer.model.score.normbt)
    trainer.train()
    return result(trainer.model, trainer.model.score.normbt)


def bt_loss(model, batch):
    chosen, rejected = model(**batch).logits[:, 0].chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def applied_in_accelerate(folder, batch_size, accumulation, num_ranks, steps):
    model = tiny_model()
    apply_normbt(model)
    known_mu(model.score.normbt)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    wrapped, optimizer, batches = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), LEARNING_RATE),
        DataLoader(ROWS[: steps * PAIRS], batch_size, collate_fn=PreferenceCollator(make_tokenizer())),
    )
    for batch in batches:
        with accelerator.accumulate(wrapped):
            accelerator.backward(bt_loss(wrapped, batch))
            optimizer.step()
            optimizer.zero_grad()
    return result(model, model.score.normbt)


def own_loop(folder, batch_size, accumulation, num_ranks, steps):
    model, loss_fn, collate = tiny_model(), known_mu(LinearNormBTLoss()), PreferenceCollator(make_tokenizer())
    wrapped = DistributedDataParallel(Rows(model)) if num_ranks > 1 else Rows(model)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loss_fn.follow(optimizer)
    for index, rows in enumerate(cut(batch_size, num_ranks, steps)):
        hidden, weight = wrapped(collate(rows))
        (loss_fn(hidden, weight) / accumulation).backward()
        if index % accumulation == accumulation - 1:
            optimizer.step()
            optimizer.zero_grad()
    return result(model, loss_fn)


class Rows(nn.Module):
    """The rows that the head reads, and its weight, out of a forward that DDP sees."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        hidden = self.model.model(**batch).last_hidden_state
        return reference.pool(hidden, batch["attention_mask"].sum(dim=1) - 1), self.model.score.weight


def eager(mu, steps=STEPS):
    """NormBT written out, in one piece for each step."""
    model, collate = tiny_model(), PreferenceCollator(make_tokenizer())
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for rows in cut(PAIRS, 1, steps):
        batch = collate(rows)
        hidden = reference.pool(model.model(**batch).last_hidden_state, batch["attention_mask"].sum(dim=1) - 1)
        chosen, rejected = hidden.chunk(2)
        distance = (chosen - rejected).norm(dim=1).detach()
        mean = distance.mean()
        weight = (mean if mu is None else mu) / (distance + 1e-6)
        difference = (chosen - rejected) @ model.score.weight[0]
        (weight * -nn.functional.logsigmoid(difference)).mean().backward()
        mu = mean if mu is None else 0.9 * mu + 0.1 * mean
        optimizer.step()
        optimizer.zero_grad()
    return {"mu": mu} | {name: parameter.detach() for name, parameter in model.named_parameters()}


FROM_THE_START = (normbt_trainer, normbt_reward_trainer)
WITH_A_KNOWN_MU = (applied_in_trl, applied_in_accelerate, own_loop)

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    num_ranks = dist.get_world_size()
    for way in (*FROM_THE_START, *WITH_A_KNOWN_MU):
        found = way(Path(sys.argv[1]), 8, PAIRS // 8 // num_ranks, num_ranks, STEPS)
        torch.save(found, Path(sys.argv[1]) / f"{way.__name__}-{dist.get_rank()}.pt")
        gc.collect()  # trainers and their DDP, which would otherwise outlive the group
    dist.barrier()
    dist.destroy_process_group()
