"""Errors that a command prints to its user as one line."""

from typing import Any

STORAGE_CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google")  # their errors, like the system's, name what to correct


class UserError(Exception):
    """An error that the user can fix: the message is one line, what is wrong and how to fix it.

    Commands print the message without a traceback and exit with code 2.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a name in it may have line breaks


def check_least(of: str, least: int | float, **given: Any) -> None:
    """Check that numbers, or all numbers of lists, are at least `least`.

    Args:
        of: the name of the function in gin, for the message.
        least: the smallest number allowed.
        given: arguments by name.

    Raises:
        UserError: a smaller number, or an empty list.
    """
    for name, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values or not min(values) >= least:
            raise UserError(f"{of}.{name} = {value}: take {least:g} or more")


class DamagedError(UserError):
    """A missing or altered record."""
