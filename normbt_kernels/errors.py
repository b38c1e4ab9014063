"""The one error that a user can put right."""


class UserError(ValueError):
    """The message is one line that says what was seen, where, and what to do; the command line prints it alone."""
