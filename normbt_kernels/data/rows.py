"""Reads the rows of a data file or a hub data set, numbered from 1 and unchanged: each is a JSON-like value."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from normbt_kernels.errors import UserError, first_sentence
from normbt_kernels.files import check_name

Rows = Iterator[tuple[int, Any]]
NUMBERS = ("margin", "pair_weight")  # what the loss may take of a pair besides its two sequences


def read_rows(source: str, config: str | None, split: str) -> Rows:
    """The rows of a .json, .jsonl or .csv file (each also .gz), of a .parquet file, or of a split of a hub data set (or
    of a local copy of one).

    Raises:
        UserError: the source cannot be read.
    """
    path = Path(source)
    kind = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if kind in READERS:
        if not path.is_file():
            raise UserError(f"{source}: no such file")
        return READERS[kind](path)
    if path.is_file():
        raise UserError(f"{source}: not one of {', '.join(READERS)}")
    return _read_hub(source, config, split)


def check_columns(row: Any, names: Iterable[str], where: str) -> None:
    """Raises UserError naming `where` if `row` is not an object with these columns."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object with columns, but {type(row).__name__}")
    for name in names:
        if name not in row:
            raise UserError(f"{where}: no column {name!r} (columns: {', '.join(map(str, row)) or 'none'})")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which is unpacked if it is .gz.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield from lines
    except (OSError, EOFError, zlib.error) as error:  # gzip's, for a file that is cut off, damaged or not gzip
        raise UserError(f"{path}: cannot be read ({first_sentence(error)})") from error


def _read_jsonl(path: Path) -> Rows:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield number, _parse_json(line, f"{path}, row {number}")


def _read_json(path: Path) -> Rows:
    rows = _parse_json(b"".join(_lines(path)), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a list of rows (one JSON object per line is .jsonl)")
    yield from enumerate(rows, start=1)


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8, in which JSON is written: save the file so ({error})") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error


def _read_csv(path: Path) -> Rows:
    """Values are text; empty ones become None."""
    limit = csv.field_size_limit(2**31 - 1)  # the most that every platform takes; texts may be over the default 131072
    try:
        lines = filter(None, csv.reader((line.decode("utf-8-sig") for line in _lines(path)), strict=True))
        header = next(lines, [])
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise UserError(f"{path}: two columns are called {twice[0]!r}")
        for number, values in enumerate(lines, start=1):
            if len(values) != len(header):
                raise UserError(
                    f"{path}, row {number}: {len(values)} fields, but the header names {len(header)} columns (a text "
                    "with commas needs quotes)"
                )
            yield number, {name: value or None for name, value in zip(header, values, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not CSV in UTF-8 ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet ({first_sentence(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_sentence(error)})") from error


def _read_hub(name: str, config: str | None, split: str) -> Rows:
    import datasets

    check_name(name)
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetGenerationError as error:  # which says only that an error occurred
        raise UserError(f"{name}: {first_sentence(error.__cause__ or error)}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: {first_sentence(error)}") from error
    yield from enumerate(dataset, start=1)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".json.gz": _read_json,
    ".jsonl.gz": _read_jsonl,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}
