"""What an experiment will take, before it is begun: rows, bytes, memory and time, from a rehearsal on this machine."""

import math
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gin
import jax
from rich.console import Console
from rich.table import Table

from resmem_lm import docstrings
from resmem_lm.datastore import document_line
from resmem_lm.documents import Document, read_shard, shard_paths
from resmem_lm.errors import UserError
from resmem_lm.index import SMALL, scann_parameters
from resmem_lm.model import init_parameters
from resmem_lm.rehearsal import Rehearsal, SearchCosts, Settings, file_bytes, pieces, rehearse
from resmem_lm.vocabulary import load_vocabulary

CHARACTERS_PER_TOKEN = 4.9  # C4 by T5's vocabulary: 2,200 characters and 450 tokens a document
DOCUMENT_LINE_BYTES = 120  # a web address, a digest and two numbers
NPY_HEADER = 128


class Amounts(NamedTuple):
    """How much text there is."""

    rows: int
    queries: int
    train_documents: int
    query_documents: int
    known_bytes: dict[str, int]  # of kinds of files that are there, or can be counted


class Plan(NamedTuple):
    """All numbers of a plan; `seconds` are of one machine, or of one worker where there are several."""

    amounts: Amounts
    bytes: dict[str, int]
    seconds: dict[str, float]
    memory: dict[str, int]
    index_shards: int
    rates: dict[str, tuple[float, bool]]  # and whether it was given


@gin.register(module="resmem_lm", denylist=["workdir", "settings", "text_stages"])
def plan(
    workdir: Path | None = None,
    settings: Any = None,
    text_stages: Any = (),
    *,
    rows: float | None = None,
    queries: float | None = None,
    documents: float | None = None,
    tokens_per_second: float | None = None,
    train_tokens_per_second: float | None = None,
    queries_per_second: float | None = None,
    index_rows_per_second: float | None = None,
    workers: float = 1,
    memory_gib: float = 64.0,
) -> Plan:
    """Prints and returns what the experiment of `settings` will take.

    Args:
        workdir: its documents and vocabulary are made if they are not there, and counted, where `rows` or `queries` is None.
        settings: of every stage, by function.
        text_stages: the stages that make documents and vocabulary.
        rows: tokens in the datastore.
        queries: tokens of validation and test together.
        documents: documents of all splits; 450 tokens each if None.
        tokens_per_second: encoded by one worker of the build. Rates that are None are measured here.
        train_tokens_per_second: in training.
        queries_per_second: encoded and searched in one index shard.
        index_rows_per_second: in building the index.
        workers: that share the build.
        memory_gib: that one index shard may take while it is built.

    Raises:
        UserError: amounts that are neither given nor can be counted, a rate that is not above 0, or too little memory.
    """
    given = {
        "train": train_tokens_per_second,
        "build": tokens_per_second,
        "index": index_rows_per_second,
        "search": queries_per_second,
    }
    for name, value in {
        "rows": rows,
        "queries": queries,
        "documents": documents,
        "workers": workers,
        "memory_gib": memory_gib,
        **given,
    }.items():
        if value is not None and not value > 0:
            raise UserError(f"plan: {name} = {value}: take a number above 0")
    vocabulary = None
    if rows and queries:
        count = documents or (rows + queries) / 450
        share = rows / (rows + queries)
        amounts = Amounts(int(rows), int(queries), max(1, round(count * share)), max(1, round(count * (1 - share))), {})
    elif workdir is None:
        raise UserError(
            "plan: how much text there is is not known: give --rows and --queries, or --workdir to make its documents and count"
        )
    else:
        for stage in text_stages:
            stage(workdir, **settings[stage.__name__])
        amounts, vocabulary = count_text(workdir, settings), workdir / "vocabulary" / "vocabulary.model"
    with tempfile.TemporaryDirectory() as folder:
        tokens = (amounts.rows + amounts.queries) / (amounts.train_documents + amounts.query_documents)
        ratio = CHARACTERS_PER_TOKEN
        if vocabulary:
            assert workdir is not None
            ratio = amounts.known_bytes["documents"] / max(1, amounts.known_bytes["all tokens"])

        def text() -> Iterator[Document]:
            if vocabulary:
                return (document for path in shard_paths(workdir, "train") for document in read_shard(path))
            found = (Document(*pair) for pair in docstrings.documents(duplicate_threshold=1.0))
            return pieces(found, max(200, int(tokens * ratio)))

        rehearsals, costs = rehearse(Path(folder), text, settings, amounts.rows, ratio, vocabulary)
    made = extrapolate(amounts, rehearsals, costs, settings, given, memory_gib)
    _print(made, int(workers), memory_gib)
    return made


