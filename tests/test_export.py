"""The export for rewardbench: a plain classifier that transformers 5 and 4.5x read as the model that was trained.

The second half of the claim needs an interpreter with transformers 4.5x (rewardbench 0.1.4 pins 4.51.0):

    python -m venv old && old/bin/pip install torch transformers==4.51.0 accelerate
    PYTHON_WITH_TRANSFORMERS_4=old/bin/python pytest tests/test_export.py
"""

import copy
import json
import os
import signal
import subprocess

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from normbt_kernels import apply_normbt
from normbt_kernels.commands.cli import main
from normbt_kernels.integrations.export import export_for_rewardbench
from normbt_kernels.integrations.pooled_head import pool_head
from normbt_kernels.integrations.transformers import NormBTTrainer
from tests.tiny_classifiers import PAD, VOCABULARY, make_batch, make_model
from tests.tiny_pairs import make_rows

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + '<eos>' }}{% endfor %}"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 200.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.5] * 4,
    "long_factor": [3.0] * 4,
}


def theta(value, **others):
    return {"rope_type": "default", "rope_theta": value} | others


# architecture, its rope settings, and what transformers 4 calls them
CASES = {
    "llama": (theta(20.0), {"rope_theta": 20.0, "rope_scaling": None}),
    "llama3": (
        LLAMA3,
        {"rope_theta": 500.0, "rope_scaling": {name: LLAMA3[name] for name in LLAMA3 if name != "rope_theta"}},
    ),
    "qwen2": (theta(20.0), {"rope_theta": 20.0, "rope_scaling": None}),
    "qwen3": (
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 20.0},
        {"rope_theta": 20.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "gemma": (theta(20.0), {"rope_theta": 20.0, "rope_scaling": None}),
    "phi3": (
        LONGROPE,
        {
            "rope_theta": 200.0,
            "partial_rotary_factor": 1.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 4, "long_factor": [3.0] * 4},
        },
    ),
    "gpt_neox": (
        theta(20.0, partial_rotary_factor=0.5),
        {"rotary_emb_base": 20.0, "rotary_pct": 0.5, "rope_scaling": None},
    ),
    "modernbert": (
        {"full_attention": theta(20.0), "sliding_attention": theta(30.0)},
        {"global_rope_theta": 20.0, "local_rope_theta": 30.0},
    ),
    "gemma3_text": (
        {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 20.0},
            "sliding_attention": theta(30.0),
        },
        {"rope_theta": 20.0, "rope_local_base_freq": 30.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "bert": (None, {}),
}


def build(case, **config):
    rope, _ = CASES[case]
    if rope is not None:
        config["rope_parameters"] = copy.deepcopy(rope)
    if case == "phi3":
        config |= {"original_max_position_embeddings": 4}
    if case == "gemma3_text":
        config |= {"head_dim": 8}
    return make_model("llama" if case == "llama3" else case, **config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE, as most decoders have; an extra special token; no token types."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<eos>", "<tool>"]
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=list("abcdefghijklmnopqrsuvy\u0120"), vocab_size=VOCABULARY
    )
    backend.train_from_iterator(["user assistant a good answer", "a bad answer"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<tool>"],
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def load(folder):
    """The classifier as anyone loads it, which must hold what the folder holds and nothing else."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # In the file the weights lie at any byte, and kernels for aligned ones round otherwise.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def exported_config(folder):
    return json.loads((folder / "config.json").read_text())


# --- transformers 5 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_plain_classifier_gives_the_same_bits(case, tokenizer, tmp_path):
    model, batch = build(case), make_batch()
    export_for_rewardbench(model, tokenizer, tmp_path / "export")
    loaded = load(tmp_path / "export")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.config.num_labels == 1
    assert loaded.config.pad_token_id == PAD


@pytest.mark.parametrize("case", CASES)
def test_rope_is_spelled_for_both_versions(case, tokenizer, tmp_path):
    rope, old = CASES[case]
    export_for_rewardbench(build(case), tokenizer, tmp_path / "export")
    config = exported_config(tmp_path / "export")
    assert {name: config[name] for name in old} == old
    if rope is not None:
        assert config["rope_parameters"].items() >= rope.items()


def test_tokenizer_is_the_same(tokenizer, tmp_path):
    export_for_rewardbench(build("llama"), tokenizer, tmp_path / "export")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    messages = [{"role": "user", "content": "a good <tool>"}, {"role": "assistant", "content": "answer"}]
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert (loaded.pad_token, loaded.eos_token, loaded.extra_special_tokens) == ("<pad>", "<eos>", ["<tool>"])


@pytest.mark.parametrize(("case", "token_types"), [("llama", False), ("bert", True)])
def test_tokenizer_returns_what_the_model_takes(case, token_types, tokenizer, tmp_path):
    tokenizer = changed(tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    export_for_rewardbench(build(case), tokenizer, tmp_path / "export")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert ("token_type_ids" in loaded("a good answer")) == token_types


def test_a_checkpoint_of_apply_normbt_leaves_nothing_of_it(tokenizer, tmp_path):
    model, batch = build("llama"), make_batch()
    keys = set(model.state_dict())
    pool_head(model)
    apply_normbt(model)
    chosen, rejected = model.train()(**batch).logits.chunk(2)
    (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()
    assert model.score.normbt.num_updates == 1
    model.save_pretrained(tmp_path / "checkpoint")
    state = copy.deepcopy(model.state_dict())
    for name, source in (("from_model", model), ("from_checkpoint", tmp_path / "checkpoint")):
        export_for_rewardbench(source, tokenizer, tmp_path / name)
        loaded = load(tmp_path / name)
        assert set(loaded.state_dict()) == keys
        assert "normbt" not in (tmp_path / name / "config.json").read_text()
        assert torch.equal(logits(loaded, batch), logits(build("llama"), batch))
    assert set(state) - keys == {"score.normbt.mu", "score.normbt.num_updates"}  # the model passed in is as it was
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_dtype_stays(tokenizer, tmp_path):
    build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    export_for_rewardbench(tmp_path / "checkpoint", tokenizer, tmp_path / "export")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_command_line_exports_what_the_trainer_saved(tokenizer, tmp_path, capsys):
    tokenizer, model, batch = copy.deepcopy(tokenizer), build("llama"), make_batch()
    args = TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = NormBTTrainer(model, args, train_dataset=make_rows(8), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    expected = logits(load(tmp_path / "run"), batch)
    assert not torch.equal(expected, logits(build("llama"), batch))

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    assert torch.equal(logits(load(tmp_path / "export"), batch), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == CHAT_TEMPLATE

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


# --- adapters ------------------------------------------------------------------------------------------------------


def adapted(base, **options):
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, **options)
    return get_peft_model(base, config)


@pytest.mark.parametrize("base", [make_model, lambda: LlamaForCausalLM(make_model().config)], ids=["reward", "causal"])
def test_adapters_are_merged(base, tokenizer, tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = adapted(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1), task_type="SEQ_CLS"
    )
    apply_normbt(model)
    model.save_pretrained(tmp_path / "adapter")
    batch = make_batch()
    expected = logits(model, batch)
    for name, source in (("from_model", model), ("from_adapter", tmp_path / "adapter")):
        export_for_rewardbench(source, tokenizer, tmp_path / name)
        loaded = load(tmp_path / name)
        assert set(loaded.state_dict()) == set(make_model().state_dict())
        torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(logits(model, batch), expected, rtol=1e-2)  # so that merging is seen
    assert torch.equal(logits(model, batch), expected)  # the model passed in still has its adapter


def test_adapter_trained_with_an_added_token(tokenizer, tmp_path):
    tokenizer, batch = copy.deepcopy(tokenizer), make_batch()
    tokenizer.add_tokens("<added>")
    make_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    base.resize_token_embeddings(len(tokenizer))
    model = adapted(base, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    export_for_rewardbench(tmp_path / "adapter", tokenizer, tmp_path / "export")
    batch["input_ids"][:, 0] = tokenizer.convert_tokens_to_ids("<added>")
    torch.testing.assert_close(logits(load(tmp_path / "export"), batch), logits(model, batch), rtol=1e-5, atol=1e-5)


def test_adapter_without_its_head_is_refused(tokenizer, tmp_path):
    LlamaForCausalLM(make_model().config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted(base).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds score\.weight: the head was not trained"):
        export_for_rewardbench(tmp_path / "adapter", tokenizer, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_adapter_for_two_labels_is_refused(tokenizer, tmp_path):
    LlamaForCausalLM(make_model().config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    adapted(base, task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not fit .*base with one label"):
        export_for_rewardbench(tmp_path / "adapter", tokenizer, tmp_path / "export")


# --- refused -------------------------------------------------------------------------------------------------------


def changed(tokenizer, **attributes):
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_refusals_say_why_and_write_nothing(tokenizer, tmp_path):
    folder = tmp_path / "export"
    two_labels, causal = make_model(num_labels=2), LlamaForCausalLM(make_model().config)
    causal.save_pretrained(tmp_path / "causal")
    sharded = make_model()
    sharded.score.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    for model, its_tokenizer, error, message in (
        (make_model(), changed(tokenizer, chat_template=None), ValueError, "no chat template"),
        (make_model(), changed(tokenizer, pad_token=None), ValueError, "no pad token"),
        (make_model(), None, TypeError, "tokenizer must be"),
        (make_model(), tmp_path / "causal", ValueError, "causal: .*tokenizer"),
        (two_labels, tokenizer, ValueError, "num_labels=2"),
        (tmp_path / "causal", tokenizer, ValueError, r"does not hold score\.weight"),
        (torch.nn.Linear(4, 1), tokenizer, TypeError, "got Linear"),
        (sharded, tokenizer, ValueError, r"score\.weight is not a plain, whole tensor"),
    ):
        with pytest.raises(error, match=message):
            export_for_rewardbench(model, its_tokenizer, folder)
        assert not folder.exists()


def test_nothing_is_overwritten(tokenizer, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("precious")
    for taken in (tmp_path / "export", tmp_path / "export" / "mine"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            export_for_rewardbench(make_model(), tokenizer, taken)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["mine"]


def test_an_export_appears_whole_or_not_at_all(tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            export_for_rewardbench(make_model(), tokenizer, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    export_for_rewardbench(make_model(), tokenizer, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_pad_that_ends_the_text_is_warned_about(tokenizer, tmp_path, caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    export_for_rewardbench(make_model(), changed(tokenizer, pad_token="<eos>"), tmp_path / "export")
    assert "the pad token is the end-of-sequence token" in caplog.text
    assert exported_config(tmp_path / "export")["pad_token_id"] == tokenizer.eos_token_id


# --- transformers 4.5x ---------------------------------------------------------------------------------------------

OLD_PYTHON = os.environ.get("PYTHON_WITH_TRANSFORMERS_4")

# What RewardBenchPipeline does with a model and a tokenizer, without its move to CUDA.
SCORE_WITH_TRANSFORMERS_4 = """
import json, sys
import torch, transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

assert transformers.__version__.startswith("4.5"), transformers.__version__
folder, result = sys.argv[1:3]
job = torch.load(folder + "/job.pt")
found = {}
for case in job["cases"]:
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{case}")
    tokenizer.padding_side = "left"
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{case}").eval()
    untouched = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{case}-untouched").eval()
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in job["conversations"]]
    inputs = tokenizer(texts, truncation=True, max_length=2048, padding=True, return_tensors="pt")
    with torch.no_grad():
        found[case] = {
            "inputs": dict(inputs), "logits": model(**inputs).logits, "untouched": untouched(**inputs).logits
        }
torch.save(found, result)
"""


@pytest.mark.skipif(OLD_PYTHON is None, reason="PYTHON_WITH_TRANSFORMERS_4 names no interpreter with transformers 4.5x")
def test_transformers_4_gives_the_same_rewards(tokenizer, tmp_path):
    cases = [case for case in CASES if case != "gemma3_text"]  # no classifier in 4.51
    conversations = [
        [{"role": "user", "content": "a <tool> question"}, {"role": "assistant", "content": answer}]
        for answer in ("good", "a bad answer, and a long one")
    ]
    torch.save({"cases": cases, "conversations": conversations}, tmp_path / "job.pt")
    expected = {}
    for case in cases:
        model = build(case)
        model.save_pretrained(tmp_path / f"{case}-untouched")
        export_for_rewardbench(model, tokenizer, tmp_path / case)
        tokenizer.padding_side = "left"
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
        inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        expected[case] = {"inputs": inputs, "logits": logits(model, inputs)}

    script = [OLD_PYTHON, "-c", SCORE_WITH_TRANSFORMERS_4, str(tmp_path), str(tmp_path / "found.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(script, check=True, cwd=tmp_path, env=environment)
    found = torch.load(tmp_path / "found.pt")
    for case in cases:
        for name, value in expected[case]["inputs"].items():
            assert torch.equal(found[case]["inputs"][name], value), (case, name)
        torch.testing.assert_close(found[case]["logits"], expected[case]["logits"], rtol=1e-4, atol=1e-5, msg=case)
        if CASES[case][0] is not None:  # as saved by transformers 5, the same model has other rewards there
            assert not torch.allclose(found[case]["untouched"], expected[case]["logits"], rtol=1e-2, atol=1e-2), case
