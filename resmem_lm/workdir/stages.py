"""Run each stage once for one configuration, and resume interrupted stages.

A finished stage is skipped. Its policy applies when its settings or inputs have changed:

    refuse    raise an error, because the output is expensive
    extend    keep the output that is still valid and add the rest; raise an error if settings changed
    redo      run the stage again, because it is cheap
"""

import contextlib
import errno
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import gin

from resmem_lm.errors import UserError
from resmem_lm.workdir.lock import assert_held, locked
from resmem_lm.workdir.run import Run, digest, output_of, plain
from resmem_lm.workdir.storage import AnyPath, Record, children, files_below, inside, sha256, write_json

Function = Callable[..., Record]
Policy = Literal["refuse", "extend", "redo"]


@contextlib.contextmanager
def disk_errors(where: AnyPath) -> Iterator[None]:
    """Replace errors about a full disk by a UserError that names the path."""
    try:
        yield
    except (OSError, ValueError) as error:
        # NumPy reports a full disk as a short write without an errno, Orbax as a ValueError with a status.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "RESOURCE_EXHAUSTED" in str(error) or " requested and " in str(error):
            place = getattr(error, "filename", None) or where
            raise UserError(f"no space left on the disk of {place}: free some space and run the same command again") from error
        raise


class Stage:
    """A stage function with its record. A call runs the function, skips it, or raises UserError.

    The function takes a `Run` and keyword-only settings. A stage also accepts the path of a work directory. The function returns a JSON
    object that identifies its output, such as a checksum. Later stages record this object as their input.
    """

    def __init__(self, function: Function, name: str, after: tuple[str, ...], policy: Policy, free: tuple[str, ...]) -> None:
        self.function, self.name, self.after, self.policy, self.free = function, name, after, policy, free
        self.output = output_of(name)
        self.__doc__, self.__name__, self.__module__ = function.__doc__, function.__name__, function.__module__
        self.signature = inspect.signature(function)

    def _settings(self, run: Run, kwargs: Record) -> Record:
        bound = self.signature.bind(run, **kwargs)
        bound.apply_defaults()
        return plain({key: value for key, value in list(bound.arguments.items())[1:] if key not in self.free})

    def _inputs(self, run: Run) -> Record:
        inputs = {}
        for name in self.after:
            record = run.record(name)
            if not record.get("finished"):
                raise UserError(f"{run}: {self.name} needs the stage {name}, which has not finished: run it first")
            inputs[name] = digest(record["result"])
        return inputs

    def check(self, run: Run | AnyPath | str, **kwargs: Any) -> None:
        """Raise UserError if this stage has begun in the work directory with other settings."""
        run = Run(run)
        settings, record = self._settings(run, kwargs), run.record(self.name)
        output = run.path / self.output.paths[0]
        # A stage that wrote nothing may run with other settings: a setting may be the reason why it failed.
        if self.policy == "redo" or not record or (not record["finished"] and not output.exists()):
            return
        old = record["settings"]
        for key in [*settings, *old]:
            if settings.get(key) != old.get(key):
                raise UserError(
                    f"{run} was made with {self.__name__}.{key} = {old.get(key)!r}, now it is {settings.get(key)!r}: "
                    f"take another --workdir, or delete {output} and {run.record_path(self.name)}"
                )

    def __call__(self, run: Run | AnyPath | str, **kwargs: Any) -> Record:
        """Return the result of the stage. Run it first unless it is finished."""
        run = Run(run)
        self.check(run, **kwargs)
        settings = self._settings(run, kwargs)
        with locked(run.path):
            inputs = self._inputs(run)
            finished = self._finished(run, settings, inputs)
            return self._run(run, settings, inputs, kwargs) if finished is None else finished

    def _finished(self, run: Run, settings: Record, inputs: Record) -> Record | None:
        """Return the result of a finished stage, or None if the stage must run. Raise UserError if the stage must not run."""
        record, path = run.record(self.name), run.record_path(self.name)
        output = run.path / self.output.paths[0]
        if not record:
            if self.output.marker and children(output) and not (output / self.output.marker).exists():
                raise UserError(f"{output} was not written by resmem, and {self.name} would replace it: move it, or take another --workdir")
            return None
        changed = [name for name in inputs if record["inputs"].get(name) != inputs[name]]
        if changed and self.policy == "refuse":
            raise UserError(
                f"{output} was made from another {changed[0]} than {run} has now: take another --workdir, or delete {output} and {path}"
            )
        if not record["finished"] or changed or record["settings"] != settings:
            return None
        if not output.exists():
            if self.policy != "redo":
                raise UserError(f"{output} is missing although {path} records it as finished: delete {path} and run the stage again")
            return None
        return record["result"]

    def _run(self, run: Run, settings: Record, inputs: Record, kwargs: Record) -> Record:
        path = run.record_path(self.name)
        record = {"settings": settings, "inputs": inputs, "finished": False}
        start = time.monotonic()
        with disk_errors(run.path):
            write_json(path, record)
            result: Record = plain(self.function(run, **kwargs))
            assert_held(run.path)
            facts = {"finished": True, "seconds": time.monotonic() - start, "result": result, "files": self._files(run)}
            write_json(path, record | facts)
        return result

    def _files(self, run: Run) -> Record:
        """Return the size and checksum of each file of the output, unless a manifest lists them."""
        if self.output.manifest:
            return {}
        outputs = [run.path / name for name in self.output.paths]
        found = [file for output in outputs for file in ([output] if output.is_file() else files_below(output))]
        return {inside(file, run.path): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in found}


def stage(*, name: str, after: tuple[str, ...] = (), policy: Policy = "refuse", free: tuple[str, ...] = ()) -> Callable[[Function], Stage]:
    """Return a decorator that makes a function the stage `name` and registers it with gin under the function's name.

    Args:
        name: name of the record, and of the output in `workdir.run.OUTPUTS`.
        after: stages that must finish first.
        policy: see the docstring of this module.
        free: settings that do not change the output, such as the checkpoint interval. They may differ between runs.
    """

    def wrap(function: Function) -> Stage:
        gin.register(function.__name__, module="resmem_lm", denylist=["run"])(function)
        return Stage(function, name, after, policy, free)

    return wrap
