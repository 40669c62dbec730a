"""Write scalars for TensorBoard."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epy

with epy.lazy_imports():
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2


@contextlib.contextmanager
def metrics(folder: Path, *, begin: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Open an event file in `folder` and yield a function that writes the scalars of a step.

    TensorBoard ignores events that an interrupted run wrote after step `begin`. Events are written synchronously, because the thread of
    tensorboardX's SummaryWriter survives a full disk and prints tracebacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    events = event_file_writer.EventsWriter(str(folder / "events"))

    def write_event(step: int, **content: Any) -> None:
        events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    def write(step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            write_event(step, summary=summary.scalar(name, value))
        events.flush()

    write_event(begin + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
    try:
        yield write
    finally:
        events.close()
