"""NormBT in TRL: real `RewardTrainer` runs, against eager NormBT written inside the same trainer."""

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

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
    PreTrainedTokenizerFast,
    Qwen3Config,
    Trainer,
)
from trl import RewardConfig, RewardTrainer
from trl.models import get_act_offloading_ctx_manager

from normbt_kernels import apply_normbt
from normbt_kernels.integrations import checkpoint
from normbt_kernels.integrations import trl as integration
from normbt_kernels.integrations.pooled_head import pool_head
from normbt_kernels.integrations.trl import METRICS, NormBTRewardMixin, NormBTRewardTrainer
from tests.processes import run_ranks
from tests.step_ema import StepEMA, start

VOCABULARY = 32
PAD, EOS, UNKNOWN = 0, 1, 2
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
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos>' }}{% endfor %}"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL then reports no usage
    datasets.disable_progress_bars()


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(5, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def make_model(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)


def make_dataset(num_pairs, seed=0, margin=True):
    """Tokenised pairs of different lengths, each sequence ending in <eos>."""
    generator = torch.Generator().manual_seed(seed)

    def ids():
        length = int(torch.randint(3, 9, (), generator=generator))
        return [*torch.randint(5, VOCABULARY, (length,), generator=generator).tolist(), EOS]

    rows = [{"chosen_ids": ids(), "rejected_ids": ids()} for _ in range(num_pairs)]
    return Dataset.from_list([row | {"margin": 0.1 * i} for i, row in enumerate(rows)] if margin else rows)


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
    """NormBT in plain autograd, with what enters the head as the only thing that TRL does not hand out."""

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


# --- the loss in the trainer ---------------------------------------------------------------------------------------

FULL, LORA, LORA_ON_HEAD = "full", "lora", "lora on head"


def lora(name, adapters):
    head = "score" if name in DECODERS else "classifier"
    layers = {"bert": ["query", "value"], "modernbert": ["Wqkv"]}.get(name, ["q_proj", "v_proj"])
    if adapters == LORA:
        return LoraConfig(r=4, target_modules=layers, modules_to_save=[head], task_type="SEQ_CLS")
    return LoraConfig(r=4, target_modules=[*layers, head])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("name", "adapters"),
    [(name, adapters) for name in CONFIGS for adapters in (FULL, LORA)] + [("llama", LORA_ON_HEAD)],
)
def test_training_equals_eager_normbt_inside_the_same_trainer(name, adapters, bf16, tokenizer, tmp_path):
    """With margin, centering, gradient checkpointing, and an accumulation whose last step has one batch only."""
    dataset = make_dataset(14)
    ours, eager = (
        make_trainer(
            cls,
            make_model(name),
            tokenizer,
            tmp_path,
            dataset,
            peft_config=None if adapters == FULL else lora(name, adapters),
            bf16=bf16,
            gradient_checkpointing=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            center_rewards_coefficient=0.05,
        )
        for cls in (NormBTRewardTrainer, EagerNormBT)
    )
    start(ours.pair_loss)
    initial = parameters_of(ours)
    ours.train()
    eager.train()
    assert ours.state.global_step == 4
    assert_same_training(ours, eager, initial, bf16)
    assert_close_mu(ours, eager)


def assert_same_training(seen, expected, initial, bf16=False):
    # bf16: the gradients of the rewards enter the model rounded, and 1 ulp of fp32 may round them either way
    tolerance = 2**-8 if bf16 else 1e-5
    trained = parameters_of(expected)
    assert (parameters_of(seen) - trained).norm() < tolerance * (trained - initial).norm()
    torch.testing.assert_close(losses_of(seen), losses_of(expected), rtol=tolerance, atol=0)


