"""Estimate what an experiment takes before it runs: rows, bytes, memory and time of each stage, shards of the index.

resmem plan --gin_file=configs/c4_t5_small.gin [--workdir=...] [--rows=... --tokens_per_second=...]
"""

import dataclasses
import math
from typing import Any, NamedTuple

import gin
import humanize

from beam_pipelines.search_job import GROUPS, LOOKUP_TOKENS
from resmem_lm.errors import UserError
from resmem_lm.evaluation.statistics import BOOTSTRAP_SAMPLES
from resmem_lm.memory.index import SMALL
from resmem_lm.memory.index_kinds import PROCESS_BYTES, group_shards, index_bytes, index_memory, largest_index
from resmem_lm.planning import sizes
from resmem_lm.planning.machine import processor
from resmem_lm.planning.rates import Costs, Rates, build_work, measure, query_work
from resmem_lm.planning.sizes import Amounts, Counts, Number, StageSettings, check_numbers, key_dimensions
from resmem_lm.report.tables import aligned
from resmem_lm.text import docstrings
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import local_path

DEFAULT_AMOUNTS, ALL_MEASURED = Amounts(), Rates()
HELD_PREDICTIONS = 50  # predictions of a query that `evaluate` holds at a time, with curves over k and sigma


class StageCosts(NamedTuple):
    """Seconds of a stage on one worker and on all workers, and bytes of memory of one worker; None where there is no estimate."""

    seconds: float
    shared_seconds: float | None
    memory: int | None


class Rate(NamedTuple):
    """A speed, and whether the user gave it; otherwise it was measured."""

    per_second: float
    given: bool


class Plan(NamedTuple):
    """The estimates of `plan`."""

    counts: Counts
    counted: bool  # or assumed
    bytes: dict[str, int]
    searching_bytes: int  # besides, until the search has finished
    stages: dict[str, StageCosts]
    index_rows: list[int]  # of each shard of the index
    rates: dict[str, Rate]


@gin.register(module="resmem_lm", denylist=["run", "settings", "text_stages"])
def plan(
    run: Run | None = None,
    settings: Any = None,
    text_stages: Any = (),
    *,
    amounts: Amounts = DEFAULT_AMOUNTS,
    rates: Rates = ALL_MEASURED,
    workers: Number = 1,
    memory_gib: Number | None = None,
) -> Plan:
    """Print and return what the experiment of `settings` takes. Rates that are not given are measured here, in minutes.

    Args:
        run: its documents and vocabulary are made if they are missing, and counted; None needs rows and queries in `amounts`.
        settings: of every stage, by the names of their functions.
        text_stages: the stages that make documents and vocabulary.
        amounts: of text.
        rates: of one worker.
        workers: processes, each as fast as the one measured, that share the stages that can be shared.
        memory_gib: of one worker; it limits the rows of a shard of the index. None is `build_index.memory_gib`.

    Raises:
        UserError: amounts that are neither given nor can be counted, a number that is not above 0, or too little memory.
    """
    amounts.check()
    rates.check()
    check_numbers("plan", 1, workers=workers)
    check_numbers("plan", 0, memory_gib=memory_gib)
    if (shards := settings["build_datastore"]["shards"]) is not None and shards < 1:
        raise UserError(f"build_datastore.shards = {shards}: take 1 or more, or None for all")
    counts, counted = _counts(run, settings, text_stages, amounts)
    memory = int((memory_gib or settings["build_index"]["memory_gib"]) * 2**30)
    index_rows = _index_rows(settings, counts, memory)
    costs = _costs(run, settings, counts, rates)
    seconds, used = _seconds(settings, counts, index_rows, costs, rates)
    if run and counted:
        seconds = {stage: run.record(stage)["seconds"] for stage in ("documents", "vocabulary")} | seconds
    parts = {"build": len(counts.shards), "index": len(index_rows), "search": min(len(index_rows), GROUPS) * counts.query_shards}
    memories = _memory(settings, counts, index_rows, costs)
    stages = {
        stage: StageCosts(alone, alone * math.ceil(n / workers) / n if (n := parts.get(stage, 1)) > 1 else None, memories.get(stage))
        for stage, alone in seconds.items()
    }
    files = sizes.planned_bytes(settings, counts, index_rows=index_rows, checkpoint=sizes.checkpoint_bytes(settings))
    made = Plan(counts, counted, files, sizes.searching_bytes(settings, counts, len(index_rows)), stages, index_rows, used)
    print(_format(made, workers=int(workers), memory=memory))
    return made


