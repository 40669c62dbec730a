"""This machine: its processor, and what something takes on it."""

import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def least(function: Callable[[], Any], times: int = 3) -> float:
    """The shortest of some runs, behind one that is not counted."""
    function()
    seconds = []
    for _ in range(times):
        start = time.monotonic()
        function()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def reset_peak_memory() -> None:
    """Where Linux can, `peak_memory` begins anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes that this process has held since `forget_peak_memory`; 0 where that is not told."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
