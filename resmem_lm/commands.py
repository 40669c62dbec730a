"""Run the commands of `resmem`: read the configuration, then run the stages in order."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.runner import arguments_of
from beam_pipelines.sample_documents import sample_documents
from beam_pipelines.search_neighbors import search
from resmem_lm import config
from resmem_lm.errors import UserError
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.maintenance.append import append
from resmem_lm.maintenance.compact import compact
from resmem_lm.maintenance.delete import delete
from resmem_lm.maintenance.verify import verify
from resmem_lm.model.take_checkpoint import take_checkpoint
from resmem_lm.model.train import train
from resmem_lm.planning.plan import plan
from resmem_lm.report.inspect import format_tokens, inspect
from resmem_lm.report.report import write_report
from resmem_lm.report.tables import format_results, format_study
from resmem_lm.studies.baselines import study_baselines
from resmem_lm.studies.datastore_size import study_datastore_size
from resmem_lm.studies.decomposition import study_decomposition
from resmem_lm.studies.examples import study_examples
from resmem_lm.studies.model_size import study_model_size
from resmem_lm.studies.residual_size import study_residual_size
from resmem_lm.studies.sensitivity import study_sensitivity
from resmem_lm.studies.shift import study_shift
from resmem_lm.studies.sources import study_sources
from resmem_lm.studies.theory import study_theory
from resmem_lm.text.documents import prepare_documents
from resmem_lm.text.vocabulary import make_vocabulary
from resmem_lm.workdir.lock import locked
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import Stage
from resmem_lm.workdir.storage import Record, read_json, remove, write_bytes

STUDIES: dict[str, Stage] = {
    study.name.removeprefix("study-"): study
    for study in (
        study_baselines,
        study_datastore_size,
        study_decomposition,
        study_examples,
        study_model_size,
        study_residual_size,
        study_sensitivity,
        study_shift,
        study_sources,
        study_theory,
    )
}
Settings = dict[str, Record]  # settings of every stage, by the name of its function


def stages_of(command: str) -> list[Stage]:
    """Return the stages that a command runs under the parsed configuration."""
    has_checkpoint = config.is_set("take_checkpoint.checkpoint")
    first = [
        sample_documents if config.is_set("sample_documents.train") else prepare_documents,
        make_vocabulary,
        take_checkpoint if has_checkpoint else train,
    ]
    rest = {"build": [build_datastore], "index": [build_index], "evaluate": [search, evaluate], "report": [write_report]}
    if command == "run":
        return [*first, *(stage for stages in rest.values() for stage in stages)]
    if command == "train":
        return first
    # With a checkpoint from elsewhere there is no training, so `build` starts with the first stages.
    return [*(first if command == "build" and has_checkpoint else []), *rest[command]]


def _parse(gin_files: Sequence[str], bindings: list[str]) -> Settings:
    """Return the settings of every stage."""
    if not gin_files:
        raise UserError("no --gin_file: give one, such as --gin_file=configs/demo.gin")
    config.parse(list(gin_files), bindings)
    return {stage.__name__: config.parameters(stage) for stage in stages_of("run")}


def run_stages(
    command: str,
    workdir: str,
    gin_files: Sequence[str],
    bindings: list[str],
    pipeline_options: str = "",
    index_memory_gib: float | None = None,
    append: Sequence[str] = (),
) -> None:
    """Run the stages of a command; print the table and the path of the report."""
    run, settings = Run(workdir), _parse(gin_files, bindings)
    if pipeline_options:
        arguments_of(pipeline_options)  # raises before anything is written
    for values in settings.values():
        if "pipeline_options" in values and pipeline_options:
            values["pipeline_options"] = pipeline_options
    if index_memory_gib is not None:
        settings["build_index"]["memory_gib"] = index_memory_gib
    if append:
        _append(run, list(append), pipeline_options)
        return
    for stage in stages_of("run"):
        stage.check(run, **settings[stage.__name__])
    with _configured(run, settings):
        for stage in stages_of(command):
            result = stage(run, **settings[stage.__name__])
            if stage is build_datastore:
                print(_format_counts(result["counts"], run.record("documents")["result"]["documents"]), file=sys.stderr)
    if command in ("evaluate", "report", "run"):
        print(format_results(read_json(run.results)))
    if command in ("report", "run"):
        print(f"Report: {run.report}")


@contextlib.contextmanager
def _configured(run: Run, settings: Settings) -> Iterator[None]:
    """Hold the lock of a work directory whose config.gin has these settings."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run.path))
            write_bytes(run.config, config.operative(settings).encode())
            run.record_config()
        except OSError as error:
            raise UserError(f"--workdir={run} cannot be written ({error.strerror}): make room there or name another directory") from None
        yield


