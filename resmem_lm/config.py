"""gin: `--gin_file` and `--gin.NAME=VALUE` -> the keyword arguments of every stage, checked before anything runs."""

import contextlib
import dataclasses
import difflib
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
from resmem_lm.model.config import ModelConfig

PACKAGE = Path(__file__).parent
INTEGERS_ARE_FLOATS = BeartypeConf(is_pep484_tower=True)


def parse(gin_files: list[str], bindings: list[str]) -> None:
    """Reads gin files, found from the current folder or among those of this package, then `NAME=VALUE` bindings.

    Raises:
        UserError: no such file, an unknown name, or a value that gin cannot read.
    """
    gin.clear_config()
    # gin's other reader looks for Python packages called gin/ and configs/, and fails where they are plain folders.
    gin.config._FILE_READERS[:] = [(functools.partial(open, encoding="utf-8"), os.path.isfile)]  # noqa: SLF001 - gin can only add readers
    # In a checkout, gin/ and configs/ stand beside the package; in a wheel, in it.
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
    """Turns what gin raises about a file or a binding into a UserError that says where, what and what instead."""
    try:
        yield
    except (SyntaxError, tokenize.TokenError) as error:
        filename, reason = getattr(error, "filename", None), str(getattr(error, "msg", None) or error.args[0])
        place = f"{filename}, line {error.lineno}" if filename and isinstance(error, SyntaxError) and filename != "<tokenize>" else source
        unreadable = re.search("Failed to parse token '(.*)'", reason)
        reason = f"{unreadable[1]} is no value" if unreadable else reason.strip(" .")
        raise UserError(f"{place}: {reason}: values are written as in Python, strings in quotes (in a shell \"'...'\")") from None
    except (ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        module = re.search(r"No module named '(t5x|seqio|tensorflow\w*)", reason)
        if module:
            raise UserError(f"{source} needs {module[1]}: it is for `python -m t5x.train` (docs/c4.md says how to install it)") from None
        missing = re.match(r"(Unable to open file: .*?)\. Searched", reason)
        if missing:
            raise UserError(f"{missing[1]}: give a --gin_file that exists here or in the package, such as configs/demo.gin") from None
        lines = re.findall(r'In file "(.*?)", line (\d+)', reason)
        place = f"{lines[0][0]}, line {lines[0][1]}" if lines else source
        reason = re.split(" In (?:file|bindings string) ", reason)[0]
        raise UserError(f"{place}: {_mended(reason)}") from None


def _mended(reason: str) -> str:
    """gin's complaint about an unknown name, with what it may have meant."""
    known = {
        selector.rpartition(".")[2]: [name for name in inspect.signature(configurable.wrapped).parameters if name != "workdir"]
        for selector, configurable in gin.config._REGISTRY.items()  # noqa: SLF001 - gin lists them nowhere else
        if selector.startswith("resmem_lm.")
    }
    parameter = re.match(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", reason)
    if parameter:
        return f"in {parameter[1]}, {_unknown(parameter[2], known.get(parameter[1], []))}"
    function = re.match(r"No configurable matching (?:reference )?'@?([\w./]+)", reason)
    return _unknown(function[1], list(known)) if function else reason


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"{name} is unknown: " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known)) or 'none'}")


def _check_macro(name: str) -> None:
    """gin takes new macros and scopes from anywhere; here only files define macros, and nothing has a scope."""
    macros = [scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"]  # noqa: SLF001 - gin lists them nowhere else
    if name not in macros and re.fullmatch(r"\w+|.*/.*", name):
        raise ValueError(_unknown(name, macros))


def is_set(setting: str) -> bool:
    """Whether the configuration gives `function.parameter` a value other than None."""
    function, _, parameter = setting.partition(".")
    return _bindings(function).get(parameter) is not None


def _bindings(name: str) -> dict[str, Any]:
    try:
        bindings: dict[str, Any] = gin.get_bindings(name)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: {_unresolved(error)}") from None
    return bindings


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The configured keyword arguments of a stage function, defaults included, each of the kind its annotation says.

    Raises:
        UserError: a value that is missing, refers to an undefined name, is of the wrong kind or is none that a model can have.
    """
    function = getattr(function, "function", function)
    name = function.__name__
    configured = _bindings(name)
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    values = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if key == "workdir":
            continue
        value = configured.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            raise UserError(f"{name}.{key} is not set: set it in a gin file or with --gin.{name}.{key}=...")
        _check_kind(f"{name}.{key}", value, hints[key])
        values[key] = value
    return values


def _unresolved(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "a value refers to itself: look for NAME = %NAME"
    reason = " ".join(str(error).split())
    macro = re.search(r"configurable 'macro' .* in scope '(.*?)'", reason)
    if macro:
        return f"%{macro[1]} is not defined: write {macro[1]} = ... in a gin file"
    reason = reason.split(" No values supplied by Gin")[0]
    missing = re.match(r"(\w+)\.__init__\(\) missing .*?: (.*)", reason)
    if missing:
        fields = [f"{missing[1]}.{field}" for field in re.findall(r"'(\w+)'", missing[2])]
        return f"{', '.join(fields)} not set: set each in a gin file or with --gin.{fields[0]}=..."
    return reason


def _check_kind(name: str, value: Any, hint: Any) -> None:
    # beartype looks at one item of a list, drawn at random.
    parts = [type(value)([item]) for item in value] if isinstance(value, list | tuple) else []
    if not all(is_bearable(part, hint, conf=INTEGERS_ARE_FLOATS) for part in (value, *parts)):
        wanted = hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")
        wanted = f"@{wanted}()" if dataclasses.is_dataclass(hint) else wanted
        raise UserError(f"{name} = {value!r} is of the wrong kind: it must be {wanted}")
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            _check_kind(f"{type(value).__name__}.{field.name}", getattr(value, field.name), hints[field.name])
    if isinstance(value, ModelConfig):
        value.check()


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
