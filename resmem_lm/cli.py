"""The command `resmem`: a thin layer over the stage functions.

resmem run --gin_file=configs/demo.gin --workdir=runs/demo [--gin.NAME=VALUE ...]
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from typing import Any

from resmem_lm.errors import STORAGE_CLIENTS, UserError

STAGES = {
    "train": "text, vocabulary and pretraining, up to checkpoints",
    "build": "the datastore, through Beam",
    "index": "the index of the datastore's keys",
    "evaluate": "neighbors, hyperparameters and results.json",
    "report": "report.html",
    "run": "all of these, one after another",
    "plan": "what all of these will take: rows, bytes, memory and time, from a rehearsal on this machine",
}
STUDIES = {
    "sensitivity": "test accuracy against k, sigma, T and lambda (paper: Figures 5 and 6)",
    "decomposition": "TPR, FPR and gain by two rules of choosing (paper: Table 2)",
    "residual-size": "accuracy and bytes for the largest entries of each residual (paper: appendix C)",
    "baselines": "every use of the memory, by frequency, distance and confidence, and the infinity-gram model (paper: section 3.2)",
    "datastore-size": "gain with a tenth to all of the datastore (paper: Figure 3a)",
    "examples": "tokens that ResMem mends where DeepNet is wrong but near, to be searched in the report (paper: Figure 2)",
    "model-size": "DeepNet and ResMem for models of growing size (paper: Figure 3b and Table 1)",
    "shift": "a memory of a text that the model was not trained on, beside fine-tuning on it (paper: section 6)",
    "theory": "linear regression with a memory (paper: section 5)",
}
KEEPING = {
    "verify": "check every file and row of a work directory against its records",
    "delete": "delete documents: none of their rows is a neighbor any more",
    "compact": "take the rows of deleted documents out of the files",
    "inspect": "what DeepNet and ResMem predict for each token of a text, and the neighbors that changed it",
}
PLAN_NUMBERS = {
    "rows": "tokens in the datastore; else those of WORKDIR's text are counted",
    "queries": "tokens of validation and test; likewise",
    "documents": "documents of rows and queries; likewise",
    "bytes_per_token": "of documents that are not counted",
    "workers": "that share the work",
    "memory_gib": "of one worker; else build_index.memory_gib",
    "train_tokens_per_second": "in training; else measured, as the rates below",
    "tokens_per_second": "of windows, context included, encoded by one worker of the build",
    "index_rows_per_second": "put into the index by one worker",
    "query_tokens_per_second": "of windows, encoded for the search",
    "queries_per_second": "looked up in one shard of the index",
    "evaluated_queries_per_second": "in the evaluation",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resmem", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in STAGES.items():
        command = commands.add_parser(name, help=text, description=text, epilog="Any setting: --gin.NAME=VALUE, strings in quotes.")
        command.add_argument("--gin_file", action="append", default=[], help="a gin file; may be given again")
        command.add_argument("--workdir", required=name != "plan", help="where everything is written")
        if name == "plan":
            for number, meaning in PLAN_NUMBERS.items():
                command.add_argument(f"--{number}", type=float, help=meaning)
        if name in ("train", "build", "index", "evaluate", "run"):
            command.add_argument("--pipeline_options", default="", help='Beam\'s own options, such as "--runner=..."')
        if name in ("index", "run"):
            command.add_argument("--index_memory_gib", type=float, help="of one worker: what a shard of the index may take to build")
        if name == "build":
            command.add_argument(
                "--append", action="append", metavar="TEXT", help="add the documents of these files to a finished datastore"
            )
    command = commands.add_parser("study", help="one of the paper's studies, written to WORKDIR/studies and the report")
    command.add_argument("study", choices=STUDIES, metavar="NAME", help="; ".join(f"{name}: {text}" for name, text in STUDIES.items()))
    command.add_argument("--gin_file", action="append", default=[], help="a gin file; may be given again")
    command.add_argument("--workdir", required=True, help="where it is written")
    for name, text in KEEPING.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "verify":
            command.add_argument("workdir")
        else:
            command.add_argument("--workdir", required=True)
        if name == "inspect":
            command.add_argument("text", help="in quotes")
        if name == "delete":
            command.add_argument("--document", help="a document's id")
            command.add_argument("--source", help="a file, folder or address from which documents came")
    return parser


def import_stages() -> None:
    """Imports every stage, so that gin knows every name."""
    stages = ("append", "documents", "search"), ("evaluate", "plan", "report", "take_checkpoint")  # which import the others
    for package, modules in zip(("beam_pipelines", "resmem_lm"), stages, strict=True):
        for module in modules:
            importlib.import_module(f"{package}.{module}")


def stages_of(command: str) -> list[Any]:
    """The stages of a command under the parsed configuration, with those before them that it also runs."""
    from beam_pipelines.build_datastore import build_datastore
    from beam_pipelines.build_index import build_index
    from beam_pipelines.sample_documents import sample_documents
    from beam_pipelines.search_neighbors import search
    from resmem_lm.config import is_set
    from resmem_lm.evaluation.evaluate import evaluate
    from resmem_lm.model.take_checkpoint import take_checkpoint
    from resmem_lm.model.train import train
    from resmem_lm.report.report import write_report
    from resmem_lm.text.documents import prepare_documents
    from resmem_lm.text.vocabulary import make_vocabulary

    trained_elsewhere = is_set("take_checkpoint.checkpoint")
    by_command: dict[str, list[Any]] = {
        "train": [
            sample_documents if is_set("sample_documents.train") else prepare_documents,
            make_vocabulary,
            take_checkpoint if trained_elsewhere else train,
        ],
        "build": [build_datastore],
        "index": [build_index],
        "evaluate": [search, evaluate],
        "report": [write_report],
    }
    if command == "run":
        return [stage for stages in by_command.values() for stage in stages]
    # With a checkpoint from elsewhere there is no training that one would want to see alone.
    return by_command["train"] * (command == "build" and trained_elsewhere) + by_command[command]


def _execute(arguments: argparse.Namespace, bindings: list[str]) -> None:
    from resmem_lm import config
    from resmem_lm.report.tables import table
    from resmem_lm.workdir.lock import locked
    from resmem_lm.workdir.stages import record_config
    from resmem_lm.workdir.storage import read_json, to_path, write_bytes

    workdir: Any = to_path(arguments.workdir) if arguments.workdir else None
    import_stages()
    from resmem_lm.planning.plan import plan

    if not arguments.gin_file:
        raise UserError("no --gin_file: give one, such as --gin_file=configs/demo.gin")
    config.parse(arguments.gin_file, bindings)
    everything = stages_of("run")
    settings = {stage.__name__: config.parameters(stage) for stage in everything}
    if arguments.command == "plan":
        given = {name: value for name in PLAN_NUMBERS if (value := getattr(arguments, name)) is not None}
        plan(workdir, **(config.parameters(plan) | given | {"settings": settings, "text_stages": everything[:2]}))
        return
    pipeline_options = getattr(arguments, "pipeline_options", "")
    if pipeline_options:
        from beam_pipelines.runner import arguments_of

        arguments_of(pipeline_options)
    for values in settings.values():
        if "pipeline_options" in values and pipeline_options:
            values["pipeline_options"] = pipeline_options
    if getattr(arguments, "index_memory_gib", None) is not None:
        settings["build_index"]["memory_gib"] = arguments.index_memory_gib
    if getattr(arguments, "append", None):
        _append(workdir, arguments.append, pipeline_options)
        return
    chosen = stages_of(arguments.command)
    for stage in everything:
        stage.check(workdir, **settings[stage.__name__])
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(workdir))
            write_bytes(workdir / "config.gin", config.operative(settings).encode())
            record_config(workdir)
        except OSError as error:
            raise UserError(
                f"--workdir={workdir} cannot be written ({error.strerror}): make room there or name another directory"
            ) from None
        for stage in chosen:
            result = stage(workdir, **settings[stage.__name__])
            if stage.name == "build":
                print(_counted(result["counts"], read_json(workdir / "stages" / "documents.json")["result"]["documents"]), file=sys.stderr)
    if arguments.command in ("evaluate", "report", "run"):
        print(table(read_json(workdir / "results.json")))
    if arguments.command in ("report", "run"):
        print(f"Report: {workdir / 'report.html'}")


def _counted(counts: dict[str, int], documents: dict[str, int]) -> str:
    """What the build went through, in a line."""
    skipped = ", ".join(
        f"{documents[why]:,} {why.replace('_', '-')}" for why in ("empty", "duplicate", "near_duplicate") if why in documents
    )
    padding = 1 - counts["window_tokens"] / max(1, counts["computed_tokens"])
    return (
        f"build: {counts['tokens']:,} tokens of {counts['documents']:,} documents in {counts['windows']:,} windows; "
        f"{padding:.1%} of the computed tokens were padding; documents skipped: {skipped}"
    )


def _append(workdir: Any, text: list[str], pipeline_options: str) -> None:
    from resmem_lm.maintenance.append import append

    found = append(workdir, text, pipeline_options=pipeline_options)
    print(
        f"{found['added']:,} documents added; {found['duplicate']:,} are there already or nearly so, {found['empty']:,} are empty, "
        f"{found['held_out']:,} of groups that are validation's or test's. "
        f"{found['rows']:,} rows now: `resmem evaluate` after `resmem index` uses them."
    )


def _study(arguments: argparse.Namespace, bindings: list[str]) -> None:
    from resmem_lm import config
    from resmem_lm.report.report import write_report
    from resmem_lm.workdir.storage import read_json, remove, to_path

    workdir: Any = to_path(arguments.workdir)
    import_stages()
    module = importlib.import_module(f"resmem_lm.studies.{arguments.study.replace('-', '_')}")
    study = getattr(module, f"study_{arguments.study.replace('-', '_')}")
    config.parse(arguments.gin_file, bindings)
    study(workdir, **config.parameters(study))
    print(format_study(read_json(workdir / "studies" / arguments.study / "results.json")))
    print(f"Numbers and plot: {workdir / 'studies' / arguments.study}")
    if (workdir / "results.json").exists():
        remove(workdir / "stages" / "report.json")  # its inputs are the same, but it has one more section
        write_report(workdir)
        print(f"Report: {workdir / 'report.html'}")


def format_study(results: dict[str, Any]) -> str:
    """A study's title and table; of examples only how many there are."""
    from resmem_lm.report.tables import aligned, study_rows

    if "examples" in results:
        return "\n".join(["", results["title"], "", f"{len(results['examples']):,} examples", ""])
    header, *rows = study_rows(results)
    return "\n".join(["", results["title"], "", *aligned(header, rows), ""])


