"""The loss of a trainer that knows only plain Bradley-Terry, and eager NormBT to compare with."""

import torch

import reference
from normbt_kernels.functional import linear_normbt_loss
from normbt_kernels.modules import DistanceEMA
from tests.tiny_classifiers import gradients

# All terms at once: the margin and the smoothing inside the antisymmetric part, the centering in the symmetric one.
LOSS = {"margin": torch.tensor([0.3, -0.2, 0.1]), "label_smoothing": 0.1, "center_coef": 0.05}


def bt_loss(model, batch, layout="halves", **options):
    """Plain Bradley-Terry, as any trainer computes it."""
    chosen, rejected = reference.pair_rows(len(batch["input_ids"]), layout)
    rewards = model(**batch).logits[:, 0]
    hidden = torch.zeros(len(rewards), 1)
    ones = torch.ones(len(chosen), dtype=rewards.dtype)
    return reference.normbt_loss(
        rewards[chosen], rewards[rejected], hidden[chosen], hidden[rejected], frozen_weight=ones, **options
    )


class LinearBTLoss(torch.nn.Module):
    """Plain Bradley-Terry on what the head reads, as somebody's own module: it has no memory and no other form."""

    def forward(self, hidden, weight, bias=None, **options):
        return linear_normbt_loss(hidden, weight, 1.0, bias=bias, power=0.0, **options)


class Eager:
    """NormBT by the reference, written into the training step: `apply_normbt` must give the same gradients."""

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


def assert_close_models(ours, eager, rtol=1e-4, atol=1e-5):
    parameters = dict(ours.named_parameters())
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


def weights_of(model):
    """The submodule with mu, in the head that trains."""
    return [module for module in model.modules() if isinstance(module, DistanceEMA)][-1]


def mu_of(model):
    weights = weights_of(model)
    return weights.mu, weights.num_updates


def with_lora(peft, model):
    torch.manual_seed(1)
    target = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[model.config.model_type]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=target, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def bystanders(model, batch):
    """Forwards outside training: evaluation of any number of sequences, with and without gradients."""
    with torch.no_grad():
        model(**batch)
    with torch.inference_mode():
        model(**batch)
    model.eval()
    model(**{name: values[:1] for name, values in batch.items()})
    with torch.no_grad():
        bt_loss(model, batch)
    model.train()


def assert_gradients_of(model, other):
    for gradient, expected in paired(model, other):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def paired(model, other):
    found, expected = gradients(model), gradients(other)
    assert found.keys() == expected.keys()
    assert found
    return [(found[name], expected[name]) for name in found]
