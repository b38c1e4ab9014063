"""What a device shows and an interpreter does not, as plain functions: pytest is not needed to run them.

    python tests/kernels/device_checks.py [--json FILE] [check ...]

A check raises, or returns nothing, or returns why there is nothing to check here. All of them run on `cases.DEVICE`;
without a GPU they run on small sizes, and `record` runs the step itself where a GPU would replay a CUDA graph of it.
`test_device_checks.py` runs the same functions under pytest, bench/gpu_check.sh this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import (
    BACKEND,
    CASES,
    DEVICE,
    DTYPES,
    LAYOUTS,
    OURS,
    Case,
    assert_as_reference,
    assert_same_bits,
    judge,
    leaves,
    linear_case,
    ours,
    reward_case,
    tolerance,
)
from torch import Tensor, nn

import reference
from bench.graph_step import capture
from normbt_kernels import LinearNormBTLoss, NormBTLoss, pair_distance
from normbt_kernels.files import write_whole
from normbt_kernels.ops import pairs_of_rows
from normbt_kernels.ops._triton import INTERPRETED

ON_GPU = DEVICE.type == "cuda"
MODULES = {"linear": LinearNormBTLoss, "reward": NormBTLoss}
Step = Callable[[], list[Tensor]]


# --- against the reference ---------------------------------------------------------------------------------------


def dtypes_layouts_and_odd_sizes() -> None:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            assert_as_reference(linear_case(7, 33, dtype, layout=layout, pooled=layout != "halves", mu=None))
        assert_as_reference(reward_case(7, 33, dtype, margin="strided"))
    # Rows of one column, of an odd number, of more than one block; pairs for more than one turn of each program.
    sizes = [(1, 1, torch.float32), (5, 333, torch.float16), (9001 if ON_GPU else 97, 130, torch.bfloat16)]
    if not INTERPRETED:  # test_against_reference.py has such rows, and they take the interpreter a minute
        sizes += [(7, 4099, torch.bfloat16), (2, 16385, torch.bfloat16), (2, 8193, torch.float32)]
    for num_pairs, hidden_size, dtype in sizes:
        assert_as_reference(linear_case(num_pairs, hidden_size, dtype, layout="explicit", center_coef=0.05))
        assert_as_reference(linear_case(num_pairs, hidden_size, dtype))
        assert_as_reference(reward_case(num_pairs, hidden_size, dtype, mu=None))


def offsets_beyond_2_to_the_31_elements() -> str | None:
    """Pairs whose rejected rows begin 2^31 elements after the first row: these must be as right as the first ones."""
    num_pairs, hidden_size = (2**31 // 8192 + 5, 8192) if ON_GPU else (300, 64)
    needed = 2.5 * 2 * num_pairs * hidden_size * 2  # rows and their gradient, in 16 bits, and room to work
    if ON_GPU and torch.cuda.mem_get_info()[0] < needed:
        return f"needs {needed / 2**30:.0f} GiB of GPU memory"
    hidden = torch.randn(2 * num_pairs, hidden_size, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    head = torch.randn(hidden_size, dtype=torch.bfloat16, device=DEVICE) / hidden_size**0.5
    some = torch.tensor([0, 1, num_pairs // 2, num_pairs - 2, num_pairs - 1], device=DEVICE)
    rows = torch.cat([some, some + num_pairs])

    loss, stats = OURS["linear"](hidden, head, 90.0, reduction="sum", return_stats=True)
    (gradient,) = torch.autograd.grad(loss, hidden)
    few = Case(
        "linear",
        {"hidden": hidden.detach()[rows], "weight": head},
        {"pairs": "halves", "last_token": None, "mu": 90.0, "reduction": "sum"},
    )
    truth = judge(few)
    torch.testing.assert_close(stats.distance[some].double(), truth.stats["distance"], **tolerance(torch.bfloat16))
    step = 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(gradient[rows].double(), truth.gradients["hidden"], rtol=step, atol=1e-30)
    return None


def same_inputs_same_bits_100_times() -> None:
    num_pairs, hidden_size = (4099, 1000) if ON_GPU else (97, 5)
    for case in (
        linear_case(num_pairs, hidden_size, torch.bfloat16, mu=None),
        linear_case(num_pairs, hidden_size, torch.bfloat16, layout="explicit", center_coef=0.1),
        reward_case(num_pairs, hidden_size, torch.bfloat16),
    ):
        first = ours(case)
        for _ in range(1 if INTERPRETED else 99):
            assert_same_bits(ours(case), first)


# --- the device: other ones, the host that must not wait, graphs ---------------------------------------------------


def tensors_on_another_device_than_the_current_one() -> str | None:
    if torch.cuda.device_count() < 2:
        return "needs two GPUs"
    other = torch.device("cuda", 1)
    for form, make in CASES.items():
        case = make(17, 33, torch.float32)
        there = Case(form, {name: x.to(other) for name, x in case.inputs.items()}, moved(case.arguments, other))
        with torch.cuda.device(0):
            result = ours(there)
            assert torch.cuda.current_device() == 0
        assert result.loss.device == other
        torch.testing.assert_close(result.loss.to(DEVICE), ours(case).loss, **tolerance(torch.float32))
    return None


def calls_on_two_streams_at_once_are_those_of_one() -> str | None:
    if not ON_GPU:
        return "needs a GPU"
    cases = [linear_case(4099, 1000, torch.bfloat16, layout=layout, mu=None) for layout in ("halves", "explicit")]
    alone = [ours(case) for case in cases]
    torch.cuda.synchronize()
    streams, beside = [torch.cuda.Stream() for _ in cases], []
    for case, stream in 20 * list(zip(cases, streams, strict=True)):
        with torch.cuda.stream(stream):
            beside.append(ours(case))
    torch.cuda.synchronize()
    for result, expected in zip(beside, itertools.cycle(alone), strict=False):
        assert_same_bits(result, expected)
    return None


def moved(arguments: dict, device: torch.device) -> dict:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


@contextmanager
def host_must_not_wait() -> Iterator[None]:
    """On a GPU: PyTorch raises RuntimeError where an operator would make the host wait for the device."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_step_makes_the_host_wait() -> str | None:
    if not ON_GPU:
        return "nothing waits on a CPU (test_graph_safety.py counts what an interpreted step hands to the host)"
    one, seen = torch.ones((), device=DEVICE), "nothing"
    try:
        with host_must_not_wait():
            one.item()
    except RuntimeError as error:
        seen = str(error)
    assert "synchronizing" in seen, f"of .item(), set_sync_debug_mode saw {seen}"
    for form, training in itertools.product(MODULES, (True, False)):
        loss, inputs = MODULES[form]().to(DEVICE).train(training), module_inputs(form, 33)
        does_not_wait(lambda: step(loss, inputs))  # noqa: B023 (called in this turn)
    for layout in LAYOUTS:
        case = linear_case(17, 33, torch.bfloat16, layout=layout, pooled=True)
        inputs, rows = leaves(case), (case.arguments["pairs"], case.arguments["last_token"])
        does_not_wait(lambda: OURS["linear"](**inputs, **case.arguments, return_stats=True)[0].backward())  # noqa: B023
        does_not_wait(lambda: pair_distance(case.inputs["hidden"], *rows))  # noqa: B023
    return None


