"""`normbt diagnose`: a model and pairs in, table, JSON and figure out."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainingArguments, set_seed

from normbt_kernels._version import versions
from normbt_kernels.commands.evaluate import demo_pairs
from normbt_kernels.commands.losses import LinearBTLoss, loss_rows
from normbt_kernels.commands.train import LossOnTheBar, one_device
from normbt_kernels.data.built_in import GENERATED, BuiltIn, find_built_in
from normbt_kernels.data.checkpoints import checkpoint_position_limit, load_model, load_training_tokenizer
from normbt_kernels.data.preferences import load_preferences
from normbt_kernels.data.tokens import LeftOut, check_known, remark, summed_up, tokenize, truncated
from normbt_kernels.diagnostics.measure import diagnose, partial_files
from normbt_kernels.diagnostics.report import can_draw
from normbt_kernels.errors import UserError
from normbt_kernels.files import write_json, write_whole
from normbt_kernels.integrations.transformers import NormBTTrainer
from normbt_kernels.resumable import partial_path

SEED = 42
FEW_STEPS = 200  # of BT: on the generated pairs enough to learn the style, and too few to learn the arithmetic


def run(
    model: str | None,
    gguf_file: str | None,
    dataset: str | None,
    dataset_config: str | None,
    dataset_split: str,
    num_gradients: int,
    batch_size: int,
    max_length: int,
    truncate: bool,
    device: str,
    dtype: str,
    out: Path,
) -> None:
    """`normbt diagnose`; the arguments are its flags.

    Raises:
        UserError: the model or the data cannot be read, or do not fit together.
    """
    from_scratch = find_built_in(dataset) if model is None else None
    if model is None and from_scratch is None:
        raise UserError("--dataset needs a --model; leave out both for the built-in default")
    if model is None and gguf_file is not None:
        raise UserError("--gguf-file needs a --model, the folder that it is in")
    tokenizer = load_training_tokenizer(model, gguf_file) if from_scratch is None else from_scratch.make_tokenizer()
    if from_scratch is not None:
        pairs = from_scratch.pairs("test", SEED)
    else:
        pairs = demo_pairs(tokenizer) if dataset is None else load_preferences(dataset, dataset_config, dataset_split)
    positions = None if model is None else checkpoint_position_limit(model, gguf_file)
    limit = min(filter(None, (max_length, tokenizer.model_max_length, positions)))
    rows = tokenize(pairs, tokenizer)
    check_known(rows, tokenizer)
    for said in summed_up((pair.where, remark(pair, row, tokenizer)) for pair, row in zip(pairs, rows, strict=True)):
        print(said)
    if truncate:
        rows, _ = truncated(rows, limit, tokenizer.truncation_side)
    if not any(map(LeftOut(limit).keeps, rows)):
        raise UserError(
            f"all {len(rows)} pairs are longer than {limit} tokens (--max-length), or the same on both sides"
        )
    set_seed(SEED)  # of a new head, where the checkpoint has none
    if from_scratch is not None:
        classifier = _half_trained(from_scratch, tokenizer, device).to(getattr(torch, dtype))
    else:
        classifier = load_model(model, tokenizer, dtype, new_head=True, gguf_file=gguf_file)

    partial = partial_path(out)
    diagnosis = diagnose(
        classifier.to(device),
        tokenizer,
        rows,
        num_gradients=num_gradients,
        batch_size=batch_size,
        max_length=limit,
        partial=partial,
    )
    if from_scratch is not None:
        name = f"{from_scratch.model_name} after {FEW_STEPS} steps of BT"
    else:
        name = model if gguf_file is None else f"{model}/{gguf_file}"
    report = {
        "model": name,
        "dataset": dataset or GENERATED.name,
        "dtype": str(classifier.dtype).removeprefix("torch."),
        **diagnosis.summary(),
        "versions": versions(),
    }
    written = [out]
    if can_draw():
        written.append(out.with_suffix(".png"))
        write_whole(written[-1], diagnosis.plot)
    write_json(out, report)
    for path in partial_files(partial):
        path.unlink()
    print(f"{report['model']}, {report['dataset']}\n{diagnosis}")
    print(*(f"wrote {path}" for path in written), sep="\n")


def _half_trained(built_in: BuiltIn, tokenizer: PreTrainedTokenizerBase, device: str) -> PreTrainedModel:
    """A data set's own model in the middle of its training with BT."""
    torch.set_num_threads(1)  # more gain nothing on models this small, and lose much where cores are shared
    args = built_in.training_defaults | {"max_steps": FEW_STEPS, "eval_strategy": "no", "logging_strategy": "no"}
    rows = tokenize(built_in.pairs("train", SEED), tokenizer, "tokenizing training pairs")
    with tempfile.TemporaryDirectory() as folder:
        trainer = NormBTTrainer(
            built_in.make_model(tokenizer),
            one_device(TrainingArguments(folder, seed=SEED, use_cpu=device == "cpu", report_to="none", **args)),
            train_dataset=loss_rows("bt", rows),
            processing_class=tokenizer,
            loss=LinearBTLoss(),
            keep_identical=True,  # which have no gradient under BT
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossOnTheBar("training with BT"))
        trainer.train()
    return trainer.model
