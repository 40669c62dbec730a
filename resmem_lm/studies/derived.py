"""Derive work directories for studies from a finished run, with copies of some of its stages.

WORKDIR/derived/NAME is a work directory like any other: a finished stage is skipped, and an interrupted one resumes.
"""

from typing import Any

from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.search_neighbors import search
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.workdir.run import Run, output_of
from resmem_lm.workdir.storage import Record, files_below, inside, read_json, remove, write_bytes, write_json


def derive(run: Run, name: str, stages: tuple[str, ...]) -> Run:
    """Return WORKDIR/derived/NAME with copies of the output of `stages`. Delete it first if that output has changed in the run."""
    target = Run(run.derived / name)
    records = {stage: run.finished(stage) for stage in stages}
    copies = {stage: target.record_path(stage) for stage in stages}
    changed = any(copy.exists() and read_json(copy) != records[stage] for stage, copy in copies.items())
    # `resmem build --append` changes the manifest of the documents, but not the record of their stage.
    manifest, copied = (some.documents / "manifest.json" for some in (run, target))
    if changed or ("documents" in stages and copied.exists() and read_json(copied) != read_json(manifest)):
        remove(target.path)
    for stage, copy in copies.items():
        if copy.exists():
            continue
        for output in output_of(stage).paths:
            for file in files_below(run.path / output):
                write_bytes(target.path / inside(file, run.path), file.read_bytes())
        write_json(copy, records[stage])
    return target


def checkpoint_steps(steps: int) -> int:
    """Return the steps between checkpoints so that an interrupted training loses at most a quarter of its steps."""
    return max(1, min(1000, steps // 4))


def build_and_evaluate(run: Run, target: Run, **build: Any) -> Record:
    """Build, index, search and evaluate in `target` with the run's settings. `build` replaces settings of `build_datastore`."""
    build_datastore(target, **run.finished("build")["settings"] | build)
    build_index(target, **run.finished("index")["settings"])
    search(target, **run.finished("search")["settings"])
    evaluate(target, **run.finished("evaluate")["settings"])
    return read_json(target.results)
