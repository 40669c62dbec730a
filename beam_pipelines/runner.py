"""Beam's runner: what `--pipeline_options` says, or Beam's in-process one."""

import contextlib
import re
import shlex
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from resmem_lm.errors import UserError

LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


@contextlib.contextmanager
def open_pipeline(options: str) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the block ends; UserError for what a worker reported as one."""
    arguments = shlex.split(options)
    if not any(argument.startswith("--runner") for argument in arguments):
        arguments.append(f"--runner={LOCAL_RUNNER}")
        if not any(argument.startswith("--direct_") for argument in arguments):
            # Two units of work at a time: what runs on one core for one (selection, files) runs beside the products of the other.
            arguments += ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    try:
        with beam.Pipeline(options=PipelineOptions(arguments)) as pipeline:
            yield pipeline
    except Exception as error:
        # Beam wraps a worker's exception in its own, with the traceback as text.
        reported = re.search(r"UserError: (.*?)(?: \[while running.*)?$", str(error), re.MULTILINE)
        if reported:
            raise UserError(reported[1]) from error
        raise
