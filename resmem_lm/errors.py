"""The one exception that a command shows to its user as a single line."""

STORAGE_CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google")  # whose errors, like the system's, name what is to be mended


class UserError(Exception):
    """Something the user can mend: the message names the culprit and the mend, on one line.

    Commands print the message without a traceback and exit with code 2.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a culprit's name may have line breaks


class DamagedError(UserError):
    """A record is missing or is not as it was written."""
