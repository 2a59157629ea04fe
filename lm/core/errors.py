"""The one exception a user is meant to read, and the check that raises it most."""


class UserError(Exception):
    """Bad input: one line that says what, where, and the way out. Programs print it, no traceback, and exit 2."""


def check_at_least(least: int, subtree: str, **counts: float) -> None:
    """UserError for the first of these entries of a config's subtree that is smaller than `least`."""
    for name, count in counts.items():
        if count < least:
            raise UserError(f"{subtree}.{name} is {count}; it must be at least {least}")