def assert_close_mu(seen, expected):
    torch.testing.assert_close(seen.pair_loss.mu, expected.ema.mu, rtol=1e-5, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("adapters", [FULL, LORA])
def test_checkpointing_changes_nothing(adapters, use_reentrant, tokenizer, tmp_path):
    trained = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            NormBTRewardTrainer,
            make_model(),
            tokenizer,
            tmp_path,
            make_dataset(8),
            peft_config=None if adapters == FULL else lora("llama", adapters),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
            max_steps=2,
        )
        trainer.train()
        trained.append(parameters_of(trainer))
        assert trainer.pair_loss.num_updates == 2  # once per batch, however often its forward pass runs
    assert torch.equal(*trained)


def test_activation_offloading_changes_nothing(tokenizer, tmp_path, monkeypatch):
    # TRL's own offloader, on the only device that there is here, with no tensor too small for it
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    offloader = functools.partial(
        get_act_offloading_ctx_manager, use_pin_memory=False, use_streams=False, min_offload_size=1
    )
    monkeypatch.setattr("trl.trainer.reward_trainer.get_act_offloading_ctx_manager", offloader)
    trained = []
    for activation_offloading in (False, True):
        arguments = {"activation_offloading": activation_offloading, "gradient_checkpointing": False, "max_steps": 2}
        trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(8), **arguments)
        trainer.train()
        trained.append(parameters_of(trainer))
    assert trainer.maybe_activation_offload_context.tensor_id > 0
    assert torch.equal(*trained)


def test_model_in_bf16_equals_eager_normbt(tokenizer, tmp_path):
    models = [make_model(dtype=torch.bfloat16) for _ in range(2)]
    arguments = {"max_steps": 3, "center_rewards_coefficient": 0.05, "learning_rate": 0.5}
    ours, eager = (
        make_trainer(cls, model, tokenizer, tmp_path, make_dataset(12), **arguments)
        for cls, model in zip((NormBTRewardTrainer, EagerNormBT), models, strict=True)
    )
    start(ours.pair_loss)
    initial = parameters_of(ours)
    ours.train()
    eager.train()
    assert_same_training(ours, eager, initial, bf16=True)


@pytest.mark.parametrize(("pooled", "read"), [(False, -2), (True, -1)])
def test_pad_equal_to_eos_measures_the_rows_that_the_model_rewards(pooled, read, tokenizer, tmp_path):
    tokenizer.pad_token = "<eos>"  # transformers' classifiers then read the token before it, a pooled head does not
    model = make_model()
    if pooled:
        pool_head(model)
    dataset = make_dataset(4)
    trainer = make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, dataset, max_steps=1, learning_rate=0.0)
    trainer.train()
    with torch.no_grad():
        rows = [[model.model(torch.tensor([row[name]])).last_hidden_state[0, read] for row in dataset]
                for name in ("chosen_ids", "rejected_ids")]  # fmt: skip
        chosen, rejected = (torch.stack(hidden) for hidden in rows)
    logged = trainer.state.log_history[0]
    assert logged["mean_distance"] == pytest.approx((chosen - rejected).norm(dim=1).mean().item(), rel=1e-5)
    margin = F.linear(chosen - rejected, model.score.weight.detach())
    assert logged["margin"] == pytest.approx(margin.mean().item(), rel=1e-4)


def test_apply_normbt_on_the_untouched_trainer_trains_the_same_model(tokenizer, tmp_path):
    arguments = {
        "max_steps": 20,
        "center_rewards_coefficient": 0.05,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
    }
    trainers = [
        make_trainer(cls, make_model(), tokenizer, tmp_path, make_dataset(24), **arguments)
        for cls in (EagerNormBT, NormBTRewardTrainer, RewardTrainer, RewardTrainer)
    ]
    start(trainers[1].pair_loss)
    apply_normbt(trainers[2].model)
    start(trainers[2].model.score.normbt)
    initial = parameters_of(trainers[0])
    for trainer in trainers:
        trainer.train()
    eager, ours, applied, plain = (parameters_of(trainer) for trainer in trainers)
    update = (eager - initial).norm()
    # Steps multiply rounding errors: after 20, these are 3e-6 and 6e-6 of the way, and BT is elsewhere.
    assert (ours - eager).norm() < 3e-5 * update
    assert (applied - eager).norm() < 3e-5 * update
    assert (plain - eager).norm() > 3e-2 * update


