"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` fill a temporary file beside `path`, then puts it in place: the whole file, or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # matplotlib goes by the suffix
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as the file `path`, whole. Raises ValueError for a number that is not finite."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda path: path.write_text(text, encoding="utf-8"))