def does_not_wait(run: Callable[[], object]) -> None:
    run()  # compiles
    with host_must_not_wait():
        run()


def module_inputs(form: str, num_pairs: int, scale: float = 1.0) -> dict[str, Tensor]:
    """What a module takes; those that are trained require grad."""
    hidden = (scale * torch.randn(2 * num_pairs, 130)).to(DEVICE, torch.bfloat16)
    if form == "linear":
        return {"hidden": hidden.requires_grad_(), "weight": torch.randn(130).to(DEVICE).requires_grad_()}
    rewards = [torch.randn(num_pairs).to(DEVICE).requires_grad_() for _ in range(2)]
    chosen, rejected = (rows.clone() for rows in hidden.chunk(2))
    return {
        "chosen_rewards": rewards[0],
        "rejected_rewards": rewards[1],
        "chosen_hidden": chosen,
        "rejected_hidden": rejected,
    }


def step(loss: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The loss and the gradients of one batch."""
    value = loss(**inputs)
    return [value.detach(), *torch.autograd.grad(value, [x for x in inputs.values() if x.requires_grad])]


def record(run: Step) -> tuple[list[Tensor], Callable[[], object]]:
    """Outputs that stay where they are, and what fills them anew: the replay of a CUDA graph, on a CPU the step."""
    if ON_GPU:
        return capture(run)
    outputs = [output.clone() for output in run()]
    return outputs, lambda: [output.copy_(new) for output, new in zip(outputs, run(), strict=True)]


def replays_of_a_graph_are_eager_steps() -> None:
    """Seven batches through one graph, the third not finite: the bits and the EMA of seven eager steps."""
    for form, module in MODULES.items():
        batches = [module_inputs(form, 33, scale=1 + i) for i in range(7)]
        rows = "hidden" if form == "linear" else "chosen_hidden"
        with torch.no_grad():
            batches[2][rows][0, 0] = float("inf")
        eager, recorded, ema = module().to(DEVICE), module().to(DEVICE), reference.DistanceEMA()
        for loss in (eager, recorded):  # the first batch, whose own mean is used, is another graph
            loss.load_state_dict({"mu": torch.tensor(16.0), "num_updates": torch.tensor(1)})
        ema.mu = torch.tensor(16.0, device=DEVICE)
        expected = [step(eager, batch) for batch in batches]

        static = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in batches[0].items()}
        outputs, replay = record(lambda: step(recorded, static))  # noqa: B023 (recorded and replayed in this turn)
        recorded.mu.fill_(16.0)  # what it was before the warm-up
        recorded.num_updates.fill_(1)
        for batch, results in zip(batches, expected, strict=True):
            with torch.no_grad():
                for name, x in static.items():
                    x.copy_(batch[name])
            replay()
            assert_same_bits(outputs, results)
            hidden = batch["hidden"] if form == "linear" else torch.cat([batch[rows], batch["rejected_hidden"]])
            ema.update(reference.pair_distance(hidden.float()))
            torch.testing.assert_close(recorded.mu, ema.mu, **tolerance(torch.float32))
        assert_same_bits(dict(recorded.state_dict()), dict(eager.state_dict()))
        assert recorded.num_updates == 1 + 6  # all but the third


def graph_of_several_ranks_is_refused() -> str | None:
    """The sum over ranks is started from Python, which a replay does not run: mu would never move."""
    if not ON_GPU:
        return "nothing is captured on a CPU"
    loss_fn, inputs, refusal = LinearNormBTLoss().to(DEVICE), module_inputs("linear", 33), ""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            try:
                loss_fn(**inputs)
            except RuntimeError as error:
                refusal = str(error)
    finally:
        dist.destroy_process_group()
    assert "a CUDA graph cannot hold the sum over ranks" in refusal, refusal
    assert loss_fn.num_updates == 0
    return None


# --- torch.compile and mixed precision -----------------------------------------------------------------------------


def compiled_whole_is_eager_to_the_bit() -> str | None:
    if INTERPRETED:
        return "Inductor would have its own kernels interpreted"
    for form, module in MODULES.items():
        torch.compiler.reset()
        # Without smoothing, other operators serve few pairs on the CPU in eager mode.
        options = {} if ON_GPU else {"label_smoothing": 0.1}
        eager, traced = module(**options).to(DEVICE), module(**options).to(DEVICE)
        # Inductor takes minutes to compile C++, and test_torch_compile.py does so.
        compiled = torch.compile(traced, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
        for i in range(4):
            inputs = module_inputs(form, 33, scale=1 + i)
            assert_same_bits(step(compiled, inputs), step(eager, inputs))
        assert_same_bits(dict(traced.state_dict()), dict(eager.state_dict()))
    torch.compiler.reset()
    return None


def amp_survives_overflow() -> None:
    """fp16 autocast with a GradScaler: a step that overflows changes no parameter, and mu only by finite distances."""
    backbone, head = nn.Linear(32, 64).to(DEVICE), nn.Linear(64, 1).to(DEVICE)
    loss_fn = LinearNormBTLoss().to(DEVICE)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)

    def train(batch: Tensor) -> bool:
        """Whether the step changed the parameters."""
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            hidden = backbone(batch)
            assert hidden.dtype == torch.float16
            loss = loss_fn(hidden, head.weight, head.bias)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(parameter.isfinite().all() for parameter in parameters)
        return any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))

    batch = torch.randn(16, 32).to(DEVICE)
    assert train(batch)
    assert (loss_fn.num_updates, scaler.get_scale()) == (1, 2.0**10)
    mu = loss_fn.mu.clone()
    assert not train(1e6 * batch)  # beyond fp16 in forward: distances are not finite
    assert (loss_fn.num_updates, scaler.get_scale()) == (1, 2.0**9)
    assert_same_bits(loss_fn.mu, mu)
    scaler.update(2.0**40)
    assert not train(batch)  # beyond fp16 in backward: the distances were as good as ever
    assert (loss_fn.num_updates, scaler.get_scale()) == (2, 2.0**39)
    scaler.update(2.0**10)
    assert train(batch)
    assert (loss_fn.num_updates, scaler.get_scale()) == (3, 2.0**10)


# --- packed sequences ----------------------------------------------------------------------------------------------


def packed_training_is_as_exact_as_padded() -> str | None:
    """Rewards and gradients of a decoder with `padding_free`, which attends by flash attention on a GPU."""
    try:
        from transformers import LlamaConfig, LlamaForSequenceClassification
    except ImportError:
        return "transformers is not installed"
    from normbt_kernels.data.packing import pack
    from normbt_kernels.integrations import packed_attention
    from normbt_kernels.integrations.shortcuts import install_shortcuts

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_labels=1, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    weights = LlamaForSequenceClassification(config).state_dict()
    lengths = torch.tensor([1, 200, 7, 64, 129, 33])
    mask = (torch.arange(200) < lengths[:, None]).long()
    ids = torch.randint(1, 64, mask.shape) * mask
    padded, packed = {"input_ids": ids, "attention_mask": mask}, pack(ids, mask, 0, one_row=True)

    def train(batch: dict, dtype: torch.dtype, autocast: bool = False, compiled: bool = False) -> list[Tensor]:
        """Rewards and all gradients, in fp64."""
        model = LlamaForSequenceClassification(config).to(DEVICE, dtype).train()
        model.load_state_dict(weights)
        if autocast:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if batch is packed:
            install_shortcuts(model, padding_free=True)
        if compiled:
            model.compile()
        batch = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            rewards = model(**batch).logits.double()
        (rewards.squeeze(-1) * torch.linspace(-1, 1, len(lengths), device=DEVICE)).sum().backward()
        gradients = [parameter.grad.double().flatten() for parameter in model.parameters()]
        return [rewards.detach(), torch.cat(gradients)]

    expected = train(padded, torch.float64)

    def check(found: list[Tensor], setting: dict) -> None:
        for seen, plain, right in zip(found, train(padded, **setting), expected, strict=True):
            error, allowed = (seen - right).norm(), (plain - right).norm()
            assert error <= 1.5 * allowed, f"{setting}: {error / right.norm():.2g}, padded {allowed / right.norm():.2g}"

    for setting in ({"dtype": torch.bfloat16}, {"dtype": torch.float32, "autocast": True}):
        with patch.object(packed_attention, "varlen_attn", wraps=packed_attention.varlen_attn) as flash_attention:
            found = train(packed, **setting)
        assert flash_attention.called == ON_GPU, setting
        check(found, setting)
    if ON_GPU:  # Inductor takes minutes to compile C++
        compiled = {"dtype": torch.bfloat16, "compiled": True}
        check(train(packed, **compiled), compiled)
    return None


# --- for compute-sanitizer -----------------------------------------------------------------------------------------


def a_little_of_everything() -> None:
    """Every kernel once on few and odd sizes: what compute-sanitizer runs, a hundred times slower."""
    for dtype, hidden_size in ((torch.bfloat16, 33), (torch.float32, 1025)):
        for layout in LAYOUTS:
            ours(linear_case(5, hidden_size, dtype, layout=layout, pooled=True, mu=None))
        ours(linear_case(5, hidden_size, dtype, layout="explicit", reduction="none"), torch.ones(5, device=DEVICE))
        ours(reward_case(5, hidden_size, dtype))
    with patch.object(pairs_of_rows, "MAX_SEARCHED", 0):  # as many pairs are summed
        ours(linear_case(7, 33, torch.bfloat16, layout="explicit"))
    if not INTERPRETED:
        ours(linear_case(3, 16385, torch.bfloat16))  # rows longer than a block
    step(LinearNormBTLoss().to(DEVICE), module_inputs("linear", 5))
    pair_distance(linear_case(5, 33, torch.bfloat16).inputs["hidden"])


CHECKS = {
    check.__name__: check
    for check in (
        dtypes_layouts_and_odd_sizes,
        offsets_beyond_2_to_the_31_elements,
        same_inputs_same_bits_100_times,
        tensors_on_another_device_than_the_current_one,
        calls_on_two_streams_at_once_are_those_of_one,
        no_step_makes_the_host_wait,
        replays_of_a_graph_are_eager_steps,
        graph_of_several_ranks_is_refused,
        compiled_whole_is_eager_to_the_bit,
        amp_survives_overflow,
        packed_training_is_as_exact_as_padded,
        a_little_of_everything,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", nargs="*", help=f"(default: all): {', '.join(CHECKS)}")
    parser.add_argument("--json", type=Path, help="file for the outcome of each check")
    options = parser.parse_args()
    if unknown := set(options.check) - CHECKS.keys():
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    if ON_GPU and BACKEND != "triton":
        parser.error("Triton is not installed: none of the kernels would run on this GPU")
    outcomes = {}
    print(f"backend {BACKEND} on {DEVICE}", flush=True)
    for name in options.check or CHECKS:
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            reason = CHECKS[name]()
            outcome = "passed" if reason is None else f"skipped: {reason}"
        except Exception as error:  # any: the other checks are still to be made
            traceback.print_exc()
            outcome = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        outcomes[name] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {outcome} ({outcomes[name]['seconds']} s)", flush=True)
        if options.json:
            text = json.dumps({"backend": BACKEND, "device": str(DEVICE), "checks": outcomes}, indent=1) + "\n"
            write_whole(options.json, lambda path, text=text: path.write_text(text))
    return int(any(entry["outcome"].startswith("failed") for entry in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
