"""`pool_head`: one token of each sequence is scored, in fp32, and nobody else notices."""

import copy
import pickle

import pytest
import torch
from torch import nn

import reference
from normbt_kernels import apply_normbt
from normbt_kernels.integrations.head import HeadReader, find_head
from normbt_kernels.integrations.pooled_head import PooledHead, pool_head
from tests.tiny_classifiers import DECODERS, PAD, TinyDecoder, gradients, make_batch, make_model

pytest.importorskip("transformers")


def bt_loss(logits):
    chosen, rejected = logits[:, 0].chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def score_all_in_fp32(model):
    """The same head, scoring every token, in the precision of the pooled one."""
    in_fp32 = lambda head, args, logits: args[0].float() @ head.weight.float().T  # noqa: E731
    model.score.register_forward_hook(in_fp32)
    return model


def head_input(model, batch):
    seen = []
    with model.score.register_forward_pre_hook(lambda head, args: seen.append(args[0])):
        model(**batch)
    return seen[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_rewards_and_gradients_are_those_of_scoring_every_token_in_fp32(architecture, dtype, side):
    every, model = score_all_in_fp32(make_model(architecture, dtype)), make_model(architecture, dtype)
    exact = make_model(architecture, torch.float64)
    exact.load_state_dict(model.state_dict())
    pool_head(model)
    for seed in range(2):  # accumulated
        batch = make_batch(seed=seed, side=side)
        expected, logits = every(**batch).logits, model(**batch).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for each in (expected, logits, exact(**batch).logits):
            bt_loss(each).backward()
    found, wanted, truth = gradients(model), gradients(every), gradients(exact)
    assert found.keys() == wanted.keys() == truth.keys()
    for name, gradient in truth.items():
        error, allowed = ((other[name].double() - gradient).norm() for other in (found, wanted))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * gradient.norm(), f"{name}: {error}, not {allowed}"


def test_only_the_pooled_rows_are_scored_and_expanded_without_copies():
    model = make_model()
    batch = make_batch()
    hidden = head_input(model, batch)
    last = [int(mask.nonzero().max()) for mask in batch["attention_mask"]]
    pool_head(model)
    assert torch.equal(head_input(model, batch), reference.pool(hidden, torch.tensor(last)))
    seen = []
    with model.score.register_forward_hook(lambda head, args, logits: seen.append(logits)):
        model(**batch)
    assert seen[0].shape == (6, 8, 1)
    assert seen[0].stride(1) == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_final_eos_is_scored_where_it_is_the_pad_token_too(side):
    model = make_model()
    pool_head(model)
    alone = [torch.tensor([[5, 6, 7, PAD]]), torch.tensor([[9, PAD]])]
    padded = [9, PAD, PAD, PAD] if side == "right" else [PAD, PAD, 9, PAD]
    mask = [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]
    batch = {"input_ids": torch.tensor([[5, 6, 7, PAD], padded]), "attention_mask": torch.tensor([[1, 1, 1, 1], mask])}
    expected = torch.cat([model(ids, attention_mask=torch.ones_like(ids)).logits for ids in alone])
    torch.testing.assert_close(model(**batch).logits, expected)
    assert not torch.isclose(make_model()(**batch).logits, expected).any()  # transformers reads the token before


def test_without_a_mask_it_is_the_token_of_transformers():
    plain, model = make_model(), make_model()
    pool_head(model)
    ids = make_batch()["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    four_dimensional = torch.ones(6, 1, 8, 8, dtype=torch.bool).tril()
    for call in (
        lambda model: model(ids),
        lambda model: model(input_ids=ids),
        lambda model: model(ids, attention_mask=four_dimensional),
        lambda model: model(inputs_embeds=embeddings),
    ):
        torch.testing.assert_close(call(model).logits, call(plain).logits, rtol=1e-5, atol=1e-5)


def test_arguments_by_position_and_masks_of_any_dtype():
    model = make_model()
    pool_head(model)
    batch = make_batch(side="left")
    batch["input_ids"][0, -1] = PAD  # a mask and the ids now disagree on the last token
    expected = model(**batch).logits
    assert torch.equal(model(*batch.values()).logits, expected)
    for dtype in (torch.bool, torch.int32, torch.float32):
        torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"].to(dtype)).logits, expected)


def test_rewards_are_fp32_under_autocast():
    model = make_model()
    pool_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        rows = head_input(model, make_batch())
        logits = model(**make_batch()).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, rows.float() @ model.score.weight.T, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_parameters_names_and_checkpoint_stay(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = make_model()
    head, weight, state = model.score, model.score.weight, model.state_dict()
    assert pool_head(model) is model.score is head
    assert isinstance(model.score, PooledHead)
    assert model.score.weight is weight
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys"))
    torch.testing.assert_close(loaded(**make_batch()).logits, model(**make_batch()).logits)


@pytest.mark.parametrize("when", ["before peft", "after peft"])
def test_lora_with_the_head_in_modules_to_save(when, tmp_path):
    peft = pytest.importorskip("peft")

    def with_lora(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    plain, model = with_lora(make_model()), make_model()
    if when == "before peft":
        pool_head(model)
    model = with_lora(model)
    if when == "after peft":
        pool_head(model)
    batch = make_batch()
    losses = [bt_loss(m(**batch).logits) for m in (model, plain)]
    for loss in losses:
        loss.backward()
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    keys = set(peft.get_peft_model_state_dict(plain))
    assert set(peft.get_peft_model_state_dict(model)) == keys
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["reader", "pooling"])
def test_head_reader_keeps_the_pooled_rows_with_their_graph(first):
    model = make_model()
    if first == "pooling":
        pool_head(model)
    reader = HeadReader(find_head(model))
    pool_head(model) if first == "reader" else None
    reader.expect(make_batch()["input_ids"])
    logits = model(**make_batch()).logits
    rows = reader.take(logits)
    torch.testing.assert_close(rows @ model.score.weight.T, logits, rtol=1e-5, atol=1e-5)
    rows.sum().backward()
    assert model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("first", ["apply", "pool"])
def test_apply_normbt_on_a_pooled_head_weighs_the_pooled_rows(first):
    model, eager = make_model(), make_model()
    steps = [apply_normbt, pool_head]
    for step in steps if first == "apply" else reversed(steps):
        step(model)
    ema = reference.DistanceEMA()
    for seed in range(3):
        batch = make_batch(seed=seed)
        batch["input_ids"][0, -1] = PAD  # a final <eos> that is the pad token, within the mask
        bt_loss(model(**batch).logits).backward()
        last = torch.tensor([int(mask.nonzero().max()) for mask in batch["attention_mask"]])
        rows = reference.pool(head_input(eager, batch), last)
        rho = reference.pair_distance(rows)
        reference.linear_normbt_loss(rows, eager.score.weight, ema.weight_mean(rho)).backward()
        ema.update(rho)
        found, expected = gradients(model), gradients(eager)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.score.normbt.mu, ema.mu)


@pytest.mark.slow
def test_compiles_into_one_graph():
    torch._dynamo.reset()
    plain, model = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    pool_head(plain)
    pool_head(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        bt_loss(compiled(**make_batch(seed=seed)).logits).backward()
        bt_loss(plain(**make_batch(seed=seed)).logits).backward()
    found, expected = gradients(model), gradients(plain)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_pool_by_themselves(twin):
    model = make_model()
    pool_head(model)
    other = twin(model)
    nn.init.zeros_(model.score.weight)
    ids = make_batch()["input_ids"]
    mask = torch.ones_like(ids)  # not what the pad token says
    torch.testing.assert_close(other(ids, mask).logits, other.score(other.model(ids, mask)[0][:, -1]))
    assert not model(ids, mask).logits.any()


def test_encoders_keep_their_rows_and_gain_fp32_rewards():
    model = make_model("bert", torch.bfloat16)
    with torch.no_grad():
        expected = model(**make_batch()).logits
        pool_head(model)
        logits = model(**make_batch()).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits.bfloat16(), expected)


def test_misuse_explains_itself():
    model = make_model()
    with pytest.raises(ValueError, match="not a module of this"):
        pool_head(model, nn.Linear(16, 1))
    with pytest.raises(ValueError, match="no module of Sequential around its head takes input_ids"):
        pool_head(nn.Sequential(nn.Linear(16, 1)))
    decoder = TinyDecoder()
    with pytest.raises(ValueError, match=r"nn\.Linear with one output.*out_features=16"):
        pool_head(decoder, decoder.mix)
    with pytest.raises(ValueError, match=r"num_labels=2.*scalar head"):
        pool_head(make_model(num_labels=2))
    pool_head(model)
    with pytest.raises(ValueError, match=r"plain nn\.Linear.*got PooledHead"):
        pool_head(model)
    with pytest.raises(ValueError, match=r"\(4, 5, 16\) outside the forward of its model"):
        model.score(torch.zeros(4, 5, 16))
