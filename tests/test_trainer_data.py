"""Preference data as people have them, in `NormBTTrainer`: text or messages in, the right token ids in the batch."""

import logging

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from tests.tiny_classifiers import make_model

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", "add", "two", "four", "five", "six"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} <eos> {% endfor %}"


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def make_trainer(model, tokenizer, folder, train_dataset=None, eval_dataset=None, **kwargs):
    batches = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "dataloader_pin_memory": False}
    args = TrainingArguments(
        str(folder), max_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to=[], **batches
    )
    return NormBTTrainer(
        model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **kwargs
    )


def words(ids):
    return [WORDS[i] for i in ids]


def message(role, content):
    return {"role": role, "content": content}


TEXT = {"chosen": "add two", "rejected": "add four six"}
PROMPT = {"prompt": "add ", "chosen": "two", "rejected": "four six"}
CHAT = {
    "chosen": [message("user", "add"), message("assistant", "two")],
    "rejected": [message("user", "add"), message("assistant", "four")],
}
CHAT_PROMPT = {
    "prompt": [message("user", "add")],
    "chosen": [message("assistant", "two")],
    "rejected": [message("assistant", "four")],
}
AS_TEXT = (["add", "two", "<eos>"], ["add", "four", "six", "<eos>"])
AS_CHAT = tuple(
    ["user", ":", "add", "<eos>", "assistant", ":", answer, "<eos>"]
    for answer in (CHAT["chosen"][1]["content"], "four")
)


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("list", TEXT, AS_TEXT),
        ("list", PROMPT, AS_TEXT),
        ("list", CHAT, AS_CHAT),
        ("Dataset", CHAT_PROMPT, AS_CHAT),
        ("IterableDataset", CHAT_PROMPT, AS_CHAT),
    ],
)
def test_pairs_of_every_kind_are_tokenised_and_train(model, tokenizer, tmp_path, kind, row, expected):
    rows = [row | {"margin": 0.5 * i, "pair_weight": 1.0 + i, "source": "web"} for i in range(4)]
    dataset = rows if kind == "list" else datasets.Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if kind == "IterableDataset" else dataset
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=dataset, eval_dataset={"own": dataset})
    for seen in (trainer.train_dataset, trainer.eval_dataset["own"]):
        first, second = list(seen)[:2]
        assert set(first) == {"chosen_ids", "rejected_ids", "margin", "pair_weight"}
        assert (words(first["chosen_ids"]), words(first["rejected_ids"])) == expected
        assert (second["margin"], second["pair_weight"]) == (0.5, 2.0)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "margin", "pair_weight"}
    trainer.train()
    assert trainer.pair_loss.num_updates == 2
    assert "eval_own_accuracy" in trainer.evaluate()
    assert len(trainer.predict(dataset).predictions[0]) == 4


def test_evaluate_and_predict_take_raw_pairs_too(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    rows = [TEXT, {"chosen": "five", "rejected": "two two two"}, TEXT]
    chosen_rewards, rejected_rewards, _ = trainer.predict(rows).predictions
    expected = []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids = torch.tensor([[*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]])
            expected.append(model.eval()(ids).logits.item())
    assert [*chosen_rewards, *rejected_rewards] == pytest.approx(expected, rel=1e-4)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_margin"] == pytest.approx(float((chosen_rewards - rejected_rewards).mean()), rel=1e-5)


def test_pairs_that_are_too_long_are_left_out_and_counted(model, tokenizer, tmp_path, caplog):
    rows = [TEXT, {"chosen": "add two two two", "rejected": "six"}, TEXT]
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows, max_length=4)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert len(trainer.train_dataset) == 2
    assert "train_dataset: 1 of 3 pairs are longer than 4 tokens, and left out" in caplog.text
    with pytest.raises(ValueError, match="test_dataset: 1 of 3 pairs are longer than 4 tokens"):
        trainer.predict(rows)  # whose predictions would be those of other rows
    with pytest.raises(ValueError, match="train_dataset: 3 of 3 pairs are longer than 1 tokens"):
        make_trainer(model, tokenizer, tmp_path, train_dataset=rows, max_length=1)
    tokenizer.model_max_length = 4
    assert len(make_trainer(model, tokenizer, tmp_path, train_dataset=rows).train_dataset) == 2


def test_token_ids_and_other_collators_are_left_alone(model, tokenizer, tmp_path):
    ids = [{"chosen_ids": [6, 7], "rejected_ids": [8], "margin": 1.0}] * 2
    assert make_trainer(model, tokenizer, tmp_path, train_dataset=ids).train_dataset is ids
    assert make_trainer(model, tokenizer, tmp_path, train_dataset=[TEXT], data_collator=list).train_dataset == [TEXT]


def test_pair_weight_multiplies_each_pairs_loss(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    collator = PreferenceCollator(tokenizer)
    rows = [{"chosen_ids": [6, 7, 1], "rejected_ids": [6, 8, 1]}, {"chosen_ids": [9, 1], "rejected_ids": [10, 7, 1]}]

    def loss(*weights):
        weighted = [row | {"pair_weight": weight} for row, weight in zip(rows, weights, strict=True)]
        return trainer.compute_loss(model.eval(), collator(weighted)).item()

    assert loss(2.0, 0.0) + loss(0.0, 3.0) == pytest.approx(loss(2.0, 3.0), rel=1e-6)
    assert loss(1.0, 1.0) == pytest.approx(trainer.compute_loss(model, collator(rows)).item(), rel=1e-6)
    assert loss(2.0, 2.0) == pytest.approx(2 * loss(1.0, 1.0), rel=1e-6)
    assert loss(1.0, 0.0) != pytest.approx(loss(0.0, 1.0), rel=1e-2)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], r"train_dataset, row 1: no column 'chosen' \(columns: question, answer\)"),
        ([TEXT, TEXT | {"rejected": ""}], "train_dataset, row 2: 'rejected' is neither text nor a list of messages"),
        ([TEXT | {"margin": 1.0}, TEXT], "train_dataset, row 2: no margin, but other rows have one"),
        ([TEXT | {"pair_weight": -1.0}], "train_dataset, row 1: 'pair_weight' is negative"),
    ],
)
@pytest.mark.parametrize("as_dataset", [False, True], ids=["list", "Dataset"])
def test_rows_that_are_no_pairs_are_named_before_training(model, tokenizer, tmp_path, rows, message, as_dataset):
    dataset = datasets.Dataset.from_list(rows) if as_dataset else rows
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tokenizer, tmp_path, train_dataset=dataset)


def test_messages_need_a_chat_template(model, tokenizer, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"eval_dataset, row 1: .*no chat template; give plain text instead"):
        make_trainer(model, tokenizer, tmp_path, eval_dataset=[CHAT])


def test_collator_names_the_columns_that_it_got(tokenizer):
    with pytest.raises(
        ValueError, match=r"rows need chosen_ids and rejected_ids, got the columns \['chosen', 'rejected'\]"
    ):
        PreferenceCollator(tokenizer)([TEXT])


def test_tokenizer_is_asked_for(model, tmp_path):
    with pytest.raises(ValueError, match="pass the tokenizer as processing_class"):
        make_trainer(model, None, tmp_path)
