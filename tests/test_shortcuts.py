"""Late pooling and padding-free change no reward and no gradient, or are refused in one sentence."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from normbt_kernels.data.packing import pack
from normbt_kernels.integrations import shortcuts
from normbt_kernels.integrations.apply import apply_normbt
from normbt_kernels.integrations.head import HeadReader, find_head
from normbt_kernels.integrations.pooled_head import pool_head
from normbt_kernels.integrations.shortcuts import install_shortcuts, remove_shortcuts
from tests.every_classifier import make_pairs
from tests.tiny_classifiers import PAD, gradients, make_batch, make_model

BOTH = {"late_pooling": True, "padding_free": True}
EACH = [pytest.param({name: True}, id=name) for name in BOTH] + [pytest.param(BOTH, id="both")]


def bt_loss(model, batch):
    chosen, rejected = model(**batch).logits.float().squeeze(-1).chunk(2)
    return torch.nn.functional.softplus(rejected - chosen).mean()


def trained_step(model, batch):
    """Loss and gradients, by name."""
    loss = bt_loss(model, batch)
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def assert_equal(seen, expected, relative=1e-6):
    """All of it together within `relative`, and no tensor of it ten times that far off."""
    assert seen.keys() == expected.keys()
    off = {name: (seen[name] - value).norm() for name, value in expected.items()}
    norm = {name: value.norm() for name, value in expected.items()}
    for name in expected:
        assert off[name] <= 10 * relative * norm[name].clamp(min=0.01), name
    assert torch.stack([*off.values()]).norm() <= relative * torch.stack([*norm.values()]).norm()


# --- what is saved -------------------------------------------------------------------------------------------------


def rows_seen(module):
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    return seen


def test_the_last_layer_computes_scored_tokens_only():
    model, batch = make_model(num_hidden_layers=3), make_batch(3)
    install_shortcuts(model, late_pooling=True)
    bt_loss(model, batch)
    layers = model.model.layers
    seen = [rows_seen(module) for layer in layers for module in (layer.self_attn.o_proj, layer.mlp.gate_proj)]
    bt_loss(model, batch)
    every = batch["input_ids"].numel()
    assert seen == [[every], [every], [every], [every], [6], [6]]


def test_no_row_of_padding_is_computed():
    model, batch = make_model(), make_batch(8)
    install_shortcuts(model, padding_free=True)
    bt_loss(model, batch)
    seen = rows_seen(model.model.layers[0].mlp)
    bt_loss(model, batch)
    rows, length = pack(**batch, pad_token_id=PAD)["input_ids"].shape
    assert seen == [rows * length]
    assert rows * length < 0.8 * batch["input_ids"].numel()


# --- exact in every setting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EACH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(options, side):
    model, batch = make_model("qwen3"), make_batch(3, side=side)
    expected = trained_step(model, batch)
    install_shortcuts(model, **options)
    for _ in range(2):
        assert_equal(trained_step(model, batch), expected)


def test_packed_by_the_caller_is_the_same_as_padded():
    model, batch = make_model(), make_batch(3)
    expected = trained_step(model, batch)
    install_shortcuts(model, **BOTH)
    for one_row in (False, True):
        packed = pack(**batch, pad_token_id=PAD, one_row=one_row)
        assert_equal(trained_step(model, packed), expected)


@pytest.mark.parametrize("options", EACH)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_repeats_the_layer_with_its_own_batch(options, reentrant):
    """Two forwards before the first backward, and the backwards in any order."""
    model, batches = make_model(), [make_batch(3, seed) for seed in range(2)]
    expected = [trained_step(model, batch) for batch in batches]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    install_shortcuts(model, **options)
    for order in ((0, 1), (1, 0)):
        losses = [bt_loss(model, batch) for batch in batches]
        for i in order:
            losses[i].backward()
            assert_equal({"loss": losses[i].detach()} | gradients(model), expected[i])


@pytest.mark.parametrize("options", EACH)
def test_lora_on_projections_mlp_and_a_head_that_is_saved(options):
    peft = pytest.importorskip("peft")
    batch = make_batch(3)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False, lora_dropout=0)
    model = peft.get_peft_model(make_model(), config)
    expected = trained_step(model, batch)
    assert any("o_proj.lora_A" in name for name in expected)
    assert any("modules_to_save" in name for name in expected)
    install_shortcuts(model, **options)
    assert_equal(trained_step(model, batch), expected)


@pytest.mark.parametrize("options", EACH)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_bf16_is_as_near_to_fp32_as_without(options, autocast):
    model, batch = make_model(), make_batch(3)
    exact = trained_step(model, batch)
    model = model if autocast else model.to(torch.bfloat16)

    def off():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            seen = trained_step(model, batch)
        return max(((seen[name].float() - value).norm() / value.norm()).item() for name, value in exact.items())

    without = off()
    install_shortcuts(model, **options)
    assert off() <= 1.5 * without


@pytest.mark.parametrize("options", EACH)
@pytest.mark.slow
def test_twenty_steps_end_where_they_end_without(options):
    def trained(**options):
        model = make_model("gemma")
        if options:
            install_shortcuts(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(20):
            bt_loss(model, make_batch(3, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    assert_equal(trained(**options), trained(), relative=2e-6)


@pytest.mark.parametrize("options", EACH)
def test_apply_normbt_weighs_the_same_batches(options):
    def trained(**options):
        model, seen = make_model(), {}
        if options:
            install_shortcuts(model, **options)
        apply_normbt(model)
        for step in range(3):
            for name, value in trained_step(model, make_batch(3, seed=step)).items():
                seen[f"{step} {name}"] = value
        return seen | {"mu": model.score.normbt.mu.clone(), "updates": model.score.normbt.num_updates.clone().float()}

    assert_equal(trained(**options), trained())


@pytest.mark.parametrize("options", EACH)
def test_a_pooled_head_scores_the_same_tokens(options):
    """It goes by the mask, also where the sequences end with the pad token."""
    model, batch = make_model(), make_batch(3)
    pool_head(model)
    expected = trained_step(model, batch)
    install_shortcuts(model, **options)
    assert_equal(trained_step(model, batch), expected)
    if "padding_free" not in options:
        batch["input_ids"][0, batch["attention_mask"][0].sum() - 1] = PAD
        with_shortcut = trained_step(model, batch)
        remove_shortcuts(model)
        assert_equal(with_shortcut, trained_step(model, batch))


def test_who_hooks_the_heads_output_before_the_first_forward_sees_the_gradient():
    """ZeRO-3 does, to gather the head's weight before backward comes to it."""
    model, seen = make_model(), []
    install_shortcuts(model, padding_free=True)

    def hooked(module, args, output):
        output = output.clone()
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append(gradient))
        return output

    model.score.register_forward_hook(hooked)
    model(**make_batch()).logits.sum().backward()
    assert len(seen) == 1
    assert (seen[0] == 1).all()


