"""Show the progress of long work: a bar on a terminal, otherwise a line every few seconds."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15


class Reporter:
    """The progress of one stage."""

    def __init__(self, name: str, total: int | None, done: int, unit: str, bar: Progress | None) -> None:
        self.name, self.total, self.unit, self.bar = name, total, unit, bar
        self.begun, self.began_at = done, time.monotonic()
        self.last = self.began_at if total is None else -float("inf")
        self.task = bar.add_task(name, total=total, completed=done, detail="") if bar else None

    def update(self, done: int, detail: str = "") -> None:
        """Show the number of finished units and a detail."""
        now = time.monotonic()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, detail=detail)
        elif now - self.last > SECONDS_BETWEEN_LINES or done == self.total:
            elapsed = now - self.began_at
            of_total = "" if self.total is None else f" of {self.total:,}"
            line = f"{self.name}: {done:,}{of_total} {self.unit}, {elapsed:.0f} s"
            if self.total is not None and done > self.begun:
                line += f", {elapsed / (done - self.begun) * (self.total - done):.0f} s left"
            print(f"{line}; {detail}" if detail else line, file=sys.stderr, flush=True)
            self.last = now


@contextlib.contextmanager
def progress(name: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Reporter]:
    """Show the progress of a stage on standard error while the block runs. A `total` of None is unknown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Reporter(name, total, done, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Reporter(name, total, done, unit, bar)
