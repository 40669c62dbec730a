"""Build and evaluate ResMem: a language model with a memory of its residuals.

    resmem run --gin_file=configs/demo.gin --workdir=runs/demo [--gin.NAME=VALUE ...]

Exit codes: 0; 1 if `verify` found a problem; 2 after one line about an error that the user can fix; 130 after Ctrl-C.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import click
from etils import epy

from resmem_lm.errors import STORAGE_CLIENTS, UserError

with epy.lazy_imports():  # it imports JAX, which takes a second
    from resmem_lm import commands

STAGES = {
    "train": "Prepare documents and vocabulary, and pretrain DeepNet.",
    "build": "Build the datastore with Apache Beam.",
    "index": "Build the index of the datastore's keys.",
    "evaluate": "Search neighbors, choose hyperparameters on validation, and evaluate on test.",
    "report": "Write report.html.",
    "run": "Run all of these stages, one after another.",
}
STUDIES = {
    "sensitivity": "Test accuracy against k, sigma, T and lambda (paper: Figures 5 and 6).",
    "decomposition": "TPR, FPR and gain under two rules for choosing hyperparameters (paper: Table 2).",
    "residual-size": "Accuracy and bytes with fewer entries of each residual (paper: appendix C).",
    "baselines": "All methods by token frequency, distance and confidence, and the infini-gram model (paper: section 3.2).",
    "datastore-size": "Gain with a tenth to all of the datastore (paper: Figure 3a).",
    "examples": "Tokens that ResMem corrects where DeepNet is close but wrong (paper: Figure 2).",
    "model-size": "DeepNet and ResMem for models of growing size (paper: Figure 3b and Table 1).",
    "shift": "A memory of another text, compared with fine-tuning on it (paper: section 6).",
    "sources": "Adaptive ResMem with each source of the memory alone, and with all but one.",
    "theory": "Linear regression with a memory (paper: section 5).",
}
PLAN_OPTIONS = {
    "rows": "Tokens in the datastore; default: counted in the text of --workdir.",
    "queries": "Tokens of validation and test; default: counted in the text of --workdir.",
    "documents": "Documents of rows and queries; default: counted, or 450 tokens each.",
    "bytes_per_token": "Bytes of text per token where the text is not counted.",
    "workers": "Processes that share the work.",
    "memory_gib": "GiB of memory of one worker; default: build_index.memory_gib.",
    "train_tokens_per_second": "Tokens per second of training. Rates that are not given are measured on this machine.",
    "tokens_per_second": "Rate at which one worker of the build encodes window tokens.",
    "index_rows_per_second": "Rate at which one worker adds rows to the index.",
    "query_tokens_per_second": "Rate at which one worker of the search encodes window tokens.",
    "queries_per_second": "Rate of queries in one shard of the index.",
    "evaluated_queries_per_second": "Rate of queries in the evaluation.",
}
TAKES_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}
GIN_FILE = click.Option(["--gin_file", "gin_files"], multiple=True, help="A gin file; may be given several times.")
WORKDIR = click.Option(["--workdir"], required=True, help="The work directory.")
PIPELINE_OPTIONS = click.Option(["--pipeline_options"], default="", help='Options of Beam, such as "--runner=...".')
INDEX_MEMORY = click.Option(["--index_memory_gib"], type=float, help="GiB of a worker's memory for building an index shard.")
APPEND = click.Option(["--append"], multiple=True, metavar="TEXT", help="Add the documents of these files to a finished datastore.")


def _bindings(context: click.Context) -> list[str]:
    """Return the `NAME=VALUE` of every --gin.NAME=VALUE. Raise UserError for any other argument."""
    for argument in context.args:
        if not (argument.startswith("--gin.") and "=" in argument):
            raise UserError(f"unknown argument {argument}: settings are given as --gin.NAME=VALUE (see resmem {context.info_name} --help)")
    return [argument.removeprefix("--gin.") for argument in context.args]


def _check_workdir(workdir: str | None) -> None:
    if workdir == "":  # an unset variable of the shell
        raise UserError("--workdir is empty: name a directory")


@click.pass_context
def _run_stages(context: click.Context, workdir: str, gin_files: tuple[str, ...], **options: Any) -> None:
    _check_workdir(workdir)
    commands.run_stages(str(context.info_name), workdir, gin_files, _bindings(context), **options)


@click.pass_context
def _plan(context: click.Context, workdir: str | None, gin_files: tuple[str, ...], **options: float | None) -> None:
    _check_workdir(workdir)
    given = {name: value for name, value in options.items() if value is not None}
    commands.run_plan(workdir, gin_files, _bindings(context), given)


@click.pass_context
def _study(context: click.Context, study: str, workdir: str, gin_files: tuple[str, ...]) -> None:
    _check_workdir(workdir)
    commands.run_study(study, workdir, gin_files, _bindings(context))


def _on_finished_run(function: str, **arguments: Any) -> Any:
    _check_workdir(arguments["workdir"])
    return getattr(commands, function)(**arguments)


class _InOrder(click.Group):
    """A group whose help lists the commands in the order of the pipeline."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names in the order in which they were added."""
        return list(self.commands)