@pytest.mark.parametrize("options", EACH)
def test_evaluation_gives_the_same_rewards(options):
    model, batch = make_model().eval(), make_batch(3)
    with torch.no_grad():
        expected = model(**batch).logits
        install_shortcuts(model, **options)
        seen = model(**batch, return_dict=False)[0]
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compiled_the_model_stays_one_graph():
    """And the forwards that the first one is compared with are not compiled."""
    model, batch = make_model(), make_batch(3)
    expected = trained_step(model, batch)
    install_shortcuts(model, **BOTH)
    graphs = []
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert_equal(trained_step(model, pack(**batch, pad_token_id=PAD)), expected)
    assert len(graphs) == 1


def read_head(model, pool):
    reader = HeadReader(find_head(model), pool=pool)

    def rows_of(batch):
        reader.expect(batch["input_ids"])
        return reader.take(model(**batch).logits)

    return rows_of


def shorten(model, **options):
    install_shortcuts(model, **options)
    return lambda batch: model(**pack(**batch, pad_token_id=PAD)).logits


def shorten_and_read(model, first):
    if first == "shorten":
        install_shortcuts(model, **BOTH)
    reader = HeadReader(find_head(model))
    if first == "read":
        install_shortcuts(model, **BOTH)

    def rows_of(batch):
        packed = pack(**batch, pad_token_id=PAD)
        reader.expect(packed["input_ids"])
        return reader.take(model(**packed).logits)

    return rows_of