# --- what TRL's trainer does, ours does ----------------------------------------------------------------------------


def test_metrics_are_those_that_trl_logs(tokenizer, tmp_path):
    """Two logs with an evaluation between them, each over unequal batches, and what is left at the end."""
    dataset = make_dataset(22)
    histories = []
    for cls in (RewardTrainer, NormBTRewardTrainer):
        trainer = make_trainer(
            cls,
            make_model(),
            tokenizer,
            tmp_path,
            dataset,
            make_dataset(10, seed=1),
            num_train_epochs=2,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=3,
            learning_rate=0.0,
        )
        trainer.train()
        trainer.predict(trainer.eval_dataset)  # its batches too are TRL's to average into the next evaluation
        trainer.evaluate()
        histories.append(trainer.state.log_history)
    theirs, ours = histories
    assert len(ours) == len(theirs)
    for seen, expected in zip(ours, theirs, strict=True):
        for name in set(expected) - {"loss", "eval_loss", "train_loss", "grad_norm"}:
            if not name.endswith(("runtime", "per_second")):
                assert seen[name] == pytest.approx(expected[name], rel=1e-5), name
        if "loss" in expected:
            assert seen["bt_loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert set(seen) == set(expected) | set(METRICS) | {"mu"}
        if "eval_loss" in expected:
            assert set(seen) == set(expected) | {f"eval_{name}" for name in METRICS}


def test_logged_distances_and_weights_are_those_of_the_reference(tokenizer, tmp_path):
    dataset = make_dataset(8)
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, dataset, learning_rate=0.0,
                           num_train_epochs=1, logging_steps=2)  # fmt: skip
    rows = []
    trainer.model.score.register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    batches = []
    original = trainer.model.forward
    trainer.model.forward = lambda **inputs: batches.append(inputs["attention_mask"]) or original(**inputs)
    trainer.train()
    distances = [
        reference.pair_distance(reference.pool(hidden, mask.sum(dim=1) - 1))
        for hidden, mask in zip(rows, batches, strict=True)
    ]
    ema = reference.DistanceEMA()
    weights = []
    for distance in distances:
        weights.append(reference.normbt_weight(distance, ema.weight_mean(distance)))
        ema.update(distance)
    logged = trainer.state.log_history[0]
    means = {
        "mean_distance": [distance.mean() for distance in distances],
        "min_weight": [weight.min() for weight in weights],
        "mean_weight": [weight.mean() for weight in weights],
        "max_weight": [weight.max() for weight in weights],
    }
    for name, values in means.items():
        assert logged[name] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5), name
    assert logged["mu"] == pytest.approx(ema.mu.item(), rel=1e-6)


def test_evaluation_uses_mu_and_leaves_it(tokenizer, tmp_path):
    dataset, eval_dataset = make_dataset(8), make_dataset(8, seed=1)
    arguments = {"max_steps": 2, "center_rewards_coefficient": 0.05, "per_device_eval_batch_size": 8}
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, dataset, eval_dataset, **arguments)
    trainer.train()
    state = copy.deepcopy(trainer.pair_loss.state_dict())
    metrics = trainer.evaluate()
    assert trainer.pair_loss.state_dict() == state

    batch = trainer.data_collator(list(eval_dataset))
    with torch.no_grad():
        hidden = trainer.model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        hidden = reference.pool(hidden, batch["attention_mask"].sum(dim=1) - 1)
        head = trainer.model.score.weight
        loss = reference.linear_normbt_loss(hidden, head, state["mu"], margin=batch["margin"], center_coef=0.05)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_compute_metrics_receives_the_rewards(tokenizer, tmp_path):
    received = []

    def compute_metrics(prediction):
        received.append(torch.as_tensor(prediction.predictions))
        return {"pairs": len(prediction.predictions) / 2}

    eval_dataset = make_dataset(4)
    options = {"compute_metrics": compute_metrics}
    model = make_model()
    trainer = make_trainer(
        NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4), eval_dataset, None, options
    )
    assert trainer.evaluate()["eval_pairs"] == 4
    batch = trainer.data_collator(list(eval_dataset))
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(received[0].reshape(expected.shape), expected)


