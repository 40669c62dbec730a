"""How right `resmem plan` is: its bytes and times beside those of a finished run.

    python -m benchmarks.plan_against_run WORKDIR --gin_file=... [--gin.NAME=VALUE ...]

WORKDIR is a finished run with the same configuration. Nothing is written to it.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import resmem_lm.commands  # noqa: F401 - registers every stage with gin
from resmem_lm import config
from resmem_lm.commands import stages_of
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.planning.plan import plan
from resmem_lm.planning.sizes import file_bytes
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json


def main() -> None:
    """Prints plan, run and their ratio for each kind of file and each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--gin_file", action="append", required=True)
    arguments, rest = parser.parse_known_args()
    config.parse(arguments.gin_file, [argument.removeprefix("--gin.") for argument in rest])
    stages = stages_of("run")
    settings = {stage.__name__: config.parameters(stage) for stage in stages}
    took = {stage.name: read_json(stage.record_path(arguments.workdir)).get("seconds", 0.0) for stage in stages}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("documents", "vocabulary", "stages"):
            shutil.copytree(arguments.workdir / name, Path(folder) / name)
        made = plan(Run(Path(folder)), **(config.parameters(plan) | {"settings": settings, "text_stages": stages[:2]}))
        copy = Path(folder) / "copy"
        shutil.copytree(arguments.workdir, copy, copy_function=lambda source, target: Path(target).symlink_to(Path(source).absolute()))
        (copy / "results.json").unlink()
        begin = time.monotonic()
        evaluate.function(copy, **settings["evaluate"])
        print(f"\nevaluate here: {time.monotonic() - begin:.1f} s; in the run:")
    run = file_bytes(Run(arguments.workdir))
    kinds = {name: (size, run.get(name, 0)) for name, size in made.bytes.items()}
    kinds["all of these"] = sum(size for size, _ in kinds.values()), sum(size for _, size in kinds.values())
    kinds["WORKDIR"] = kinds["all of these"][0], sum(run.values())
    for name, (planned, size) in kinds.items():
        print(f"{name:32}{planned:15,}{size:15,}" + (f"  {planned / size:.4f}" if size else ""))
    for name, stage in made.stages.items():
        print(f"{name:32}{stage.seconds:15.1f}{took[name]:15.1f}  {stage.seconds / took[name]:.2f}")


if __name__ == "__main__":
    main()
