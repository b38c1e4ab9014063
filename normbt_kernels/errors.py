"""The one error for mistakes that a user can put right."""


class UserError(ValueError):
    """The message is one line that says what was seen, where, and what to do; the command line prints it alone."""


def first_line(error: Exception) -> str:
    """The first line of a library's exception, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
