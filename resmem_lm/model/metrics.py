"""Scalars for TensorBoard."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epy

with epy.lazy_imports():
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2


class Metrics:
    """Writes at once and in this thread: tensorboardX's SummaryWriter has a thread that outlives a full disk, with tracebacks."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds the scalars of a step."""
        for name, value in scalars.items():
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))
        self._events.flush()


@contextlib.contextmanager
def metrics(folder: Path, *, begin: int) -> Iterator[Metrics]:
    """A file of events in `folder`. TensorBoard drops what an interrupted run wrote after step `begin`."""
    folder.mkdir(parents=True, exist_ok=True)
    events = event_file_writer.EventsWriter(str(folder / "events"))
    events.write_event(
        event_pb2.Event(wall_time=time.time(), step=begin + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
    )
    try:
        yield Metrics(events)
    finally:
        events.close()
