"""Attention within packed sequences: as exact as attention with a mask, or refused in one sentence."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn
from transformers import LlamaForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from normbt_kernels.data.packing import pack
from normbt_kernels.integrations import shortcuts
from normbt_kernels.integrations.packed_attention import PACKED_SDPA, attend, carry
from normbt_kernels.integrations.shortcuts import attention_of, install_shortcuts, packing_for, remove_shortcuts
from tests.every_classifier import make_classifier
from tests.test_shortcuts import bt_loss
from tests.tiny_classifiers import PAD, make_batch, make_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, WIDTH, ENDS = 4, 32, (0, 1, 6, 134, 434)


class Attention(nn.Module):
    """As much of a layer as an attention function looks at."""

    is_causal = True

    def __init__(self, key_heads=HEADS):
        super().__init__()
        self.num_key_value_groups = HEADS // key_heads


def random_tensors(key_heads, dtype):
    """Query, key, value and an upstream gradient of one row, in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, ENDS[-1], WIDTH) for heads in (HEADS, key_heads, key_heads)] + [(1, ENDS[-1], HEADS, WIDTH)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def mask_of(window):
    """True where a token of the row looks at another one: in its sequence, not later, and not `window` earlier."""
    sequence = torch.cat([torch.full((end - start,), i) for i, (start, end) in enumerate(pairwise(ENDS))])
    behind = torch.arange(ENDS[-1])[:, None] - torch.arange(ENDS[-1])
    seen = (sequence[:, None] == sequence) & (behind >= 0) & (behind < (window or ENDS[-1]))
    return seen[None, None].to(DEVICE)


def result_and_gradients(run, query, key, value, upstream):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = run(*leaves)
    return [tensor.double() for tensor in (out.detach(), *torch.autograd.grad(out, leaves, upstream))]


def by_definition(mask):
    def run(query, key, value):
        key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1) for tensor in (key, value))
        scores = (query @ key.mT * WIDTH**-0.5).masked_fill(~mask, float("-inf"))
        return (scores.softmax(dim=-1) @ value).transpose(1, 2)

    return run


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_sequences_it_is_as_exact_as_with_a_mask(dtype, key_heads, window):
    """Against fp64, result and gradients. On a GPU the 16-bit ones are flash attention's."""
    tensors, module, mask = random_tensors(key_heads, dtype), Attention(key_heads), mask_of(window)
    expected = result_and_gradients(by_definition(mask), *(tensor.double() for tensor in tensors))
    carried = carry(torch.tensor(ENDS, dtype=torch.int32, device=DEVICE), 300)

    def packed(*rows):
        return attend(sdpa_attention_forward, module, *rows, carried, scaling=WIDTH**-0.5, sliding_window=window)[0]

    def masked(*rows):
        return sdpa_attention_forward(module, *rows, mask, scaling=WIDTH**-0.5)[0]

    errors = {
        run: [(seen - value).norm() for seen, value in zip(result_and_gradients(run, *tensors), expected, strict=True)]
        for run in (packed, masked)
    }
    for seen, allowed, value in zip(errors[packed], errors[masked], expected, strict=True):
        assert seen <= 1.5 * allowed + 1e-7 * value.norm()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"position_bias": torch.zeros(())}, "a bias for each pair of tokens"),
        ({"is_causal": False}, "attention to later tokens"),
    ],
    ids=["bias", "not causal"],
)
def test_what_it_does_not_do_is_refused(options, what):
    *rows, _ = random_tensors(HEADS, torch.float32)
    carried = carry(torch.tensor(ENDS, dtype=torch.int32, device=DEVICE), 300)
    with pytest.raises(ValueError, match=f"Attention asks for {what}, which packed sequences do not get"):
        attend(sdpa_attention_forward, Attention(), *rows, carried, **options)


def test_dropout_is_that_of_sdpa():
    """Which flash attention of variable length has none of."""
    *rows, _ = random_tensors(HEADS, torch.bfloat16)
    carried = carry(torch.tensor(ENDS, dtype=torch.int32, device=DEVICE), 300)
    kept, dropped = (attend(sdpa_attention_forward, Attention(), *rows, carried, dropout=p)[0] for p in (0.0, 0.5))
    assert (dropped[0, 0] == 0).any()  # the first sequence is one token long, and drops what it looks at
    assert not (kept[0, 0] == 0).any()


def test_a_model_has_it_while_it_has_the_shortcut_and_saves_nothing_of_it(tmp_path):
    model = make_model()
    install_shortcuts(model, padding_free=True)
    assert attention_of(model) == PACKED_SDPA
    model.save_pretrained(tmp_path)
    assert "attn" not in " ".join(json.loads((tmp_path / "config.json").read_text()))
    remove_shortcuts(model)
    assert attention_of(model) == "sdpa"
    install_shortcuts(model, late_pooling=True)
    assert attention_of(model) == "sdpa"


