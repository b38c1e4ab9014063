"""`apply_normbt`: any trainer's Bradley-Terry backward becomes NormBT's, and nothing else of the model changes."""

import copy
import gc
import pickle
import socket
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from normbt_kernels import apply_normbt, remove_normbt
from normbt_kernels.integrations.pooled_head import pool_head
from normbt_kernels.modules import DistanceEMA
from tests.processes import FORKED
from tests.step_ema import StepEMA, start
from tests.tiny_classifiers import DECODERS, ENCODERS, PAD, TinyDecoder, gradients, make_batch, make_model

pytest.importorskip("transformers")

# All terms at once: the margin and the smoothing inside the antisymmetric part, the centering in the symmetric one.
LOSS = {"margin": torch.tensor([0.3, -0.2, 0.1]), "label_smoothing": 0.1, "center_coef": 0.05}


def bt_loss(model, batch, layout="halves", **options):
    """Plain Bradley-Terry, as a trainer that knows nothing of NormBT computes it."""
    chosen, rejected = reference.pair_rows(len(batch["input_ids"]), layout)
    rewards = model(**batch).logits[:, 0]
    hidden = torch.zeros(len(rewards), 1)
    ones = torch.ones(len(chosen), dtype=rewards.dtype)
    return reference.normbt_loss(
        rewards[chosen], rewards[rejected], hidden[chosen], hidden[rejected], frozen_weight=ones, **options
    )


class Eager:
    """NormBT written into the training step, by the reference: what `apply_normbt` must amount to."""

    def __init__(self, model):
        self.model, self.ema = model, reference.DistanceEMA()

    def loss(self, batch, layout="halves", **options):
        head = [module for module in self.model.modules() if getattr(module, "out_features", None) == 1][-1]
        seen = []
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        rewards = self.model(**batch).logits[:, 0]
        hook.remove()
        (hidden,) = seen
        last = [int(mask.nonzero().max()) for mask in batch["attention_mask"]]
        rows = hidden if hidden.dim() == 2 else reference.pool(hidden, torch.tensor(last))
        chosen, rejected = reference.pair_rows(len(rows), layout)
        rho = reference.pair_distance(rows, layout)
        mu = self.ema.weight_mean(rho)
        self.ema.update(rho)
        return reference.normbt_loss(rewards[chosen], rewards[rejected], rows[chosen], rows[rejected], mu, **options)


def assert_as_close_as_eager(ours, eager, truth):
    """Each layer's gradient is at most twice as far from the fp64 one as eager PyTorch in the same dtype, plus one
    rounding step of that dtype (four of fp32's): CONTRIBUTING.md. (A layer, because a bias of one number is luck.)"""
    assert ours.keys() == eager.keys() == truth.keys()
    for layer in {name.rpartition(".")[0] for name in truth}:
        names = [name for name in truth if name.rpartition(".")[0] == layer]
        own, others, exact = (torch.cat([g[name].flatten() for name in names]) for g in (ours, eager, truth))
        rounding = (4 if own.dtype == torch.float32 else 1) * torch.finfo(own.dtype).eps * exact.norm()
        bound, error = 2 * (others - exact).norm() + rounding, (own - exact).norm()
        assert error <= bound, f"{layer}: {error} > {bound}"


def assert_close_models(ours, eager, rtol=1e-4, atol=1e-5):
    parameters = dict(ours.named_parameters())
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


def weights_of(model):
    """The submodule that holds mu, of the head that trains."""
    return [module for module in model.modules() if isinstance(module, DistanceEMA)][-1]


def mu_of(model):
    weights = weights_of(model)
    return weights.mu, weights.num_updates


