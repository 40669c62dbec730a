"""What an experiment will take, told before it is begun: rows, bytes, memory, time, and shards of the index.

    resmem plan --gin_file=configs/c4_t5_small.gin [--workdir=...] [--rows=... --tokens_per_second=...]

Bytes follow from `resmem_lm.sizes`, times from what `resmem_lm.rates` measures or the user gives.
"""

import math
from typing import Any, NamedTuple

import gin

from beam_pipelines.search_neighbors import GROUPS, LOOKUP_TOKENS
from resmem_lm.errors import UserError
from resmem_lm.evaluation.statistics import BOOTSTRAP_SAMPLES
from resmem_lm.memory.index import SMALL
from resmem_lm.memory.index_kinds import PROCESS_BYTES, group_shards, index_bytes, index_memory, largest_index
from resmem_lm.planning.machine import processor
from resmem_lm.planning.rates import Cost, Costs, measure
from resmem_lm.planning.sizes import (
    Counts,
    StageSettings,
    assume,
    checkpoint_bytes,
    count,
    key_dimensions,
    model_of,
    query_bytes,
    searching_bytes,
    sizes,
)
from resmem_lm.text import docstrings
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import local_path

Number = int | float

TEXT_CHARACTERS = 1_500_000  # on which to measure
TOKENS_PER_DOCUMENT = 450  # C4's
HELD_PREDICTIONS = 50  # whose predictions `evaluate` holds at a time, with curves over k and sigma


class Stage(NamedTuple):
    """Seconds on one worker and on all of them, and bytes of memory of one; None is not known."""

    seconds: float | None
    shared_seconds: float | None
    memory: int | None


class Rate(NamedTuple):
    """A speed and whether it was given; otherwise it was measured."""

    per_second: float
    given: bool


class Plan(NamedTuple):
    """What `plan` finds."""

    counts: Counts
    counted: bool  # or assumed
    bytes: dict[str, int]
    searching_bytes: int  # besides, until the search has finished
    stages: dict[str, Stage]
    index_rows: list[int]  # of each shard of the index
    rates: dict[str, Rate]


@gin.register(module="resmem_lm", denylist=["run", "settings", "text_stages"])
def plan(
    run: Run | None = None,
    settings: Any = None,
    text_stages: Any = (),
    *,
    rows: Number | None = None,
    queries: Number | None = None,
    documents: Number | None = None,
    bytes_per_token: Number = 4.5,
    workers: Number = 1,
    memory_gib: Number | None = None,
    train_tokens_per_second: Number | None = None,
    tokens_per_second: Number | None = None,
    index_rows_per_second: Number | None = None,
    query_tokens_per_second: Number | None = None,
    queries_per_second: Number | None = None,
    evaluated_queries_per_second: Number | None = None,
) -> Plan:
    """Prints and returns what the experiment of `settings` takes. Rates that are not given are measured here, in minutes.

    Args:
        run: its documents and vocabulary are made if they are not there, and counted; None needs `rows` and `queries`.
        settings: of every stage, by the names of their functions.
        text_stages: the stages that make documents and vocabulary.
        rows: tokens in the datastore.
        queries: tokens of validation and test together.
        documents: of rows and queries together; 450 tokens each if None and not counted.
        bytes_per_token: of documents, where they are not counted.
        workers: processes, each as fast as the one measured, that share what can be shared.
        memory_gib: of one worker, which says how many rows a shard of the index has. None is `build_index.memory_gib`.
        train_tokens_per_second: in `train`.
        tokens_per_second: of windows, context included, in `build`, by one worker.
        index_rows_per_second: in `index`, by one worker.
        query_tokens_per_second: of windows, in `search`, without the index.
        queries_per_second: looked up in one shard of the index.
        evaluated_queries_per_second: in `evaluate`.

    Raises:
        UserError: amounts that are neither given nor can be counted, a number that is not above 0, or too little memory.
    """
    given = {
        "train_tokens_per_second": train_tokens_per_second,
        "tokens_per_second": tokens_per_second,
        "index_rows_per_second": index_rows_per_second,
        "query_tokens_per_second": query_tokens_per_second,
        "queries_per_second": queries_per_second,
        "evaluated_queries_per_second": evaluated_queries_per_second,
    }
    numbers = {"rows": rows, "queries": queries, "documents": documents, "bytes_per_token": bytes_per_token, "workers": workers}
    for name, value in (numbers | {"memory_gib": memory_gib} | given).items():
        least = 1 if name in ("rows", "queries", "documents", "workers") else 0
        if value is not None and not (0 < value < math.inf and value >= least):
            raise UserError(f"plan.{name} = {value:g}: take a number {'of 1 or more' if least else 'above 0'}")
    shards = settings["build_datastore"]["shards"]
    if shards is not None and shards < 1:
        raise UserError(f"build_datastore.shards = {shards}: take 1 or more, or None for all")
    counts, counted = _counts(run, settings, text_stages, rows, queries, documents, bytes_per_token)

    memory = int((settings["build_index"]["memory_gib"] if memory_gib is None else memory_gib) * 2**30)
    kind = settings["build_index"]["kind"]
    emb, training_rows = key_dimensions(settings), settings["build_index"]["training_rows"]
    most, largest = largest_index(kind, memory - PROCESS_BYTES, emb, training_rows), max(shard.tokens for shard in counts.shards)
    if most < largest:
        needed = (index_memory(kind, largest, emb, training_rows) + PROCESS_BYTES) / 2**30
        raise UserError(
            f"plan.memory_gib = {memory / 2**30:g} holds an index of {most} rows, the largest shard of the datastore has {largest}: "
            f"take {needed + 0.05:.1f}, or more shards of documents"
        )
    rows_of = [shard.tokens for shard in counts.shards]
    index_rows = [sum(rows_of[first : first + shards]) for first, shards in group_shards(rows_of, most)]

    wanted = {name for name, rate in given.items() if rate is None and (name != "train_tokens_per_second" or "train" in settings)}
    costs = Costs()
    if wanted:
        vocabulary = local_path(run.vocabulary / "vocabulary.model") if run else None
        costs = measure(settings, _some_text(run), vocabulary, wanted)
    files = sizes(settings, counts, index_rows=index_rows, checkpoint=checkpoint_bytes(settings))
    times, rates = _times(settings, counts, files, index_rows, costs, given)
    if run and counted:
        records = {name: run.record(name) for name in ("documents", "vocabulary")}
        times = {name: (record["seconds"], 1) for name, record in records.items()} | times
    memories = _memory(settings, counts, index_rows, costs)
    stages = {
        name: Stage(seconds, seconds * math.ceil(parts / workers) / parts if parts > 1 else None, memories.get(name))
        for name, (seconds, parts) in times.items()
    }
    made = Plan(counts, counted, files, searching_bytes(settings, counts, len(index_rows)), stages, index_rows, rates)
    print(format_plan(made, workers=int(workers), memory=memory))
    return made


