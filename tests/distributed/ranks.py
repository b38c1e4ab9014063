"""What each rank does in `test_ranks.py`, which launches it and compares it with one process on the joined batches:

    python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.ranks FOLDER

Writes FOLDER/<scenario>-<rank>.pt for each scenario: all of them on two ranks, on more those of `ON_ANY_NUMBER`.
"""

import gc
import itertools
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from normbt_kernels import LinearNormBTLoss, NormBTLoss, apply_normbt
from normbt_kernels.integrations.head import HeadReader, find_head
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from normbt_kernels.modules import DistanceEMA
from tests.bradley_terry import LinearBTLoss
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import make_rows, make_tokenizer

JOINT_BATCH, NUM_PAIRS, STEPS = 8, 42, 6
# 42 pairs are 5 batches of 8 and one of 2, which accelerate's even_batches fills up with the first 6 pairs.
FILLED = [*range(NUM_PAIRS), *range(STEPS * JOINT_BATCH - NUM_PAIRS)]


def pairs(num_pairs=NUM_PAIRS, seed=0):
    return make_rows(num_pairs, ["margin"], seed)


ARGUMENTS = {
    "max_steps": STEPS,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "logging_steps": 3,
    "disable_tqdm": True,
    "report_to": [],
    "dataloader_pin_memory": False,
}


def make_trainer(
    folder, rows, num_ranks, model=None, loss=None, trainer_class=NormBTTrainer, shortcuts=False, **arguments
):
    """A trainer whose joint batch is the same for any number of ranks."""
    defaults = {
        "save_strategy": "no",
        "use_cpu": True,
        "per_device_train_batch_size": JOINT_BATCH // num_ranks,
        "per_device_eval_batch_size": JOINT_BATCH // num_ranks,
    }
    args = TrainingArguments(str(folder), **ARGUMENTS | defaults | arguments)
    model = make_model() if model is None else model
    options = {"loss": loss, "late_pooling": shortcuts, "padding_free": shortcuts}
    return trainer_class(model, args, train_dataset=rows, processing_class=make_tokenizer(), **options)


def with_lora(model):
    import peft

    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "SEQ_CLS"}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def state(trainer):
    """All that training has changed: whole parameters, mu, and what was logged."""
    return whole(trainer.model) | {
        "mu": trainer.pair_loss.mu.clone(),
        "num_updates": trainer.pair_loss.num_updates.clone(),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def evaluation(trainer):
    """The loss of pairs that divide among the ranks (Trainer's is the mean over batches, and the last one is filled up
    with pairs seen before), and the metrics of pairs that do not."""
    loss = trainer.evaluate(pairs(2 * JOINT_BATCH, seed=1))["eval_loss"]
    metrics = trainer.evaluate(pairs(JOINT_BATCH + 3, seed=1))
    return {"eval_loss": loss, **{name: metrics[name] for name in ("eval_accuracy", "eval_margin")}}


def whole(model):
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone() for name, tensor in tensors
    }


# --- Trainer under DDP and FSDP2 -----------------------------------------------------------------------------------


class LateRank(NormBTTrainer):
    """Rank 1 takes its time over its part of a checkpoint: the others must not call it whole before."""

    def _save_rng_state(self, output_dir):
        if dist.get_rank() == 1:
            time.sleep(0.5)
            assert not Path(output_dir, "trainer_state.json").exists()
        super()._save_rng_state(output_dir)


