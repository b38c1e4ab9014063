"""NormBT in TRL: real `RewardTrainer` runs, against eager NormBT written inside the same trainer."""

import functools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
)
from trl import RewardConfig, RewardTrainer
from trl.models import get_act_offloading_ctx_manager

from normbt_kernels import apply_normbt
from normbt_kernels.integrations.pooled_head import pool_head
from normbt_kernels.integrations.trl import NormBTRewardMixin, NormBTRewardTrainer
from tests.step_ema import start
from tests.tiny_trl import (
    CONFIGS,
    FULL,
    LORA,
    LORA_ON_HEAD,
    TINY,
    EagerNormBT,
    assert_close_mu,
    assert_same_training,
    lora,
    make_dataset,
    make_model,
    make_trainer,
    parameters_of,
)

# --- the loss in the trainer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "adapters", "bf16"),
    [
        *((name, adapters, False) for name in CONFIGS for adapters in (FULL, LORA)),
        ("llama", LORA_ON_HEAD, False),
        *((name, FULL, True) for name in CONFIGS),
        ("llama", LORA, True),
        ("llama", LORA_ON_HEAD, True),
    ],
)
@pytest.mark.slow
def test_training_equals_eager_normbt_inside_the_same_trainer(name, adapters, bf16, tokenizer, tmp_path):
    """With margin, centering, gradient checkpointing, and an accumulation whose last step has one batch only."""
    dataset = make_dataset(14)
    ours, eager = (
        make_trainer(
            cls,
            make_model(name),
            tokenizer,
            tmp_path,
            dataset,
            peft_config=None if adapters == FULL else lora(name, adapters),
            bf16=bf16,
            gradient_checkpointing=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            center_rewards_coefficient=0.05,
        )
        for cls in (NormBTRewardTrainer, EagerNormBT)
    )
    start(ours.pair_loss)
    initial = parameters_of(ours)
    ours.train()
    eager.train()
    assert ours.state.global_step == 4
    assert_same_training(ours, eager, initial, bf16)
    assert_close_mu(ours, eager)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("adapters", [FULL, LORA])
@pytest.mark.slow
def test_checkpointing_changes_nothing(adapters, use_reentrant, tokenizer, tmp_path):
    trained = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            NormBTRewardTrainer,
            make_model(),
            tokenizer,
            tmp_path,
            make_dataset(8),
            peft_config=None if adapters == FULL else lora("llama", adapters),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
            max_steps=2,
        )
        trainer.train()
        trained.append(parameters_of(trainer))
        assert trainer.pair_loss.num_updates == 2  # once per batch, however often its forward pass runs
    assert torch.equal(*trained)


def test_activation_offloading_changes_nothing(tokenizer, tmp_path, monkeypatch):
    # TRL's own offloader, on the only device that there is here, with no tensor too small for it
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    offloader = functools.partial(
        get_act_offloading_ctx_manager, use_pin_memory=False, use_streams=False, min_offload_size=1
    )
    monkeypatch.setattr("trl.trainer.reward_trainer.get_act_offloading_ctx_manager", offloader)
    trained = []
    for activation_offloading in (False, True):
        arguments = {"activation_offloading": activation_offloading, "gradient_checkpointing": False, "max_steps": 2}
        trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(8), **arguments)
        trainer.train()
        trained.append(parameters_of(trainer))
    assert trainer.maybe_activation_offload_context.tensor_id > 0
    assert torch.equal(*trained)


def test_model_in_bf16_equals_eager_normbt(tokenizer, tmp_path):
    models = [make_model(dtype=torch.bfloat16) for _ in range(2)]
    arguments = {"max_steps": 3, "center_rewards_coefficient": 0.05, "learning_rate": 0.5}
    ours, eager = (
        make_trainer(cls, model, tokenizer, tmp_path, make_dataset(12), **arguments)
        for cls, model in zip((NormBTRewardTrainer, EagerNormBT), models, strict=True)
    )
    start(ours.pair_loss)
    initial = parameters_of(ours)
    ours.train()
    eager.train()
    assert_same_training(ours, eager, initial, bf16=True)