# --- the gradient is NormBT's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", DECODERS + ENCODERS)
@pytest.mark.parametrize(("layout", "side"), [("halves", "right"), ("halves", "left"), ("interleaved", "right")])
def test_every_gradient_is_that_of_eager_normbt(architecture, dtype, layout, side):
    model = make_model(architecture, dtype)
    eager, truth = Eager(copy.deepcopy(model)), Eager(copy.deepcopy(model).double())
    apply_normbt(model, layout)
    for seed in range(2):  # the first batch is weighed by its own mean, the second by mu
        batch = make_batch(seed=seed, side=side)
        bt_loss(model, batch, layout, **LOSS).backward()
        for reference_step in (eager, truth):
            reference_step.loss(batch, layout, **LOSS).backward()
        assert_as_close_as_eager(gradients(model), gradients(eager.model), gradients(truth.model))
    mu, num_updates = mu_of(model)
    torch.testing.assert_close(mu.double(), truth.ema.mu, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)
    assert num_updates == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_gradient_is_scaled_in_fp32_and_rounded_once(dtype, layout):
    torch.manual_seed(0)
    head, rows = nn.Linear(8, 1).to(dtype), torch.randn(6, 8).to(dtype)
    apply_normbt(head, layout)
    head(rows).sum().mul(0).backward()
    mu = mu_of(head)[0].clone()
    logits = head(rows * 3)
    pairs = reference.pair_rows(6, layout)
    bt, reward_sum = torch.tensor([0.4, -0.3, 0.7]), logits.detach()[torch.stack(pairs), 0].sum(dim=0)
    plain = torch.empty(6, 1, dtype=dtype)
    for i, sign in zip(pairs, (1, -1), strict=True):
        plain[i, 0] = (sign * bt + 0.1 * reward_sum).to(dtype)  # with a centering term
    (received,) = torch.autograd.grad(logits, logits, plain)

    wide = torch.promote_types(dtype, torch.float32)
    w = reference.normbt_weight(reference.pair_distance((rows * 3).to(wide), layout), mu)
    chosen, rejected = (plain[i, 0].to(wide) for i in pairs)
    expected = plain.clone()
    for i, sign in zip(pairs, (1, -1), strict=True):
        expected[i, 0] = ((chosen + rejected) / 2 + sign * w * (chosen - rejected) / 2).to(dtype)
    if dtype.itemsize == 2:
        assert torch.equal(received, expected)
    else:
        torch.testing.assert_close(received, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("when", ["before peft", "after peft"])
def test_lora_with_the_head_in_modules_to_save(architecture, when):
    peft = pytest.importorskip("peft")
    model = make_model(architecture)
    eager = Eager(with_lora(peft, copy.deepcopy(model)))
    if when == "before peft":
        apply_normbt(model)
    model = with_lora(peft, model)
    if when == "after peft":
        apply_normbt(model)
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, eager.model)]
    for seed in range(3):
        bt_loss(model, make_batch(seed=seed), **LOSS).backward()
        eager.loss(make_batch(seed=seed), **LOSS).backward()
        for step in steps:
            step.step()
            step.zero_grad()
    assert_close_models(model, eager.model)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu)
    remove_normbt(model)
    assert not [key for key in model.state_dict() if "normbt" in key]


def with_lora(peft, model):
    torch.manual_seed(1)
    target = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[model.config.model_type]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=target, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("architecture", ["llama", "modernbert"])
def test_mu_moves_once_per_step_of_the_optimizer_with_evaluation_between(architecture):
    model = make_model(architecture)
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model)
    start(weights_of(model))
    eager.ema = StepEMA()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, eager.model)]
    of_another = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    for seed in range(9):
        batch = make_batch(3 if seed % 2 else 2, seed=seed)  # unequal micro-batches
        bt_loss(model, batch).backward()
        eager.loss(batch).backward()
        bystanders(model, make_batch(2, seed=99))
        of_another.step()
        if seed % 3 == 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            eager.ema.end_step()
            assert_close_models(model, eager.model)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu, rtol=1e-5, atol=0)
    assert mu_of(model)[1] == 1 + 3


def test_optimizer_made_after_the_first_forward_is_followed_from_its_first_step():
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    assert mu_of(model)[1] == 1  # no optimizer: each forward is a step
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer.step()
    for seed in range(4):
        bt_loss(model, make_batch(seed=seed)).backward()
    assert mu_of(model)[1] == 1
    optimizer.step()
    assert mu_of(model)[1] == 2


