"""Files are written whole or not at all, and never over results. Also: what an error says about the disk."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normbt_kernels.errors import UserError


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


# --- before anything is loaded -------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raises UserError if `folder` is a file, or if it (or the folder in which to make it) cannot be written."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{there} is a file, not a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error


def check_name(name: str) -> None:
    """Raises UserError if `name`, of a folder or on the hub, can only be that of a folder, and there is none."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not Path(name).exists():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"{name}: no such folder") from error


def check_new_file(path: Path, option: str) -> None:
    """Raises UserError if `path`, which the user gave as `option`, exists or cannot be written."""
    if path.exists():
        raise UserError(f"{option} {path} exists, and nothing is overwritten: choose another {option}")
    check_folder(path.parent)


def free_path(first: Path) -> Path:
    """`first` if it does not exist, else the first free name with -2, -3, ... before the suffix."""
    path, number = first, 2
    while path.exists():
        path, number = first.with_name(f"{first.stem}-{number}{first.suffix}"), number + 1
    return path


# --- afterwards ----------------------------------------------------------------------------------------------------

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_trouble(error: BaseException | None) -> str | None:
    """What an exception or one of its causes says about a file that could not be written, or may not be opened; None if
    it says nothing.

    The libraries that write models replace the system's error with a text of their own.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, PermissionError):  # to read or to write
            return f"{error.filename or 'a file'}: {error.strerror}"
        if isinstance(error, OSError) and error.errno in (*NO_ROOM, errno.EROFS):
            return f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        for number in NO_ROOM:  # safetensors
            if f"(os error {number})" in text:
                return f"the model cannot be written: {os.strerror(number)}"
        if "PytorchStreamWriter failed" in text or "inline_container" in text:
            return "the checkpoint cannot be written: is the disk full?"
        error = error.__cause__ or error.__context__
    return None
