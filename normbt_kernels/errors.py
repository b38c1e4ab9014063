"""The one error for mistakes that a user can put right."""

import re
import textwrap


class UserError(ValueError):
    """The message is one line that says what was seen, where, and what to do; the command line prints it alone."""


def first_sentence(error: Exception) -> str:
    """The first line of a library's exception, with those that continue its sentence; its type if it says nothing."""
    lines = re.split(r"(?<![:,\s])\s*\n\s*(?=[A-Z])", str(error).strip())
    return textwrap.shorten(lines[0] or type(error).__name__, 600, placeholder=" ...")
