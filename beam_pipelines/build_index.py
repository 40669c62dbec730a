"""Build the index of the keys and the suffix index of the tokens from the datastore, in two Beam pipelines.

An index shard covers as many consecutive shards of the datastore as a worker's memory holds.
"""

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

from beam_pipelines.runner import count, run_units
from resmem_lm.errors import UserError
from resmem_lm.memory import suffix_index
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.index_kinds import PROCESS_BYTES, group_shards, index_memory, largest_index, library
from resmem_lm.memory.schema import KEY_FILES
from resmem_lm.model.checkpoints import load_config
from resmem_lm.workdir.artifacts import Attempt, find_record, folder_of, publish, remove_orphans, require_record
from resmem_lm.workdir.lock import assert_held
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors, stage
from resmem_lm.workdir.storage import AnyPath, Record, drop_copy, write_json


class IndexJob(NamedTuple):
    """Consecutive shards of the datastore, and the name and provenance of the artifact that is built from them."""

    first: int
    shards: int
    name: str
    provenance: Record


class OneAtATime:
    """Lock a worker process, so that its threads hold one index in memory, not one each."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Build:
    """Build an artifact from shards of the datastore, and publish it."""

    run: Run
    manifest: Record
    inputs: ClassVar[tuple[str, ...]]  # the files of each shard that the build reads

    def setup(self) -> OneAtATime:
        """Return the process's lock."""
        return OneAtATime()

    def process(self, unit: IndexJob, process: OneAtATime) -> Iterator[str]:
        """Yield the artifact's name once it is published."""
        folder = self.run.index
        part = Datastore(self.run.datastore, self.manifest).part(unit.first, unit.shards)
        with process.lock:
            if not find_record(folder, unit.name, unit.provenance):
                part.check_files(*self.inputs)
                with disk_errors(folder), publish(folder, unit.name, unit.provenance) as attempt:
                    self.write(part, attempt)
                for shard in part.shards:
                    for name in self.inputs:
                        drop_copy(folder_of(part.folder, shard) / name)
        yield unit.name

    def write(self, part: Datastore, attempt: Attempt) -> None:
        """Write the artifact's files and facts."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BuildShard(Build):
    """Build an index shard."""

    settings: Record
    inputs: ClassVar[tuple[str, ...]] = KEY_FILES

    def write(self, part: Datastore, attempt: Attempt) -> None:
        """Write the index of the keys."""
        if self.settings["kind"] != "exact":
            attempt.facts |= library(self.settings["kind"]).build(part, attempt.folder, self.settings)
        attempt.facts["rows"] = part.rows
        count("indexed_rows", part.rows)


class BuildSuffixes(Build):
    """Build a shard of the suffix index from live rows."""

    inputs: ClassVar[tuple[str, ...]] = ("tokens.npy",)

    def write(self, part: Datastore, attempt: Attempt) -> None:
        """Write the tokens, and the rows in the order of the preceding tokens."""
        suffix_index.save_suffixes(attempt.folder, suffix_index.build_suffixes(suffix_index.live_tokens(part)))


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
    """Write WORKDIR/index: an index of the keys, and a suffix index of the tokens.

    If shards of the datastore are added or changed, only their index shards are rebuilt.

    Args:
        kind: "faiss"; "scann", as in the paper (pip install 'resmem_lm[scann]'); or "exact", which compares a query with every key.
        candidates: neighbors that an index shard proposes per query, before ranking by true distance.
        training_rows: largest number of rows to learn lists (ScaNN's leaves) and codebooks from; faiss uses fewer if more do not help.
        threads: threads of a ScaNN build; 0 for all cores. One thread is deterministic. With more, a row at the same distance from two
            leaves may be in either, and one query in 60,000 has other neighbors. faiss uses all cores and is deterministic.
        memory_gib: memory of one worker process, which limits the rows of an index shard; a finished index stays as it is.
        pipeline_options: Beam's options, such as "--runner=..."; without a runner, Beam's in-process runner.

    Returns:
        The kind and its parameters, the rows and the provenance of each index shard, and the provenance of each shard of the suffix index.

    Raises:
        UserError: ScaNN cannot be imported, the datastore is damaged, or the memory is too small for one of its shards.
    """
    datastore = open_datastore(run.datastore)
    settings: Record = {"kind": kind, "candidates": candidates, "training_rows": training_rows, "threads": threads}
    emb = datastore.binding.key_dimensions or load_config(run.checkpoints).emb_dim
    groups = group_shards([shard["rows"] for shard in datastore.shards], _most_rows(datastore, settings, emb, memory_gib))
    jobs = [_job("shard", datastore, group, settings) for group in groups]
    suffix_jobs = [_job("suffixes", datastore, group, suffix_index.deleted_of(datastore.part(*group))) for group in groups]
    folder = run.index
    folder.mkdir(parents=True, exist_ok=True)
    records = _published(folder, "Index", jobs, BuildShard(run, datastore.manifest, settings), pipeline_options)
    suffixes = _published(folder, "Index suffixes", suffix_jobs, BuildSuffixes(run, datastore.manifest), pipeline_options)
    assert_held(run.path)
    facts: Record = {"kind": kind, "candidates": candidates}
    write_json(folder / "index.json", facts | {"shards": records, "suffixes": suffixes})
    remove_orphans(folder, records + suffixes)
    shards = [{"rows": record["rows"], "provenance": record["provenance"]} for record in records]
    return facts | {"shards": shards, "suffixes": [record["provenance"] for record in suffixes]}


def _job(kind: str, datastore: Datastore, group: tuple[int, int], facts: Record) -> IndexJob:
    """Return the job that builds an artifact from a group of datastore shards, given as the first shard and the number of shards."""
    provenance = {**facts, "folders": [shard["folder"] for shard in datastore.part(*group).shards]}
    name = f"{kind}-{hashlib.sha256(json.dumps(provenance).encode()).hexdigest()[:12]}"
    return IndexJob(*group, name, provenance)


def _published(folder: AnyPath, title: str, jobs: list[IndexJob], work: Build, pipeline_options: str) -> list[Record]:
    """Run the jobs whose artifacts are missing, and return the records of all."""
    todo = [job for job in jobs if find_record(folder, job.name, job.provenance) is None]
    run_units(title, todo, work, pipeline_options, published=folder, names=[job.name for job in jobs])
    return [require_record(folder, job.name, job.provenance) for job in jobs]


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