@pytest.mark.parametrize(("pooled", "read"), [(False, -2), (True, -1)])
def test_pad_equal_to_eos_measures_the_rows_that_the_model_rewards(pooled, read, tokenizer, tmp_path):
    tokenizer.pad_token = "<eos>"  # transformers' classifiers then read the token before it, a pooled head does not
    model = make_model()
    if pooled:
        pool_head(model)
    dataset = make_dataset(4)
    trainer = make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, dataset, max_steps=1, learning_rate=0.0)
    trainer.train()
    with torch.no_grad():
        rows = [[model.model(torch.tensor([row[name]])).last_hidden_state[0, read] for row in dataset]
                for name in ("chosen_ids", "rejected_ids")]  # fmt: skip
        chosen, rejected = (torch.stack(hidden) for hidden in rows)
    logged = trainer.state.log_history[0]
    assert logged["mean_distance"] == pytest.approx((chosen - rejected).norm(dim=1).mean().item(), rel=1e-5)
    margin = F.linear(chosen - rejected, model.score.weight.detach())
    assert logged["margin"] == pytest.approx(margin.mean().item(), rel=1e-4)


@pytest.mark.slow
def test_apply_normbt_on_the_untouched_trainer_trains_the_same_model(tokenizer, tmp_path):
    arguments = {
        "max_steps": 20,
        "center_rewards_coefficient": 0.05,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
    }
    trainers = [
        make_trainer(cls, make_model(), tokenizer, tmp_path, make_dataset(24), **arguments)
        for cls in (EagerNormBT, NormBTRewardTrainer, RewardTrainer, RewardTrainer)
    ]
    start(trainers[1].pair_loss)
    apply_normbt(trainers[2].model)
    start(trainers[2].model.score.normbt)
    initial = parameters_of(trainers[0])
    for trainer in trainers:
        trainer.train()
    eager, ours, applied, plain = (parameters_of(trainer) for trainer in trainers)
    update = (eager - initial).norm()
    # Steps multiply rounding errors: after 20, these are 3e-6 and 6e-6 of the way, and BT is elsewhere.
    assert (ours - eager).norm() < 3e-5 * update
    assert (applied - eager).norm() < 3e-5 * update
    assert (plain - eager).norm() > 3e-2 * update


def test_grouping_by_length_goes_by_the_longer_side(tokenizer, tmp_path):
    lengths = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_list([{"chosen_ids": [6], "rejected_ids": [8] * (n + 1)} for n in lengths])
    options = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, rows, rows, **options)
    batches = [batch["attention_mask"][2:].sum(1) for batch in trainer.get_train_dataloader()]
    assert sum(abs(int(first - second)) for first, second in batches) < 32 * 10  # some 21 a batch at random
    assert trainer.evaluate()["eval_accuracy"] <= 1


class OwnSamplers(RewardTrainer):
    """Samples in its own way, by the tokens of the rows."""

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        return sorted(range(len(rows)), key=lambda i: len(rows[i]["chosen_ids"]))

    def _get_eval_sampler(self, eval_dataset):
        return range(len(eval_dataset) - 1, -1, -1)


class OwnSamplersWithNormBT(NormBTRewardMixin, OwnSamplers):
    pass


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_trainer_that_samples_in_its_own_way_keeps_it(strategy, tokenizer, tmp_path):
    rows, options = make_dataset(4), {"train_sampling_strategy": strategy}
    trainer = make_trainer(OwnSamplersWithNormBT, make_model(), tokenizer, tmp_path, rows, rows, **options)
    assert sorted(trainer._get_train_sampler()) == [0, 1, 2, 3]
    assert list(trainer._get_eval_sampler(rows)) == [3, 2, 1, 0]


# --- misuse explains itself ----------------------------------------------------------------------------------------


def test_frozen_head_is_warned_about(tokenizer, tmp_path, messages):
    arguments = tokenizer, tmp_path, make_dataset(4)
    for adapters in (LORA, LORA_ON_HEAD):
        make_trainer(NormBTRewardTrainer, make_model(), *arguments, peft_config=lora("llama", adapters))
    assert "frozen" not in messages.text
    make_trainer(NormBTRewardTrainer, make_model(), *arguments, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert "frozen" in messages.text
    assert "modules_to_save=['score']" in messages.text


def test_smoothing_of_token_labels_is_refused(tokenizer, tmp_path):
    arguments = NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 smooths token labels, of which pairs have none"):
        make_trainer(*arguments, label_smoothing_factor=0.1)


def test_forward_of_liger_is_refused(tokenizer, tmp_path):
    arguments = NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4)
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(*arguments, use_liger_kernel=True)
    make_trainer(*arguments, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False})


def test_model_without_a_scalar_head_is_refused(tokenizer, tmp_path):
    model = make_model()
    model.score = torch.nn.Identity()
    with pytest.raises(ValueError, match="scalar head"):
        make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4))


