"""Build the index from the datastore, as a Beam pipeline.

An index shard covers as many consecutive shards of the datastore as a worker's memory holds.
"""

import dataclasses
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
    """Consecutive shards of the datastore, and the name of their index shard."""

    first: int
    shards: int
    name: str


class OneAtATime:
    """Lock a worker process, so that its threads hold one index in memory, not one each."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class BuildShard:
    """Build an index shard and publish it."""

    run: Run
    manifest: Record
    settings: Record

    def setup(self) -> OneAtATime:
        """Return the process's lock."""
        return OneAtATime()

    def process(self, unit: IndexJob, process: OneAtATime) -> Iterator[str]:
        """Yield the shard's name once it is published."""
        folder = self.run.index
        part = Datastore(self.run.datastore, self.manifest).part(unit.first, unit.shards)
        provenance = provenance_of(part, self.settings)
        with process.lock:
            if not find_record(folder, unit.name, provenance):
                part.check_files(*KEY_FILES)
                with disk_errors(folder), publish(folder, unit.name, provenance) as attempt:
                    if self.settings["kind"] != "exact":
                        attempt.facts |= library(self.settings["kind"]).build(part, attempt.folder, self.settings)
                    attempt.facts["rows"] = part.rows
                for shard in part.shards:
                    for name in KEY_FILES:
                        drop_copy(folder_of(part.folder, shard) / name)
                count("indexed_rows", part.rows)
        yield unit.name


def provenance_of(part: Datastore, settings: Record) -> Record:
    """Return the provenance of an index shard."""
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
    """Write WORKDIR/index. If shards of the datastore are added or changed, only their index shards are rebuilt.

    Args:
        kind: "faiss"; "scann", as in the paper (pip install 'resmem_lm[scann]'); or "exact", which compares a query with every key.
        candidates: neighbors that an index shard proposes per query, before ranking by true distance.
        training_rows: largest number of rows to learn lists (ScaNN's leaves) and codebooks from; faiss uses fewer if more do not help.
        threads: threads of a ScaNN build; 0 for all cores. One thread is deterministic. With more, a row at the same distance from two
            leaves may be in either, and one query in 60,000 has other neighbors. faiss uses all cores and is deterministic.
        memory_gib: memory of one worker process, which limits the rows of an index shard; a finished index stays as it is.
        pipeline_options: Beam's options, such as "--runner=..."; without a runner, Beam's in-process runner.

    Returns:
        The kind and its parameters, and the rows and the provenance of each index shard.

    Raises:
        UserError: ScaNN cannot be imported, the datastore is damaged, or the memory is too small for one of its shards.
    """
    datastore = open_datastore(run.datastore)
    settings: Record = {"kind": kind, "candidates": candidates, "training_rows": training_rows, "threads": threads}
    emb = datastore.binding.key_dimensions or load_config(run.checkpoints).emb_dim
    jobs, provenances = _jobs(datastore, settings, _most_rows(datastore, settings, emb, memory_gib))
    folder = run.index
    folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if find_record(folder, job.name, provenances[job.name]) is None]
    work = BuildShard(run, datastore.manifest, settings)
    run_units("Index", todo, work, pipeline_options, published=folder, names=list(provenances))
    records = [require_record(folder, name, provenance) for name, provenance in provenances.items()]
    assert_held(run.path)
    facts: Record = {"kind": kind, "candidates": candidates}
    write_json(folder / "index.json", facts | {"shards": records})
    remove_orphans(folder, records)
    return facts | {"shards": [{"rows": record["rows"], "provenance": record["provenance"]} for record in records]}


def _most_rows(datastore: Datastore, settings: Record, emb: int, memory_gib: float) -> int:
    """Return the most rows of an index shard; raise UserError if the memory is too small for a shard of the datastore."""
    if not 0 < memory_gib < math.inf:
        raise UserError(f"build_index.memory_gib = {memory_gib}: take a number above 0")
    kind, training_rows = settings["kind"], settings["training_rows"]
    most = largest_index(kind, int(memory_gib * 2**30) - PROCESS_BYTES, emb, training_rows)
    largest = max(shard["rows"] for shard in datastore.shards)
    if largest > most:
        needed = (index_memory(kind, largest, emb, training_rows) + PROCESS_BYTES) / 2**30
        raise UserError(
            f"build_index.memory_gib = {memory_gib:g} is too small for the largest shard of the datastore, of {largest} rows: take "
            f"{needed + 0.05:.1f} (--index_memory_gib), or more shards of documents"
        )
    return most


def _jobs(datastore: Datastore, settings: Record, most_rows: int) -> tuple[list[IndexJob], dict[str, Record]]:
    """Return the index shards, and the provenance of each by name."""
    jobs, provenances = [], {}
    for first, shards in group_shards([shard["rows"] for shard in datastore.shards], most_rows):
        provenance = provenance_of(datastore.part(first, shards), settings)
        name = f"shard-{hashlib.sha256(json.dumps(provenance).encode()).hexdigest()[:12]}"
        jobs.append(IndexJob(first, shards, name))
        provenances[name] = provenance
    return jobs, provenances