def test_what_was_chosen_meanwhile_stays():
    model = make_model()
    install_shortcuts(model, padding_free=True)
    model.set_attn_implementation("eager")
    remove_shortcuts(model)
    assert attention_of(model) == "eager"


def test_a_pickled_model_runs_in_another_process(tmp_path):
    model, batch = make_model(), make_batch(3)
    install_shortcuts(model, padding_free=True)
    torch.save({"model": model, "batch": batch, "rewards": model(**batch).logits.detach()}, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(saved['model'](**saved['batch']).logits, saved['rewards'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


class Chunked(LlamaForSequenceClassification):
    """A class that inherits all that Llama says of itself."""


def test_models_of_one_configuration_do_not_share_it():
    """A class that keeps its masks, with the configuration of a model that needs none."""
    model, batch = make_model(), make_batch(3)
    other = Chunked(model.config).train()
    expected = other(**batch).logits
    install_shortcuts(model, padding_free=True)
    install_shortcuts(other, padding_free=True)
    for packed in (pack(**batch, pad_token_id=PAD), pack(**batch, pad_token_id=PAD, one_row=True)):
        torch.testing.assert_close(other(**packed).logits, expected)


def keeps_its_mask(model):
    before = attention_of(model)
    install_shortcuts(model, padding_free=True)
    return attention_of(model) == before != PACKED_SDPA


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("gpt_neo", "eager"), ("doge", "its mask holds more"), ("phimoe", "its window is in the mask alone")],
)
def test_models_that_need_their_mask_keep_it(architecture, why):
    assert keeps_its_mask(make_classifier(architecture))


def test_classes_that_others_wrote_keep_their_mask():
    assert keeps_its_mask(Chunked(make_model().config))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("llama", {"attention_dropout": 0.1}), ("llama", {"head_dim": 12}), ("gemma", {"head_dim": 320})],
    ids=["dropout", "odd width", "wide"],
)
def test_models_that_flash_attention_does_not_serve_keep_their_mask(architecture, config):
    assert keeps_its_mask(make_model(architecture, **config))


def test_values_of_another_width_keep_their_mask():
    assert keeps_its_mask(make_classifier("deepseek_v3"))


@pytest.mark.parametrize("one_row", [True, False], ids=["one row", "padded"])
def test_the_first_forward_is_compared_in_one_row_if_that_is_what_runs(one_row, monkeypatch):
    """An attention that looks beyond its sequence is refused."""
    model, batch = make_model(), make_batch(3)
    monkeypatch.setattr(shortcuts, "carry", lambda ends, max_length: carry(ends[[0, -1]], int(ends[-1])))
    monkeypatch.setattr(shortcuts, "has_flash_attention", lambda device: not one_row)
    install_shortcuts(model, padding_free=True)
    with pytest.raises(ValueError, match=r"not made for padding_free: in the first batch the rows .* differ"):
        model(**pack(**batch, pad_token_id=PAD, one_row=True) if one_row else batch)


@pytest.mark.slow
def test_the_comparison_leaves_compiled_attention_compiled():
    """As flex attention is: it would compute every score."""
    model, batch, compiled = make_model(), make_batch(3), []
    function = torch.compile(torch.sin, backend=lambda graph, inputs: compiled.append(graph) or graph)

    def in_the_comparison(module, args):
        if not torch.is_grad_enabled():
            function(torch.ones(2))

    model.score.register_forward_pre_hook(in_the_comparison)
    install_shortcuts(model, padding_free=True)
    model(**batch)
    assert len(compiled) == 1


def test_one_row_is_for_flash_attention(monkeypatch):
    gpu, capability = torch.device("cuda"), (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    model = make_model()
    assert packing_for(model, gpu) == "rows"  # "sdpa" as it was
    install_shortcuts(model, padding_free=True)
    assert packing_for(model, gpu) == "one row"
    assert packing_for(model, torch.device("cpu")) == "rows"
    capability = (7, 5)
    assert packing_for(model, gpu) == "rows"


def test_rows_are_not_given_to_flash_attention():
    """Which goes by the ends of sequences in one row, and would look beyond them in several."""
    model, batch = make_model(), make_batch(3)
    install_shortcuts(model, padding_free=True)
    bt_loss(model, batch)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"packed in \d rows: it needs one row, pack\(..., one_row=True\)"):
        model(**pack(**batch, pad_token_id=PAD))