READERS = {
    "read": lambda model: read_head(model, pool=False),
    "read, pooled": lambda model: read_head(model, pool=True),
    "padding-free": lambda model: shorten(model, padding_free=True),
    "both": lambda model: shorten(model, **BOTH),
    "both, then read": lambda model: shorten_and_read(model, first="shorten"),
    "read, then both": lambda model: shorten_and_read(model, first="read"),
    "late pooling": lambda model: install_shortcuts(model, late_pooling=True) or (lambda batch: model(**batch).logits),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.slow
def test_batches_of_other_lengths_are_not_compiled_one_by_one(reader):
    """The first is compiled for its own length, the next ones for any length and any number of packed rows."""
    model, graphs = make_model(num_hidden_layers=1), []
    run = READERS[reader](model)
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    for length in (8, 7, 6, 5, 4):
        run({name: value[:, :length] for name, value in make_batch(3).items()}).sum().backward()
    assert len(graphs) <= 3


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


@pytest.mark.slow
def test_a_model_that_was_compiled_and_called_before_gets_them():
    model, batch = make_model(num_hidden_layers=1), make_batch(3)
    compiled = torch.compile(Wrapper(model), backend="eager")
    with torch.no_grad():
        compiled(**batch)
        install_shortcuts(model, late_pooling=True)
        compiled(**batch)
    assert model.normbt_shortcuts._compared


# --- refused, and nothing is changed -------------------------------------------------------------------------------


def deaf_to_positions(model):
    """A model that does not see by `position_ids` where a sequence ends: sequences see each other in silence."""
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    return model


def test_sequences_that_see_each_other_are_refused():
    model = deaf_to_positions(make_model())
    install_shortcuts(model, padding_free=True)
    with pytest.raises(ValueError, match=r"^Llama\w+ is not made for padding_free: .* differ by"):
        model(**make_batch(3))


def test_they_are_refused_where_no_two_of_the_first_batch_would_share_a_row():
    model, batch = deaf_to_positions(make_model()), make_batch(2)
    batch = {name: value[:1].repeat(4, 1) for name, value in batch.items()}
    install_shortcuts(model, padding_free=True)
    with pytest.raises(ValueError, match=r"set padding_free=False$"):
        model(**batch)


def test_an_mlp_that_mixes_tokens_is_refused():
    model = make_model()
    mlp = model.model.layers[-1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden.cumsum(dim=1))
    install_shortcuts(model, late_pooling=True)
    with pytest.raises(ValueError, match=r"not made for late_pooling: .*set late_pooling=False$"):
        model(**make_batch(3))


def test_a_refusal_changes_nothing():
    model, batch = deaf_to_positions(make_model()), make_batch(3)
    apply_normbt(model)
    model.model.layers[0].eval()
    modes, before = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    install_shortcuts(model, **BOTH)
    random_state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(ValueError, match="padding_free"):
            model(**batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    remove_shortcuts(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    bt_loss(model, batch).backward()


def test_removed_shortcuts_leave_the_model_bit_for_bit_what_it_was():
    model, batch = make_model(), make_batch(3)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    expected = trained_step(model, batch)
    install_shortcuts(model, **BOTH)
    bt_loss(model, batch)
    remove_shortcuts(model)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
    for name, value in trained_step(model, batch).items():
        assert torch.equal(value, expected[name]), name


def test_a_copy_of_the_model_has_shortcuts_of_its_own():
    model, batch = make_model(), make_batch(3)
    expected = trained_step(model, batch)
    install_shortcuts(model, **BOTH)
    bt_loss(model, batch)
    twin = copy.deepcopy(model)
    remove_shortcuts(model)
    seen = rows_seen(twin.model.layers[-1].mlp)
    assert_equal(trained_step(twin, batch), expected)
    assert seen == [6]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda batch: batch | {"labels": torch.zeros(6)}, "padding_free has the model return rewards and no loss"),
        (lambda batch: {"inputs_embeds": torch.zeros(6, 8, 16)}, r"without input_ids .* set padding_free=False"),
    ],
    ids=["labels", "embeddings"],
)
def test_calls_that_cannot_be_shortened_are_refused(change, sentence):
    model, batch = make_model(), make_batch(3)
    install_shortcuts(model, padding_free=True)
    bt_loss(model, batch)
    with pytest.raises(ValueError, match=sentence):
        model(**change(batch))


def test_a_packed_batch_is_refused_without_padding_free():
    model, batch = make_model(), make_batch(3)
    install_shortcuts(model, late_pooling=True)
    with pytest.raises(ValueError, match="this batch is packed"):
        model(**pack(**batch, pad_token_id=PAD))


def test_a_mask_over_too_many_pairs_of_tokens_is_refused(monkeypatch):
    model, batch = make_model(attn_implementation="eager"), make_batch(3)
    install_shortcuts(model, padding_free=True)
    bt_loss(model, batch)
    monkeypatch.setattr(shortcuts, "MAX_MASK", 1000)
    with pytest.raises(ValueError, match=r"a mask of 1 x 3\d x 3\d .* attn_implementation='flash_attention_2'"):
        model(**pack(**batch, pad_token_id=PAD, one_row=True))


def test_shortcuts_are_installed_once():
    model = make_model()
    install_shortcuts(model, late_pooling=True)
    with pytest.raises(ValueError, match="has shortcuts already"):
        install_shortcuts(model, padding_free=True)
    remove_shortcuts(model)
    with pytest.raises(ValueError, match="has no shortcuts"):
        remove_shortcuts(model)


def test_make_pairs_end_with_the_token_that_is_scored():
    assert (make_pairs()["input_ids"] == 1).any(dim=1).all()
