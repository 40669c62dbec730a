"""Stages of a work directory: each runs once for one configuration, and goes on where it stopped.

`WORKDIR/stages/NAME.json` records a stage's settings, what it was made from and, once finished, its results. A
stage whose record says finished is skipped; one whose settings or inputs have changed is refused, because its output
cost hours, or (`redo=True`) made again, because it costs seconds.
"""

import contextlib
import dataclasses
import errno
import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, ParamSpec

import gin

from resmem_lm.errors import UserError

P = ParamSpec("P")
Record = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that readers see the old file or the whole new one."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` so that readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `path` if the block succeeds, and vanishes if it does not."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The JSON value in `path`; UserError if it was altered or is missing."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the stage that writes it again") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run its stage again") from None


def _plain(value: Any) -> Any:
    """Settings as JSON has them."""
    return json.loads(
        json.dumps(value, default=lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else str(x))
    )


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
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

    The function takes `workdir: Path` first, keyword-only settings after it, and returns a JSON object that identifies
    its output (a checksum or the like), because later stages remember that as their input.
    """

    def __init__(
        self, function: Callable[P, Record], *, name: str, after: tuple[str, ...], output: str, redo: bool, free: tuple[str, ...]
    ) -> None:
        self.function, self.name, self.after, self.output, self.redo, self.free = function, name, after, output, redo, free
        self.__doc__, self.__name__, self.__module__ = function.__doc__, function.__name__, function.__module__
        self.signature = inspect.signature(function)

    def record_path(self, workdir: Path) -> Path:
        """Where the stage's record lies."""
        return workdir / "stages" / f"{self.name}.json"

    def _settings(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Path, Record]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        workdir = Path(settings.pop("workdir"))
        return workdir, _plain({key: value for key, value in settings.items() if key not in self.free})

    def _inputs(self, workdir: Path) -> Record:
        inputs = {}
        for name in self.after:
            path = workdir / "stages" / f"{name}.json"
            record = read_json(path) if path.exists() else {}
            if not record.get("finished"):
                raise UserError(f"{workdir}: {self.name} needs the stage {name}, which has not finished: run it first")
            inputs[name] = hashlib.sha256(json.dumps(record["result"], sort_keys=True).encode()).hexdigest()
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
        path, inputs = self.record_path(workdir), self._inputs(workdir)
        if path.exists():
            record = read_json(path)
            changed = [name for name in inputs if record["inputs"].get(name) != inputs[name]]
            if changed and not self.redo:
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
        record = {"settings": settings, "inputs": inputs, "finished": False}
        start = time.monotonic()
        with disk_errors(workdir):
            write_json(path, record)
            result = _plain(self.function(*args, **kwargs))
            write_json(path, record | {"finished": True, "seconds": time.monotonic() - start, "result": result})
        return result


def stage(
    *, name: str, output: str, after: tuple[str, ...] = (), redo: bool = False, free: tuple[str, ...] = ()
) -> Callable[[Callable[P, Record]], Stage[P]]:
    """Makes a function the stage `name`, which needs the stages `after`, writes WORKDIR/`output` and is known to gin.

    Settings named in `free` do not change the output (how often to save, where to run) and may differ between runs.
    """

    def wrap(function: Callable[P, Record]) -> Stage[P]:
        gin.register(function.__name__, module="resmem_lm", denylist=["workdir"])(function)
        return Stage(function, name=name, after=after, output=output, redo=redo, free=free)

    return wrap
