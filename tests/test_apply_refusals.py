"""`apply_normbt` refuses in one sentence what it cannot weigh, before anything changes; `remove_normbt` undoes it."""

import copy
import warnings
from types import MethodType

import pytest
import torch
from torch import nn

from normbt_kernels import apply_normbt, remove_normbt
from normbt_kernels.integrations.head import NUM_CHECKED
from tests.bradley_terry import bt_loss, mu_of, paired, with_lora
from tests.tiny_classifiers import TinyDecoder, gradients, make_batch, make_model

pytest.importorskip("transformers")


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [hook for module in model.modules() for name in names for hook in getattr(module, name)]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_remove_leaves_the_model_as_if_never_applied(architecture):
    plain, model = make_model(architecture), make_model(architecture)
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    gradients(model)
    remove_normbt(model)
    bt_loss(model, make_batch()).backward()
    bt_loss(plain, make_batch()).backward()
    assert all(torch.equal(gradient, expected) for gradient, expected in paired(model, plain))
    assert hooks_of(model) == hooks_of(plain) == []
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    apply_normbt(model)  # and it can be applied again


def test_applied_twice_or_removed_without():
    model = make_model()
    with pytest.raises(ValueError, match="not applied"):
        remove_normbt(model)
    apply_normbt(model)
    with pytest.raises(ValueError, match="already applied"):
        apply_normbt(model)
    assert len(hooks_of(model)) == len(hooks_of(copy.deepcopy(model))) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "quarters"}, "layout must be one of .*'quarters'"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, "eps must be finite and >= 0"),
        ({"max_weight": 0.0}, "max_weight must be > 0"),
        ({"head": nn.Linear(4, 1)}, "not a module of this LlamaForSequenceClassification"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_refused_before_anything_changes(arguments, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        apply_normbt(model, **arguments)
    assert hooks_of(model) == []
    assert list(model.state_dict()) == list(make_model().state_dict())


def test_model_without_a_scalar_head():
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"num_labels=3.*scalar head.*num_labels=1"):
        apply_normbt(make_model(num_labels=3))
    mixture = make_model(num_labels=2)
    mixture.model.layers[0].gate = nn.Linear(16, 1)  # of a mixture of experts
    with pytest.raises(ValueError, match=r"num_labels=2.*scalar head"):
        apply_normbt(mixture)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*scalar head"):
        apply_normbt(AutoModelForCausalLM.from_config(make_model().config))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_odd_batch_is_named_and_changes_nothing(architecture):
    model = make_model(architecture)
    apply_normbt(model)
    bt_loss(model, make_batch()).backward()
    before = [value.clone() for value in mu_of(model)]
    with pytest.raises(ValueError, match=r"an even number of rows, got hidden \(5, "):
        model(**{name: values[:5] for name, values in make_batch().items()})
    assert list(mu_of(model)) == before


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.score, self.other = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, hidden):
        return self.score(hidden), self.other(hidden)


@pytest.mark.parametrize("name", ["score", "other"])
def test_head_that_the_loss_does_not_read_is_warned_of_once(name, recwarn):
    model = TwoHeads()
    apply_normbt(model, head=getattr(model, name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(NUM_CHECKED + 1):
        chosen, rejected = model(torch.randn(6, 8))[0].chunk(2)
        nn.functional.softplus(rejected - chosen).mean().backward()
        optimizer.step()
    seen = [str(warning.message) for warning in recwarn]
    expected = "no gradient came to the head 'other', so NormBT weighed none: if the loss reads another head"
    assert [expected in message for message in seen] == ([True] if name == "other" else [])


def test_frozen_head_is_warned_of_and_lora_in_the_head_refused():
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="head is frozen.*modules_to_save"):
        apply_normbt(peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])))
    trained = with_lora(peft, make_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_normbt(trained)
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj", "score"], r=2))
    with pytest.raises(ValueError, match=r"'score' is adapted by LoRA.*modules_to_save"):
        apply_normbt(adapted)


def test_liger_and_other_forwards_that_pass_the_head_by():
    def lce_forward(self, input_ids, attention_mask=None):
        return self.lm_head(self.model(input_ids, attention_mask).last_hidden_state)

    model = make_model()
    apply_normbt(model)
    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = MethodType(lce_forward, model)  # as Trainer does at the start of train()
    with pytest.raises(ValueError, match=r"Liger has replaced.*fused_linear_cross_entropy"):
        model(**make_batch())

    def fused_forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask).last_hidden_state @ self.score.weight.T

    model.forward = MethodType(fused_forward, model)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification did not call its scalar head"):
        model(**make_batch())
    with torch.no_grad():
        model(**make_batch())


def test_model_that_scores_another_token_is_refused_in_backward():
    class FirstToken(TinyDecoder):
        def forward(self, input_ids):
            return self.score(self.mix(self.embed(input_ids)))[:, 0]

    model = FirstToken()
    apply_normbt(model)
    with pytest.raises(ValueError, match="the loss depends on other tokens"):
        model(make_batch()["input_ids"]).pow(2).sum().backward()


PENALTIES = {
    "of rewards": lambda model, batch: torch.autograd.grad(
        model(**batch).logits.sum(), model.score.weight, create_graph=True
    )[0],
    "of the loss": lambda model, batch: torch.autograd.grad(
        bt_loss(model, batch), model.score.weight, create_graph=True
    )[0],
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradient_penalty_is_refused(penalty):
    model = make_model()
    apply_normbt(model)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        PENALTIES[penalty](model, make_batch())


def test_forward_mode_differentiation_is_refused():
    head = nn.Linear(8, 1)
    apply_normbt(head)
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(head, (torch.randn(4, 8),), (torch.ones(4, 8),))


def test_head_called_without_its_model_and_packed_sequences():
    model = TinyDecoder()
    apply_normbt(model)
    with pytest.raises(ValueError, match=r"\(4, 5, 16\) outside the forward of its model"):
        model.score(torch.zeros(4, 5, 16))
    alone = nn.Linear(16, 1)
    apply_normbt(alone)
    with pytest.raises(ValueError, match=r"\(4, 5, 16\).*no module around it takes input_ids"):
        alone(torch.zeros(4, 5, 16))

    class Packed(TinyDecoder):
        def forward(self, input_ids):
            return self.score(self.embed(input_ids).flatten(0, 1)[None])

    packed = Packed()
    apply_normbt(packed)
    with pytest.raises(ValueError, match=r"input_ids \(6, 8\).*\(1, 48, 16\)"):
        packed(make_batch()["input_ids"])


def test_data_parallel_is_refused():
    model = TinyDecoder()
    apply_normbt(model)
    replica = model.score._replicate_for_data_parallel()  # what nn.DataParallel calls in each of its threads
    replica.weight, replica.bias = model.score.weight, None
    with pytest.raises(ValueError, match=r"nn.DataParallel splits the pairs"):
        replica(torch.zeros(4, 16))
