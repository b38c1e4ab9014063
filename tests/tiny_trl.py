"""TRL's trainers on tiny models and pairs, and eager NormBT in the same trainer to compare them with."""

import copy
import os

import pytest
import torch

import reference

pytest.importorskip("trl")
pytest.importorskip("peft")

import datasets
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    LlamaConfig,
    ModernBertConfig,
    Qwen3Config,
)
from trl import RewardConfig, RewardTrainer

from normbt_kernels import apply_normbt
from tests.step_ema import StepEMA
from tests.tiny_classifiers import PAD, VOCABULARY
from tests.tiny_pairs import EOS, make_rows

os.environ["CI"] = "1"  # TRL then reports no usage
datasets.disable_progress_bars()

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 1,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "qwen": Qwen3Config(**TINY, num_key_value_heads=1, head_dim=8),
    "gemma": GemmaConfig(**TINY, num_key_value_heads=1, head_dim=8),
    "bert": BertConfig(**TINY),
    "modernbert": ModernBertConfig(**TINY, cls_token_id=None, sep_token_id=None),
}
DECODERS = ("llama", "qwen", "gemma")


def make_model(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)


def make_dataset(num_pairs, seed=0, margin=True):
    return Dataset.from_list(make_rows(num_pairs, ["margin"] if margin else [], seed))


def make_trainer(cls, model, tokenizer, output_dir, dataset, eval_dataset=None, peft_config=None, options=(), **config):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "learning_rate": 0.02,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    return cls(
        model,
        RewardConfig(str(output_dir), **defaults | config),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        **dict(options),
    )


class EagerNormBT(RewardTrainer):
    """NormBT in plain autograd; a hook reads the input of the head, which TRL does not give."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema = StepEMA()
        self.entering = []
        # The first of that name: under peft it is the wrapper that the model calls.
        head = next(m for name, m in self.model.named_modules() if name.split(".")[-1] in ("score", "classifier"))
        head.register_forward_pre_hook(lambda module, args: self.entering.append(args[0]))

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        optimizer.register_step_post_hook(self.ema.end_step)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.entering.clear()
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        dtype = torch.promote_types(outputs.logits.dtype, torch.float32)
        hidden = self.entering[-1].detach().to(dtype)
        if hidden.dim() == 3:
            hidden = reference.pool(hidden, inputs["attention_mask"].sum(dim=1) - 1)
        chosen, rejected = hidden.chunk(2)
        chosen_rewards, rejected_rewards = outputs.logits.to(dtype).chunk(2)
        distance = reference.pair_distance(hidden)
        loss = reference.normbt_loss(
            chosen_rewards,
            rejected_rewards,
            chosen,
            rejected,
            self.ema.weight_mean(distance),
            margin=inputs.get("margin"),
            center_coef=self.args.center_rewards_coefficient or 0.0,
        )
        if model.training:
            self.ema.update(distance)
        return (loss, outputs) if return_outputs else loss


def parameters_of(trainer):
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters())
    return torch.cat([parameter.detach().double().flatten() for parameter in whole])


def applied(*args, **kwargs):
    """TRL's own trainer, with the one line for trainers that cannot be changed."""
    trainer = RewardTrainer(*args, **kwargs)
    apply_normbt(trainer.model)
    return trainer


def losses_of(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


FULL, LORA, LORA_ON_HEAD = "full", "lora", "lora on head"


def lora(name, adapters):
    head = "score" if name in DECODERS else "classifier"
    layers = {"bert": ["query", "value"], "modernbert": ["Wqkv"]}.get(name, ["q_proj", "v_proj"])
    if adapters == LORA:
        return LoraConfig(r=4, target_modules=layers, modules_to_save=[head], task_type="SEQ_CLS")
    return LoraConfig(r=4, target_modules=[*layers, head])


def assert_same_training(seen, expected, initial, bf16=False):
    # bf16: the gradients of the rewards enter the model rounded, and 1 ulp of fp32 may round them either way
    tolerance = 2**-8 if bf16 else 1e-5
    trained = parameters_of(expected)
    assert (parameters_of(seen) - trained).norm() < tolerance * (trained - initial).norm()
    torch.testing.assert_close(losses_of(seen), losses_of(expected), rtol=tolerance, atol=0)


def assert_close_mu(seen, expected):
    torch.testing.assert_close(seen.pair_loss.mu, expected.ema.mu, rtol=1e-5, atol=0)
