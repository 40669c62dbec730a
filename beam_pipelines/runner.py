"""Run work on many units with Beam: with the runner of `--pipeline_options`, or with Beam's in-process runner.

Beam is imported only if there is work, because the import takes a second.
"""

import argparse
import builtins
import contextlib
import importlib
import logging
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable
from unittest import mock

from etils import epy

from resmem_lm.errors import STORAGE_CLIENTS, UserError
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.storage import AnyPath, children, is_local

with epy.lazy_imports():
    import apache_beam as beam
    from apache_beam import metrics as beam_metrics
    from apache_beam.options import pipeline_options as beam_options
    from apache_beam.runners import common
    from apache_beam.runners.worker import sdk_worker
    from apache_beam.utils import shared

JOB_SERVERS = ("portable", "flink", "spark", "prism")
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


@runtime_checkable
class Work(Protocol):
    """Process units in any process. The object is small and picklable."""

    def setup(self) -> Any:
        """Return what all units and threads of a process share (a model, a lock)."""

    def process(self, unit: Any, kept: Any) -> Iterator[Any]:
        """Process one unit, possibly for the second time, and yield something small."""


def run_units(label: str, units: Sequence[Any], work: Work, options: str, *, published: AnyPath, names: Sequence[str]) -> None:
    """Run `work` on every unit with Beam's `options`, in one linear chain in which no array crosses a stage.

    The progress line counts the `names` that are in the folder `published`. Raise UserError as `open_pipeline` does.
    """
    if units:
        with _show_published(label, published, set(names)), open_pipeline(options) as pipeline:
            source = pipeline | "Units" >> beam.Create(list(units)) | "Spread" >> beam.Reshuffle()
            _ = source | label >> process_with(work)


def process_with(work: Work) -> Any:
    """Return a Beam transform that does the work; each process calls `setup` once."""
    return beam.FlatMap(_process, work, shared.Shared())


def _process(unit: Any, work: Work, kept: Any) -> Iterator[Any]:
    yield from work.process(unit, kept.acquire(work.setup))


def count(name: str, number: int) -> None:
    """Add to a counter on the runner's pages, from within `Work.process`."""
    beam_metrics.Metrics.counter("resmem", name).inc(number)


@contextlib.contextmanager
def _show_published(label: str, published: AnyPath, names: set[str]) -> Iterator[None]:
    """Show how many of `names` are published, whichever process publishes them."""

    def finished() -> int:
        return sum(path.name.removesuffix(".json") in names for path in children(published, "*.json"))

    over = threading.Event()
    with progress(label.lower(), total=len(names), done=finished(), unit="shards") as bar:

        def show() -> None:
            with contextlib.suppress(Exception):  # an outage of the storage, with errors of any package, must not stop the work
                bar.update(finished())

        def watch() -> None:
            while not over.wait(1.0 if is_local(published) else 15.0):
                show()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            show()


@contextlib.contextmanager
def open_pipeline(options: str) -> Iterator[Any]:
    """Yield a pipeline that runs when the block ends. Raise UserError for an unknown option or a worker's error that the user can fix."""
    arguments = arguments_of(options)
    try:
        with _without_tracebacks(), beam.Pipeline(options=beam_options.PipelineOptions(arguments)) as pipeline:
            yield pipeline
    except Exception as error:
        if reported := _reported(str(error)):
            raise UserError(reported) from error
        if isinstance(error, NotImplementedError | ImportError) or "validations errors" in str(error) or _module(error) == "grpc":
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"--pipeline_options={options}: the runner reports: {reason}: correct the options, or start the runner's server"
            ) from error
        raise


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep Beam's in-process worker from printing and logging exceptions, because the pipeline raises them."""
    loggers = [logging.getLogger(module.__name__) for module in (common, sdk_worker)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with mock.patch.object(sdk_worker, "print", create=True):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _module(error: Exception) -> str:
    return type(error).__module__.partition(".")[0]


def _reported(wrapped: str) -> str | None:
    """Find a worker's error that the user can fix in the text of Beam's error, and return its message."""
    found = re.findall(r"^(?:RuntimeError: )?([\w.]+): (.*?)(?: \[while running.*)?$", wrapped, re.MULTILINE)
    for name, message in found:
        if name.rpartition(".")[2] in ("UserError", "DamagedError"):
            return message
    for name, message in found[-1:]:
        kind = getattr(builtins, name, None)
        if name.partition(".")[0] in STORAGE_CLIENTS or (isinstance(kind, type) and issubclass(kind, OSError)):
            return f"{message}: correct it and run the same command again"
    return None


def arguments_of(options: str) -> list[str]:
    """Return Beam's arguments, with the in-process runner if none is named.

    Raise UserError for a runner or an option that Beam does not have and would ignore. Options of a job server are not checked.
    """
    try:
        arguments = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--pipeline_options={options}: {error}: correct the quotes") from None
    if not any(argument.startswith("--runner") for argument in arguments):
        arguments.append(f"--runner={LOCAL_RUNNER}")
        if not any(argument.startswith("--direct_") for argument in arguments):
            # Two units at a time: the single-threaded work on one unit (files, selection) overlaps with the matrix products of the other.
            arguments += ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    runner = beam_options.PipelineOptions(arguments).view_as(beam_options.StandardOptions).runner or ""
    _check_runner(runner)
    if not any(name in runner.lower() for name in JOB_SERVERS):
        _check_options(arguments)
    return arguments


def _check_runner(runner: str) -> None:
    known = {name.lower(): name for name in beam_options.StandardOptions.KNOWN_RUNNER_NAMES}
    if "." in runner:
        module, _, name = runner.rpartition(".")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--pipeline_options: the runner {runner} cannot be imported ({error}): install it or name another") from None
    elif runner.lower() not in known and f"{runner.lower()}runner" not in known:
        raise UserError(
            f"--pipeline_options: Beam has no runner {runner}: take one of {', '.join(sorted(known.values()))}, or its full name"
        )


def _check_options(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for options in _subclasses(beam_options.PipelineOptions):
        with contextlib.suppress(argparse.ArgumentError, NotImplementedError):  # a class may repeat an option of another
            options._add_argparse_args(parser)  # noqa: SLF001 - as Beam's own parser does
    try:
        unknown = parser.parse_known_args(arguments)[1]
    except argparse.ArgumentError as error:
        raise UserError(f"--pipeline_options: {error}: correct it") from None
    if unknown:
        raise UserError(f"--pipeline_options: Beam has no option {unknown[0]}: correct it or leave it out")


def _subclasses(cls: type) -> list[Any]:
    children: list[Any] = cls.__subclasses__()
    return [found for child in children for found in (child, *_subclasses(child))]
