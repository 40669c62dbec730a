"""Stages of a work directory: each runs once for one configuration, and goes on where it stopped.

`WORKDIR/stages/NAME.json` records a stage's settings, what it was made from and, once finished, its results. A
stage whose record says finished is skipped; one whose settings or inputs have changed is refused, because its output
cost hours. A stage with `extend` makes what is new where its inputs have changed, and keeps the rest; one with `redo` is made again
whatever has changed, because it costs less than what it is made from.
"""

import contextlib
import dataclasses
import errno
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec

import gin

from resmem_lm.errors import UserError
from resmem_lm.lock import assert_held, locked
from resmem_lm.storage import AnyPath, children, files_below, inside, read_json, sha256, to_path, write_json

P = ParamSpec("P")
Record = dict[str, Any]
WITH_MANIFEST = ("documents", "datastore", "index", "neighbors")


def _plain(value: Any) -> Any:
    """Settings as JSON has them."""
    return json.loads(
        json.dumps(value, default=lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else str(x))
    )


@contextlib.contextmanager
def disk_errors(where: AnyPath) -> Iterator[None]:
    """Turns "no space left on device" into a UserError that names the place."""
    try:
        yield
    except (OSError, ValueError) as error:
        # NumPy tells of a write that was cut short without an errno, Orbax by a status code in a ValueError.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "RESOURCE_EXHAUSTED" in str(error) or " requested and " in str(error):
            place = getattr(error, "filename", None) or where
            raise UserError(f"no space left on the disk of {place}: free some and run the same command again; it goes on") from error
        raise


