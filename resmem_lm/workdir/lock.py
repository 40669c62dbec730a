"""Lock a work directory, so that one command writes at a time. A lock is released when its process ends, even by a kill."""

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

HEARTBEAT = 5.0  # seconds between renewals of a lock in object storage; after three without one, the lock is free
_held: set[str] = set()
_lost: set[str] = set()


@contextlib.contextmanager
def locked(workdir: AnyPath) -> Iterator[None]:
    """Hold the lock of a work directory (reentrant). Raise UserError if another process holds it."""
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
    """Raise UserError if another process took the lock because this one could not renew it in time.

    Call this before writing files that other processes read.
    """
    if str(workdir.absolute()) in _lost:
        raise UserError(f"{workdir} was locked by another command during a storage outage: run this command again when that one has ended")


def _refusal(workdir: AnyPath, holder: str) -> UserError:
    return UserError(f"{workdir} is being written by another command{holder}: wait until that command ends, or take another --workdir")


@contextlib.contextmanager
def _file_lock(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / ".lock", blocking=False)
    try:
        acquired = lock.acquire()
    except filelock.Timeout:
        raise _refusal(workdir, "") from None
    with acquired:
        yield


@contextlib.contextmanager
def _lease(workdir: UPath) -> Iterator[None]:
    """Hold a lock in object storage: an object that its holder renews, because object storage has no locks."""
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
        time.sleep(HEARTBEAT)  # if several processes write it, the last one holds the lock
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
            with contextlib.suppress(Exception):  # during an outage, each storage package raises its own errors
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
