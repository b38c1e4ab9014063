"""`NormBTTrainer` against an eager NormBT written inside the same `Trainer`: the same losses and parameters, whatever
the architecture, the precision, and the features of the trainer."""

import pytest
import torch

import reference

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers import Trainer, TrainingArguments

from normbt_kernels import LinearNormBTLoss, NormBTLoss
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from tests.step_ema import StepEMA, start
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import make_rows, make_tokenizer

STEPS = 4


class EagerNormBTTrainer(Trainer):
    """What a user would write: hidden states by a hook, the loss by the reference, mu on the side."""

    loss_is_scaled_for_ga = False

    def __init__(self, model, args, train_dataset, tokenizer):
        super().__init__(model, args, PreferenceCollator(tokenizer), train_dataset)
        self.ema = StepEMA()
        self.losses = []
        self.rows = None
        # The outermost module with one output, which is the one that the model calls.
        names = {name for name, module in model.named_modules() if getattr(module, "out_features", None) == 1}
        (head,) = (name for name in names if not any(name.startswith(f"{other}.") for other in names))
        model.get_submodule(head).register_forward_pre_hook(self.keep)

    def create_optimizer(self):
        optimizer = super().create_optimizer()
        optimizer.register_step_post_hook(self.ema.end_step)
        return optimizer

    def keep(self, module, args):
        self.rows = args[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        constants = {name: inputs.pop(name) for name in ("margin", "pair_weight") if name in inputs}
        rewards = model(**inputs).logits[:, 0].float()
        rows = self.rows.float()
        if rows.dim() == 3:
            rows = reference.pool(rows, torch.tensor([int(mask.nonzero().max()) for mask in inputs["attention_mask"]]))
        chosen, rejected = rows.chunk(2)
        mu = self.ema.weight_mean(reference.pair_distance(rows))
        self.ema.update(reference.pair_distance(rows))
        return reference.normbt_loss(*rewards.chunk(2), chosen, rejected, mu, **constants)


def lora(**options):
    return lambda model: peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    )


# What is combined with what: every feature with a decoder and an encoder, no two runs alike.
ACCUMULATION = {"gradient_accumulation_steps": 2}
CHECKPOINTING = {"gradient_checkpointing": True}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
MODULES_TO_SAVE = lora(task_type="SEQ_CLS")
SCENARIOS = {
    "llama, left, accumulation": ("llama", "left", ACCUMULATION, ["margin"], None),
    "qwen2, LoRA, checkpointing": ("qwen2", "right", CHECKPOINTING, [], MODULES_TO_SAVE),
    "gemma, accumulation, reentrant": ("gemma", "right", ACCUMULATION | REENTRANT, ["pair_weight"], None),
    "bert, LoRA, accumulation": ("bert", "right", ACCUMULATION, ["pair_weight"], MODULES_TO_SAVE),
    "modernbert, checkpointing": ("modernbert", "left", CHECKPOINTING, ["margin"], None),
    "llama, LoRA on the head": ("llama", "right", {}, ["margin"], lora()),
    "bert, LoRA on the head": ("bert", "right", {}, [], lora()),
}


def train(scenario, folder, loss=None, eager=False, num_layers=2, **arguments):
    """Trains a few steps; the trainer afterwards, and its model's parameters."""
    architecture, side, features, constants, adapt = SCENARIOS[scenario]
    tokenizer = make_tokenizer(side)
    model = make_model(architecture, attn_implementation="eager", num_hidden_layers=num_layers)
    if adapt is not None:
        torch.manual_seed(0)
        model = adapt(model)
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **features | arguments,
    )
    rows = make_rows(32, constants)
    trainer = (
        EagerNormBTTrainer(model, args, rows, tokenizer)
        if eager
        else NormBTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, loss=loss)
    )
    if not eager:
        start(trainer.pair_loss)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    moved = {
        name: parameter.detach() - before[name]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return trainer, moved


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module", params=SCENARIOS)
def eager_run(request, tmp_path_factory):
    return request.param, *train(request.param, tmp_path_factory.mktemp("eager"), eager=True)


@pytest.mark.parametrize("form", ["default", "reward form"])
@pytest.mark.slow
def test_fp32_training_equals_eager_normbt(eager_run, tmp_path, form):
    scenario, eager, expected = eager_run
    trainer, moved = train(scenario, tmp_path, loss=NormBTLoss() if form == "reward form" else None)
    assert trainer.fused == (form == "default" and "on the head" not in scenario)
    assert losses(trainer) == pytest.approx(losses(eager), rel=1e-5)
    torch.testing.assert_close(trainer.pair_loss.mu, eager.ema.mu, rtol=1e-5, atol=0)
    assert moved.keys() == expected.keys()
    for name, seen in moved.items():
        torch.testing.assert_close(seen, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any("score" in name or "classifier" in name for name, seen in moved.items() if seen.any())


@pytest.mark.slow
def test_bf16_training_is_as_close_to_fp32_as_eager_normbt_in_bf16(eager_run, tmp_path):
    scenario, exact, exact_moves = eager_run
    eager, eager_moves = train(scenario, tmp_path, eager=True, bf16=True)
    runs = [train(scenario, tmp_path, loss, bf16=True) for loss in (None, NormBTLoss())]

    def moves(found):
        return torch.cat([found[name].flatten() for name in exact_moves])

    def history(trainer):
        return torch.tensor(losses(trainer))

    # Over all parameters, and over all steps: a single one would be judged by eager's luck.
    for seen, rounded, truth in (
        *((moves(found), moves(eager_moves), moves(exact_moves)) for _, found in runs),
        *((history(trainer), history(eager), history(exact)) for trainer, _ in runs),
    ):
        assert (rounded - truth).norm() > 0
        assert (seen - truth).norm() <= 2 * (rounded - truth).norm() + 2**-8 * truth.norm()


@pytest.mark.parametrize(
    ("scenario", "loss"), [("llama, left, accumulation", NormBTLoss), ("bert, LoRA, accumulation", LinearNormBTLoss)]
)
@pytest.mark.slow
def test_compiled_training_equals_eager_normbt(tmp_path, scenario, loss):
    eager, expected = train(scenario, tmp_path, eager=True, num_layers=1)
    # aot_eager traces forward and backward as torch_compile=True does, and generates no C++.
    trainer, moved = train(scenario, tmp_path, loss(), num_layers=1, torch_compile_backend="aot_eager")
    assert trainer.args.torch_compile
    assert losses(trainer) == pytest.approx(losses(eager), rel=1e-5)
    for name, seen in moved.items():
        torch.testing.assert_close(seen, expected[name], rtol=1e-4, atol=1e-6, msg=name)