def ddp(folder):
    """With checkpoints on the way; and evaluated on pairs that do not divide among the ranks."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(folder, pairs(), dist.get_world_size(), trainer_class=LateRank, **saving)
    trainer.train()
    return state(trainer) | {"fused": trainer.fused, "eval": evaluation(trainer)}


def ddp_by_shortcuts(folder):
    trainer = make_trainer(folder, pairs(), dist.get_world_size(), shortcuts=True)
    trainer.train()
    return state(trainer) | {"eval": evaluation(trainer)}


def ddp_resumed(folder):
    trainer = make_trainer(folder, pairs(), dist.get_world_size())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return state(trainer)


def streamed(folder):
    import datasets

    stream = datasets.Dataset.from_list(pairs()).to_iterable_dataset()
    trainer = make_trainer(folder, stream, dist.get_world_size())
    trainer.train()
    return state(trainer)


def lora(folder):
    """With checkpointed activations, where Trainer lets DDP not look for unused parameters."""
    model, checkpointing = with_lora(make_model()), {"gradient_checkpointing": True}
    trainer = make_trainer(folder, pairs(), dist.get_world_size(), model, **checkpointing)
    trainer.train()
    return state(trainer) | {"fused": trainer.fused}


def fsdp2(folder):
    """`fully_shard` by transformers itself, which its Trainer takes on any device (accelerate's does not on CPUs)."""
    return sharded(folder)


def fsdp2_by_shortcuts(folder):
    return sharded(folder, shortcuts=True)


def sharded(folder, shortcuts=False):
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        make_model().save_pretrained(folder / "initial")
    dist.barrier()
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "initial", distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
    )
    trainer = make_trainer(folder, pairs(), dist.get_world_size(), model, LinearNormBTLoss(), shortcuts=shortcuts)
    trainer.train()
    return state(trainer) | {"fused": trainer.fused, "eval": evaluation(trainer)}


# --- a loop of one's own, with unequal batches ---------------------------------------------------------------------


def unequal_batches(num_ranks):
    """For each step, the row numbers of each rank's batch: 1 to 3 pairs, seldom equally many."""
    rows = itertools.count()
    return [[[next(rows) for _ in range(1 + (step + rank) % 3)] for rank in range(num_ranks)] for step in range(STEPS)]


