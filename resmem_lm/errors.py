"""Errors that a command prints to its user as one line."""

from typing import Any

STORAGE_CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google")  # packages whose errors describe the problem well enough for users


class UserError(Exception):
    """An error that the user can fix. Its one-line message states what is wrong and how to fix it; the command exits with code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a file name may contain line breaks


def check_least(of: str, least: int | float, **given: Any) -> None:
    """Raise UserError if a number, or a number in a list, is below `least` or a list is empty; `of` is the function's name in gin."""
    for name, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values or not min(values) >= least:
            raise UserError(f"{of}.{name} = {value}: take {least:g} or more")


class DamagedError(UserError):
    """A record is missing or altered."""
