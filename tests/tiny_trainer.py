"""`NormBTTrainer` on a tiny model and pairs, and the rows that its head reads, found without the code under test."""

import torch
from transformers import TrainingArguments

from normbt_kernels.integrations.transformers import NormBTTrainer


def make_trainer(model, tokenizer, output_dir, loss=None, eval_dataset=None, train_dataset=None, **arguments):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "learning_rate": 0.1,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(output_dir), **defaults | arguments)
    return NormBTTrainer(
        model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, loss=loss
    )


def pooled_rows(model, batch):
    """The hidden row at each sequence's last real token, found without the code under test."""
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    positions = [int(mask.nonzero().max()) for mask in batch["attention_mask"]]
    return hidden[torch.arange(len(positions)), positions]
