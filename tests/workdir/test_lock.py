import itertools
import subprocess
import sys
import threading
import time

import pytest

from resmem_lm.errors import UserError
from resmem_lm.workdir.lock import assert_held, locked
from resmem_lm.workdir.storage import to_path

HOLD = """
import sys
from pathlib import Path
from resmem_lm.workdir.lock import assert_held, locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Return another process that holds the lock of `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def refused(workdir):
    with pytest.raises(UserError, match="is being written by another command") as caught, locked(workdir):
        pass
    assert "\n" not in str(caught.value)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, holder):
    refused(tmp_path)
    with locked(tmp_path / "other"):
        pass
    holder.communicate()  # the process ends with its input
    with locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("place", ["here", "object storage"])
def test_a_lock_is_reentrant_and_released_by_an_exception(tmp_path, place):
    workdir = tmp_path if place == "here" else to_path(f"memory://lock{tmp_path}")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), locked(workdir), locked(workdir):
            raise KeyboardInterrupt


def test_a_renewed_lock_in_object_storage_is_refused_and_an_abandoned_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.workdir.lock.HEARTBEAT", 0.01)
    workdir = to_path(f"memory://lock{tmp_path}")
    over, begun = threading.Event(), threading.Event()

    def renew():
        for beat in itertools.count():
            workdir.fs.pipe_file((workdir / ".lock").path, f"there 1 abcd {beat}".encode())
            begun.set()
            if over.is_set():
                return

    other = threading.Thread(target=renew)
    other.start()
    begun.wait()
    try:
        refused(workdir)
    finally:
        over.set()
        other.join()
    with locked(workdir):
        assert (workdir / ".lock").exists()
    assert not (workdir / ".lock").exists()


def test_a_holder_that_lost_its_lock_writes_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.workdir.lock.HEARTBEAT", 0.05)
    workdir = to_path(f"memory://lost{tmp_path}")
    with locked(workdir):
        assert_held(workdir)
        (workdir / ".lock").write_bytes(b"another 1 0123abcd 0")
        for _ in range(100):
            time.sleep(0.05)
            try:
                assert_held(workdir)
            except UserError as error:
                assert "was locked by another command" in str(error)  # noqa: PT017 - raised after the next renewal
                break
        else:
            pytest.fail("the loss was not noticed")
    assert (workdir / ".lock").read_bytes() == b"another 1 0123abcd 0"  # the other holder's lock is kept
    assert_held(workdir)


def test_an_outage_does_not_end_the_renewal(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.workdir.lock.HEARTBEAT", 0.02)
    workdir = to_path(f"memory://outage{tmp_path}")

    class ClientError(Exception):
        """An error of a storage package that is not an OSError."""

    real, calls = type(workdir.fs).pipe_file, []

    def failing(self, path, value, **kwargs):
        calls.append(path)
        if 2 <= len(calls) <= 4:
            raise ClientError
        return real(self, path, value, **kwargs)

    monkeypatch.setattr(type(workdir.fs), "pipe_file", failing)
    with locked(workdir):
        before = (workdir / ".lock").read_bytes()
        for _ in range(200):
            time.sleep(0.02)
            if (workdir / ".lock").read_bytes() != before:
                break
        else:
            pytest.fail("the lock was not renewed after the outage")
    assert len(calls) > 4
