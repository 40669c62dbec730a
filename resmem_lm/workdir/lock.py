"""The lock of a work directory: one command writes at a time. The lock ends with its process, also when that is killed."""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
from upath import UPath

from resmem_lm.errors import UserError
from resmem_lm.workdir.storage import AnyPath

HEARTBEAT = 5.0  # seconds; a lock in object storage that is not renewed for three of them is free
_held: set[str] = set()
_lost: set[str] = set()


@contextlib.contextmanager
def locked(workdir: AnyPath) -> Iterator[None]:
    """Hold the lock of a work directory; a process that holds it may take it again.

    Raises:
        UserError: another process holds it.
    """
    name = str(workdir.absolute())
    if name in _held:
        yield
        return
    with _file_lock(workdir) if isinstance(workdir, Path) else _lease(workdir):
        _held.add(name)
        try:
            yield
        finally:
            _held.discard(name)


def assert_held(workdir: AnyPath) -> None:
    """Check that this process still holds the lock; call it before writing what other processes read.

    Raises:
        UserError: this process could not renew the lock in time, and another took it.
    """
    if str(workdir.absolute()) in _lost:
        raise UserError(f"{workdir} was taken over by another command while it could not be reached: run this command again after that")


def _refusal(workdir: AnyPath, holder: str) -> UserError:
    return UserError(f"{workdir} is being written by another command{holder}: wait until it has ended, or take another --workdir")


@contextlib.contextmanager
def _file_lock(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _refusal(workdir, "") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _lease(workdir: UPath) -> Iterator[None]:
    """Hold a lock in object storage, which has none of its own: an object that its holder renews."""
    path, me = workdir / ".lock", f"{socket.gethostname()} {os.getpid()} {os.urandom(4).hex()}"
    write = functools.partial(path.fs.pipe_file, path.path)

    def holder() -> str:
        try:
            return path.read_bytes().decode()
        except FileNotFoundError:
            return ""

    def is_mine() -> bool:
        return holder().startswith(f"{me} ")

    before = holder()
    if before:
        time.sleep(3 * HEARTBEAT)
        now = holder()
        if now and now != before:
            raise _refusal(workdir, f" ({' '.join(now.split()[:2])})")
        write(f"{me} 0".encode())
        time.sleep(HEARTBEAT)  # if several processes take it, the last to write holds it
    else:
        with contextlib.suppress(FileExistsError):
            write(f"{me} 0".encode(), mode="create")
    if not is_mine():
        raise _refusal(workdir, "")
    over = threading.Event()

    def renew() -> None:
        beat = 0
        while not over.wait(HEARTBEAT):
            beat += 1
            with contextlib.suppress(Exception):  # an outage, as any storage's package raises it
                if not is_mine():
                    _lost.add(str(workdir))
                    return
                write(f"{me} {beat}".encode())

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _lost.discard(str(workdir))
        with contextlib.suppress(Exception):
            if is_mine():
                path.unlink(missing_ok=True)