def test_resume_in_the_middle_of_an_accumulation_is_bitwise():
    def train(model, seeds, gradients=()):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for parameter, gradient in zip(model.parameters(), gradients, strict=False):
            parameter.grad = gradient.clone()
        for seed in seeds:
            bt_loss(model, make_batch(seed=seed)).backward()
            if seed % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        return model

    whole, first, second = (make_model() for _ in range(3))
    for model in (whole, first, second):
        apply_normbt(model)
    train(whole, range(9))
    train(first, range(4))
    assert "score.normbt.pending" in first.state_dict()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, range(4, 9), [parameter.grad for parameter in first.parameters()])
    assert mu_of(second) == mu_of(whole)
    assert mu_of(whole)[1] == 3
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))
    assert "score.normbt.pending" not in whole.state_dict()


def bystanders(model, batch):
    """Forwards that are no training: evaluation, with gradients or not, of any number of sequences."""
    with torch.no_grad():
        model(**batch)
    with torch.inference_mode():
        model(**batch)
    model.eval()
    model(**{name: values[:1] for name, values in batch.items()})
    with torch.no_grad():
        bt_loss(model, batch)
    model.train()


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_logits_are_bit_identical_and_eval_has_the_plain_gradient(architecture):
    plain, model = make_model(architecture), make_model(architecture)
    apply_normbt(model)
    batch = make_batch()
    bt_loss(model, batch).backward()
    for mode in (True, False):
        assert torch.equal(model.train(mode)(**batch).logits, plain.train(mode)(**batch).logits)
        assert torch.equal(bt_loss(model, batch), bt_loss(plain, batch))
    before = [value.clone() for value in mu_of(model)]
    gradients(model)
    bt_loss(model.eval(), batch).backward()
    bt_loss(plain.eval(), batch).backward()
    assert all(torch.equal(gradient, gradients_of) for gradient, gradients_of in paired(model, plain))
    assert list(mu_of(model)) == before


def paired(model, other):
    found, expected = gradients(model), gradients(other)
    assert found.keys() == expected.keys()
    assert found
    return [(found[name], expected[name]) for name in found]


def test_first_batch_not_finite_and_later_batches_follow_the_formula_of_mu():
    head = nn.Linear(4, 1)
    apply_normbt(head, beta=0.5, max_weight=1.5)
    for distances, mu in [((float("inf"), 1.0), 0.0), ((2.0, 4.0), 3.0), ((1.0, 1.0), 2.0), ((2.0, 8.0), 3.5)]:
        rows = torch.zeros(4, 4)
        rows[:2, 0] = torch.tensor(distances)
        logits = head(rows)
        assert mu_of(head)[0] == mu
    signs = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    (gradient,) = torch.autograd.grad(logits, logits, signs)  # weighed by 2 / 2 and 2 / 8
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [0.25], [-1.0], [-0.25]]))
    (gradient,) = torch.autograd.grad(head(rows / 4), logits := head(rows / 4), signs, allow_unused=True)
    (gradient,) = torch.autograd.grad(logits, logits, signs)  # (0.5 + 2) / 2 < mu: the cap holds for the first pair
    assert gradient[0] == 1.5


# --- which sequences are a pair ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "batches_are"), [("halves", "interleaved"), ("interleaved", "halves")])
@pytest.mark.parametrize("num_pairs", [2, 3])
def test_layout_that_does_not_match_the_batches_is_refused_in_the_first_backward(layout, batches_are, num_pairs):
    model = make_model()
    apply_normbt(model, layout)
    loss = bt_loss(model, make_batch(num_pairs), batches_are)
    with pytest.raises(ValueError, match=f"layout='{layout}' does not match the batches"):
        loss.backward()
    assert not gradients(model)