class Stage(Generic[P]):
    """A stage function behind its record. Calling it runs, skips or refuses; the result is what the function returned.

    The function takes `workdir` first, keyword-only settings after it, and returns a JSON object that identifies
    its output (a checksum or the like), because later stages remember that as their input.
    """

    def __init__(
        self,
        function: Callable[P, Record],
        *,
        name: str,
        after: tuple[str, ...],
        output: str,
        redo: bool = False,
        extend: bool = False,
        free: tuple[str, ...] = (),
        beside: str = "",
        replaces: str = "",
    ) -> None:
        self.function, self.name, self.after, self.output, self.free, self.beside = function, name, after, output, free, beside
        self.replaces = replaces
        self.redo, self.extend = redo, extend or redo
        self.__doc__, self.__name__, self.__module__ = function.__doc__, function.__name__, function.__module__
        self.signature = inspect.signature(function)

    def record_path(self, workdir: AnyPath) -> AnyPath:
        """Where the stage's record lies."""
        return workdir / "stages" / f"{self.name}.json"

    def _settings(self, *args: P.args, **kwargs: P.kwargs) -> tuple[AnyPath, Record]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        workdir = to_path(settings.pop("workdir"))
        return workdir, _plain({key: value for key, value in settings.items() if key not in self.free})

    def _inputs(self, workdir: AnyPath) -> Record:
        inputs = {}
        for name in self.after:
            path = workdir / "stages" / f"{name}.json"
            record = read_json(path) if path.exists() else {}
            if not record.get("finished"):
                raise UserError(f"{workdir}: {self.name} needs the stage {name}, which has not finished: run it first")
            inputs[name] = _digest(record["result"])
        return inputs

    def check(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Raises UserError if this stage was begun in the workdir with other settings."""
        workdir, settings = self._settings(*args, **kwargs)
        path = self.record_path(workdir)
        if self.redo or not path.exists():
            return
        record = read_json(path)
        if not record["finished"] and not (workdir / self.output).exists():
            return  # it failed before it had written anything, perhaps because of a setting
        old = record["settings"]
        for key in [*settings, *old]:
            if settings.get(key) != old.get(key):
                raise UserError(
                    f"{workdir} was made with {self.__name__}.{key} = {old.get(key)!r}, now it is {settings.get(key)!r}: "
                    f"take another --workdir, or delete {workdir / self.output} and {path}"
                )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Record:
        """Runs the stage unless it is finished; returns its result."""
        self.check(*args, **kwargs)
        workdir, settings = self._settings(*args, **kwargs)
        with locked(workdir):
            return self._run(workdir, settings, *args, **kwargs)

    def _run(self, workdir: AnyPath, settings: Record, *args: P.args, **kwargs: P.kwargs) -> Record:
        path, inputs = self.record_path(workdir), self._inputs(workdir)
        if path.exists():
            record = read_json(path)
            changed = [name for name in inputs if record["inputs"].get(name) != inputs[name]]
            if changed and not self.extend:
                raise UserError(
                    f"{workdir / self.output} was made from another {changed[0]} than {workdir} has now: "
                    f"take another --workdir, or delete {workdir / self.output} and {path}"
                )
            if record["finished"] and not changed and record["settings"] == settings:
                if (workdir / self.output).exists():
                    result: Record = record["result"]
                    return result
                if not self.redo:
                    raise UserError(f"{workdir / self.output} is missing although {path} says it was made: delete {path} to make it again")
        elif self.replaces and children(workdir / self.output) and not (workdir / self.output / self.replaces).exists():
            raise UserError(
                f"{workdir / self.output} is not of a run, and {self.name} would replace it: move it, or take another --workdir"
            )
        record = {"settings": settings, "inputs": inputs, "finished": False}
        start = time.monotonic()
        with disk_errors(workdir):
            write_json(path, record)
            result = _plain(self.function(*args, **kwargs))
            assert_held(workdir)
            facts = {"finished": True, "seconds": time.monotonic() - start, "result": result, "files": self.files(workdir)}
            write_json(path, record | facts)
        return result

    def files(self, workdir: AnyPath) -> Record:
        """Size and checksum of the stage's files, where they have no manifest of their own."""
        if self.output in WITH_MANIFEST:
            return {}
        outputs = [workdir / name for name in (self.output, self.beside) if name]
        found = [file for output in outputs for file in ([output] if output.is_file() else files_below(output))]
        return {inside(file, workdir): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in found}

    def renew(self, workdir: AnyPath, result: Record) -> None:
        """Replaces the result of a finished stage whose output another command has changed."""
        path = self.record_path(workdir)
        write_json(path, read_json(path) | {"result": _plain(result)})


def seal_config(workdir: AnyPath) -> None:
    """Records the checksum of config.gin, by which `resmem verify` knows it."""
    config = workdir / "config.gin"
    facts = {"bytes": config.stat().st_size, "sha256": sha256(config)}
    write_json(workdir / "stages" / "config.json", {"finished": True, "files": {"config.gin": facts}})


def finished(workdir: AnyPath, name: str) -> Record:
    """The record of a finished stage; UserError if it is not."""
    path = workdir / "stages" / f"{name}.json"
    record = read_json(path) if path.exists() else {}
    if not record.get("finished"):
        raise UserError(f"{workdir}: the stage {name} has not finished: run it first")
    return record


def current(workdir: AnyPath) -> set[str]:
    """The stages that have finished, and whose inputs are still what the work directory has."""
    records = {path.stem: read_json(path) for path in children(workdir / "stages", "*.json")}
    digests = {name: _digest(record.get("result", {})) for name, record in records.items()}
    return {
        name
        for name, record in records.items()
        if record.get("finished") and all(digests.get(of) == digest for of, digest in record.get("inputs", {}).items())
    }


def _digest(result: Record) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def stage(
    *,
    name: str,
    output: str,
    after: tuple[str, ...] = (),
    redo: bool = False,
    extend: bool = False,
    free: tuple[str, ...] = (),
    beside: str = "",
    replaces: str = "",
) -> Callable[[Callable[P, Record]], Stage[P]]:
    """Makes a function the stage `name`, which needs the stages `after`, writes WORKDIR/`output` and is known to gin.

    `beside` is another folder that it writes, or the one in which the output lies. Settings named in `free` do not change the output (how
    often to save, where to run) and may differ between runs. A stage that takes away what lies at its output names with `replaces` a file
    by which it knows that as a run's.
    """

    def wrap(function: Callable[P, Record]) -> Stage[P]:
        gin.register(function.__name__, module="resmem_lm", denylist=["workdir"])(function)
        return Stage(function, name=name, after=after, output=output, redo=redo, extend=extend, free=free, beside=beside, replaces=replaces)

    return wrap
