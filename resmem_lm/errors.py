"""The one exception that a command shows to its user as a single line."""

from typing import Any

STORAGE_CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google")  # whose errors, like the system's, name what is to be corrected


class UserError(Exception):
    """Something the user can mend: the message names the culprit and the mend, on one line.

    Commands print the message without a traceback and exit with code 2.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a culprit's name may have line breaks


def check_least(of: str, least: int | float, **given: Any) -> None:
    """UserError for an argument of `of`, a function that gin knows, that is below `least`, or has such a number in it or none."""
    for name, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values or not min(values) >= least:
            raise UserError(f"{of}.{name} = {value}: take {least:g} or more")


class DamagedError(UserError):
    """A record is missing or is not as it was written."""
