"""`apply_normbt`: mu is saved and copied with the model, and checkpoints load with and without this package."""

import copy
import pickle

import pytest
import torch
from torch import nn

from normbt_kernels import apply_normbt, remove_normbt
from tests.bradley_terry import Eager, assert_gradients_of, bt_loss, mu_of, with_lora
from tests.tiny_classifiers import gradients, make_batch, make_model

pytest.importorskip("transformers")


def test_saved_model_loads_without_this_package_and_mu_with_it(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = make_model()
    keys = set(model.state_dict())
    apply_normbt(model)
    for seed in range(2):
        bt_loss(model, make_batch(seed=seed)).backward()
    assert set(model.state_dict()) - keys == {"score.normbt.mu", "score.normbt.num_updates"}
    assert keys < set(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == {"score.normbt.mu", "score.normbt.num_updates"}
    assert torch.equal(loaded(**make_batch()).logits, model.eval()(**make_batch()).logits)

    apply_normbt(loaded)
    loaded.load_state_dict(make_model().state_dict(), strict=True)  # from before NormBT: mu stays as it is
    assert mu_of(loaded) == (0, 0)
    loaded.load_state_dict(model.state_dict(), strict=True)
    assert mu_of(loaded) == mu_of(model)
    with pytest.raises(RuntimeError, match=r"normbt\.other"):
        loaded.load_state_dict(model.state_dict() | {"score.normbt.other": torch.zeros(())}, strict=True)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trainer_resumes_bitwise_with_mu(tmp_path, lora):
    """The real Trainer with a Bradley-Terry loss of somebody else's."""
    peft = pytest.importorskip("peft") if lora else None
    from transformers import Trainer, TrainingArguments

    class BTTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            chosen, rejected = outputs.logits[:, 0].chunk(2)
            loss = -nn.functional.logsigmoid(chosen - rejected).mean()
            return (loss, outputs) if return_outputs else loss

    def train(steps, resume=None):
        model = make_model()
        model = with_lora(peft, model) if lora else model
        apply_normbt(model)
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=1, learning_rate=0.01, save_steps=2, use_cpu=True,
            report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        batches = [make_batch(seed=seed) for seed in range(4)]
        trainer = BTTrainer(model, arguments, lambda rows: rows[0], batches)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(4)
    resumed = train(4, str(tmp_path / "checkpoint-2"))
    for parameter, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert mu_of(resumed) == mu_of(whole)
    assert mu_of(whole)[1] == 4


def test_adapter_carries_mu_and_loads_without_this_package(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_lora(peft, make_model())
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    assert torch.equal(loaded.eval()(**make_batch()).logits, model.eval()(**make_batch()).logits)
    apply_normbt(loaded)
    loaded.load_adapter(tmp_path, "default", is_trainable=True)
    assert mu_of(loaded) == mu_of(model)
    assert mu_of(loaded)[1] == 1


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_mu_stays_fp32_when_the_model_is_cast(cast):
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    mu = mu_of(model)[0].clone()
    getattr(model, cast)()
    assert model.score.weight.dtype == getattr(torch, cast)
    assert torch.equal(mu_of(model)[0], mu)


def test_mu_survives_weights_that_are_sharded_on_the_meta_device():
    """As accelerate does for FSDP2 with cpu_ram_efficient_loading: it loads each key of a meta model as sharded."""
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    before, weights = [value.clone() for value in mu_of(model)], model.state_dict()
    keys = set(model.to("meta").state_dict())
    assert keys == set(make_model().state_dict())
    model.load_state_dict({key: weights[key] for key in keys}, assign=True)
    assert list(mu_of(model)) == before
    assert set(model.state_dict()) == set(weights)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(twin):
    model = make_model()
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    other = twin(model)
    assert mu_of(other) == mu_of(model)
    eager = Eager(make_model())
    for seed in range(2):
        gradients(eager.model)
        eager.loss(make_batch(seed=seed)).backward()
    gradients(other)
    bt_loss(other, make_batch(seed=1)).backward()
    assert_gradients_of(other, eager.model)
    assert (mu_of(model)[1], mu_of(other)[1]) == (1, 2)
    remove_normbt(other)
    bt_loss(other, make_batch(seed=1)).backward()
    bt_loss(model, make_batch(seed=1)).backward()
    assert mu_of(model)[1] == 2
