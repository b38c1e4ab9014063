"""Keeps each result as soon as it is known, so that a stopped run can be continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm


def partial_path(out: Path) -> Path:
    """Where results are kept until the file `out` is written."""
    return out.with_name(f".{out.name}.partial")


def map_resumable(
    work: Callable[[Sequence[int]], Any],
    chunks: Sequence[Sequence[int]],
    path: Path | None,
    name: str | None,
    description: str,
) -> list[Any]:
    """`[work(chunk) for chunk in chunks]` with a progress bar; a chunk holds numbers of pairs, a result is JSON.

    Each result is appended to the file `path`. If an earlier call with the same fingerprint `name` left results there,
    only the others are computed; results of another fingerprint are dropped. With `path` None nothing is kept and
    `name` is not needed.
    """
    with tqdm(total=sum(map(len, chunks)), desc=description, unit=" pairs", leave=False) as bar:
        if path is None:
            return [_step(work, chunk, bar) for chunk in chunks]
        with path.open("a+b") as file:
            results = _begin(file, json.dumps(name).encode() + b"\n")
            bar.update(sum(map(len, chunks[: len(results)])))
            for chunk in chunks[len(results) :]:
                results.append(_step(work, chunk, bar))
                file.write(json.dumps(results[-1]).encode() + b"\n")
                file.flush()
            return results


def _step(work: Callable[[Sequence[int]], Any], chunk: Sequence[int], bar: tqdm) -> Any:
    result = work(chunk)
    bar.update(len(chunk))
    return result


def _begin(file: Any, header: bytes) -> list[Any]:
    """The results of this work in the open `file`. Removes a line that was cut off, and results of other work."""
    file.seek(0)
    lines = [line for line in file if line.endswith(b"\n")]
    if lines[:1] != [header]:
        file.truncate(0)
        file.write(header)
        return []
    file.truncate(sum(map(len, lines)))
    return [json.loads(line) for line in lines[1:]]


def fingerprint(model: nn.Module, rows: Sequence[dict[str, Any]], *settings: Any) -> str:
    """Names the work by what it depends on: configuration, weights, buffers, pairs and settings, but no file names."""
    parts = (settings, model_fingerprint(model), rows_fingerprint(rows), torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Names a model by its configuration, weights and buffers, and by which of them are trained."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    config.pop("_name_or_path", None)
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def rows_fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """Names pairs by their token ids and whatever else a row says."""
    digest = hashlib.sha256()
    for row in rows:
        plain = {name: list(map(int, value)) if name.endswith("_ids") else value for name, value in row.items()}
        digest.update(repr(sorted(plain.items())).encode())
    return digest.hexdigest()
