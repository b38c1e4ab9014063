"""Preference pairs from the Python standard library's own source, as installed: `--dataset stdlib-faults`.

    fine    a real function, and the same function with one fault in its syntax tree (operator, off by one, swapped
            arguments, wrong variable, dropped return): the kinds of HumanEvalPack (Muennighoff et al., 2023)
    coarse  a docstring's first line above its own function, and above an unrelated one

Nothing is shipped or downloaded. The same version of Python gives the same pairs, another version gives others. Whole
modules are held out, and a function that occurs twice counts once, so no model trains on a held-out function.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from normbt_kernels.data.checkpoints import new_llama
from normbt_kernels.data.preferences import Preference

LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
MAX_CHARACTERS = 300  # of a function
VERSIONS_OF_A_FUNCTION = 3  # training pairs of each kind, with different faults
VOCABULARY = 2048
MAX_TOKENS = 256

# How much worse an annotator would rate the rejected text, for the losses that use a margin.
FINE_MARGIN, COARSE_MARGIN = 1.0, 2.0

OPPOSITES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.Lt: ast.GtE,
    ast.Gt: ast.LtE,
    ast.Is: ast.IsNot,
    ast.In: ast.NotIn,
    ast.And: ast.Or,
    ast.Add: ast.Sub,
    ast.Mult: ast.FloorDiv,
}
OPPOSITES |= {opposite: operator for operator, opposite in OPPOSITES.items()}
SYMMETRIC = {"max", "min"}  # calls whose arguments may be swapped without harm

# TrainingArguments of the built-in model, unless the command line says otherwise.
TRAINING_DEFAULTS: dict[str, Any] = {
    "max_steps": 600,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 50,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 60,
    "logging_steps": 30,
    "eval_strategy": "steps",
    "eval_steps": 150,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


# --- functions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """One function of the library, without comments, decorators and docstring. `summary` is the docstring's first line,
    empty if there is none; `split` is that of its module."""

    module: str
    source: str
    summary: str
    split: str

    @property
    def text(self) -> str:
        return f"# {self.summary}\n{self.source}" if self.summary else self.source


@lru_cache(maxsize=1)
def functions() -> tuple[Function, ...]:
    """The library's functions of at most `MAX_CHARACTERS`, each source once, in the order of their modules' paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, files in os.walk(library):
        folders[:] = set(folders) - LEFT_OUT  # which it then does not walk
        paths += [Path(folder, file).relative_to(library) for file in set(files) - LEFT_OUT if file.endswith(".py")]
    found: dict[str, Function] = {}
    for path in tqdm(sorted(paths), desc="reading the standard library", unit=" modules", leave=False):
        module = path.with_suffix("").as_posix()
        try:
            tree = ast.parse((library / path).read_bytes())
        except (SyntaxError, ValueError):  # some files hold errors on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _function(node, module)
                if function is not None:
                    found.setdefault(function.source, function)
    return tuple(found.values())


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> Function | None:
    docstring = ast.get_docstring(node)
    if docstring is not None:
        node.body = node.body[1:]
    node.decorator_list = []
    source = ast.unparse(node) if node.body else ""
    if not 0 < len(source) <= MAX_CHARACTERS:
        return None
    summary = next(iter((docstring or "").strip().splitlines()), "")
    return Function(module, source, summary, _split(module))


def _split(module: str) -> str:
    tenth = hashlib.sha256(module.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


# --- pairs -------------------------------------------------------------------------------------------------------


def split_pairs(split: str, seed: int) -> list[Preference]:
    """The pairs of the modules of "train", "validation" or "test". The seed draws the faults of the training pairs."""
    members = [function for function in functions() if function.split == split]
    described = [function for function in members if function.summary]
    pairs = []
    for version in range(VERSIONS_OF_A_FUNCTION if split == "train" else 1):
        rng = random.Random(f"{split} {version} {seed if split == 'train' else ''}")
        for function in members:
            fine = _fine_pair(function, rng)
            if fine is not None:
                pairs.append(fine)
            if function.summary:
                pairs.append(_coarse_pair(function, described, rng))
    return pairs


def _fine_pair(function: Function, rng: random.Random) -> Preference | None:
    tree = ast.parse(function.source)
    by_kind: dict[str, list[Callable[[], None]]] = {}
    for kind, make in faults(tree, rng):
        by_kind.setdefault(kind, []).append(make)
    if not by_kind:
        return None
    kind = rng.choice(list(by_kind))
    rng.choice(by_kind[kind])()
    faulty = replace(function, source=ast.unparse(tree))
    return Preference(function.text, faulty.text, margin=FINE_MARGIN, category=f"fine: {kind}", where=function.module)


def _coarse_pair(function: Function, others: list[Function], rng: random.Random) -> Preference:
    other = function
    while other.summary == function.summary:
        other = rng.choice(others)
    wrong = replace(other, summary=function.summary)
    return Preference(
        function.text, wrong.text, margin=COARSE_MARGIN, category="coarse: unrelated function", where=function.module
    )


def faults(tree: ast.AST, rng: random.Random) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each fault that a function's `tree` can get: its kind, and a call that makes it. Each changes the text."""
    nodes = list(ast.walk(tree))
    variables = sorted(
        {node.arg for node in nodes if isinstance(node, ast.arg)}
        | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    )
    for node in nodes:
        match node:
            case ast.Compare(ops=operators):
                for i, operator in enumerate(operators):
                    if type(operator) in OPPOSITES:
                        yield "operator", lambda ops=operators, i=i: ops.__setitem__(i, OPPOSITES[type(ops[i])]())
            case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OPPOSITES:
                yield "operator", lambda node=node: setattr(node, "op", OPPOSITES[type(node.op)]())
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                by = rng.choice((-1, 1))
                yield "off by one", lambda node=node, by=by: setattr(node, "value", node.value + by)
            case ast.Call(func=called, args=arguments) if getattr(called, "id", None) not in SYMMETRIC:
                for i, (first, second) in enumerate(pairwise(arguments)):
                    starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
                    if not starred and ast.dump(first) != ast.dump(second):
                        yield "swapped arguments", lambda args=arguments, i=i: _swap(args, i)
            case ast.Name(id=name, ctx=ast.Load()) if name in variables and len(variables) > 1:
                other = rng.choice([variable for variable in variables if variable != name])
                yield "wrong variable", lambda node=node, other=other: setattr(node, "id", other)
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for i, statement in enumerate(block if isinstance(block, list) else ()):
                if isinstance(statement, ast.Return) and not _is_none(statement.value):
                    dropped = ast.Expr(statement.value)
                    yield "dropped return", lambda block=block, i=i, dropped=dropped: block.__setitem__(i, dropped)


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _swap(items: list[Any], i: int) -> None:
    items[i], items[i + 1] = items[i + 1], items[i]


# --- tokenizer and model -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (function.text for function in functions() if function.split == "train")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained here on the functions of the training modules."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=MAX_TOKENS,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    """A Llama of 3 layers and 96 hidden units with a scalar head, drawn from torch's current seed."""
    return new_llama(tokenizer, hidden_size=96, intermediate_size=256, num_layers=3, max_tokens=MAX_TOKENS)
