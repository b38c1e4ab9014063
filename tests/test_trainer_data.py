"""Preference data as people have them, in `NormBTTrainer`: text or messages in, the right token ids in the batch."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
from transformers import TrainingArguments

from normbt_kernels import LinearNormBTLoss
from normbt_kernels.integrations.transformers import NormBTTrainer, PreferenceCollator
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import word_tokenizer

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", "add", "two", "four", "five", "six"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} <eos> {% endfor %}"


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS, CHAT_TEMPLATE, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def make_trainer(model, tokenizer, folder, train_dataset=None, eval_dataset=None, label_smoothing_factor=0, **kwargs):
    batches = {"label_smoothing_factor": label_smoothing_factor}
    batches |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "dataloader_pin_memory": False}
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


def test_pairs_that_are_too_long_are_left_out_and_counted(model, tokenizer, tmp_path, messages):
    rows = [TEXT, {"chosen": "add two two two", "rejected": "six"}, TEXT]
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows, max_length=4)
    assert len(trainer.train_dataset) == 2
    assert "train_dataset: 1 of 3 pairs are longer than 4 tokens, and left out" in messages.text
    with pytest.raises(ValueError, match="test_dataset: 1 of 3 pairs are longer than 4 tokens"):
        trainer.predict(rows)  # whose predictions would be those of other rows
    with pytest.raises(ValueError, match="train_dataset: 3 of 3 pairs are longer than 1 tokens"):
        make_trainer(model, tokenizer, tmp_path, train_dataset=rows, max_length=1)
    tokenizer.model_max_length = 4
    assert len(make_trainer(model, tokenizer, tmp_path, train_dataset=rows).train_dataset) == 2


@pytest.mark.parametrize("kind", ["list", "Dataset", "Dataset of token ids", "stream"])
def test_long_sequences_are_cut_where_the_tokenizer_cuts_if_asked(model, tokenizer, tmp_path, messages, kind):
    rows = [TEXT, {"chosen": "add two two two", "rejected": "six"}, {"chosen": "add two two six", "rejected": "add"}]
    if kind == "Dataset of token ids":
        ids = [make_trainer(model, tokenizer, tmp_path, train_dataset=[row]).train_dataset[0] for row in rows]
        rows = [{name: list(value) for name, value in row.items()} for row in ids]
    made = {"list": list, "stream": Stream}.get(kind, datasets.Dataset.from_list)(rows)
    for side, first in (("right", ["add", "two", "two"]), ("left", ["two", "two", "<eos>"])):
        tokenizer.truncation_side = side
        trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=made, max_length=3, truncate=True)
        seen = list(trainer.train_dataset)
        assert [len(row["chosen_ids"]) for row in seen] == [3, 3, 3]
        assert words(seen[1]["chosen_ids"]) == first
        assert words(seen[1]["rejected_ids"]) == ["six", "<eos>"]
        assert "row 1: cut to 3 tokens" in messages.text
    if kind != "stream":
        assert "row 1: cut to 3 tokens (and in 2 more pairs)" in messages.text
        assert make_trainer(model, tokenizer, tmp_path, max_length=3, truncate=True).predict(made).metrics


def test_token_ids_and_other_collators_are_left_alone(model, tokenizer, tmp_path):
    ids = [{"chosen_ids": [6, 7], "rejected_ids": [8], "margin": 1.0}] * 2
    assert make_trainer(model, tokenizer, tmp_path, train_dataset=ids).train_dataset is ids
    assert make_trainer(model, tokenizer, tmp_path, train_dataset=[TEXT], data_collator=list).train_dataset == [TEXT]


SAME = {"chosen": "add two", "rejected": "add two"}
IDS = {"chosen_ids": [6, 7, 1], "rejected_ids": [6, 8, 1]}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("kind", ["list", "Dataset", "ids", "IterableDataset", "torch stream"])
def test_pairs_with_the_same_tokens_on_both_sides_are_left_out_and_said(model, tokenizer, tmp_path, messages, kind):
    rows = [TEXT, SAME, TEXT]
    if kind == "ids":
        rows = [IDS, IDS | {"rejected_ids": [6, 7, 1]}, IDS]
    rows = {
        "Dataset": datasets.Dataset.from_list,
        "IterableDataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "torch stream": Stream,
    }.get(kind, list)(rows)
    kept = list(make_trainer(model, tokenizer, tmp_path, train_dataset=rows).train_dataset)
    assert len(kept) == 2
    assert all(list(row["chosen_ids"]) != list(row["rejected_ids"]) for row in kept)
    if "tream" in kind or "Iterable" in kind:
        assert "train_dataset, row 2: left out, like all that are identical" in messages.text
        return
    assert "train_dataset: 1 of 3 pairs are the same tokens on both sides, and left out" in messages.text
    assert len(make_trainer(model, tokenizer, tmp_path, train_dataset=rows, keep_identical=True).train_dataset) == 3


def test_a_torch_stream_of_raw_rows_trains(model, tokenizer, tmp_path):
    make_trainer(model, tokenizer, tmp_path, train_dataset=Stream([TEXT, PROMPT, TEXT, PROMPT])).train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_of_which_no_pair_is_left_ends_as_in_trainer(model, tokenizer, tmp_path, messages, accumulation):
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=Stream([SAME] * 8))
    trainer.args.gradient_accumulation_steps = accumulation
    assert trainer.train().global_step == 0
    assert "There seems not to be a single sample in your epoch_iterator" in messages.text


@pytest.mark.parametrize("kind", [list, Stream, datasets.Dataset.from_list], ids=["list", "torch stream", "Dataset"])
@pytest.mark.parametrize("row", ["TEXT", "IDS"])
def test_a_column_of_numbers_that_is_empty_is_none(model, tokenizer, tmp_path, kind, row):
    rows = [{"TEXT": TEXT, "IDS": IDS}[row] | {"margin": None, "pair_weight": 2.0}] * 4
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=kind(rows))
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "pair_weight"}


def test_a_stream_says_which_number_is_missing(model, tokenizer, tmp_path):
    rows = datasets.Dataset.from_list([TEXT | {"margin": 1.0}, TEXT | {"margin": None}]).to_iterable_dataset()
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows)
    with pytest.raises(ValueError, match="train_dataset, row 2: no margin: a stream has one in each row, or no column"):
        list(trainer.train_dataset)


@pytest.mark.parametrize("as_dataset", [False, True], ids=["list", "Dataset"])
def test_token_ids_are_held_to_the_length_too(model, tokenizer, tmp_path, messages, as_dataset):
    rows = [IDS, IDS | {"chosen_ids": [6] * 5}]
    rows = datasets.Dataset.from_list(rows) if as_dataset else rows
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows, max_length=4)
    assert [row["chosen_ids"] for row in trainer.train_dataset] == [[6, 7, 1]]
    assert "train_dataset: 1 of 2 pairs are longer than 4 tokens, and left out" in messages.text


def test_pairs_beyond_the_models_positions_are_left_out(tokenizer, tmp_path, messages):
    bert = make_model("bert", max_position_embeddings=4)
    trainer = make_trainer(bert, tokenizer, tmp_path, train_dataset=[IDS, IDS | {"chosen_ids": [6] * 5}, IDS])
    assert "1 of 3 pairs are longer than 4 tokens" in messages.text
    trainer.train()


def test_what_looks_wrong_is_said_with_its_row(model, tokenizer, tmp_path, messages):
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    begins = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    rows = [
        TEXT,
        {"chosen": "<bos> add two", "rejected": "six"},
        {"prompt": "add", "chosen": "add six", "rejected": "two"},
    ]
    make_trainer(model, tokenizer, tmp_path, train_dataset=rows)
    said = messages.text
    assert "train_dataset, row 2: a text begins with <bos>, and the tokenizer puts another one before it" in said
    assert "train_dataset, row 3: an answer begins with the prompt" in said


def test_a_remark_may_come_late(model, tokenizer, tmp_path, messages):
    """datasets takes the types of columns from the rows of its first batch, a thousand."""
    rows = [TEXT | {"prompt": None}] * 1000 + [{"prompt": "add", "chosen": "add six", "rejected": "two"}]
    make_trainer(model, tokenizer, tmp_path, train_dataset=datasets.Dataset.from_list(rows))
    assert "train_dataset, row 1001: an answer begins with the prompt" in messages.text


def test_grouping_by_length_goes_by_the_longer_side_and_leaves_predictions_in_order(model, tokenizer, tmp_path):
    lengths = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"chosen_ids": [6], "rejected_ids": [8] * (n + 1)} for n in lengths]
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=rows)
    expected = trainer.predict(rows).predictions[1]

    def padding():
        batches = [batch["attention_mask"][2:].sum(1) for batch in trainer.get_train_dataloader()]
        return sum(abs(int(first - second)) for first, second in batches)

    at_random = padding()
    trainer.args.train_sampling_strategy = "group_by_length"
    assert padding() < at_random / 2
    assert trainer.predict(rows).predictions[1].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "option", [{"batch_eval_metrics": True}, {"eval_do_concat_batches": False}, {"dataloader_drop_last": True}]
)
def test_the_metrics_do_not_depend_on_how_evaluation_is_cut(model, tokenizer, tmp_path, option):
    rows = [IDS, {"chosen_ids": [9, 1], "rejected_ids": [10, 7, 1]}, IDS, IDS | {"chosen_ids": [9, 10]}, IDS]
    trainer = make_trainer(model, tokenizer, tmp_path)
    expected = trainer.evaluate(rows)
    for name, value in option.items():
        setattr(trainer.args, name, value)
    metrics = trainer.evaluate(rows)
    for name in ("eval_accuracy", "eval_margin"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6)


def test_there_is_a_prediction_for_each_row_even_if_training_drops_its_last_batch(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path, train_dataset=[TEXT] * 5)
    trainer.args.dataloader_drop_last = True
    assert len(trainer.predict([TEXT] * 5).predictions[0]) == 5
    assert len(trainer.get_train_dataloader()) == 2  # batches of two pairs


def test_a_folder_and_a_processor_do_for_a_model_and_a_tokenizer(tokenizer, tmp_path):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(make_model().config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    processor = type("Processor", (), {"tokenizer": tokenizer, "model_input_names": ["input_ids"]})()
    for processing_class in (None, processor):
        trainer = make_trainer(str(tmp_path / "model"), processing_class, tmp_path, train_dataset=[TEXT, PROMPT])
        trainer.train()
        assert type(trainer.model).__name__ == "LlamaForSequenceClassification"


def test_each_model_of_model_init_is_trained_with_a_loss_of_its_own(tokenizer, tmp_path):
    given = LinearNormBTLoss(beta=0.5)
    by_init = make_trainer(None, tokenizer, tmp_path, [TEXT, PROMPT], model_init=lambda: make_model(), loss=given)
    for _ in range(2):
        by_init.train()
        by_model = make_trainer(make_model(), tokenizer, tmp_path, [TEXT, PROMPT], loss=LinearNormBTLoss(beta=0.5))
        by_model.train()
        assert by_init.pair_loss.num_updates == 2
        assert torch.equal(by_init.pair_loss.mu, by_model.pair_loss.mu)
        for found, expected in zip(by_init.model.parameters(), by_model.model.parameters(), strict=True):
            assert torch.equal(found, expected)
    assert given.num_updates == 0
    by_init.model = None  # as hyperparameter_search leaves it
    by_init.train()
    assert by_init.pair_loss.num_updates == 2


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
        ([TEXT | {"margin": None}, TEXT | {"margin": 1.0}], "train_dataset, row 1: no margin, but other rows have one"),
        ([TEXT | {"pair_weight": -1.0}], "train_dataset, row 1: 'pair_weight' is negative"),
        ([IDS, IDS | {"rejected_ids": []}], "train_dataset, row 2: 'rejected_ids' is empty"),
        ([IDS | {"margin": 1.0}, IDS | {"margin": None}], "train_dataset, row 2: no margin, but other rows have one"),
        ([IDS | {"margin": float("nan")}], "train_dataset, row 1: 'margin' is not a finite number: nan"),
        ([IDS | {"pair_weight": -1.0}], "train_dataset, row 1: 'pair_weight' is negative"),
        (
            [IDS, IDS | {"chosen_ids": [6, 32]}],
            "row 2: 'chosen_ids' has the token 32, but the model has embeddings for 32",
        ),
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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (IDS | {"chosen_ids": []}, "pair 2 of the batch: 'chosen_ids' is empty"),
        (IDS | {"margin": None}, "pair 2 of the batch: 'margin' is not a finite number: None"),
        (IDS, "pair 2 of the batch: 'margin' is not a finite number: None"),
        (IDS | {"margin": 10**400}, "pair 2 of the batch: 'margin' is not a finite number: 1000"),
    ],
)
def test_collator_refuses_what_it_would_have_to_make_up(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(tokenizer)([IDS | {"margin": 1.0}, row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"takes loss=LinearNormBTLoss\(label_smoothing=...\)"),
        ({"compute_loss_func": lambda *args: None}, "compute_loss_func is not called: pass the loss as loss="),
    ],
)
def test_options_that_would_change_nothing_are_refused(model, tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tokenizer, tmp_path, **options)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (datasets.DatasetDict(train=datasets.Dataset.from_list([TEXT]), test=datasets.Dataset.from_list([TEXT])),
         "train_dataset has the splits train, test: pass one of them"),
        ((row for row in [TEXT]), "train_dataset is a generator: pass a list of rows"),
        (datasets.Dataset.from_list([TEXT]).to_pandas(), "train_dataset is a DataFrame: .* .from_pandas takes"),
    ],
)  # fmt: skip
def test_what_is_no_data_set_is_refused(model, tokenizer, tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tokenizer, tmp_path, train_dataset=dataset)


def test_tokenizer_is_asked_for(model, tmp_path):
    with pytest.raises(ValueError, match="pass the tokenizer as processing_class"):
        make_trainer(model, None, tmp_path)
