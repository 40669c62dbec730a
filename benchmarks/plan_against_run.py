"""How right `resmem plan` is: its bytes and times beside those of a finished run.

    python -m benchmarks.plan_against_run WORKDIR --gin_file=... [--gin.NAME=VALUE ...]

WORKDIR is a finished run with the same configuration. Nothing is written to it.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from resmem_lm import config
from resmem_lm.evaluate import evaluate
from resmem_lm.main import import_stages, stages_of
from resmem_lm.plan import plan
from resmem_lm.rehearsal import file_bytes
from resmem_lm.workdir import read_json


def main() -> None:
    """Prints plan, run and their ratio for each kind of file and each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--gin_file", action="append", required=True)
    arguments, rest = parser.parse_known_args()
    import_stages()
    config.parse(arguments.gin_file, [argument.removeprefix("--gin.") for argument in rest])
    stages = stages_of("run")
    settings = {stage.__name__: config.parameters(stage) for stage in stages}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("documents", "vocabulary", "stages"):
            shutil.copytree(arguments.workdir / name, Path(folder) / name)
        made = plan(Path(folder), settings, stages[:2], **config.parameters(plan))
    run = file_bytes(arguments.workdir)
    print(f"{'file':45}{'plan':>15}{'run':>15}  ratio")
    for name, size in made.bytes.items():
        print(f"{name:45}{size:15,}{run.get(name, 0):15,}  {size / max(run.get(name, 0), 1):.4f}")
    print(f"{'together':45}{sum(made.bytes.values()):15,}{sum(run.values()):15,}  {sum(made.bytes.values()) / sum(run.values()):.4f}")
    begin = time.monotonic()
    evaluate.function(arguments.workdir, **settings["evaluate"])  # its time is not in its own results
    took = {"evaluate": time.monotonic() - begin}
    took |= {name: read_json(arguments.workdir / "stages" / f"{name}.json")["seconds"] for name in made.seconds if name != "evaluate"}
    print(f"{'stage':45}{'plan, s':>15}{'run, s':>15}  ratio")
    for name, seconds in made.seconds.items():
        print(f"{name:45}{seconds:15.1f}{took[name]:15.1f}  {seconds / took[name]:.2f}")


if __name__ == "__main__":
    main()