def fully_sharded_loop(folder):
    """The mean over all ranks' pairs is a sum, divided by their number, times the ranks that FSDP averages over."""
    model = make_model()
    reader = HeadReader(find_head(model))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    try:
        LinearNormBTLoss()(torch.randn(4, model.config.hidden_size), model.score.weight)
    except TypeError as error:
        refusal = str(error)
    loss_fn = NormBTLoss(reduction="sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    collate, all_pairs = PreferenceCollator(make_tokenizer()), pairs(STEPS * 3 * dist.get_world_size())
    for of_ranks in unequal_batches(dist.get_world_size()):
        batch = collate([all_pairs[i] for i in of_ranks[dist.get_rank()]])
        margin = batch.pop("margin")
        reader.expect(batch["input_ids"])
        rewards = model(**batch).logits[:, 0]
        loss = loss_fn(*rewards.chunk(2), *reader.take(rewards).chunk(2), margin=margin)
        (loss * dist.get_world_size() / sum(map(len, of_ranks))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model) | {"mu": loss_fn.state_dict()["mu"].clone(), "refusal": refusal}


# --- FSDP1, which casts buffers behind `Module._apply` --------------------------------------------------------------

SLOW_BETA = 0.999  # of a mu that 16 bits would hold still


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def vectors(step, num_ranks):
    """The chosen, then the rejected vectors of each rank's four pairs; farther apart after the first step."""
    generator = torch.Generator().manual_seed(step)
    return (3 if step else 1) * torch.randn(num_ranks, 2, 4, 5, generator=generator)


def fsdp1_with_buffers_in_16_bits(folder):
    model = plain_net()
    apply_normbt(model, beta=SLOW_BETA)
    in_16_bits = MixedPrecision(buffer_dtype=torch.bfloat16)
    sharded = FullyShardedDataParallel(
        model, mixed_precision=in_16_bits, device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.02)
    for step in range(STEPS):
        rewards = sharded(vectors(step, dist.get_world_size())[dist.get_rank()].flatten(0, 1))
        (-nn.functional.logsigmoid(rewards[:4] - rewards[4:]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    (ema,) = (module for module in sharded.modules() if isinstance(module, DistanceEMA))
    with FullyShardedDataParallel.summon_full_params(sharded):
        return {"mu": ema.mu.clone()} | whole(model)


# --- what the mean of the distances costs, and who shares it -------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Names and sizes of the collectives that are issued."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.seen.append((func.__name__.partition(".")[0], [(tensor.numel(), tensor.dtype) for tensor in tensors]))
        return func(*args, **kwargs or {})


def collectives(folder):
    """Those of a whole training step, gradients included, with NormBT and with plain BT."""

    def of_second_step(loss):
        trainer = make_trainer(folder, pairs(), dist.get_world_size(), loss=loss, max_steps=1)
        trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))
        with Collectives() as issued:
            trainer.training_step(trainer.model_wrapped, batch)
            if isinstance(loss, DistanceEMA):
                loss.end_step()  # what follows the optimizer's
        return issued.seen

    return {"normbt": of_second_step(LinearNormBTLoss()), "bt": of_second_step(LinearBTLoss())}


def overlap(folder):
    """Rank 0 finishes backward before the others begin their forward: a step that waited for them would never end."""
    loss_fn, store = LinearNormBTLoss(), dist.distributed_c10d._get_default_store()
    hidden, head = torch.randn(4, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    loss_fn(hidden, head).backward()  # the first mean is waited for, since it weighs the first batch
    if dist.get_rank() == 0:
        loss_fn(2 * hidden, head).backward()
        store.set("backward is over", "1")
    else:
        store.wait(["backward is over"], timedelta(seconds=30))
        loss_fn(2 * hidden, head).backward()
    return {"mu": loss_fn.mu.clone()}


def distributed_checkpoint(folder):
    """Saved and loaded as PyTorch's documentation does it."""

    def make():
        model = nn.ModuleDict({"head": nn.Linear(5, 1), "loss": LinearNormBTLoss()})
        optimizer = torch.optim.AdamW(model.parameters())
        model["loss"].follow(optimizer)
        return model, optimizer

    def mu_of(model):
        return model["loss"].mu.clone(), model["loss"].num_updates.clone()

    model, optimizer = make()
    for _ in range(2):
        model["loss"](torch.randn(4, 5), model["head"].weight, model["head"].bias).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(dict(enumerate(get_state_dict(model, optimizer))), checkpoint_id=folder)
    loaded, optimizer = make()
    states = dict(enumerate(get_state_dict(loaded, optimizer)))
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(loaded, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    return {"saved": mu_of(model), "loaded": mu_of(loaded)}


def subgroups(folder):
    """Ranks in pairs, as in ring attention: the second of each pair holds the last tokens, the first other rows."""
    distances = torch.arange(1.0, 3.0) + dist.get_rank()
    hidden = torch.cat([distances[:, None] * torch.eye(3)[0], torch.zeros(2, 3)])
    groups = [dist.new_group(list(range(part, dist.get_world_size(), 2))) for part in (0, 1)]
    found = {}
    for name, group in (("group", groups[dist.get_rank() % 2]), ("all", "default")):
        loss_fn = LinearNormBTLoss(process_group=group)
        for scale in (1.0, 2.0):
            loss_fn(scale * hidden, torch.ones(3))
        found[name] = loss_fn.state_dict()["mu"].clone()
    return found


SCENARIOS = (ddp, ddp_by_shortcuts, ddp_resumed, streamed, lora, fully_sharded_loop, collectives, overlap, subgroups)
SCENARIOS += (fsdp1_with_buffers_in_16_bits, distributed_checkpoint)
TRAINER_TAKES_FSDP2 = hasattr(Trainer, "_defer_fsdp_gradient_reduction")  # of a model sharded at load time
if TRAINER_TAKES_FSDP2:
    SCENARIOS += (fsdp2, fsdp2_by_shortcuts)
ON_ANY_NUMBER = (ddp, fully_sharded_loop, overlap, subgroups)

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for scenario in SCENARIOS if dist.get_world_size() == 2 else ON_ANY_NUMBER:
        folder = Path(sys.argv[1]) / ("ddp" if scenario is ddp_resumed else scenario.__name__)
        torch.save(scenario(folder), Path(sys.argv[1]) / f"{scenario.__name__}-{dist.get_rank()}.pt")
        dist.barrier()
    gc.collect()  # trainers and their DDP, which would otherwise outlive the group, and end its threads at exit
    dist.destroy_process_group()