def _counts(
    run: Run | None,
    settings: StageSettings,
    text_stages: Any,
    rows: Number | None,
    queries: Number | None,
    documents: Number | None,
    bytes_per_token: Number,
) -> tuple[Counts, bool]:
    """Amounts of text, and whether all were counted."""
    counts = None
    if run:
        for stage in text_stages:
            stage(run, **settings[stage.__name__])
        counts = count(run, settings)
        if not (rows or queries or documents):
            return counts, True
        rows, queries = rows or counts.rows, queries or counts.all_queries
    if rows is None or queries is None:
        name = "rows" if rows is None else "queries"
        raise UserError(f"plan.{name} is not set: give --{name}=..., or --workdir=... whose text is counted")
    documents = documents or max(1.0, (rows + queries) / TOKENS_PER_DOCUMENT)
    return assume(settings, rows=int(rows), queries=int(queries), documents=int(documents), bytes_per_token=bytes_per_token), False


def _some_text(run: Run | None) -> list[Document]:
    """Text to measure on: that of the work directory, or docstrings."""
    if run:
        documents = (document for path in shard_paths(run, "train") for document in read_shard(path))
    else:
        documents = (Document(*pair) for pair in docstrings.documents(duplicate_threshold=1.0))
    found, characters = [], 0
    for document in documents:
        found.append(document)
        characters += len(document.text)
        if characters > TEXT_CHARACTERS:
            break
    return found