def bt_loss_apart(model, batch, **options):
    """Chosen and rejected in a forward each."""
    rewards = [model(**{name: x.chunk(2)[side] for name, x in batch.items()}).logits[:, 0] for side in (0, 1)]
    ones, hidden = torch.ones(len(rewards[0])), torch.zeros(len(rewards[0]), 1)
    return reference.normbt_loss(*rewards, hidden, hidden, frozen_weight=ones, **options)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_chosen_and_rejected_in_two_forwards_are_refused_in_the_first_backward(layout):
    model = make_model()
    apply_normbt(model, layout)
    with pytest.raises(ValueError, match=r"'apart' \(chosen in one forward, rejected in the next\)"):
        bt_loss_apart(model, make_batch(4)).backward()


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_layout_apart_weighs_chosen_and_rejected_of_two_forwards(architecture):
    model = make_model(architecture)
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model, "apart")
    options = {"margin": LOSS["margin"], "label_smoothing": 0.1}
    for seed in range(3):
        bt_loss_apart(model, make_batch(seed=seed), **options).backward()
        eager.loss(make_batch(seed=seed), **options).backward()
        bystanders(model, make_batch(seed=99))
        for gradient, expected in paired(model, eager.model):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu, rtol=1e-5, atol=0)
    assert mu_of(model)[1] == 3


def test_layout_apart_refuses_what_it_cannot_weigh():
    model = make_model()
    apply_normbt(model, "apart")
    with pytest.raises(ValueError, match="before the forward on the rejected"):
        model(**make_batch(2)).logits.sum().backward()
    with pytest.raises(ValueError, match=r"chosen rows are \(4, 16\).*\(6, 16\)"):
        model(**make_batch(3))
    with pytest.raises(ValueError, match="do not cancel"):
        bt_loss_apart(model, make_batch(), center_coef=0.05).backward()


# --- the order of forwards and backwards ---------------------------------------------------------------------------

BACKWARDS = {
    "sum": lambda losses: sum(losses).backward(),
    "in order": lambda losses: [loss.backward() for loss in losses],
    "in reverse": lambda losses: [loss.backward() for loss in reversed(losses)],
    "twice": lambda losses: [sum(losses).backward(retain_graph=keep) for keep in (True, False)],
}


def under(checkpointing, forward, batch):
    """`forward(batch)` in a checkpoint of the whole model."""
    if checkpointing == "none":
        return forward(batch)
    # Reentrant checkpoints need an input that requires a gradient.
    run = lambda needed, *values: forward(dict(zip(batch, values, strict=True))) + 0 * needed  # noqa: E731
    reentrant = checkpointing == "reentrant"
    return checkpoint(run, torch.zeros((), requires_grad=True), *batch.values(), use_reentrant=reentrant)


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("checkpointing", ["none", "not reentrant"])
def test_forwards_are_weighed_in_their_order_whatever_the_order_of_backwards(checkpointing, backwards):
    model = make_model()
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model)
    for step in range(2):
        batches = [make_batch(seed=3 * step + i) for i in range(3)]
        BACKWARDS[backwards]([eager.loss(batch, **LOSS) for batch in batches])
        BACKWARDS[backwards]([under(checkpointing, partial(bt_loss, model, **LOSS), batch) for batch in batches])
        bystanders(model, batches[0])
        for gradient, expected in paired(model, eager.model):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mu_of(model)[0], eager.ema.mu, rtol=1e-5, atol=0)
    assert mu_of(model)[1] == 6


def test_several_batches_in_one_checkpoint():
    model = make_model()
    eager = Eager(copy.deepcopy(model))
    apply_normbt(model)
    batch = make_batch()  # the same rows, and yet two weights: the first mean is mu when the second comes
    for seed in range(2):
        eager.loss(make_batch(seed=7 + seed)).backward()
        bt_loss(model, make_batch(seed=7 + seed)).backward()
        (eager.loss(batch) + eager.loss(batch)).backward()
        under("not reentrant", lambda batch: bt_loss(model, batch) + bt_loss(model, batch), batch).backward()
    for gradient, expected in paired(model, eager.model):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert mu_of(model)[1] == 6


