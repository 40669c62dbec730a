"""gin: `--gin_file` and `--gin.NAME=VALUE` -> the keyword arguments of every stage, checked before anything runs."""

import dataclasses
import difflib
import inspect
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

import gin
from resmem_lm.errors import UserError

PACKAGE = Path(__file__).parent
INTEGERS_ARE_FLOATS = BeartypeConf(is_pep484_tower=True)


def parse(gin_files: list[str], bindings: list[str]) -> None:
    """Reads gin files, found from the current folder or among those of this package, then `NAME=VALUE` bindings.

    Raises:
        UserError: no such file, an unknown name, or a value that gin cannot read.
    """
    gin.clear_config()
    # gin's other reader looks for Python packages called gin/ and configs/, and fails where they are plain folders.
    gin.config._FILE_READERS[:] = [(open, os.path.isfile)]  # noqa: SLF001
    # In a checkout, gin/ and configs/ stand beside the package; in a wheel, in it.
    for folder in (PACKAGE, PACKAGE.parent):
        gin.add_config_file_search_path(str(folder))
    try:
        gin.parse_config_files_and_bindings(gin_files, [], finalize_config=False)
        for binding in bindings:
            name = binding.split("=", 1)[0].strip()
            if re.fullmatch(r"\w+", name):
                _check_macro(name)
            with gin.unlock_config():
                gin.parse_config(binding)
    except (ValueError, SyntaxError, OSError) as error:
        raise UserError(_first_line(error, gin_files)) from None


def _check_macro(name: str) -> None:
    macros = sorted({scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"})  # noqa: SLF001 - gin lists them nowhere else
    if name not in macros:
        near = difflib.get_close_matches(name, macros, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the files define {', '.join(macros) or 'none'}"
        raise ValueError(f"unknown gin name --gin.{name}: {hint}")


def _first_line(error: Exception, gin_files: list[str]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and "Unable to open file" in str(error):
        return f"{lines[0].split('. ')[0]}: give a --gin_file that exists here or in the package, such as configs/demo.gin"
    text = " ".join(lines)
    return text if text.startswith("unknown gin name") else f"gin ({', '.join(gin_files)}): {text}"


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The configured keyword arguments of a stage function, defaults included, each of the kind its annotation says.

    Raises:
        UserError: a value that is missing, refers to an undefined name or is of the wrong kind.
    """
    function = getattr(function, "function", function)
    name = function.__name__
    try:
        configured = gin.get_bindings(name)
    except (ValueError, TypeError) as error:
        raise UserError(f"gin: {' '.join(str(error).split())}") from None
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    values = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if key == "workdir":
            continue
        value = configured.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            raise UserError(f"{name}.{key} is not set: set it in a gin file or with --gin.{name}.{key}=...")
        if not is_bearable(value, hints[key], conf=INTEGERS_ARE_FLOATS):
            wanted = getattr(hints[key], "__name__", None) if inspect.isclass(hints[key]) else str(hints[key])
            raise UserError(f"{name}.{key} = {value!r} is of the wrong kind: it must be {str(wanted).replace('typing.', '')}")
        values[key] = value
    return values


def operative(settings: dict[str, dict[str, Any]]) -> str:
    """Every setting as a gin file that can be given to `--gin_file` again. Keys are the names of stage functions."""
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
