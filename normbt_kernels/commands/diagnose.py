"""`normbt diagnose`: measures a model on pairs; a table, a JSON file and a figure."""

from __future__ import annotations

import tempfile

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainingArguments, set_seed

from normbt_kernels._version import versions
from normbt_kernels.commands.arguments import DiagnoseOptions
from normbt_kernels.commands.evaluate import built_in_pairs
from normbt_kernels.commands.losses import loss_rows
from normbt_kernels.commands.train import LossOnTheBar, one_device
from normbt_kernels.data.built_in import GENERATED, BuiltIn, find_built_in
from normbt_kernels.data.checkpoints import load_model, load_training_tokenizer, token_limit
from normbt_kernels.data.preferences import load_preferences
from normbt_kernels.data.tokens import LeftOut, checked_rows, tokenize
from normbt_kernels.diagnostics.measure import diagnose, partial_files
from normbt_kernels.errors import UserError
from normbt_kernels.integrations.transformers import NormBTTrainer
from normbt_kernels.modules import LinearNormBTLoss
from normbt_kernels.results import write_results
from normbt_kernels.resumable import partial_path

SEED = 42
FEW_STEPS = 200  # of BT on the generated pairs: enough to learn the style, and too few to learn the arithmetic


def run(options: DiagnoseOptions) -> None:
    """`normbt diagnose`.

    Raises:
        UserError: the model or the data cannot be read, or do not fit together.
    """
    built_in = find_built_in(options.dataset) if options.model is None else None
    if built_in is not None:
        if options.gguf_file is not None:
            raise UserError("--gguf-file needs a --model, the folder that it is in")
        name = f"{built_in.model_name} after {FEW_STEPS} steps of BT"
        tokenizer, pairs = built_in.make_tokenizer(), built_in.pairs("test", SEED)
    elif options.model is None:
        raise UserError("--dataset needs a --model; leave out both for the built-in default")
    else:
        name = options.model if options.gguf_file is None else f"{options.model}/{options.gguf_file}"
        tokenizer = load_training_tokenizer(options.model, options.gguf_file)
        if options.dataset is None:
            pairs = built_in_pairs(tokenizer)
        else:
            pairs = load_preferences(options.dataset, options.dataset_config, options.dataset_split)
    limit = token_limit(tokenizer, options.max_length, options.model, options.gguf_file)
    rows, remarks = checked_rows(pairs, tokenizer, limit if options.truncate else None)
    for line in remarks:
        print(line)
    LeftOut(limit).told(rows)  # refuses data of which no pair is left, before the model is loaded
    set_seed(SEED)  # for a new head, if the checkpoint has none
    if built_in is not None:
        classifier = _half_trained(built_in, tokenizer, options.device).to(getattr(torch, options.dtype))
    else:
        classifier = load_model(options.model, tokenizer, options.dtype, new_head=True, gguf_file=options.gguf_file)

    partial = partial_path(options.out)
    diagnosis = diagnose(
        classifier.to(options.device),
        tokenizer,
        rows,
        num_gradients=options.num_gradients,
        batch_size=options.batch_size,
        max_length=limit,
        partial=partial,
    )
    report = {
        "model": name,
        "dataset": options.dataset or GENERATED.name,
        "dtype": str(classifier.dtype).removeprefix("torch."),
        **diagnosis.summary(),
        "versions": versions(),
    }
    print(f"{report['model']}, {report['dataset']}\n{diagnosis}")
    write_results(options.out, report, diagnosis.plot, kept=partial_files(partial))


def _half_trained(built_in: BuiltIn, tokenizer: PreTrainedTokenizerBase, device: str) -> PreTrainedModel:
    """The built-in model in the middle of its training with BT."""
    torch.set_num_threads(1)  # more threads do not help models this small, and hurt where cores are shared
    args = built_in.training_defaults | {"max_steps": FEW_STEPS, "eval_strategy": "no", "logging_strategy": "no"}
    rows = tokenize(built_in.pairs("train", SEED), tokenizer, "tokenizing training pairs")
    with tempfile.TemporaryDirectory() as folder:
        trainer = NormBTTrainer(
            built_in.make_model(tokenizer),
            one_device(TrainingArguments(folder, seed=SEED, use_cpu=device == "cpu", report_to="none", **args)),
            train_dataset=loss_rows("bt", rows),
            processing_class=tokenizer,
            loss=LinearNormBTLoss(power=0.0),
            keep_identical=True,  # identical pairs have no gradient under BT
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossOnTheBar("training with BT"))
        trainer.train()
    return trainer.model
