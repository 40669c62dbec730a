"""Measurements of this machine: its processor, the time of a function, the peak memory of this process."""

import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def least(function: Callable[[], Any], times: int = 3) -> float:
    """Return the shortest time of several calls in seconds. The first call warms up and is not counted."""
    function()
    seconds = []
    for _ in range(times):
        start = time.monotonic()
        function()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory`, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the most bytes that this process has held since `reset_peak_memory`; 0 where the system does not report them."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
