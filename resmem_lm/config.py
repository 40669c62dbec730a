"""Turn `--gin_file` and `--gin.NAME=VALUE` into the keyword arguments of every stage, checked before anything runs."""

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import tokenize
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gin
from beartype import BeartypeConf
from beartype.door import is_bearable

from resmem_lm.errors import UserError

PACKAGE = Path(__file__).parent
INTEGERS_ARE_FLOATS = BeartypeConf(is_pep484_tower=True)


def parse(gin_files: list[str], bindings: list[str]) -> None:
    """Read gin files, found from the current folder or among those of this package, then `NAME=VALUE` bindings.

    Raise UserError with gin's message for a missing file, an unknown name, or a value that gin cannot read.
    """
    gin.clear_config()
    # gin's other reader looks for Python packages called gin/ and configs/, and fails where they are plain folders.
    gin.config._FILE_READERS[:] = [(functools.partial(open, encoding="utf-8"), os.path.isfile)]  # noqa: SLF001 - gin can only add readers
    # In a checkout, gin/ and configs/ are beside the package; in a wheel, in it.
    for folder in (PACKAGE, PACKAGE.parent):
        gin.add_config_file_search_path(str(folder))
    for file in gin_files:
        with _gin_errors(file):
            gin.parse_config_file(file)
    for binding in bindings:
        with _gin_errors(f"--gin.{' '.join(binding.split())}"):
            _check_macro(binding.split("=", 1)[0].strip())
            gin.parse_config(binding)


@contextlib.contextmanager
def _gin_errors(source: str) -> Iterator[None]:
    """Raise gin's errors as UserError, with the source of the binding in front."""
    try:
        yield
    except (SyntaxError, tokenize.TokenError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = " ".join(str(getattr(error, "msg", None) or error.args[0]).split()).rstrip(".")
        raise UserError(f"{source}{line}: {reason}: write values as in Python, strings in quotes (in a shell \"'...'\")") from None
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


def _check_macro(name: str) -> None:
    """Raise ValueError for a macro that no file defines, because gin would accept it without effect."""
    macros = [scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"]  # noqa: SLF001 - gin lists them nowhere else
    if name not in macros and re.fullmatch(r"\w+|.*/.*", name):
        raise ValueError(f"no gin file defines {name}; known: {', '.join(sorted(macros)) or 'none'}")


def is_set(setting: str) -> bool:
    """Return whether the configuration gives `function.parameter` a value other than None."""
    function, _, parameter = setting.partition(".")
    return _bindings(function).get(parameter) is not None


def _bindings(name: str) -> dict[str, Any]:
    try:
        bindings: dict[str, Any] = gin.get_bindings(name)
    except RecursionError:
        raise UserError(f"{name}: a value refers to itself: look for NAME = %NAME") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}: set it in a gin file or with --gin.NAME=VALUE") from None
    return bindings


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the configured keyword arguments of a stage function, defaults included, each of its annotated type.

    Raise UserError for a value that is missing, refers to an undefined name, has the wrong type or is out of range.
    """
    function = getattr(function, "function", function)
    name, hints = function.__name__, typing.get_type_hints(function)
    configured, values = _bindings(name), {}
    for key, parameter in list(inspect.signature(function).parameters.items())[1:]:
        value = configured.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            raise UserError(f"{name}.{key} is not set: set it in a gin file or with --gin.{name}.{key}=...")
        _check_type(f"{name}.{key}", value, hints[key])
        values[key] = value
    return values


def _check_type(name: str, value: Any, hint: Any) -> None:
    # beartype checks one item of a list, drawn at random.
    parts = [type(value)([item]) for item in value] if isinstance(value, list | tuple) else []
    if not all(is_bearable(part, hint, conf=INTEGERS_ARE_FLOATS) for part in (value, *parts)):
        wanted = hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")
        wanted = f"@{wanted}()" if dataclasses.is_dataclass(hint) else wanted
        raise UserError(f"{name} = {value!r} has the wrong type: it must be {wanted}")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            _check_type(f"{type(value).__name__}.{field.name}", getattr(value, field.name), hints[field.name])
        if hasattr(value, "check"):
            value.check()


def operative(settings: dict[str, dict[str, Any]]) -> str:
    """Return every setting as a gin file that `--gin_file` takes again. Keys are the names of stage functions."""
    lines = ["# The complete configuration of this work directory.\n"]
    for name, values in settings.items():
        for key, value in values.items():
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                kind = type(value).__name__
                lines += [f"{kind}.{field} = {content!r}\n" for field, content in dataclasses.asdict(value).items()]
                value = f"@{kind}()"
            else:
                value = repr(value)
            lines.append(f"{name}.{key} = {value}\n")
        lines.append("\n")
    return "".join(lines)
