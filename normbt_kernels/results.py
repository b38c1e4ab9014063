"""How results are shown and written: tables with aligned columns, and a JSON file with a figure beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from normbt_kernels.files import write_json, write_whole


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row: its first cell to the left, the others to the right. The first row has every column, and a
    row of one cell may be wider than its column."""
    several = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in several if len(row) > i) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def write_results(
    path: Path, results: Any, draw: Callable[[Path], None] | None = None, kept: Iterable[Path] = ()
) -> None:
    """Writes `results` as the JSON file `path`, and has `draw` make the figure beside it. Then removes the files `kept`
    for a stopped run. Each file appears whole or not at all, `path` last.
    """
    written = [] if draw is None else write_figure(path.with_suffix(".png"), draw)
    write_json(path, results)
    for file in kept:
        file.unlink()
    for file in [path, *written]:
        print(f"wrote {file}")


def write_figure(path: Path, draw: Callable[[Path], None]) -> list[Path]:
    """Has `draw` make the figure `path`, and returns the files written: none without matplotlib, and it says so."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: it needs matplotlib (pip install 'normbt-kernels[plot]')")
        return []
    write_whole(path, draw)
    return [path]
