"""Real ranks over gloo: what several processes train equals what one process trains on the joined batches."""

import pytest
import torch

import reference

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("datasets")

from normbt_kernels.integrations.transformers import PreferenceCollator
from tests.distributed import ranks
from tests.processes import run_ranks
from tests.tiny_classifiers import make_model
from tests.tiny_pairs import make_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def results(request, tmp_path_factory):
    """results(scenario): what each rank found in it."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    run_ranks(request.param, "tests.distributed.ranks", folder)
    return lambda scenario: [torch.load(folder / f"{scenario}-{rank}.pt") for rank in range(request.param)]


# The mean over ranks is tried with two and with four; what it is combined with, with two.
two_ranks = pytest.mark.parametrize("results", [2], ids="{} ranks".format, indirect=True)


def test_ddp_equals_one_process(results, single, assert_same_training):
    of_ranks = results("ddp")
    assert_same_training(of_ranks, single)
    assert all(result["fused"] for result in of_ranks)
    assert of_ranks[0]["eval"] == pytest.approx(single["eval"], rel=1e-4)


@two_ranks
def test_ddp_by_late_pooling_and_padding_free_equals_one_process(results, single, assert_same_training):
    of_ranks = results("ddp_by_shortcuts")
    assert_same_training(of_ranks, single)
    assert of_ranks[0]["eval"] == pytest.approx(single["eval"], rel=1e-4)


@two_ranks
def test_ddp_resumed_equals_uninterrupted_bitwise(results):
    for whole, resumed in zip(results("ddp"), results("ddp_resumed"), strict=True):
        for name, expected in whole.items():
            if isinstance(expected, torch.Tensor):
                assert torch.equal(resumed[name], expected), name
        assert resumed["num_updates"] == ranks.STEPS
        assert resumed["logs"][-1]["mu"] == whole["logs"][-1]["mu"]


@two_ranks
def test_streamed_pairs_stay_whole(results, single, assert_same_training):
    assert_same_training(results("streamed"), single)


@two_ranks
def test_lora_with_a_saved_head_equals_one_process(results, tmp_path, assert_same_training):
    rows = ranks.pairs()
    trainer = ranks.make_trainer(tmp_path, [rows[i] for i in ranks.FILLED], 1, ranks.with_lora(make_model()))
    trainer.train()
    single = ranks.state(trainer)
    assert any("modules_to_save" in name for name in single)
    assert_same_training(results("lora"), single)
    assert results("lora")[0]["fused"]


@two_ranks
@pytest.mark.skipif(not ranks.TRAINER_TAKES_FSDP2, reason="this Trainer takes no model that is sharded already")
def test_fsdp2_equals_one_process(results, single, assert_same_training):
    of_ranks = results("fsdp2")
    assert_same_training(of_ranks, single)
    assert not any(result["fused"] for result in of_ranks)  # the weight is a DTensor
    assert of_ranks[0]["eval"] == pytest.approx(single["eval"], rel=1e-4)


@two_ranks
@pytest.mark.skipif(not ranks.TRAINER_TAKES_FSDP2, reason="this Trainer takes no model that is sharded already")
def test_fsdp2_by_late_pooling_and_padding_free_equals_one_process(results, single, assert_same_training):
    of_ranks = results("fsdp2_by_shortcuts")
    assert_same_training(of_ranks, single)
    assert of_ranks[0]["eval"] == pytest.approx(single["eval"], rel=1e-4)


def test_fully_sharded_loop_with_unequal_batches_equals_one_process(results):
    of_ranks = results("fully_sharded_loop")
    model, ema = make_model(), reference.DistanceEMA()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    collate, pairs = PreferenceCollator(make_tokenizer()), ranks.pairs(ranks.STEPS * 3 * len(of_ranks))
    for batches in ranks.unequal_batches(len(of_ranks)):
        batch = collate([pairs[i] for rows in batches for i in rows])
        margin = batch.pop("margin")
        last = torch.tensor([int(mask.nonzero().max()) for mask in batch["attention_mask"]])
        rows = reference.pool(model.model(**batch).last_hidden_state, last)
        mu = ema.weight_mean(reference.pair_distance(rows))
        ema.update(reference.pair_distance(rows))
        reference.linear_normbt_loss(rows, model.score.weight, mu, margin=margin).backward()
        optimizer.step()
        optimizer.zero_grad()
    for result in of_ranks:
        assert result["refusal"].startswith("weight is sharded (a DTensor): use NormBTLoss")
        torch.testing.assert_close(result["mu"], ema.mu, rtol=1e-6, atol=0)
        for name, expected in model.named_parameters():
            torch.testing.assert_close(result[name], expected.detach(), rtol=1e-5, atol=1e-6, msg=name)


@two_ranks
def test_mu_stays_in_fp32_under_fsdp1_with_buffers_in_16_bits(results):
    of_ranks = results("fsdp1_with_buffers_in_16_bits")
    model, ema = ranks.plain_net(), reference.DistanceEMA(ranks.SLOW_BETA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(ranks.STEPS):
        rows = model[:2](ranks.vectors(step, len(of_ranks)).transpose(0, 1).flatten(0, 2))
        distance = reference.pair_distance(rows)
        mu = ema.weight_mean(distance)
        ema.update(distance)
        reference.linear_normbt_loss(rows, model[2].weight, mu, bias=model[2].bias).backward()
        optimizer.step()
        optimizer.zero_grad()
    for result in of_ranks:
        torch.testing.assert_close(result["mu"], ema.mu, rtol=1e-6, atol=0)
        for name, expected in model.named_parameters():
            torch.testing.assert_close(result[name], expected.detach(), rtol=1e-5, atol=1e-6, msg=name)


@two_ranks
def test_a_step_costs_one_reduction_of_two_floats(results):
    for result in results("collectives"):
        extra = list(result["normbt"])
        assert len(result["bt"]) > 1  # DDP's own are seen, so ours would be
        for collective in result["bt"]:
            extra.remove(collective)
        assert extra == [("allreduce_", [(2, torch.float32)])]


def test_reduction_overlaps_backward(results):
    assert len({result["mu"].item() for result in results("overlap")}) == 1


@two_ranks
def test_distributed_checkpoints_keep_mu(results):
    for result in results("distributed_checkpoint"):
        assert result["saved"][1] == 2
        assert result["loaded"] == result["saved"]


def test_process_group_shares_the_mean_among_its_ranks_alone(results):
    of_ranks = results("subgroups")
    for part in (0, 1):
        # Rank r has pairs at distance r + 1 and r + 2, then twice as far apart.
        group = range(part, len(of_ranks), 2)
        mean = sum(rank + 1.5 for rank in group) / len(group)
        for rank in group:
            assert of_ranks[rank]["group"].item() == pytest.approx(0.9 * mean + 0.1 * 2 * mean, rel=1e-6)
            assert of_ranks[rank]["group"] != of_ranks[rank]["all"]