def _counts(run: Run | None, settings: StageSettings, text_stages: Any, amounts: Amounts) -> tuple[Counts, bool]:
    """Return the amounts of text, and whether all were counted."""
    if run:
        for stage in text_stages:
            stage(run, **settings[stage.__name__])
        counts = sizes.count(run, settings)
        if not (amounts.rows or amounts.queries or amounts.documents):
            return counts, True
        amounts = dataclasses.replace(amounts, rows=amounts.rows or counts.rows, queries=amounts.queries or counts.all_queries)
    for name in ("rows", "queries"):
        if getattr(amounts, name) is None:
            raise UserError(f"Amounts.{name} is not set: give --{name}=..., or --workdir=... whose text is counted")
    return sizes.assume(settings, amounts), False


def _index_rows(settings: StageSettings, counts: Counts, memory: int) -> list[int]:
    """Return the rows of each shard of the index; UserError if the memory cannot hold one."""
    kind, training_rows = settings["build_index"]["kind"], settings["build_index"]["training_rows"]
    rows, dimensions = [shard.tokens for shard in counts.shards], key_dimensions(settings)
    most, largest = largest_index(kind, memory - PROCESS_BYTES, dimensions, training_rows), max(rows)
    if most < largest:
        needed = (index_memory(kind, largest, dimensions, training_rows) + PROCESS_BYTES) / 2**30
        raise UserError(
            f"plan.memory_gib = {memory / 2**30:g} holds an index of {most} rows, the largest shard of the datastore has {largest}: "
            f"take {needed + 0.05:.1f}, or more shards of documents"
        )
    return [sum(rows[first : first + shards]) for first, shards in group_shards(rows, most)]


def _costs(run: Run | None, settings: StageSettings, counts: Counts, rates: Rates) -> Costs | None:
    """Measure the costs of all stages, or return None if every rate is given."""
    missing = {name for name, rate in dataclasses.asdict(rates).items() if rate is None}
    training = "train" in settings and "train_tokens_per_second" in missing
    if not training and not missing - {"train_tokens_per_second"}:
        return None
    if run:
        documents = (document for path in shard_paths(run, "train") for document in read_shard(path))
    else:
        documents = (Document(*pair) for pair in docstrings.documents(duplicate_threshold=1.0))
    vocabulary = local_path(run.vocabulary / "vocabulary.model") if run else None
    validation = counts.queries["validation"].tokens / counts.all_queries
    return measure(settings, documents, vocabulary, training=training, validation=validation)


def _seconds(
    settings: StageSettings, counts: Counts, index_rows: list[int], costs: Costs | None, rates: Rates
) -> tuple[dict[str, float], dict[str, Rate]]:
    """Return the seconds of each stage on one worker, and the speeds behind them."""
    seconds: dict[str, float] = {}
    used: dict[str, Rate] = {}

    def add(stage: str, name: str, units: int, measured: float) -> None:
        given = getattr(rates, name)
        took = measured if given is None else units / given
        seconds[stage] = seconds.get(stage, 0.0) + took
        used[name] = Rate(units / max(took, 1e-12), given is not None)

    def stage_seconds(stage: str, units: int) -> float:
        return costs.stages[stage].seconds(units) if costs and stage in costs.stages else 0.0

    queries, computed = counts.all_queries, sum(shard.window_tokens for shard in counts.shards)
    if "train" in settings:
        tokens = math.prod(settings["train"][name] for name in ("steps", "batch_size", "sequence_length"))
        add("train", "train_tokens_per_second", tokens, stage_seconds("train", tokens))
    add("build", "tokens_per_second", computed, stage_seconds("build", computed))
    built, looked_up, recalled = _index_seconds(settings, counts, index_rows, costs) if costs else (0.0, 0.0, 0.0)
    if settings["build_index"]["kind"] != "exact":
        add("index", "index_rows_per_second", counts.rows, built)
    searched = sum(split.window_tokens for split in counts.queries.values())
    add("search", "query_tokens_per_second", searched, stage_seconds("search", searched))
    add("search", "queries_per_second", queries * len(index_rows), looked_up)
    seconds["search"] += recalled
    add("evaluate", "evaluated_queries_per_second", queries, stage_seconds("evaluate", queries))
    return seconds, used


