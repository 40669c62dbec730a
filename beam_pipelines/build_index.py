"""Datastore -> index, as a Beam pipeline: one shard of the index for as many shards of the datastore as a worker's memory holds."""

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from typing import Literal, NamedTuple

from beam_pipelines.runner import count, run_units
from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.index_kinds import PROCESS_BYTES, group_shards, index_memory, largest_index, library
from resmem_lm.memory.schema import KEY_FILES
from resmem_lm.model.checkpoints import load_config
from resmem_lm.workdir.artifacts import find_record, folder_of, publish, remove_orphans, require_record
from resmem_lm.workdir.lock import assert_held
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors, stage
from resmem_lm.workdir.storage import Record, drop_copy, write_json


class IndexJob(NamedTuple):
    """Consecutive shards of the datastore, and the name of the shard of the index that they become."""

    first: int
    shards: int
    name: str


class OneAtATime:
    """What the threads of a worker process share, so that one index is in memory and not one for each thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class BuildShard:
    """Builds a shard of the index and publishes it."""

    def __init__(self, run: Run, manifest: Record, settings: Record) -> None:
        self.run, self.manifest, self.settings = run, manifest, settings

    def setup(self) -> OneAtATime:
        """Makes the process's lock."""
        return OneAtATime()

    def process(self, unit: IndexJob, turn: OneAtATime) -> Iterator[str]:
        """The shard's name, when it is published."""
        run = self.run
        part = Datastore(run.datastore, self.manifest).part(unit.first, unit.shards)
        provenance = source_of(part, self.settings)
        with turn.lock:
            if not find_record(run.index, unit.name, provenance):
                part.check_files(*KEY_FILES)
                with disk_errors(run.index), publish(run.index, unit.name, provenance) as attempt:
                    if self.settings["kind"] != "exact":
                        attempt.facts |= library(self.settings["kind"]).build(part, attempt.folder, self.settings)
                    attempt.facts["rows"] = part.rows
                for shard in part.shards:
                    for name in KEY_FILES:
                        drop_copy(folder_of(part.folder, shard) / name)
                count("indexed_rows", part.rows)
        yield unit.name


def source_of(part: Datastore, settings: Record) -> Record:
    """What a shard of the index is made from."""
    return {**settings, "folders": [shard["folder"] for shard in part.shards]}


@stage(name="index", after=("build",), policy="extend", free=("pipeline_options", "memory_gib"))
def build_index(
    run: Run,
    *,
    kind: Literal["faiss", "scann", "exact"] = "faiss",
    candidates: int = 300,
    training_rows: int = 100_000,
    threads: int = 0,
    memory_gib: float = 8.0,
    pipeline_options: str = "",
) -> Record:
    """Writes WORKDIR/index. Where shards of the datastore were added or changed, only what holds them is made again.

    Args:
        kind: "faiss"; "scann", the paper's (pip install 'resmem_lm[scann]'); or "exact" where every comparison is wanted.
        candidates: neighbors that each shard of the index proposes for a query; the nearest by true distance are kept.
        training_rows: rows from which lists (ScaNN's leaves) and codes are learned, at most; faiss takes no more than help it.
        threads: that ScaNN builds with; 0 is all cores. With 1, two of its builds are equal; with more, a row that is equally near to two
            leaves is in either, and one query in some 60,000 finds other neighbors. faiss takes all cores and builds the same each time.
        memory_gib: of one worker process, which says how many rows a shard of the index has; a finished index stays as it is.
        pipeline_options: Beam's own, such as "--runner=..."; without a runner, Beam's in-process one.

    Returns:
        The datastore's shards, the kind and its parameters.

    Raises:
        UserError: ScaNN cannot be imported, the datastore is damaged, or the memory does not hold one of its shards.
    """
    if not 0 < memory_gib < math.inf:
        raise UserError(f"build_index.memory_gib = {memory_gib}: take a number above 0")
    datastore = open_datastore(run.datastore)
    settings: Record = {"kind": kind, "candidates": candidates, "training_rows": training_rows, "threads": threads}
    emb = datastore.binding.key_dimensions or load_config(run.checkpoints).emb_dim
    most = largest_index(kind, int(memory_gib * 2**30) - PROCESS_BYTES, emb, training_rows)
    largest = max(shard["rows"] for shard in datastore.shards)
    if largest > most:
        needed = (index_memory(kind, largest, emb, training_rows) + PROCESS_BYTES) / 2**30
        raise UserError(
            f"build_index.memory_gib = {memory_gib:g} is too small for the largest shard of the datastore, of {largest} rows: take "
            f"{needed + 0.05:.1f} (--index_memory_gib), or more shards of documents"
        )
    units = []
    for first, shards in group_shards([shard["rows"] for shard in datastore.shards], most):
        source = json.dumps(source_of(datastore.part(first, shards), settings))
        units.append(IndexJob(first, shards, f"shard-{hashlib.sha256(source.encode()).hexdigest()[:12]}"))
    folder = run.index
    folder.mkdir(parents=True, exist_ok=True)

    sources = {unit.name: source_of(datastore.part(unit.first, unit.shards), settings) for unit in units}
    todo = [unit for unit in units if find_record(folder, unit.name, sources[unit.name]) is None]
    run_units(
        "Index",
        todo,
        BuildShard(run, datastore.manifest, settings),
        pipeline_options,
        published=folder,
        names=[unit.name for unit in units],
    )
    records = [require_record(folder, name, provenance) for name, provenance in sources.items()]
    assert_held(run.path)
    facts: Record = {"kind": kind, "candidates": candidates}
    write_json(folder / "index.json", facts | {"shards": records})
    remove_orphans(folder, records)
    return facts | {"shards": [{"rows": record["rows"], "provenance": record["provenance"]} for record in records]}