def test_two_labels_and_data_parallel_are_refused_by_trl(tokenizer, tmp_path, monkeypatch):
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**TINY | {"num_labels": 2}))
    with pytest.raises(ValueError, match="num_labels=1"):
        make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4))
    monkeypatch.setattr(RewardConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="torchrun"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4))


def test_odd_batch_is_refused_before_anything_changes(tokenizer, tmp_path):
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4))
    whole = trainer.data_collator
    trainer.data_collator = lambda rows: {name: value[:-1] for name, value in whole(rows).items()}
    with pytest.raises(ValueError, match="as many rejected: got 7 sequences"):
        trainer.train()
    assert trainer.pair_loss.num_updates == 0


def test_pair_weight_multiplies_each_pairs_loss(tokenizer, tmp_path):
    rows, losses = make_dataset(4), []
    for weight in (1.0, 2.0):
        weighted = rows.add_column("pair_weight", [weight] * 4)
        arguments = tokenizer, tmp_path, weighted, {"rows": weighted, "stream": weighted.to_iterable_dataset()}
        trainer = make_trainer(NormBTRewardTrainer, make_model(), *arguments, max_steps=1, learning_rate=0.0)
        evaluated = trainer.evaluate()
        trainer.train()
        of_training = trainer.state.log_history[-1]["train_loss"]
        losses.append([of_training, evaluated["eval_rows_loss"], evaluated["eval_stream_loss"]])
    assert losses[1] == pytest.approx([2 * loss for loss in losses[0]])


@pytest.mark.parametrize(("column", "value"), [("pair_weight", None), ("margin", float("nan")), ("margin", "1")])
def test_a_margin_or_weight_that_is_no_number_is_refused_before_training(tokenizer, tmp_path, column, value):
    rows = make_dataset(4, margin=False)
    dataset = rows.add_column(column, [value] * 4)
    with pytest.raises(ValueError, match=f"the eval dataset, row 1: '{column}' is not a finite number"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, rows, dataset)


def test_forward_that_skips_the_head_found_is_refused(tokenizer, tmp_path):
    model = make_model()
    trainer = make_trainer(NormBTRewardTrainer, model, tokenizer, tmp_path, make_dataset(4))
    model.score = torch.nn.Linear(16, 1, bias=False)
    with pytest.raises(ValueError, match="did not call its scalar head"):
        trainer.train()


def test_pairs_with_the_same_tokens_on_both_sides_are_left_out(tokenizer, tmp_path):
    rows = make_dataset(6, margin=False).to_list()
    rows[2]["rejected_ids"] = rows[2]["chosen_ids"]
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, Dataset.from_list(rows))
    assert trainer.train_dataset.to_list() == [row for i, row in enumerate(rows) if i != 2]
    with pytest.raises(ValueError, match="1 of 1 pairs are the same tokens on both sides"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, Dataset.from_list(rows[2:3]))


def test_a_stream_says_so_once(tokenizer, tmp_path, messages):
    rows = make_dataset(8, margin=False).to_list()
    for row in rows[2:4]:
        row["rejected_ids"] = row["chosen_ids"]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, stream, max_steps=1)
    trainer.train()
    assert messages.text.count("the train dataset, row 3: the same tokens on both sides, left out") == 1


def test_a_data_set_that_holds_no_pair_is_refused(tokenizer, tmp_path):
    rows = make_dataset(4, margin=False)
    with pytest.raises(ValueError, match="the train dataset is empty"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, rows.select([]))
    with pytest.raises(ValueError, match="the train dataset has no pair of at most max_length=1 tokens"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, rows, max_length=1)


def test_lora_on_a_head_is_warned_about(tokenizer, tmp_path, messages):
    adapters = LoraConfig(target_modules="all-linear")
    make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4), peft_config=adapters)
    assert "LoRA adapts the scalar head 'score', and the adapter does not hold the weight beneath" in messages.text
    assert "modules_to_save=['score']" in messages.text


def test_data_without_the_columns_are_refused_with_those_they_have(tokenizer, tmp_path):
    rows = [{"question": "a", "chosen": "b"}]
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"the train dataset needs .*'rejected'.*; it has chosen, question"):
            make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, dataset, max_steps=1)
    with pytest.raises(ValueError, match="the eval dataset needs"):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4), Dataset.from_list(rows))


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"eps": -1.0}, {"max_weight": 0.0}])
def test_options_out_of_range_are_refused(options, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_trainer(NormBTRewardTrainer, make_model(), tokenizer, tmp_path, make_dataset(4), options=options)
