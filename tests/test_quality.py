"""The experiment: it resumes, chooses rates on other pairs than it reports, and its statistics are right."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers import TrainingArguments

from bench import quality, quality_runs
from bench.quality_figure import draw_groups, looks
from tests.processes import Command

pytestmark = pytest.mark.slow

FEW_PAIRS = "tests.quality_of_few_pairs"
COMMAND = ["quality", "--steps", "3", "--seeds", "1", "--grid-seeds", "1"]
COMMAND += ["--power", "0.5", "--learning-rate", "1e-3", "2e-3", "--processes", "1"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The command, interrupted once a run is written: its folder, and the command as it ended."""
    folder = tmp_path_factory.mktemp("quality")
    command = Command(FEW_PAIRS, *COMMAND, "--out", folder / "out", "--runs", folder / "runs")
    command.wait_until(lambda: list(folder.glob("runs/*/*.npz")))
    os.killpg(command.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    command.wait()
    return folder, command


def test_no_runs_are_left_half_written_by_an_interrupt(interrupted):
    folder, command = interrupted
    assert command.exit_code != 0
    assert "bench: interrupted" in command.errors
    runs = list(folder.glob("runs/*/*.npz"))
    assert 0 < len(runs) < 6
    for path in runs:
        with np.load(path) as arrays:
            assert len(arrays["test_chosen"]) == 200
    assert not list(folder.glob("out/*.json"))


@pytest.fixture
def experiment(interrupted):
    """Runs the command to its end; returns its results, what it printed, and when each run was written."""
    folder, _ = interrupted

    def run():
        command = Command(FEW_PAIRS, *COMMAND, "--out", folder / "out", "--runs", folder / "runs")
        assert command.wait() == 0, command.errors
        results = json.loads((folder / "out" / "quality.json").read_text())
        return results, command.output, times_of_writing(folder)

    return run


def times_of_writing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.npz")}


def test_it_reports_what_the_runs_predicted_and_resumes(interrupted, experiment):
    before = times_of_writing(interrupted[0])
    results, screen, written = experiment()
    assert before.items() <= written.items()  # what an interrupted command had written is not made again
    assert len(written) == 2 * 2 + 2  # two losses at two rates, then another seed at the chosen rate
    mixed = results["settings"]["mixed"]
    (folder,) = {path.parent for path in written}
    for loss, path in (("bt", "bt"), ("normbt^0.5", "normbt-power0.5")):
        rates = mixed["learning_rates"][loss]
        chosen = rates["chosen"]
        accuracies = {float(rate): value["mean"] for rate, value in rates["validation_accuracy"].items()}
        assert accuracies[chosen] == max(accuracies.values())
        for rate, accuracy in accuracies.items():  # chosen by a seed that is not reported
            with np.load(folder / f"mixed-{path}-lr{rate:g}-seed0.npz") as run:
                assert accuracy == (run["validation_chosen"] > run["validation_rejected"]).mean()
        with np.load(folder / f"mixed-{path}-lr{chosen:g}-seed1.npz") as run:
            assert len(run["test_chosen"]) == len(run["validation_chosen"]) == 200
            right = run["test_chosen"] > run["test_rejected"]
            fine = run["test_category"] == "fine: one wrong token"
        accuracies = {group: of["accuracy"][loss]["seeds"] for group, of in mixed["groups"].items()}
        assert accuracies["all"] == [pytest.approx(right.mean())]
        assert accuracies["fine: one wrong token"] == [pytest.approx(right[fine].mean())]
    assert f"{mixed['groups']['all']['accuracy']['bt']['mean']:.3f}" in screen
    assert results["environment"]["command"].startswith("python -m bench quality")

    victim = next(iter(written))
    victim.unlink()
    again, _, rewritten = experiment()
    assert again["settings"] == results["settings"]  # the run that was lost is the same when it is made again
    assert {path for path in written if written[path] != rewritten[path]} == {victim}


def make_run(right, distance, category):
    chosen = np.asarray(right, dtype=np.float32)
    arrays = {"chosen": chosen, "rejected": np.full_like(chosen, 0.5), "distance": np.asarray(distance)}
    run = {f"{split}_{key}": values for split in ("validation", "test") for key, values in arrays.items()}
    return run | {"test_category": np.array(category), "validation_category": np.array(category)}


def test_thirds_go_by_the_mean_rank_of_all_losses_models():
    category = ["coarse", "fine"] * 3
    bt = make_run([1, 1, 1, 0, 0, 0], [1, 2, 3, 4, 5, 6], category)
    other = make_run([0, 0, 1, 1, 1, 1], [10, 30, 20, 60, 40, 50], category)  # mean ranks 0, 1.5, 1.5, 4, 3.5, 4.5
    groups = quality.compare({"bt": [bt], "normbt": [other]})
    expected = {"closest third": (1.0, 0.0), "middle third": (0.5, 1.0), "farthest third": (0.0, 1.0)}
    for group, (of_bt, of_other) in expected.items():
        assert groups[group]["accuracy"]["bt"]["seeds"] == [of_bt]
        assert groups[group]["accuracy"]["normbt"]["seeds"] == [of_other]
    assert groups["fine"]["accuracy"]["normbt"]["seeds"] == [pytest.approx(2 / 3)]
    assert groups["all"]["difference"] == [
        {"loss": "normbt", "baseline": "bt", "mean": pytest.approx(1 / 6), "interval_95": None, "p_value": None}
    ]


def test_intervals_and_paired_tests_are_those_of_a_table_of_students_t():
    values, baseline = [0.9, 0.8, 0.85], [0.7, 0.75, 0.65]
    differences = [0.2, 0.05, 0.2]
    mean, deviation = 0.15, math.sqrt((0.05**2 + 0.1**2 + 0.05**2) / 2)
    result = quality.paired(values, baseline)
    half = 4.302653 * deviation / math.sqrt(3)  # t of 2 degrees of freedom at 97.5%
    assert result["mean"] == pytest.approx(np.mean(differences))
    assert result["interval_95"] == pytest.approx([mean - half, mean + half], rel=1e-6)
    t = mean / (deviation / math.sqrt(3))
    assert result["p_value"] == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-6)  # closed form at 2 degrees
    assert quality.paired(values, values)["p_value"] is None


