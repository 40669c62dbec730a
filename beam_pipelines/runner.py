"""Beam's runner: what `--pipeline_options` says, or Beam's in-process one; and the chain in which it runs work on every unit."""

import argparse
import builtins
import contextlib
import importlib
import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners import common
from apache_beam.runners.worker import sdk_worker
from apache_beam.utils.shared import Shared

from beam_pipelines.work import Work
from resmem_lm.errors import STORAGE_CLIENTS, UserError

JOB_SERVERS = ("portable", "flink", "spark", "prism")
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


@contextlib.contextmanager
def open_pipeline(options: str) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the block ends; UserError for an option that Beam does not know and for what a worker reported as one."""
    arguments = arguments_of(options)
    try:
        with _tracebacks_told_once(), beam.Pipeline(options=PipelineOptions(arguments)) as pipeline:
            yield pipeline
    except Exception as error:
        if reported := _reported(str(error)):
            raise UserError(reported) from error
        if isinstance(error, NotImplementedError | ImportError) or "validations errors" in str(error) or _module(error) == "grpc":
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"--pipeline_options={options}: the runner says: {reason}: mend them, or see that its server runs") from error
        raise


@contextlib.contextmanager
def _tracebacks_told_once() -> Iterator[None]:
    """Beam's worker in this process prints and logs the traceback of every exception, which the pipeline raises with it as its text."""
    loggers = [logging.getLogger(module.__name__) for module in (common, sdk_worker)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    names = vars(sdk_worker)
    names["print"] = lambda *_, **__: None  # found before the builtin
    try:
        yield
    finally:
        del names["print"]
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _module(error: Exception) -> str:
    return type(error).__module__.partition(".")[0]


def _reported(wrapped: str) -> str | None:
    """What a worker said that the user can mend. Beam wraps a worker's exception in its own, with the traceback as text."""
    told = re.findall(r"^(?:RuntimeError: )?([\w.]+): (.*?)(?: \[while running.*)?$", wrapped, re.MULTILINE)
    for name, message in told:
        if name.rpartition(".")[2] in ("UserError", "DamagedError"):
            return message
    for name, message in told[-1:]:
        kind = getattr(builtins, name, None)
        if name.partition(".")[0] in STORAGE_CLIENTS or (isinstance(kind, type) and issubclass(kind, OSError)):
            return f"{message}: mend it and run the same command again"
    return None


def arguments_of(options: str) -> list[str]:
    """Beam's arguments, with the in-process runner where none is named.

    Raises UserError for a runner or an option that Beam does not know: Beam itself would go on without it. The options of a job server
    are its own to know; they are not checked.
    """
    try:
        arguments = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--pipeline_options={options}: {error}: mend the quotes") from None
    if not any(argument.startswith("--runner") for argument in arguments):
        arguments.append(f"--runner={LOCAL_RUNNER}")
        if not any(argument.startswith("--direct_") for argument in arguments):
            # Two units of work at a time: what runs on one core for one (selection, files) runs beside the products of the other.
            arguments += ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    _check_options(arguments)
    return arguments


def _check_options(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    runner = PipelineOptions(arguments).view_as(StandardOptions).runner or ""
    known = {name.lower(): name for name in StandardOptions.KNOWN_RUNNER_NAMES}
    if "." in runner:
        try:
            getattr(importlib.import_module(runner.rpartition(".")[0]), runner.rpartition(".")[2])
        except (ImportError, AttributeError) as error:
            raise UserError(f"--pipeline_options: the runner {runner} cannot be imported ({error}): install it or name another") from None
    elif runner.lower() not in known and f"{runner.lower()}runner" not in known:
        raise UserError(
            f"--pipeline_options: the runner {runner} is unknown: take one of {', '.join(sorted(known.values()))}, or its full name"
        )
    if any(name in runner.lower() for name in JOB_SERVERS):
        return
    for options in _subclasses(PipelineOptions):
        with contextlib.suppress(argparse.ArgumentError, NotImplementedError):  # a class may repeat an option of another
            options._add_argparse_args(parser)  # noqa: SLF001 - how Beam's own parser asks for them
    try:
        unknown = parser.parse_known_args(arguments)[1]
    except argparse.ArgumentError as error:
        raise UserError(f"--pipeline_options: {error}: mend it") from None
    if unknown:
        raise UserError(f"--pipeline_options: Beam has no option {unknown[0]}: mend it or leave it out")


def _subclasses(cls: type) -> list[Any]:
    children: list[Any] = cls.__subclasses__()
    return [found for child in children for found in (child, *_subclasses(child))]


class WorkFn(beam.DoFn):
    """Work as Beam takes it; what it keeps is made once a process."""

    def __init__(self, work: Work) -> None:
        self._work, self._shared = work, Shared()

    def setup(self) -> None:
        """Makes or takes what the process keeps."""
        self._kept = self._shared.acquire(self._work.setup)

    def process(self, unit: Any) -> Iterator[Any]:
        """What the work yields."""
        yield from self._work.process(unit, self._kept)


def run_chain(label: str, units: Sequence[Any], work: Work, options: str) -> None:
    """Runs the work on every unit."""
    with open_pipeline(options) as pipeline:
        _ = pipeline | "Units" >> beam.Create(list(units)) | "Spread" >> beam.Reshuffle() | label >> beam.ParDo(WorkFn(work))
