"""Work on many units, of which a Beam runner takes one at a time. Without Beam: a finished work directory has nothing to give it.

Importing Beam takes about a second. So what says which units there are, and whether any is left, knows only this module.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.storage import AnyPath, children, is_local


class Work(Protocol):
    """What is done with every unit, in any process: a small picklable object."""

    def setup(self) -> Any:
        """What a process keeps for all of its units and threads (a model, a lock)."""

    def process(self, unit: Any, kept: Any) -> Iterator[Any]:
        """Does one unit, perhaps again, and yields something small."""


def run_units(label: str, units: Sequence[Any], work: Work, options: str, *, published: AnyPath, names: Sequence[str]) -> None:
    """Runs `work` on every unit, on any runner: one linear chain, in which no array crosses a stage.

    Args:
        label: of the work, for the runner's pages and for progress.
        units: small picklable values, each of which tells what to do.
        work: takes a unit and publishes what it makes.
        options: Beam's.
        published: the folder where the work publishes.
        names: what is published there in the end, some of it already; progress is counted by it.
    """
    if not units:
        return
    from beam_pipelines.runner import run_chain

    with _shown(label, published, set(names)):
        run_chain(label, units, work, options)


def count(name: str, number: int) -> None:
    """Adds to a counter on the runner's pages, from within `Work.process`."""
    from apache_beam.metrics import Metrics

    Metrics.counter("resmem", name).inc(number)


@contextlib.contextmanager
def _shown(label: str, published: AnyPath, names: set[str]) -> Iterator[None]:
    """Shows how much of `names` is published, whichever process does it."""

    def count() -> int:
        return sum(path.name.removesuffix(".json") in names for path in children(published, "*.json"))

    over = threading.Event()
    with progress(label.lower(), total=len(names), done=count(), unit="shards") as bar:

        def show() -> None:
            with contextlib.suppress(Exception):  # an outage, in the words of any storage's package: the work is not hurt by it
                bar.update(count())

        def watch() -> None:
            while not over.wait(1.0 if is_local(published) else 15.0):
                show()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            show()