def _times(
    settings: StageSettings,
    counts: Counts,
    files: dict[str, int],
    index_rows: list[int],
    costs: Costs,
    given: dict[str, Number | None],
) -> tuple[dict[str, tuple[float, int]], dict[str, Rate]]:
    """Seconds of each stage on one worker, with the number of parts in which workers can share them; and the speeds behind them."""
    rates: dict[str, Rate] = {}

    def cost(name: str, measured: Cost | None) -> Cost:
        rate = given[name]
        found = Cost(0.0, 1 / rate) if rate is not None else measured
        assert found is not None  # what is not given was measured
        rates[name] = Rate(1 / max(found.each, 1e-12), rate is not None)
        return found

    emb, index, search = key_dimensions(settings), settings["build_index"], settings["search"]
    datastore = sum(size for name, size in files.items() if name.startswith("datastore/"))
    checksums = costs.checksum * datastore
    times: dict[str, tuple[float, int]] = {}
    if "train" in settings:
        train = settings["train"]
        tokens = train["steps"] * train["batch_size"] * train["sequence_length"]
        saves = -(-train["steps"] // train["checkpoint_steps"])
        seconds = cost("train_tokens_per_second", costs.train).seconds(tokens)
        times["train"] = seconds + (saves - 1) * costs.save + costs.tokenize * counts.train_tokens, 1
    build = cost("tokens_per_second", costs.build).seconds(sum(shard.window_tokens for shard in counts.shards))
    times["build"] = build, len(counts.shards)

    trees = [rows >= SMALL and index["kind"] != "exact" for rows in index_rows]
    built = looked_up = 0.0
    for rows, tree in zip(index_rows, trees, strict=True):
        if tree and costs.tree:
            built += costs.tree.build_seconds(rows, emb, index["training_rows"])
            looked_up += costs.tree.search_seconds(rows, emb) + costs.rescore
        else:
            looked_up += costs.index * rows
    if index["kind"] != "exact":
        rows = counts.rows
        built = cost("index_rows_per_second", Cost(0.0, built / rows)).seconds(rows)
    times["index"] = built + checksums, len(index_rows)

    shards, queries = len(index_rows), counts.all_queries
    encoded = cost("query_tokens_per_second", costs.queries).seconds(sum(split.window_tokens for split in counts.queries.values()))
    found = cost("queries_per_second", Cost(0.0, looked_up / shards)).seconds(queries) * shards
    recalled = sum(min(search["recall_queries"], split.tokens) for split in counts.queries.values()) if index["kind"] != "exact" else 0
    times["search"] = encoded + found + checksums + recalled * counts.rows * costs.exact, min(shards, GROUPS) * counts.query_shards

    if given["evaluated_queries_per_second"] is None:
        assert costs.validation is not None
        assert costs.test is not None
        evaluated = costs.validation.seconds(counts.queries["validation"].tokens) + costs.test.seconds(counts.queries["test"].tokens)
        each = (evaluated - costs.validation.once) / queries
        rates["evaluated_queries_per_second"] = Rate(1 / each, given=False)
    else:
        evaluated = cost("evaluated_queries_per_second", None).seconds(queries)
    times["evaluate"] = evaluated + checksums, 1
    return times, rates


def _memory(settings: StageSettings, counts: Counts, index_rows: list[int], costs: Costs) -> dict[str, int]:
    """Bytes that each stage holds: of the process with its programs, and of what grows. Files that are mapped are not among them."""
    model, k = model_of(settings), settings["search"]["neighbors"]
    most, largest = max(index_rows), max(split.tokens for split in counts.queries.values())
    query_shard = largest * len(counts.queries) // counts.query_shards
    documents = max(split.documents for split in counts.queries.values())
    each = sum(query_bytes(model, k, len(settings["build_datastore"]["temperatures"])).values())
    kind, emb = settings["build_index"]["kind"], key_dimensions(settings)
    looked_up = min(counts.all_queries, max(query_shard, LOOKUP_TOKENS))
    grows = {
        "train": 24 * counts.train_tokens,  # lists of tokens, then rows of tokens and of segments
        "build": 2 * 48 * max(shard.tokens for shard in counts.shards),  # two shards at a time, text, tokens and Python's numbers of them
        "index": 0 if kind == "exact" else index_memory(kind, most, emb, settings["build_index"]["training_rows"]),
        # What is merged, in parts and then together, of two shards; or what is found for many of them, and the index.
        "search": max(4 * query_shard * each, 24 * k * looked_up + index_bytes(kind, most, emb)),
        "evaluate": largest * 5 * HELD_PREDICTIONS + 16 * BOOTSTRAP_SAMPLES * documents,
    }
    if "train" not in settings:
        del grows["train"]
    return {name: costs.memory.get(name, PROCESS_BYTES) + size for name, size in grows.items()}


def format_plan(made: Plan, *, workers: int, memory: int) -> str:
    """The plan as text, aligned."""
    counts, where = made.counts, "counted" if made.counted else "given or assumed"
    documents = sum(split.documents for split in (*counts.shards, *counts.queries.values()))
    largest = max(made.index_rows)
    index = f"{len(made.index_rows)} shard{'s' * (len(made.index_rows) > 1)} of {largest:,} rows, for {memory / 2**30:.3g} GiB"
    computed = sum(shard.window_tokens for shard in counts.shards)
    lines = [
        f"{counts.rows:,} rows and {counts.all_queries:,} queries of {documents:,} documents ({where})",
        f"{computed:,} tokens computed for the rows, context and padding included",
        "",
        *_table(
            ["file", "bytes", ""],
            [[name, f"{size:,}", size_text(size)] for name, size in (made.bytes | {"together": sum(made.bytes.values())}).items()],
        ),
        "",
        *_table(
            ["stage", "time, one worker", f"{workers} workers", "memory"],
            [
                [name, *(seconds_text(s) if s is not None else "" for s in stage[:2]), size_text(stage.memory) if stage.memory else ""]
                for name, stage in made.stages.items()
            ],
        ),
        "",
        f"index: {index}",
        f"searching: {size_text(made.searching_bytes)} more, until it has finished",
        "",
        *_table(
            ["rate", "per second", "from"],
            [
                [name, f"{rate.per_second:,.4g}", "given" if rate.given else f"measured here, {processor()}"]
                for name, rate in made.rates.items()
            ],
        ),
    ]
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    text = [
        "  ".join(cell.rjust(w) if column else cell.ljust(w) for column, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in (header, *rows)
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def size_text(size: int) -> str:
    """1.68 TB."""
    unit = next((u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1, "B"))
    return f"{size / unit[0]:.4g} {unit[1]}"


def seconds_text(seconds: float) -> str:
    """5.2 days."""
    unit = next((u for u in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= u[0]), (1, "s"))
    value = seconds / unit[0]
    return f"{value:,.0f} {unit[1]}" if value >= 100 else f"{value:.3g} {unit[1]}"
