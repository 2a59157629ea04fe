"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that says what, where, and the way out. Programs print it, no traceback, and exit 2."""