def _format_counts(counts: dict[str, int], documents: dict[str, int]) -> str:
    """Return one line about what the build processed."""
    skipped = ", ".join(
        f"{documents[why]:,} {why.replace('_', '-')}" for why in ("empty", "duplicate", "near_duplicate") if why in documents
    )
    padding = 1 - counts["window_tokens"] / max(1, counts["computed_tokens"])
    return (
        f"build: {counts['tokens']:,} tokens of {counts['documents']:,} documents in {counts['windows']:,} windows; "
        f"{padding:.1%} of the computed tokens were padding; documents skipped: {skipped}"
    )


def _append(run: Run, text: list[str], pipeline_options: str) -> None:
    counts = append(run, text, pipeline_options=pipeline_options)
    print(
        f"{counts['added']:,} documents added; skipped: {counts['duplicate']:,} near-duplicates, {counts['empty']:,} empty, "
        f"{counts['held_out']:,} of groups in validation or test. "
        f"The datastore has {counts['rows']:,} rows: run `resmem index`, then `resmem evaluate`."
    )


def run_plan(workdir: str | None, gin_files: Sequence[str], bindings: list[str], given: dict[str, float]) -> None:
    """Print the plan of an experiment. Numbers in `given` replace configured ones of `plan`, `Amounts` and `Rates`."""
    settings = _parse(gin_files, ["plan.amounts = @Amounts()", "plan.rates = @Rates()", *bindings])
    arguments = config.parameters(plan)
    for name in ("amounts", "rates"):
        fields = {field.name for field in dataclasses.fields(arguments[name])}
        arguments[name] = dataclasses.replace(arguments[name], **{key: value for key, value in given.items() if key in fields})
    arguments |= {name: value for name, value in given.items() if name in arguments}
    plan(Run(workdir) if workdir else None, **(arguments | {"settings": settings, "text_stages": stages_of("run")[:2]}))


def run_study(name: str, workdir: str, gin_files: Sequence[str], bindings: list[str]) -> None:
    """Run a study, print its table, and write the report again with it."""
    run, study = Run(workdir), STUDIES[name]
    config.parse(list(gin_files), bindings)
    study(run, **config.parameters(study))
    print(format_study(read_json(run.studies / name / "results.json")))
    print(f"Numbers and plot: {run.studies / name}")
    if run.results.exists():
        remove(run.record_path("report"))  # its inputs are the same, but it has one more section
        write_report(run)
        print(f"Report: {run.report}")


def _finished_run(workdir: str) -> Run:
    run = Run(workdir)
    if not run.stages.exists():
        raise UserError(f"{run} is not a work directory, because it has no stages/: name the directory of a run")
    return run


def run_verify(workdir: str) -> int:
    """Print the problems of a work directory; return 1 if there are any."""
    problems = verify(_finished_run(workdir))
    print("\n".join(problems) if problems else f"{workdir}: no problems found")
    return 1 if problems else 0


def run_inspect(workdir: str, text: str) -> None:
    """Print the predictions for each token of a text."""
    print(format_tokens(inspect(_finished_run(workdir), text)))


def run_delete(workdir: str, document: str | None, source: str | None) -> None:
    """Delete documents."""
    counts = delete(_finished_run(workdir), document=document, source=source)
    print(f"{counts['documents']:,} documents deleted, {counts['rows']:,} rows; `resmem compact` removes them from the files")


def run_compact(workdir: str) -> None:
    """Remove deleted rows from the files."""
    counts = compact(_finished_run(workdir))
    print(f"{counts['shards']:,} shards rewritten: {counts['rows_before']:,} rows before, {counts['rows']:,} now")
