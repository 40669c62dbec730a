"""Measure the start time of each command on a finished work directory. The commands only read records there."""

import statistics
import subprocess
import sys
import time

from benchmarks.measure import interleaved, ratio, table
from resmem_lm.workdir.run import Run

COMMANDS = ("run", "train", "build", "index", "evaluate", "report")
FLOOR = "import numpy"


def run(run: Run) -> None:
    """Print the table."""
    settings = [f"--gin_file={run.config}", f"--workdir={run}"]
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
    """Run Python; return the seconds until it prints its first line or ends."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        output = process.stdout.readline()
        seconds = time.perf_counter() - start
        output += process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{arguments}: {output.decode()}")
    return seconds


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