@pytest.mark.parametrize("outer", ["none", "reentrant", "not reentrant"])
def test_reentrant_checkpoint_around_the_head_is_refused_in_backward(outer):
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    before, parameters = [value.clone() for value in mu_of(model)], gradients(model)
    loss = under(outer, lambda batch: under("reentrant", partial(bt_loss, model), batch), make_batch())
    with pytest.raises(
        RuntimeError, match=r"head is inside a reentrant activation checkpoint: pass use_reentrant=False"
    ):
        loss.backward()
    assert list(mu_of(model)) == before
    assert parameters
    assert not gradients(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_layers(reentrant):
    plain, model = make_model(), make_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for each in (plain, model):
        apply_normbt(each)
        for seed in range(2):
            bt_loss(each, make_batch(seed=seed)).backward()
    for gradient, expected in paired(model, plain):
        torch.testing.assert_close(gradient, expected)
    assert mu_of(model) == mu_of(plain)


@pytest.mark.slow
def test_torch_compile_gives_the_gradients_of_eager_mode():
    torch._dynamo.reset()
    plain, model = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    apply_normbt(plain)
    apply_normbt(model)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(3):
        batch = make_batch(seed=seed)
        bt_loss(compiled, batch, **LOSS).backward()
        bt_loss(plain, batch, **LOSS).backward()
        for gradient, expected in paired(model, plain):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert mu_of(model) == mu_of(plain)
    compiled.eval()
    with torch.no_grad():
        compiled(**batch)
    assert mu_of(model) == mu_of(plain)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_saved_model_loads_without_this_package_and_mu_with_it(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = make_model()
    keys = set(model.state_dict())
    apply_normbt(model)
    for seed in range(2):
        bt_loss(model, make_batch(seed=seed)).backward()
    assert set(model.state_dict()) - keys == {"score.normbt.mu", "score.normbt.num_updates"}
    assert keys < set(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == {"score.normbt.mu", "score.normbt.num_updates"}
    assert torch.equal(loaded(**make_batch()).logits, model.eval()(**make_batch()).logits)

    apply_normbt(loaded)
    loaded.load_state_dict(make_model().state_dict(), strict=True)  # from before NormBT: mu stays as it is
    assert mu_of(loaded) == (0, 0)
    loaded.load_state_dict(model.state_dict(), strict=True)
    assert mu_of(loaded) == mu_of(model)
    with pytest.raises(RuntimeError, match=r"normbt\.other"):
        loaded.load_state_dict(model.state_dict() | {"score.normbt.other": torch.zeros(())}, strict=True)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trainer_resumes_bitwise_with_mu(tmp_path, lora):
    """The real Trainer with a Bradley-Terry loss of somebody else's."""
    peft = pytest.importorskip("peft") if lora else None
    from transformers import Trainer, TrainingArguments

    class BTTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            chosen, rejected = outputs.logits[:, 0].chunk(2)
            loss = -nn.functional.logsigmoid(chosen - rejected).mean()
            return (loss, outputs) if return_outputs else loss

    def train(steps, resume=None):
        model = make_model()
        model = with_lora(peft, model) if lora else model
        apply_normbt(model)
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=1, learning_rate=0.01, save_steps=2, use_cpu=True,
            report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        batches = [make_batch(seed=seed) for seed in range(4)]
        trainer = BTTrainer(model, arguments, lambda rows: rows[0], batches)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(4)
    resumed = train(4, str(tmp_path / "checkpoint-2"))
    for parameter, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert mu_of(resumed) == mu_of(whole)
    assert mu_of(whole)[1] == 4


def test_adapter_carries_mu_and_loads_without_this_package(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_lora(peft, make_model())
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    assert torch.equal(loaded.eval()(**make_batch()).logits, model.eval()(**make_batch()).logits)
    apply_normbt(loaded)
    loaded.load_adapter(tmp_path, "default", is_trainable=True)
    assert mu_of(loaded) == mu_of(model)
    assert mu_of(loaded)[1] == 1


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_mu_stays_fp32_when_the_model_is_cast(cast):
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    mu = mu_of(model)[0].clone()
    getattr(model, cast)()
    assert model.score.weight.dtype == getattr(torch, cast)
    assert torch.equal(mu_of(model)[0], mu)


def test_mu_survives_weights_that_are_sharded_on_the_meta_device():
    """What accelerate does for FSDP2 with cpu_ram_efficient_loading: each key of a meta model is loaded as sharded."""
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    before, weights = [value.clone() for value in mu_of(model)], model.state_dict()
    keys = set(model.to("meta").state_dict())
    assert keys == set(make_model().state_dict())
    model.load_state_dict({key: weights[key] for key in keys}, assign=True)
    assert list(mu_of(model)) == before
    assert set(model.state_dict()) == set(weights)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(twin):
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    other = twin(model)
    assert mu_of(other) == mu_of(model)
    eager = Eager(make_model())
    for seed in range(2):
        gradients(eager.model)
        eager.loss(make_batch(seed=seed)).backward()
    gradients(other)
    bt_loss(other, make_batch(seed=1)).backward()
    for gradient, expected in paired(other, eager.model):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert (mu_of(model)[1], mu_of(other)[1]) == (1, 2)
    remove_normbt(other)
    bt_loss(other, make_batch(seed=1)).backward()
    bt_loss(model, make_batch(seed=1)).backward()
    assert mu_of(model)[1] == 2


# --- taking it away, and misuse ------------------------------------------------------------------------------------


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [hook for module in model.modules() for name in names for hook in getattr(module, name)]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_remove_leaves_the_model_as_if_never_applied(architecture):
    plain, model = make_model(architecture), make_model(architecture)
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    gradients(model)
    remove_normbt(model)
    bt_loss(model, make_batch()).backward()
    bt_loss(plain, make_batch()).backward()
    assert all(torch.equal(gradient, expected) for gradient, expected in paired(model, plain))
    assert hooks_of(model) == hooks_of(plain) == []
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    apply_normbt(model)  # and it can be applied again


def test_applied_twice_or_removed_without():
    model = make_model()
    with pytest.raises(ValueError, match="not applied"):
        remove_normbt(model)
    apply_normbt(model)
    with pytest.raises(ValueError, match="already applied"):
        apply_normbt(model)
    assert len(hooks_of(model)) == len(hooks_of(copy.deepcopy(model))) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "quarters"}, "layout must be one of .*'quarters'"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, "eps must be finite and >= 0"),
        ({"max_weight": 0.0}, "max_weight must be > 0"),
        ({"head": nn.Linear(4, 1)}, "not a module of this LlamaForSequenceClassification"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_refused_before_anything_changes(arguments, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        apply_normbt(model, **arguments)
    assert hooks_of(model) == []
    assert list(model.state_dict()) == list(make_model().state_dict())


def test_model_without_a_scalar_head():
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"num_labels=3.*scalar head.*num_labels=1"):
        apply_normbt(make_model(num_labels=3))
    mixture = make_model(num_labels=2)
    mixture.model.layers[0].gate = nn.Linear(16, 1)  # of a mixture of experts
    with pytest.raises(ValueError, match=r"num_labels=2.*scalar head"):
        apply_normbt(mixture)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*scalar head"):
        apply_normbt(AutoModelForCausalLM.from_config(make_model().config))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_odd_batch_is_named_and_changes_nothing(architecture):
    model = make_model(architecture)
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    before = [value.clone() for value in mu_of(model)]
    with pytest.raises(ValueError, match=r"an even number of rows, got hidden \(5, "):
        model(**{name: values[:5] for name, values in make_batch().items()})
    assert list(mu_of(model)) == before


def test_frozen_head_is_warned_of_and_lora_in_the_head_refused():
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="head is frozen.*modules_to_save"):
        apply_normbt(peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])))
    trained = with_lora(peft, make_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_normbt(trained)
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj", "score"], r=2))
    with pytest.raises(ValueError, match=r"'score' is adapted by LoRA.*modules_to_save"):
        apply_normbt(adapted)


def test_liger_and_other_forwards_that_pass_the_head_by():
    def lce_forward(self, input_ids, attention_mask=None):
        return self.lm_head(self.model(input_ids, attention_mask).last_hidden_state)

    model = make_model()
    apply_normbt(model)
    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = MethodType(lce_forward, model)  # as Trainer does at the start of train()
    with pytest.raises(ValueError, match=r"Liger has replaced.*fused_linear_cross_entropy"):
        model(**make_batch())

    def fused_forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask).last_hidden_state @ self.score.weight.T

    model.forward = MethodType(fused_forward, model)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification did not call its scalar head"):
        model(**make_batch())
    with torch.no_grad():
        model(**make_batch())


