"""The command `resmem`: a thin layer over the stage functions.

resmem run --gin_file=configs/demo.gin --workdir=runs/demo [--gin.NAME=VALUE ...]
"""

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from resmem_lm.errors import UserError

STAGES = {
    "train": "text, vocabulary and pretraining, up to checkpoints",
    "build": "the datastore, through Beam",
    "index": "the index of the datastore's keys",
    "evaluate": "neighbours, hyperparameters and results.json",
    "report": "report.html",
    "run": "all of these, one after another",
    "plan": "what all of these will take: rows, bytes, memory and time, from a rehearsal on this machine",
}
PLAN_NUMBERS = {
    "rows": "tokens in the datastore; else those of WORKDIR's text are counted",
    "queries": "tokens of validation and test; likewise",
    "documents": "documents of rows and queries; likewise",
    "bytes_per_token": "of documents that are not counted",
    "workers": "that share the work",
    "memory_gib": "of one worker; else this machine's",
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
        command.add_argument("--workdir", required=name != "plan", type=Path, help="where everything is written")
        if name == "plan":
            for number, meaning in PLAN_NUMBERS.items():
                command.add_argument(f"--{number}", type=float, help=meaning)
        if name in ("train", "build", "run"):
            command.add_argument("--pipeline_options", default="", help='Beam\'s own options, such as "--runner=..."')
    return parser


def import_stages() -> None:
    """Imports every stage, so that gin knows every name."""
    logging.disable(logging.WARNING)  # while Beam warns of what only Google's cloud needs
    for module in ("beam_pipelines.datastore", "beam_pipelines.documents"):
        importlib.import_module(module)
    logging.disable(logging.NOTSET)
    for module in ("evaluate", "plan", "report", "take_checkpoint"):  # which import the others
        importlib.import_module(f"resmem_lm.{module}")


def stages_of(command: str) -> list[Any]:
    """The stages of a command under the parsed configuration, with those before them that it also runs."""
    from beam_pipelines.datastore import build_datastore
    from beam_pipelines.documents import sample_documents
    from resmem_lm.config import is_set
    from resmem_lm.documents import prepare_documents
    from resmem_lm.evaluate import evaluate
    from resmem_lm.index import build_index
    from resmem_lm.report import write_report
    from resmem_lm.search import search
    from resmem_lm.take_checkpoint import take_checkpoint
    from resmem_lm.train import train
    from resmem_lm.vocabulary import make_vocabulary

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
    # With a checkpoint from elsewhere nothing long lies before the build.
    return by_command["train"] * (command == "build" and trained_elsewhere) + by_command[command]


def _execute(arguments: argparse.Namespace, bindings: list[str]) -> None:
    from resmem_lm import config
    from resmem_lm.results import table
    from resmem_lm.workdir import read_json, write_bytes

    workdir: Path = arguments.workdir
    import_stages()
    from resmem_lm.plan import plan

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
    for values in settings.values():
        if "pipeline_options" in values and pipeline_options:
            values["pipeline_options"] = pipeline_options
    chosen = stages_of(arguments.command)
    for stage in everything:
        stage.check(workdir, **settings[stage.__name__])
    try:
        write_bytes(workdir / "config.gin", config.operative(settings).encode())
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error.strerror}): make room there or name another directory") from None
    for stage in chosen:
        stage(workdir, **settings[stage.__name__])
    if arguments.command in ("evaluate", "report", "run"):
        print(table(read_json(workdir / "results.json")))
    if arguments.command in ("report", "run"):
        print(f"Report: {workdir / 'report.html'}")


def _use_huge_pages() -> None:
    """Starts this process again with 2 MiB pages for the heap, where glibc can: training is 1.1 times as fast on a CPU (docs/demo.md).

    glibc reads the setting at its start only. One that the user has set stays.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        # Not `-m resmem_lm`, which would import what lies in the current folder in place of libraries.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 2 after one line about what the user can mend."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        unknown = [argument for argument in rest if not (argument.startswith("--gin.") and "=" in argument)]
        if unknown:
            raise UserError(
                f"unknown argument {unknown[0]}: settings are given as --gin.NAME=VALUE (see resmem {arguments.command} --help)"
            )
        _execute(arguments, [argument.removeprefix("--gin.") for argument in rest])
    except UserError as error:
        print(f"resmem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("resmem: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def script() -> int:
    """The entry point of the installed command."""
    _use_huge_pages()
    return main()