class CountingTrainer(RewardTrainer):
    """Somebody's own trainer, with a metric and a weight for each step."""

    def training_step(self, *args, **kwargs):
        self._metrics["train"]["steps"].append(1.0)
        return super().training_step(*args, **kwargs)


class NormBTCountingTrainer(NormBTRewardMixin, CountingTrainer):
    pass


def test_mixin_keeps_what_a_trainer_of_your_own_adds(tokenizer, tmp_path):
    options = {"beta": 0.5, "eps": 1e-3, "max_weight": 1.0}
    trainer = make_trainer(
        NormBTCountingTrainer, make_model(), tokenizer, tmp_path, make_dataset(8), options=options, max_steps=2
    )
    trainer.train()
    assert trainer.pair_loss.beta == 0.5
    assert trainer.pair_loss.options.eps == 1e-3
    assert trainer.state.log_history[0]["steps"] == 1.0
    assert trainer.state.log_history[0]["max_weight"] == 1.0


def test_conversations_are_tokenised_by_the_chat_template(tokenizer, tmp_path):
    answers = {"chosen": "w9 w8", "rejected": "w7"}
    prompt = {"role": "user", "content": "w5 w6"}
    rows = [{name: [prompt, {"role": "assistant", "content": answers[name]}] for name in answers}] * 4
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, Dataset.from_list(rows), max_steps=1)
    assert tokenizer.decode(trainer.train_dataset[0]["chosen_ids"]) == "user w5 w6 <eos> assistant w9 w8 <eos>"
    trainer.train()
    assert trainer.state.log_history[0]["mean_distance"] > 0