def count_text(workdir: Path, settings: Settings) -> Amounts:
    """Rows and queries of the documents in WORKDIR, exactly."""
    vocabulary = load_vocabulary(workdir)
    limit = settings["build_datastore"]["shards"]
    tokens, documents, line_bytes, all_tokens = {"train": 0, "query": 0}, {"train": 0, "query": 0}, 0, 0
    for split in ("train", "validation", "test"):
        for number, path in enumerate(shard_paths(workdir, split)):
            found, kind, first_row = read_shard(path), "train" if split == "train" else "query", 0
            lengths = [len(one) for one in vocabulary.encode_documents(found)]
            all_tokens += sum(lengths)
            if split == "train" and limit is not None and number >= limit:
                continue
            tokens[kind] += sum(lengths)
            documents[kind] += len(found)
            for document, length in zip(found, lengths, strict=True):
                line_bytes += len(document_line(document.id, first_row, length)) * (kind == "train")
                first_row += length
    known = {name: size for name, size in file_bytes(workdir).items() if name in ("documents", "vocabulary")}
    known |= {"datastore/documents.jsonl": line_bytes, "all tokens": all_tokens}
    return Amounts(tokens["train"], tokens["query"], documents["train"], documents["query"], known)


def extrapolate(
    amounts: Amounts,
    rehearsals: list[Rehearsal],
    costs: SearchCosts,
    settings: Settings,
    given: dict[str, float | None],
    memory_gib: float,
) -> Plan:
    """The experiment's numbers from those of two rehearsals: each a fixed part and one that grows."""
    one, two = rehearsals
    model = settings.get("train", settings.get("take_checkpoint", {}))["model"]
    index_row_bytes = model.emb_dim * 4 + sum(_per_row(two, name, two.rows) for name in two.bytes if name.startswith("index/"))
    shards = math.ceil(amounts.rows * index_row_bytes / (memory_gib * 2**30))
    if shards > amounts.rows / max(SMALL, settings["search"]["neighbors"]) and shards > 1:
        raise UserError(
            f"plan: {memory_gib} GiB hold {int(memory_gib * 2**30 / index_row_bytes):,} rows of the index, too few to search: "
            f"set --memory_gib={math.ceil(SMALL * index_row_bytes / 2**30 * 10) / 10} or more"
        )
    sizes = _bytes(amounts, two, settings, model, shards)

    training = settings.get("train")
    step = (two.seconds["train"] - one.seconds["train"]) / (two.steps - one.steps)
    rates = {"train": two.step_tokens / step if step > 0 else math.inf}
    row_seconds, build_fixed = _line(one.rows, two.rows, one.seconds["build"], two.seconds["build"])
    rates["build"] = 1 / row_seconds
    shard_rows = math.ceil(amounts.rows / shards)
    index_one, index_fixed = _index_seconds(one, two, costs, shard_rows, settings, model)
    rates["index"] = amounts.rows / max(shards * index_one, 1e-9)
    query_seconds, search_fixed = _search_seconds(one, two, costs, shard_rows, shards, settings, model)
    rates["search"] = 1 / query_seconds
    evaluate_row, evaluate_fixed = _line(one.queries, two.queries, one.seconds["evaluate"], two.seconds["evaluate"])
    used = {name: (given[name] or rate, given[name] is not None) for name, rate in rates.items()}
    seconds = {
        "build": build_fixed + amounts.rows / used["build"][0],
        "index": index_fixed + amounts.rows / used["index"][0],
        "search": search_fixed + 2 * costs.exact_rows * amounts.rows + amounts.queries / used["search"][0],
        "evaluate": evaluate_fixed + amounts.queries * evaluate_row,
    }
    if training:
        train_tokens = training["steps"] * training["batch_size"] * training["sequence_length"]
        fixed = max(0.0, two.seconds["train"] - two.steps * step)
        seconds = {"train": fixed + train_tokens / used["train"][0]} | seconds
    else:
        del used["train"]
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_parameters(model, 0))))
    # The logits of a block of tokens, and copies of them on the way to the largest.
    block = 256 * model.vocab_size * 4 * 4
    neighbor_bytes = sum(_per_row(two, name, two.queries) for name in two.bytes if name.startswith("neighbors/"))
    memory = {
        "build": int(4 * parameters + 2 * block),
        "index": int(shard_rows * index_row_bytes),
        "search": int(4 * parameters + block + amounts.queries * (neighbor_bytes + 2 * 4 * model.emb_dim)),
        "evaluate": 2 * block,
    }
    if training:
        # Parameters, gradients and updates; tokens and segments.
        memory = {"train": int(3 * 4 * parameters + 16 * amounts.rows)} | memory
    return Plan(amounts, sizes, seconds, memory, shards, used)