def _group() -> click.Group:
    """Return the command line: stages, `plan`, studies, and the commands that need no configuration."""
    group = _InOrder("resmem", help=__doc__)

    def add(name: str, callback: Callable[..., Any], text: str, params: list[click.Parameter], settings: bool = False) -> None:
        epilog = "Any setting: --gin.NAME=VALUE, strings in quotes." if settings else None
        context = TAKES_SETTINGS if settings else {}
        group.add_command(click.Command(name, context, callback, params, help=text, epilog=epilog))

    for name, text in STAGES.items():
        params: list[click.Parameter] = [GIN_FILE, WORKDIR]
        params += [PIPELINE_OPTIONS] if name != "report" else []
        params += [INDEX_MEMORY] if name in ("index", "run") else []
        params += [APPEND] if name == "build" else []
        add(name, _run_stages, text, params, settings=True)
    numbers = [click.Option([f"--{name}"], type=float, help=text) for name, text in PLAN_OPTIONS.items()]
    plan_workdir = click.Option(["--workdir"], help="A work directory whose text is counted.")
    add("plan", _plan, "Estimate rows, bytes, memory and time of all stages.", [GIN_FILE, plan_workdir, *numbers], settings=True)
    studies = "\n".join(["Run one study of the paper.", *(f"\n{name}: {text}" for name, text in STUDIES.items())])
    study = click.Argument(["study"], type=click.Choice(list(STUDIES)), metavar="NAME")
    add("study", _study, studies, [study, GIN_FILE, WORKDIR], settings=True)

    document = click.Option(["--document"], help="The id of a document.")
    source = click.Option(["--source"], help="A file, folder or address that documents came from.")
    sentence = click.Argument(["text"])
    finished: dict[str, tuple[str, list[click.Parameter]]] = {
        "verify": ("Check every file and row of a work directory.", [click.Argument(["workdir"])]),
        "delete": ("Delete documents, so that no search finds their rows.", [WORKDIR, document, source]),
        "compact": ("Remove the rows of deleted documents from the files.", [WORKDIR]),
        "inspect": ("Print DeepNet's and ResMem's prediction for each token of a text, and the neighbors.", [WORKDIR, sentence]),
    }
    for name, (help_text, parameters) in finished.items():
        add(name, functools.partial(_on_finished_run, f"run_{name}"), help_text, parameters)
    return group


def _one_line(error: Exception) -> str | None:
    """Return one line for an error that the user can fix, or None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, click.ClickException):
        return error.format_message()
    reason = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and any(words in reason for words in ("RESOURCE_EXHAUSTED", "Out of memory")):  # XLA's
        return f"{reason[:200].rstrip('.')}: take a smaller train.batch_size, train.sequence_length or model"
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in STORAGE_CLIENTS:
        # Permissions, networks, credentials: the message of the system or of the storage's package names the cause.
        return f"{reason}: correct it and run the same command again"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        return int(_group().main(argv, standalone_mode=False) or 0)
    except (KeyboardInterrupt, click.Abort):
        print("resmem: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"resmem: {line}", file=sys.stderr)
        return 2


def script() -> int:
    """Run the installed command. Libraries log nothing, because `main` prints each error in one line."""
    logging.disable(logging.ERROR)
    return main()
