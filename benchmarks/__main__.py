"""Measure each part of the pipeline on this machine, beside a lower bound and other libraries.

    python -m benchmarks [NAME ...] [--workdir=runs/bench]

WORKDIR is a finished work directory; `docs/performance.md` uses one of configs/bench_t5_small.gin. `make bench` also turns on huge pages.
"""

import argparse
import importlib
from pathlib import Path

from resmem_lm.workdir.run import Run

PARTS = ("encode", "build", "search", "suffixes", "rows", "knn_lm", "merge", "evaluation", "bytes_per_row", "training", "start")


def main() -> None:
    """Run the named parts, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: take some of {', '.join(PARTS)}")
    if not (arguments.workdir / "results.json").exists():
        parser.error(f"{arguments.workdir} is not finished: resmem run --gin_file=configs/bench_t5_small.gin --workdir={arguments.workdir}")
    for name in arguments.parts or PARTS:
        importlib.import_module(f"benchmarks.{name}").run(Run(arguments.workdir))


if __name__ == "__main__":
    main()
