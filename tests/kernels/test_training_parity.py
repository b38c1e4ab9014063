"""A tiny Hugging Face model trained with the reference and with the package ends in the same place."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import reference
from normbt_kernels import LinearNormBTLoss, NormBTLoss
from normbt_kernels.ops.backend import backend_name

INTERPRETED = backend_name(torch.device("cpu")) == "triton-interpreter"
STEPS = 5 if INTERPRETED else 40
BATCH, LENGTH = 8, 12


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def reference_loss():
    ema = reference.DistanceEMA()

    def loss_fn(hidden, head):
        rho = reference.pair_distance(hidden)
        loss = reference.linear_normbt_loss(hidden, head, ema.weight_mean(rho))
        ema.update(rho)
        return loss

    return loss_fn


def reward_form():
    loss_fn = NormBTLoss()

    def apply(hidden, head):
        chosen, rejected = torch.nn.functional.linear(hidden, head).chunk(2)
        return loss_fn(chosen, rejected, *hidden.chunk(2))

    return apply


def train(model, loss_fn, dtype):
    model = copy.deepcopy(model).to(dtype)
    # Plain SGD at a rate where training is not chaotic: Adam, or lr=0.1, blows rounding up to 1e-4 and more.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        input_ids = torch.randint(1, 64, (2 * BATCH, LENGTH), generator=generator)
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, -1]
        loss = loss_fn(hidden, model.score.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), torch.cat([parameter.detach().double().ravel() for parameter in model.parameters()])


def distance_to(truth, run):
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(run, truth, strict=True)]


@pytest.mark.parametrize("make_loss", [LinearNormBTLoss, reward_form], ids=["linear", "reward"])
@pytest.mark.slow
def test_training_is_as_close_to_fp64_as_training_with_the_reference(make_loss):
    model = tiny_model()
    truth = train(model, reference_loss(), torch.float64)
    eager = distance_to(truth, train(model, reference_loss(), torch.float32))
    ours = distance_to(truth, train(model, make_loss(), torch.float32))
    start = torch.cat([parameter.detach().double().ravel() for parameter in model.parameters()])
    moved = ((truth[1] - start).abs().max() / truth[1].abs().max()).item()
    assert moved > 1e-2, "the run must train for the comparison to mean anything"
    rounding = torch.finfo(torch.float32).eps
    for name, error, eager_error in zip(("losses", "parameters"), ours, eager, strict=True):
        assert error <= 2 * eager_error + rounding, f"{name}: {error:.1e} from fp64, the reference {eager_error:.1e}"
