"""Beam's runner: what `--pipeline_options` says, or Beam's in-process one; and the one shape that every pipeline over shards has."""

import argparse
import contextlib
import importlib
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from resmem_lm.errors import UserError
from resmem_lm.progress import progress
from resmem_lm.storage import AnyPath, children, is_local

JOB_SERVERS = ("portable", "flink", "spark", "prism")
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


@contextlib.contextmanager
def open_pipeline(options: str) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the block ends; UserError for an option that Beam does not know and for what a worker reported as one."""
    arguments = arguments_of(options)
    try:
        with beam.Pipeline(options=PipelineOptions(arguments)) as pipeline:
            yield pipeline
    except Exception as error:
        # Beam wraps a worker's exception in its own, with the traceback as text.
        reported = re.search(r"UserError: (.*?)(?: \[while running.*)?$", str(error), re.MULTILINE)
        if reported:
            raise UserError(reported[1]) from error
        raise


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


def run_units(label: str, units: Sequence[Any], work: beam.DoFn, options: str, *, published: AnyPath, names: Sequence[str]) -> None:
    """Runs `work` on every unit, on any runner: one linear chain, in which no array crosses a stage.

    Args:
        label: of the work, for the runner's pages and for progress.
        units: small picklable values, each of which tells what to do.
        work: takes a unit, publishes what it makes, and yields something small.
        options: Beam's.
        published: the folder where the work publishes.
        names: what is published there in the end, some of it already; progress is counted by it.
    """
    if not units:
        return
    with _shown(label, published, set(names)), open_pipeline(options) as pipeline:
        _ = pipeline | "Units" >> beam.Create(list(units)) | "Spread" >> beam.Reshuffle() | label >> beam.ParDo(work)


@contextlib.contextmanager
def _shown(label: str, published: AnyPath, names: set[str]) -> Iterator[None]:
    """Shows how much of `names` is published, whichever process does it."""

    def count() -> int:
        return sum(path.name.removesuffix(".json") in names for path in children(published, "*.json"))

    over = threading.Event()
    with progress(label.lower(), total=len(names), done=count(), unit="shards") as bar:

        def watch() -> None:
            while not over.wait(1.0 if is_local(published) else 15.0):
                bar.update(count())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            bar.update(count())
