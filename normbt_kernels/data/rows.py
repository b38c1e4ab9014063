"""Reads the rows of a data file or a hub data set, numbered from 1 and unchanged: each is a JSON-like value."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from normbt_kernels.errors import UserError, first_line

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


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_jsonl(path: Path) -> Rows:
    with _open(path) as lines:
        for number, line in enumerate(_readable(lines, path), start=1):
            if line.strip():
                yield number, _parse_json(line, f"{path}, row {number}")


def _read_json(path: Path) -> Rows:
    with _open(path) as file:
        rows = _parse_json(b"".join(_readable(file, path)), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a list of rows (one JSON object per line is .jsonl)")
    yield from enumerate(rows, start=1)


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{where}: not JSON ({error})") from error


def _read_csv(path: Path) -> Rows:
    """Values are text, except that empty ones become None and those of the columns in `NUMBERS` become numbers."""
    with _open(path) as file:
        try:
            lines = (line.decode("utf-8-sig") for line in _readable(file, path))
            for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
                yield number, {name: _csv_value(name, value) for name, value in row.items() if name is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not CSV in UTF-8 ({error})") from error


def _csv_value(name: str, value: str | None) -> str | float | None:
    if not value:
        return None
    try:
        return float(value) if name in NUMBERS else value
    except ValueError:
        return value  # the check of the row will refuse it


def _readable(lines: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (OSError, EOFError) as error:  # gzip raises these for a file that is cut off or is not gzip
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet ({first_line(error)})") from error


def _read_hub(name: str, config: str | None, split: str) -> Rows:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:  # datasets' own errors derive from these
        raise UserError(f"{name}: {first_line(error)}") from error
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
