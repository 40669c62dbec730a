"""Compare the bytes and times of `resmem plan` with those of a finished run.

    python -m benchmarks.plan_against_run WORKDIR --gin_file=... [--gin.NAME=VALUE ...]

WORKDIR is a finished run with the same configuration, made on this machine. Nothing is written to it.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from resmem_lm import config
from resmem_lm.commands import stages_of
from resmem_lm.planning.plan import plan
from resmem_lm.report.tables import aligned
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import files_below, inside


def file_bytes(run: Run) -> dict[str, int]:
    """Return the bytes of each kind of file of a finished run, with the names of `planned_bytes`."""
    found: dict[str, int] = {}
    for path in files_below(run.path):
        kind = inside(path, run.path).split("/")[0]
        if kind in ("datastore", "neighbors", "index"):
            record = path.suffix == ".json" and (path.parent == run.path / kind or path.name == "shard.json")
            kind += "/*.json" if record else f"/{path.name}" if kind == "datastore" else ""
        found[kind] = found.get(kind, 0) + path.stat().st_size
    return found


def main() -> None:
    """Print plan, run and their ratio for each kind of file and each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--gin_file", action="append", required=True)
    arguments, rest = parser.parse_known_args()
    config.parse(arguments.gin_file, [argument.removeprefix("--gin.") for argument in rest])
    stages, run = stages_of("run"), Run(arguments.workdir)
    settings = {stage.__name__: config.parameters(stage) for stage in stages}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("documents", "vocabulary", "stages"):
            shutil.copytree(arguments.workdir / name, Path(folder) / name)
        made = plan(Run(Path(folder)), **(config.parameters(plan) | {"settings": settings, "text_stages": stages[:2]}))
    sizes = file_bytes(run)
    compared = {name: (size, sizes.get(name, 0)) for name, size in made.bytes.items()}
    compared["together"] = sum(size for size, _ in compared.values()), sum(size for _, size in compared.values())
    compared["WORKDIR"] = compared["together"][0], sum(sizes.values())
    files = [[name, f"{planned:,}", f"{size:,}", f"{planned / max(1, size):.4f}"] for name, (planned, size) in compared.items()]
    seconds = {name: (stage.seconds, run.record(name)["seconds"]) for name, stage in made.stages.items()}
    times = [[name, f"{planned:.1f}", f"{took:.1f}", f"{planned / took:.2f}"] for name, (planned, took) in seconds.items()]
    for header, lines in ((["file", "plan, bytes", "run, bytes", "ratio"], files), (["stage", "plan, s", "run, s", "ratio"], times)):
        print("\n" + aligned(header, lines, right=True))


if __name__ == "__main__":
    main()