def _index_seconds(settings: StageSettings, counts: Counts, index_rows: list[int], costs: Costs) -> tuple[float, float, float]:
    """Return the seconds to build the index, to look up all queries, and to measure the recall."""
    kind, training_rows, dimensions = settings["build_index"]["kind"], settings["build_index"]["training_rows"], key_dimensions(settings)
    built = sum(costs.index_build.seconds(build_work(kind, rows, dimensions, training_rows)) for rows in index_rows)

    def lookup(rows: int) -> float:
        exact = kind == "exact" or rows < SMALL
        return costs.compared_row * rows if exact else costs.index_query.seconds(query_work(kind, rows, dimensions))

    compared = 0 if kind == "exact" else sum(min(settings["search"]["recall_queries"], s.tokens) for s in counts.queries.values())
    return built, counts.all_queries * sum(map(lookup, index_rows)), compared * counts.rows * costs.compared_row


def _memory(settings: StageSettings, counts: Counts, index_rows: list[int], costs: Costs | None) -> dict[str, int]:
    """Return the peak memory of each stage in bytes: the process, and what grows with the text. Mapped files do not count."""
    kind, k, dimensions = settings["build_index"]["kind"], settings["search"]["neighbors"], key_dimensions(settings)
    most, largest = max(index_rows), max(split.tokens for split in counts.queries.values())
    query_shard = largest * len(counts.queries) // counts.query_shards
    documents = max(split.documents for split in counts.queries.values())
    looked_up, merged = min(counts.all_queries, max(query_shard, LOOKUP_TOKENS)), sizes.query_bytes(settings)
    grows = {
        "train": 24 * counts.train_tokens,  # lists of tokens, then rows of tokens and of segments
        "build": 2 * 48 * max(shard.tokens for shard in counts.shards),  # two shards at a time: text, tokens and Python's numbers of them
        "index": 0 if kind == "exact" else index_memory(kind, most, dimensions, settings["build_index"]["training_rows"]),
        # The larger of two merged shards, in parts and together, and of the neighbors of many shards with an index.
        "search": max(4 * query_shard * merged, 24 * k * looked_up + index_bytes(kind, most, dimensions)),
        "evaluate": largest * 5 * HELD_PREDICTIONS + 16 * BOOTSTRAP_SAMPLES * documents,
    }
    measured = costs.memory if costs else {}
    return {stage: measured.get(stage, PROCESS_BYTES) + size for stage, size in grows.items()}


def duration(seconds: float) -> str:
    """Return a duration as "2 hours and 5 minutes"."""
    unit = next(unit for least, unit in ((86400, "hours"), (3600, "minutes"), (0, "seconds")) if seconds >= least)
    return humanize.precisedelta(seconds, minimum_unit=unit, suppress=("years", "months"), format="%.2g")


def size_text(size: Number) -> str:
    """Return a size as "1.678 TB"."""
    return humanize.naturalsize(size, format="%.4g")


def _format(made: Plan, *, workers: int, memory: int) -> str:
    """Return the plan as text."""
    counts, files = made.counts, made.bytes | {"together": sum(made.bytes.values())}
    documents = sum(split.documents for split in (*counts.shards, *counts.queries.values()))
    computed = sum(shard.window_tokens for shard in counts.shards)
    stages = [
        [name, *("" if value is None else text(value) for text, value in zip((duration, duration, size_text), stage, strict=True))]
        for name, stage in made.stages.items()
    ]
    rates = [
        [name, f"{rate.per_second:,.4g}", "given" if rate.given else f"measured here, {processor()}"] for name, rate in made.rates.items()
    ]
    return "\n".join(
        [
            f"{counts.rows:,} rows and {counts.all_queries:,} queries of {documents:,} documents "
            f"({'counted' if made.counted else 'given or assumed'})",
            f"{computed:,} tokens computed for the rows, context and padding included",
            "",
            aligned(["file", "bytes", ""], [[name, f"{size:,}", size_text(size)] for name, size in files.items()], right=True),
            "",
            aligned(["stage", "time, one worker", f"{workers} workers", "memory"], stages, right=True),
            "",
            f"index: shards: {len(made.index_rows)}; rows of the largest: {max(made.index_rows):,}; memory: {memory / 2**30:.3g} GiB",
            f"searching: {size_text(made.searching_bytes)} more, until it has finished",
            "",
            aligned(["rate", "per second", "from"], rates, right=True),
        ]
    )
