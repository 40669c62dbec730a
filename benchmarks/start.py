"""How long a command takes on a finished work directory, where all of it is starting and looking at records."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import interleaved, ratio, table

COMMANDS = ("run", "train", "build", "index", "evaluate", "report")
FLOOR = "import numpy"


def run(workdir: Path) -> None:
    """Prints the table."""
    settings = [f"--gin_file={workdir / 'config.gin'}", f"--workdir={workdir}"]
    arguments = {
        "Python alone": ["-c", "pass"],
        FLOOR: ["-c", "import numpy"],
        "import jax": ["-c", "import jax.numpy"],
        "resmem --help": ["-m", "resmem_lm", "--help"],
        **{f"resmem {command}": ["-m", "resmem_lm", command, *settings] for command in COMMANDS},
    }
    first_lines: dict[str, list[float]] = {name: [] for name in arguments}
    times = interleaved({name: lambda name=name: first_lines[name].append(_first_line(arguments[name])) for name in arguments})
    table(
        "Start of a command on a finished work directory",
        ("command", "s to its first line", "s to its end", f"times {FLOOR}"),
        ((name, _spread(first_lines[name][1:]), _spread(times[name]), ratio(times, name, FLOOR)) for name in times),
    )


def _first_line(arguments: list[str]) -> float:
    """Runs Python to the end; returns the seconds until it had said one line, or ended without one."""
    # As from a shell: what this process was started with would spare the command its own restart.
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout
        process.stdout.readline()
        seconds = time.perf_counter() - start
        said = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{arguments}: {said.decode()}")
    return seconds


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
