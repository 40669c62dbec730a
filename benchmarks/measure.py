"""Times of several ways to do one thing, taken in turns, told as ratios.

Absolute times mislead where others share the machine; so every way runs once a round, and ratios are taken within rounds.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from resmem_lm.planning.machine import processor

Times = dict[str, list[float]]


def interleaved(ways: dict[str, Callable[[], Any]], *, rounds: int = 5) -> Times:
    """Seconds of every way in every round, after one round that is not counted (compilation, caches)."""
    times: Times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Times, one: str, other: str) -> str:
    """Median and spread of one's seconds over the other's, round by round: "1.07 (1.05 to 1.11)"."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def median(times: Times, name: str) -> float:
    """Seconds."""
    return statistics.median(times[name])


def machine() -> str:
    """What the numbers were measured on."""
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores"


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Prints a table in Markdown, as `docs/performance.md` shows it."""
    columns = list(columns)
    print(f"\n### {title}\n\n{machine()}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