def _per_row(rehearsal: Rehearsal, name: str, rows: int) -> float:
    return rehearsal.bytes[name] / rows


def _line(x1: float, x2: float, y1: float, y2: float) -> tuple[float, float]:
    """Slope and the part that does not grow; times are never taken to fall with size."""
    slope = (y2 - y1) / (x2 - x1)
    if slope <= 0 or y2 - slope * x2 < 0:
        return y2 / x2, 0.0
    return slope, y2 - slope * x2


def _leaves(rows: int, model: Any) -> dict[str, int] | None:
    return scann_parameters(rows, model.emb_dim) if rows >= SMALL else None


def _bytes(amounts: Amounts, two: Rehearsal, settings: Settings, model: Any, index_shards: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    limit = settings["build_datastore"]["shards"]
    shards = limit or settings.get("prepare_documents", settings.get("sample_documents", {}))["shards"]
    rehearsed, planned = _leaves(two.rows, model), _leaves(math.ceil(amounts.rows / index_shards), model)
    checkpoints = min(2, math.ceil(settings["train"]["steps"] / settings["train"]["checkpoint_steps"])) if "train" in settings else 1
    for name, size in sorted(two.bytes.items()):
        kind, _, file = name.partition("/")
        if name in amounts.known_bytes:
            sizes[name] = amounts.known_bytes[name]
        elif kind == "documents":
            sizes[name] = int(
                (amounts.rows + amounts.queries) * CHARACTERS_PER_TOKEN + 120 * (amounts.train_documents + amounts.query_documents)
            )
        elif kind == "checkpoints":
            sizes[name] = size * checkpoints
        elif name == "datastore/documents.jsonl":
            sizes[name] = DOCUMENT_LINE_BYTES * amounts.train_documents
        elif kind == "datastore" and file.endswith(".npy"):
            sizes[name] = _scaled(size, 4, two.rows, amounts.rows, shards)
        elif kind == "datastore":
            sizes[name] = round(size / 4 * shards)
        elif kind == "neighbors" and file == "document_lengths.npy":
            sizes[name] = _scaled(size, 2, two.query_documents, amounts.query_documents, 2)
        elif kind == "neighbors" and file.endswith(".npy"):
            sizes[name] = _scaled(size, 2, two.queries, amounts.queries, 2)
        elif kind == "index" and file.endswith(".npy"):
            sizes[name] = _scaled(size, 1, two.rows, amounts.rows, index_shards)
        elif file == "serialized_partitioner.pb" and rehearsed and planned:
            sizes[name] = round(size * planned["leaves"] / rehearsed["leaves"]) * index_shards
        else:
            sizes[name] = size * (index_shards if kind == "index" else 1)
    return sizes


def _scaled(size: int, files: int, rows: int, planned_rows: int, planned_files: int) -> int:
    return round((size - files * NPY_HEADER) / rows * planned_rows) + planned_files * NPY_HEADER


def _index_seconds(one: Rehearsal, two: Rehearsal, costs: SearchCosts, rows: int, settings: Settings, model: Any) -> tuple[float, float]:
    """Seconds of one index of `rows` rows without its fixed part, and the fixed part.

    k-means compares each training row with each leaf in every iteration, then each row with each leaf once.
    """
    planned = _leaves(rows, model)
    if not planned or not costs.index_leaf_row:
        slope, fixed = _line(one.rows, two.rows, one.seconds["index"], two.seconds["index"])
        return slope * rows, fixed
    iterations = 12  # ScaNN's default

    def tree(count: int) -> float:
        parameters = _leaves(count, model)
        assert parameters is not None
        return costs.index_leaf_row * parameters["leaves"] * (min(settings["build_index"]["training_rows"], count) + count / iterations)

    slope, fixed = _line(one.rows, two.rows, one.seconds["index"] - tree(one.rows), two.seconds["index"] - tree(two.rows))
    return slope * rows + tree(rows), fixed


def _search_seconds(
    one: Rehearsal, two: Rehearsal, costs: SearchCosts, rows: int, shards: int, settings: Settings, model: Any
) -> tuple[float, float]:
    """Seconds a query, encoded once and searched in every shard, and the part that does not grow."""

    def compared(count: int) -> float:
        parameters = _leaves(count, model) if settings["build_index"]["kind"] == "scann" else None
        return count * parameters["leaves_to_search"] / parameters["leaves"] if parameters else count

    def searched(count: int) -> float:
        return costs.query + costs.compared_row * compared(count)

    rest = [r.seconds["search"] - r.queries * searched(r.rows) - 2 * costs.exact_rows * r.rows for r in (one, two)]
    slope, fixed = _line(one.queries, two.queries, *rest)
    return max(slope, 0.0) + shards * searched(rows), max(fixed, 0.0)


def _amount(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, unit = next(((size, unit) for size, unit in units if value >= size), units[-1])
    return f"{value / size:,.3g} {unit}" if value / size < 1000 else f"{value / size:,.0f} {unit}"


def _size(value: float) -> str:
    return _amount(value, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def _time(value: float) -> str:
    return _amount(value, ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")))


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    device = jax.local_devices()[0]
    return name if device.platform == "cpu" else f"{device.device_kind}, {name}"


def _print(made: Plan, workers: int, memory_gib: float) -> None:
    console = Console(width=max(100, Console().width))
    amounts = made.amounts
    console.print(
        f"{amounts.rows:,} rows of {amounts.train_documents:,} documents; {amounts.queries:,} queries of {amounts.query_documents:,} documents"
    )
    files = Table("files", "bytes", "", title_justify="left", box=None)
    for name, size in made.bytes.items():
        files.add_row(name, f"{size:,}", _size(size))
    files.add_row("together", f"{sum(made.bytes.values()):,}", _size(sum(made.bytes.values())))
    console.print(files)
    stages = Table("stage", "time, one machine", f"time, {workers} workers", "memory, about", box=None)
    for name, seconds in made.seconds.items():
        shared = _time(seconds / workers) if name == "build" else ""
        stages.add_row(name, _time(seconds), shared, _size(made.memory[name]))
    console.print(stages)
    console.print(f"index shards of at most {memory_gib:g} GiB: {made.index_shards}")
    units = {"train": "tokens trained", "build": "tokens encoded", "index": "rows indexed", "search": "queries searched"}
    for name, (rate, was_given) in made.rates.items():
        source = "given" if was_given else f"measured here, {_processor()}, {jax.local_device_count()} device(s)"
        console.print(f"{units[name]} per second: {rate:,.0f} ({source})")
    console.print(
        "Reading the text and making a vocabulary are not in it. Training is rehearsed with 2,048 tokens a step: larger ones are faster on"
    )
    console.print("accelerators. Files and memory of index and search are told for shards that are searched one by one.")
