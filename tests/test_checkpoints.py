"""Checkpoints as people have them: only a head may be new, which is said; anything else that is missing is refused."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from normbt_kernels.commands import cli
from normbt_kernels.data.checkpoints import load_model, load_tokenizer, load_training_tokenizer, position_limit
from normbt_kernels.errors import UserError, first_sentence
from tests.test_evaluate import make_rows, make_tokenizer, own_rewards, save, write_jsonl
from tests.tiny_classifiers import make_model


@pytest.fixture
def tokenizer():
    return make_tokenizer(pad_token="<pad>")


def saved(model, folder, change_weights=None, **config):
    """A checkpoint whose weights or config.json were changed behind its back."""
    save(model, folder, pad_token="<pad>")
    if change_weights is not None:
        weights = load_file(folder / "model.safetensors")
        change_weights(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def without_layer_1(weights):
    for name in [name for name in weights if "layers.1." in name]:
        del weights[name]


def with_value_head(weights):
    weights["value_head.weight"] = weights.pop("score.weight", torch.zeros(1, 16))


LM = LlamaForCausalLM


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize(
    ("make", "change", "config", "message"),
    [
        (make_model, None, {"vocab_size": 30}, r"model.embed_tokens.weight has the shape \(32, 16\) in the checkpoint"),
        (make_model, without_layer_1, {}, r"is not whole: it does not hold model.layers.1.*and \d more"),
        (make_model, with_value_head, {}, "does not hold score.weight, but value_head.weight"),
        (lambda: LM(make_model().config), with_value_head, {}, "does not hold score.weight, but value_head.weight"),
        (
            make_model,
            lambda weights: weights.update({"score.weight": torch.zeros(2, 16)}),
            {},
            r"has the shape \(2, 16",
        ),
    ],
    ids=["stale vocab_size", "lost layer", "renamed head", "renamed head on a causal LM", "head of two labels"],
)
def test_weights_that_are_no_new_head_are_refused_by_name(tmp_path, tokenizer, make, change, config, message, new_head):
    folder = saved(make(), tmp_path, change, **config)
    with pytest.raises(UserError, match=message):
        load_model(folder, tokenizer, "float32", new_head=new_head)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LM(make_model().config), "is LlamaForCausalLM: its reward head is new, initialised from the seed"),
        (lambda: BertForMaskedLM(make_model("bert").config), "is BertForMaskedLM: its reward head is new"),
        (lambda: make_model(num_labels=3), "has 3 labels: its head is replaced by a new one with 1"),
    ],
    ids=["causal LM", "masked LM, which has no pooler either", "three labels"],
)
def test_a_new_head_is_said_aloud_and_refused_where_it_cannot_be_trained(tmp_path, tokenizer, capsys, make, said):
    model = make()
    folder = saved(model, tmp_path)
    loaded = load_model(folder, tokenizer, "float32", new_head=True)
    assert said in capsys.readouterr().out
    for name, weight in loaded.base_model.state_dict().items():
        if "pooler" not in name:
            assert torch.equal(weight, model.base_model.state_dict()[name]), name
    with pytest.raises(UserError, match=r"is no trained reward model: it (does not hold|has 3 labels)"):
        load_model(folder, tokenizer)


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)  # without the tokenizer's files transformers invents an empty one
    with pytest.raises(UserError, match="its tokenizer has no vocabulary: the tokenizer's files are missing"):
        load_tokenizer(str(tmp_path))


def test_a_reason_is_never_cut_within_its_sentence(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"from one of: .* class to instantiate and convert\.$"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(RuntimeError) as mismatch:  # many lines, the first of which ends in a colon
        torch.nn.Linear(1, 1).load_state_dict({})
    assert first_sentence(mismatch.value).endswith('in state_dict: "weight", "bias".')


def test_the_attention_is_chosen_or_refused_in_words(tokenizer, tmp_path):
    folder = saved(make_model(), tmp_path / "model")
    assert load_model(folder, tokenizer).config._attn_implementation == "sdpa"
    assert load_model(folder, tokenizer, attention="eager").config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"model: .*no_such_attention"):
        load_model(folder, tokenizer, attention="no_such_attention")


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_position_limit_is_where_the_model_fails(architecture):
    model = make_model(architecture, max_position_embeddings=12)
    limit = position_limit(model)
    assert limit == {"bert": 12, "llama": None}[architecture]
    model(input_ids=torch.full((1, limit or 40), 5))
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.slow
def test_an_adapter_is_a_model_for_every_command(tmp_path, capsys, monkeypatch):
    """Made as our own error text says: a pad token added, the embedding resized, LoRA with its head."""
    monkeypatch.chdir(tmp_path)
    LM(make_model().config).save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    tokenizer = load_training_tokenizer("base")
    base = load_model("base", tokenizer, "float32", new_head=True)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    model.save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")
    rows = make_rows(6)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)

    assert cli.main(["evaluate", "adapter", "--dataset", str(data), "--device", "cpu"]) == 0
    model.merge_and_unload().save_pretrained("merged")
    tokenizer.save_pretrained("merged")
    chosen, rejected = (own_rewards("merged", rows, answer=answer) for answer in ("chosen", "rejected"))
    right = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(rows)
    assert f"{right:9.3f}" in capsys.readouterr().out

    few = ["--dataset", str(data), "--model", "adapter"]
    assert cli.main(["diagnose", *few, "--num-gradients", "2", "--device", "cpu"]) == 0
    train = ["train", *few, "--output-dir", "out", "--max-steps", "1", "--learning-rate", "0.1", "--use-cpu"]
    assert cli.main([*train, "--disable-tqdm", "True", "--report-to", "none", "--save-strategy", "no"]) == 0
    assert cli.main(["evaluate", "out/normbt", "--dataset", str(data), "--device", "cpu"]) == 0
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("adapter", "out/normbt"))
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name or "score" in name)


def test_an_adapter_without_its_head_is_refused(tmp_path, tokenizer):
    saved(LM(make_model().config), tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"neither the adapter .* nor its base model .* holds score.weight"):
        load_model(str(tmp_path / "adapter"), copy.deepcopy(tokenizer), new_head=True)


# --- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(path, gguf):
    """A Llama of one layer as llama.cpp has it, with a tokenizer of bytes and two words; and the same as a model."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b"]
    heads, hidden, inner = 2, 16, 32
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": heads}
    torch.manual_seed(0)
    model = LM(LlamaConfig(vocab_size=len(words), **shape))
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": hidden,
        "block_count": 1,
        "feed_forward_length": inner,
        "head_count": heads,
        "head_count_kv": heads,
        "layer_norm_rms_eps": 1e-6,
        "rope_dimension_count": hidden // heads,
        "vocab_size": len(words),
        "tokenizer_model": "llama",
        "token_list": words,
        "token_scores": [-float(i) for i in range(len(words))],
        "token_types": [2, 3, 3, *[6] * 256, *[1] * 5],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
    }.items():
        getattr(writer, f"add_{name}")(value)
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for theirs, ours in GGUF_NAMES.items():
        weight = weights[f"model.layers.0.{ours}.weight"]
        if theirs in ("attn_q", "attn_k"):  # the halves that rope turns stand side by side
            weight = weight.reshape(heads, 2, -1, hidden).swapaxes(1, 2).reshape(weight.shape).copy()
        writer.add_tensor(f"blk.0.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.slow
def test_a_gguf_file_is_trained_from_and_saved_as_a_plain_model(tmp_path, capsys, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm").mkdir()
    model = write_gguf("lm/tiny.gguf", gguf)
    rows = [{"chosen": "a" * i + " b", "rejected": "b" * i} for i in range(1, 9)]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    train = ["train", "--model", "lm", "--gguf-file", "tiny.gguf", "--dataset", str(data), "--output-dir", "out"]
    options = ["--max-steps", "1", "--learning-rate", "0", "--use-cpu", "--disable-tqdm", "True", "--report-to", "none"]
    assert cli.main([*train, *options]) == 0
    assert "its reward head is new" in capsys.readouterr().out
    trained = AutoModelForSequenceClassification.from_pretrained("out/normbt").model.state_dict()
    for name, weight in model.model.state_dict().items():
        assert torch.equal(trained[name][: len(weight)], weight), name

    options = ["--dataset", str(data), "--num-gradients", "2", "--device", "cpu"]
    assert cli.main(["diagnose", "--model", "lm", "--gguf-file", "tiny.gguf", *options, "--out", "diagnosis.json"]) == 0
    assert json.loads((tmp_path / "diagnosis.json").read_text())["model"] == "lm/tiny.gguf"
    assert cli.main(["diagnose", "--gguf-file", "tiny.gguf"]) == 2
    assert "--gguf-file needs a --model" in capsys.readouterr().err
