"""Measure several ways to do one thing in turns, and print the ratios of their times.

Absolute times mislead on a shared machine, so every way runs once per round, and ratios are within rounds.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from resmem_lm.planning.machine import processor

Times = dict[str, list[float]]


def interleaved(ways: dict[str, Callable[[], Any]], *, rounds: int = 5) -> Times:
    """Return the seconds of every way in every round. A first round (compilation, caches) is not counted."""
    times: Times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Times, one: str, other: str) -> str:
    """Return median and range of the ratios of two ways' seconds, round by round: "1.07 (1.05 to 1.11)"."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def median(times: Times, name: str) -> float:
    """Return the median of a way's seconds."""
    return statistics.median(times[name])


def machine() -> str:
    """Return the processor and the number of cores."""
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores"


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table in Markdown, for `docs/performance.md`."""
    columns = list(columns)
    print(f"\n### {title}\n\n{machine()}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