def test_each_variant_is_compared_with_bt_and_with_what_it_is_put_on():
    run = make_run([1, 0, 1], [1, 2, 3], ["fine"] * 3)
    losses = ("bt", "bt-margin", "normbt", "normbt-margin", "normbt^0.5")
    groups = quality.compare({loss: [run] for loss in losses})
    assert "fine" not in groups  # it is all pairs
    compared = {(row["loss"], row["baseline"]) for row in groups["all"]["difference"]}
    on_bt = {(loss, "bt") for loss in losses if loss != "bt"}
    assert compared == on_bt | {("normbt-margin", "bt-margin"), ("normbt^0.5", "normbt")}


def test_a_control_changes_one_thing_about_the_training():
    built_in, clipped = quality_runs.built_in_of("generated"), {}
    tokenizer = built_in.make_tokenizer()
    for setting in ("mixed", "no-clipping", "layer-norm"):
        run = quality_runs.Run("generated", setting, "normbt", 1e-3, 0, 1)
        clipped[setting] = TrainingArguments("x", use_cpu=True, **quality_runs.settings_of(run, built_in)).max_grad_norm
        model = quality_runs.new_model(run, built_in, tokenizer)
        with torch.no_grad():
            for gain in model.model.norm.parameters():  # as after some training
                gain += torch.linspace(0, 1, len(gain))
            rows = model.model(input_ids=torch.arange(2, 32).reshape(3, 10)).last_hidden_state
        norms = rows.norm(dim=-1)
        equal = torch.allclose(norms, torch.full_like(norms, rows.shape[-1] ** 0.5), rtol=0.01)
        assert equal == (setting == "layer-norm")
    assert clipped == {"mixed": 1.0, "no-clipping": 0.0, "layer-norm": 1.0}


def test_no_interval_is_drawn_beyond_what_an_accuracy_can_be():
    plt = pytest.importorskip("matplotlib.pyplot")
    run = make_run([1, 1, 1, 0], [1, 2, 3, 4], ["fine", "fine", "coarse", "coarse"])
    whole = make_run([1, 1, 1, 1], [1, 2, 3, 4], ["fine", "fine", "coarse", "coarse"])
    groups = quality.compare({"bt": [run, whole], "normbt": [whole, run], "normbt^0.5": [run, whole]})
    assert max(of["interval_95"][1] for of in groups["all"]["accuracy"].values()) > 1
    figure, (accuracy, difference) = plt.subplots(1, 2)
    draw_groups(accuracy, difference, groups, looks(["bt", "normbt", "normbt^0.5"]))
    drawn = [point for lines in accuracy.collections for line in lines.get_segments() for point in line[:, 0]]
    assert max(drawn) == 1.0
    assert len(difference.collections) == 2
    plt.close(figure)


def test_runs_of_other_data_or_steps_are_kept_apart(monkeypatch):
    digest = quality_runs.digest("generated", None)
    assert digest != quality_runs.digest("generated", 10)
    assert digest == quality_runs.digest("generated", None)
    from normbt_kernels.data import generated

    monkeypatch.setitem(generated.TRAINING_DEFAULTS, "warmup_steps", 7)
    assert digest != quality_runs.digest("generated", None)