def _keep(arguments: argparse.Namespace) -> int:
    """The commands that need no configuration."""
    from resmem_lm.workdir.storage import to_path

    import_stages()
    workdir: Any = to_path(arguments.workdir)
    if not (workdir / "stages").exists():
        raise UserError(f"{workdir} is no work directory: it has no stages/")
    if arguments.command == "verify":
        from resmem_lm.maintenance.verify import verify

        problems = verify(workdir)
        print("\n".join(problems) if problems else f"{workdir}: all is well")
        return 1 if problems else 0
    if arguments.command == "inspect":
        from resmem_lm.report.inspect import format_tokens, inspect

        print(format_tokens(inspect(workdir, arguments.text)))
        return 0
    from resmem_lm.maintenance.compact import compact
    from resmem_lm.maintenance.delete import delete

    if arguments.command == "delete":
        found = delete(workdir, document=arguments.document, source=arguments.source)
        print(f"{found['documents']:,} documents deleted, {found['rows']:,} rows; `resmem compact` takes them out of the files")
    else:
        found = compact(workdir)
        print(f"{found['shards']:,} shards written anew: {found['rows_before']:,} rows before, {found['rows']:,} now")
    return 0


def use_huge_pages() -> None:
    """Starts this process again with 2 MiB pages for the heap, where glibc can: training is 1.2 times as fast on a CPU (docs/demo.md).

    glibc reads the setting at its start only. One that the user has set stays.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        # Not `-m resmem_lm`, which would import what lies in the current folder in place of libraries.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0; 1 where `verify` found something; 2 after one line about what the user can mend; 130 after Ctrl-C.
    """
    arguments, rest = _parser().parse_known_args(argv)
    try:
        takes_settings = arguments.command not in KEEPING
        unknown = [argument for argument in rest if not (takes_settings and argument.startswith("--gin.") and "=" in argument)]
        if unknown:
            raise UserError(
                f"unknown argument {unknown[0]}: settings are given as --gin.NAME=VALUE (see resmem {arguments.command} --help)"
            )
        if arguments.workdir == "":  # of a shell's variable that is not set
            raise UserError("--workdir is empty: name a directory")
        if arguments.command in KEEPING:
            return _keep(arguments)
        bindings = [argument.removeprefix("--gin.") for argument in rest]
        if arguments.command == "study":
            _study(arguments, bindings)
        else:
            _execute(arguments, bindings)
    except UserError as error:
        print(f"resmem: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):  # XLA's
            reason = " ".join(str(error).split())[:200].rstrip(".")
            print(f"resmem: {reason}: give the device less: a smaller train.batch_size, sequence_length or model", file=sys.stderr)
            return 2
        if not (isinstance(error, OSError) or type(error).__module__.partition(".")[0] in STORAGE_CLIENTS):
            raise
        # Permissions, networks, credentials: the message of the system or of the storage's package names the culprit.
        print(f"resmem: {UserError(f'{error}: mend it and run the same command again')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("resmem: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _quiet_libraries() -> None:
    """Keeps back what libraries say of what we tell in a line, or of nothing.

    On a full disk Orbax logs the traceback of what it also raises, and leaves tasks behind, of which asyncio tells. Beam warns of what only
    Google's cloud needs.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("apitools not found"))
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def script() -> int:
    """The entry point of the installed command."""
    use_huge_pages()
    _quiet_libraries()
    return main()
