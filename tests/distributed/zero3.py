"""`ranks.ddp` under DeepSpeed's ZeRO-3, for `test_zero3.py`:

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.zero3 FOLDER
"""

import gc
import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}  # read where these are imported

import deepspeed
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import AutoModelForSequenceClassification, TrainingArguments

from normbt_kernels import LinearNormBTLoss
from normbt_kernels.integrations.transformers import NormBTTrainer
from tests.distributed import ranks
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import make_tokenizer

CONFIG = {
    "zero_optimization": {"stage": 3},
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 1.0,  # as Trainer does by default
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}


def zero3(folder, resume=None, shortcuts=False):
    # Told of no backend, accelerate takes a machine without GPUs for a single process.
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run
    PartialState(backend="gloo")
    args = TrainingArguments(
        str(folder),
        deepspeed=CONFIG,
        accelerator_config={"use_configured_state": True},
        **ranks.ARGUMENTS,
        per_device_train_batch_size=ranks.JOINT_BATCH // dist.get_world_size(),
        save_strategy="steps",
        save_steps=3,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "initial")
    tokenizer = make_tokenizer()
    options = {"loss": LinearNormBTLoss(), "late_pooling": shortcuts, "padding_free": shortcuts}
    trainer = NormBTTrainer(model, args, train_dataset=ranks.pairs(), processing_class=tokenizer, **options)
    trainer.train(resume_from_checkpoint=resume)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return ranks.state(trainer) | {"fused": trainer.fused}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if os.environ["RANK"] == "0":
        make_model().save_pretrained(folder / "initial")
    PartialState(backend="gloo").wait_for_everyone()
    for name, options in {
        "zero3": {},
        "zero3_resumed": {"resume": str(folder / "checkpoint-3")},
        "zero3_by_shortcuts": {"shortcuts": True},
    }.items():
        torch.save(zero3(folder, **options), folder / f"{name}-{dist.get_rank()}.pt")
    gc.collect()  # the engines, which would otherwise outlive the group, and end its threads at exit
    dist.barrier()
    dist.destroy_process_group()