def test_model_card_names_the_method(tokenizer, tmp_path):
    dataset = make_dataset(4)
    trainer = make_trainer(
        NormBTRewardTrainer,
        make_model(),
        tokenizer,
        tmp_path,
        dataset,
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
    )
    trainer.train()  # TRL writes the card with each checkpoint
    card = (tmp_path / "README.md").read_text()
    assert "trained with NormBT" in card
    assert "https://huggingface.co/papers/2512.06343" in card
    assert {"trl", "reward-trainer"} <= set(trainer.model.model_tags)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [FULL, LORA])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(adapters, tokenizer, tmp_path):
    def train(checkpoint=None):
        trainer = make_trainer(
            NormBTRewardTrainer,
            make_model(),
            tokenizer,
            tmp_path,
            make_dataset(24),
            peft_config=None if adapters == FULL else lora("llama", adapters),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            optim="adamw_torch",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole, resumed = train(), train(str(tmp_path / "checkpoint-3"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert whole.pair_loss.num_updates == 6
    assert resumed.pair_loss.state_dict() == whole.pair_loss.state_dict()
    assert torch.equal(losses_of(resumed), losses_of(whole))


def test_checkpoint_loads_without_this_package(tokenizer, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4), **arguments)
    trainer.train()
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-1", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_checkpoint_of_another_loss_starts_mu_anew_and_says_so(tokenizer, tmp_path, warnings):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    for cls, max_steps in ((RewardTrainer, 1), (NormBTRewardTrainer, 2)):
        trainer = make_trainer(
            cls, make_model(), tokenizer, tmp_path, make_dataset(8), max_steps=max_steps, **arguments
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if max_steps == 2 else None)
    assert trainer.pair_loss.num_updates == 1
    assert "normbt.pt" in warnings[0]


@pytest.fixture
def warnings(monkeypatch):
    received = []
    for module in (integration, checkpoint):
        monkeypatch.setattr(module.logger, "warning", received.append)
    return received


# --- the host waits for nothing ------------------------------------------------------------------------------------


class HostReads(TorchFunctionMode):
    """Counts what would make the host wait for a GPU: a tensor's values read or copied by Python."""

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.READS
        return func(*args, **kwargs or {})


class WithoutMetrics(RewardTrainer):
    """The least that a reward trainer can do: all reads are the model's and `Trainer`'s."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return -F.logsigmoid(rewards[: len(rewards) // 2] - rewards[len(rewards) // 2 :]).mean()


def test_host_reads_once_per_log_and_never_in_a_step(tokenizer, tmp_path):
    reads = {}
    for cls in (WithoutMetrics, NormBTRewardTrainer, RewardTrainer):
        trainer = make_trainer(
            cls, make_model(), tokenizer, tmp_path, make_dataset(32), num_train_epochs=1, logging_steps=4
        )
        with HostReads() as seen:
            trainer.train()
        assert trainer.state.global_step == 8
        reads[cls] = seen.count
    assert reads[NormBTRewardTrainer] == reads[WithoutMetrics] + 2  # two logs
    assert reads[RewardTrainer] >= reads[WithoutMetrics] + 6 * 8  # the counter sees what TRL reads in each step


# --- several processes ---------------------------------------------------------------------------------------------


def train_on_this_rank(cls, model, tokenizer, output_dir, **config):
    data = make_dataset(18), make_dataset(8, seed=1)
    trainer = make_trainer(cls, model, tokenizer, output_dir, *data, logging_steps=2, **config)
    trainer.train()
    return trainer


def trained(trainer):
    """The whole parameters and mu that training has led to."""
    weights = trainer.model.score.normbt if type(trainer) is RewardTrainer else trainer.pair_loss
    return parameters_of(trainer), weights.state_dict()["mu"].clone()


TRAINER_TAKES_FSDP2 = hasattr(Trainer, "_defer_fsdp_gradient_reduction")  # of a model sharded at load time


def sharded_model(folder):
    """The same model, by `fully_shard` (which accelerate does not do on CPUs, but transformers does)."""
    from transformers.distributed import DistributedConfig

    if torch.distributed.get_rank() == 0:
        make_model().save_pretrained(folder)
    torch.distributed.barrier()
    config = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
    return AutoModelForSequenceClassification.from_pretrained(folder, distributed_config=config)


def train_on_two_ranks(output_dir):
    tokenizer = make_tokenizer()
    config = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    histories = [
        train_on_this_rank(cls, make_model(), tokenizer, output_dir, learning_rate=0.0, num_train_epochs=1,
                           eval_strategy="steps", eval_steps=3, **config).state.log_history
        for cls in (RewardTrainer, NormBTRewardTrainer)
    ]  # fmt: skip
    results = {}
    for cls in (NormBTRewardTrainer, applied):
        for engine in ("DDP", "FSDP2") if TRAINER_TAKES_FSDP2 else ("DDP",):
            model = make_model() if engine == "DDP" else sharded_model(output_dir / f"initial-{cls.__name__}")
            trainer = train_on_this_rank(cls, model, tokenizer, output_dir, max_steps=4, **config)
            results[f"{cls.__name__} under {engine}"] = trained(trainer)
    if trainer.is_world_process_zero():
        torch.save((histories, results), output_dir / "two_ranks.pt")


@pytest.mark.slow
def test_two_ranks_log_as_trl_does_and_train_as_one_on_the_joined_batch(tokenizer, tmp_path):
    run_ranks(2, "tests.test_trl", tmp_path, CI=1)
    (theirs, ours), results = torch.load(tmp_path / "two_ranks.pt", weights_only=True)
    for expected, seen in zip(theirs, ours, strict=True):
        shared = {name for name in expected if name.removeprefix("eval_") in METRICS}
        assert len(shared) == 6 or "train_runtime" in expected
        assert {name: seen[name] for name in shared} == pytest.approx({name: expected[name] for name in shared})
        if "loss" in expected:
            assert seen["bt_loss"] == pytest.approx(expected["loss"])

    initial = torch.cat([parameter.detach().double().flatten() for parameter in make_model().parameters()])
    config = {"max_steps": 4, "per_device_train_batch_size": 4}
    expected, expected_mu = trained(
        train_on_this_rank(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, **config)
    )
    assert len(results) == (4 if TRAINER_TAKES_FSDP2 else 2)
    for run, (parameters, mu) in results.items():
        assert (parameters - expected).norm() < 1e-5 * (expected - initial).norm(), run
        torch.testing.assert_close(mu, expected_mu, rtol=1e-6, atol=0, msg=run)


# --- misuse explains itself ----------------------------------------------------------------------------------------


def test_frozen_head_is_warned_about(tokenizer, tmp_path, warnings):
    arguments = tokenizer, tmp_path, make_dataset(4)
    for adapters in (LORA, LORA_ON_HEAD):
        make_trainer(NormBTRewardTrainer, make_model(), *arguments, peft_config=lora("llama", adapters))
    assert not warnings
    make_trainer(NormBTRewardTrainer, make_model(), *arguments, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert "frozen" in warnings[0]
    assert "modules_to_save=['score']" in warnings[0]


def test_forward_of_liger_is_refused(tokenizer, tmp_path):
    arguments = NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4)
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(*arguments, use_liger_kernel=True)
    make_trainer(*arguments, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False})


def test_model_without_a_scalar_head_is_refused(tokenizer, tmp_path):
    model = make_model()
    model.score = torch.nn.Identity()
    with pytest.raises(ValueError, match="scalar head"):
        make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4))


def test_two_labels_and_data_parallel_are_refused_by_trl(tokenizer, tmp_path, monkeypatch):
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**TINY | {"num_labels": 2}))
    with pytest.raises(ValueError, match="num_labels=1"):
        make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4))
    monkeypatch.setattr(RewardConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="torchrun"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4))


def test_odd_batch_is_refused_before_anything_changes(tokenizer, tmp_path):
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4))
    whole = trainer.data_collator
    trainer.data_collator = lambda rows: {name: value[:-1] for name, value in whole(rows).items()}
    with pytest.raises(ValueError, match=r"as many rejected ones, got input_ids \(7, "):
        trainer.train()
    assert trainer.pair_loss.num_updates == 0


def test_forward_that_skips_the_head_found_is_refused(tokenizer, tmp_path):
    model = make_model()
    trainer = make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4))
    model.score = torch.nn.Linear(16, 1, bias=False)
    with pytest.raises(ValueError, match="did not call its scalar head"):
        trainer.train()


def test_pairs_with_the_same_tokens_on_both_sides_are_left_out(tokenizer, tmp_path):
    rows = make_dataset(6, margin=False).to_list()
    rows[2]["rejected_ids"] = rows[2]["chosen_ids"]
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, Dataset.from_list(rows))
    assert trainer.train_dataset.to_list() == [row for i, row in enumerate(rows) if i != 2]
    with pytest.raises(ValueError, match="1 of 1 pairs are the same tokens on both sides"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, Dataset.from_list(rows[2:3]))


def test_data_without_the_columns_are_refused_with_those_they_have(tokenizer, tmp_path):
    rows = [{"question": "a", "chosen": "b"}]
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"the train dataset needs .*'rejected'.*; it has chosen, question"):
            make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, dataset, max_steps=1)
    with pytest.raises(ValueError, match="the eval dataset needs"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4), Dataset.from_list(rows))


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"eps": -1.0}, {"max_weight": 0.0}])
def test_options_out_of_range_are_refused(options, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4), options=options)


if __name__ == "__main__":
    train_on_two_ranks(Path(sys.argv[1]))
