"""Work directories that a study makes from a finished one, with some of its stages in common.

WORKDIR/derived/NAME is a work directory like any other: every stage in it is skipped when it is finished and goes on where it stopped.
"""

from typing import Any

from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.search_neighbors import search
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.workdir.run import Run, output_of
from resmem_lm.workdir.storage import Record, files_below, inside, read_json, remove, write_bytes, write_json


def derive(run: Run, name: str, stages: tuple[str, ...]) -> Run:
    """WORKDIR/derived/NAME, with copies of what these stages wrote. One that was made from other results is made anew.

    Args:
        run: of a finished run.
        name: of the derived one, such as "model-size/emb-64".
        stages: those in common: "documents", "vocabulary", "train", "build".

    Raises:
        UserError: one of the stages has not finished in `run`.
    """
    target = Run(run.derived / name)
    records = {stage: run.finished(stage) for stage in stages}
    places = {stage: target.record_path(stage) for stage in stages}
    changed = any(place.exists() and read_json(place) != records[stage] for stage, place in places.items())
    # `build --append` adds documents, of which their stage's record does not tell.
    ours, copied = (some.documents / "manifest.json" for some in (run, target))
    if changed or ("documents" in stages and copied.exists() and read_json(copied) != read_json(ours)):
        remove(target.path)
    for stage, place in places.items():
        if place.exists():
            continue
        for output in output_of(stage).paths:
            for file in files_below(run.path / output):
                write_bytes(target.path / inside(file, run.path), file.read_bytes())
        write_json(place, records[stage])
    return target


def settings_of(run: Run, stage: str) -> Record:
    """With what a finished stage was run, as JSON has it."""
    settings: Record = run.finished(stage)["settings"]
    return settings


def checkpoint_steps(steps: int) -> int:
    """Between the checkpoints of a short training: killed, it loses a quarter at most."""
    return max(1, min(1000, steps // 4))


def build_and_evaluate(run: Run, target: Run, **build: Any) -> Record:
    """Builds, indexes, searches and evaluates in a derived work directory as in the finished run; returns its results.

    Args:
        run: the finished run.
        target: the derived one, with documents, vocabulary and checkpoint.
        build: settings of `build_datastore` that differ from those of the run.
    """
    build_datastore(target, **settings_of(run, "build") | build)
    build_index(target, **settings_of(run, "index"))
    search(target, **settings_of(run, "search"))
    evaluate(target, **settings_of(run, "evaluate"))
    return read_json(target.results)