def test_model_that_scores_another_token_is_refused_in_backward():
    class FirstToken(TinyDecoder):
        def forward(self, input_ids):
            return self.score(self.mix(self.embed(input_ids)))[:, 0]

    model = FirstToken()
    apply_normbt(model)
    with pytest.raises(ValueError, match="the loss depends on other tokens"):
        model(make_batch()["input_ids"]).pow(2).sum().backward()


PENALTIES = {
    "of rewards": lambda model, batch: torch.autograd.grad(
        model(**batch).logits.sum(), model.score.weight, create_graph=True
    )[0],
    "of the loss": lambda model, batch: torch.autograd.grad(
        bt_loss(model, batch), model.score.weight, create_graph=True
    )[0],
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradient_penalty_is_refused(penalty):
    model = make_model()
    apply_normbt(model)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        PENALTIES[penalty](model, make_batch())


def test_forward_mode_differentiation_is_refused():
    head = nn.Linear(8, 1)
    apply_normbt(head)
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(head, (torch.randn(4, 8),), (torch.ones(4, 8),))


def test_head_called_without_its_model_and_packed_sequences():
    model = TinyDecoder()
    apply_normbt(model)
    with pytest.raises(ValueError, match=r"\(4, 5, 16\) outside the forward of its model"):
        model.score(torch.zeros(4, 5, 16))
    alone = nn.Linear(16, 1)
    apply_normbt(alone)
    with pytest.raises(ValueError, match=r"\(4, 5, 16\).*no module around it takes input_ids"):
        alone(torch.zeros(4, 5, 16))

    class Packed(TinyDecoder):
        def forward(self, input_ids):
            return self.score(self.embed(input_ids).flatten(0, 1)[None])

    packed = Packed()
    apply_normbt(packed)
    with pytest.raises(ValueError, match=r"input_ids \(6, 8\).*\(1, 48, 16\)"):
        packed(make_batch()["input_ids"])


def test_data_parallel_is_refused():
    model = TinyDecoder()
    apply_normbt(model)
    replica = model.score._replicate_for_data_parallel()  # what nn.DataParallel calls in each of its threads
    replica.weight, replica.bias = model.score.weight, None
    with pytest.raises(ValueError, match=r"nn.DataParallel splits the pairs"):
        replica(torch.zeros(4, 16))


# --- ranks ---------------------------------------------------------------------------------------------------------

ENGINES = ("ddp", "fsdp2", "fsdp2 pooled")
PAIRS_OF_RANKS = [(1, 3), (2, 2), (4, 1)]  # unequal, at each step


def rank_batches():
    generator = torch.Generator().manual_seed(0)
    draw = lambda pairs: torch.randint(PAD, 32, (2, pairs, 6), generator=generator)  # noqa: E731
    return [[draw(pairs) for pairs in ranks] for ranks in PAIRS_OF_RANKS]


def pair_losses(model, ids):
    chosen, rejected = model(ids.flatten(0, 1))[:, 0].chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).sum()


def train_rank(engine, rank, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = TinyDecoder()
    apply_normbt(model)
    if engine == "fsdp2 pooled":
        pool_head(model)
    wrapped = DistributedDataParallel(model) if engine == "ddp" else fully_shard(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for ranks in rank_batches():
        pair_losses(wrapped, ranks[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    torch.save(full, f"{folder}/{engine}-{rank}.pt")


def rank_main(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    for engine in ENGINES:
        train_rank(engine, rank, folder)
    # gloo's threads must end before the interpreter does: nothing may hold the group when it is destroyed.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, (port, str(tmp_path)), nprocs=2, start_method=FORKED.get_start_method())
    single = TinyDecoder()
    apply_normbt(single)
    optimizer = torch.optim.SGD(single.parameters(), 0.1)
    for ranks in rank_batches():
        (pair_losses(single, torch.cat(ranks, dim=1)) / 2).backward()  # the engines average over the ranks
        optimizer.step()
        optimizer.zero_grad()
    for engine in ENGINES:
        first, second = (torch.load(tmp_path / f"{engine}-{rank}.pt") for rank in range(2))
        for name, expected in single.state_dict().items():
            assert torch.equal(first[name], second[name]), f"{engine}: ranks disagree on {name}"
            torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)
