"""Find the neighbors of every query, in three Beam pipelines with files between them.

1. Encode each shard of the queries' documents.
2. Look each shard up in each group of index shards. A process holds one index shard at a time.
3. Merge the neighbors that the groups found. Add the neighbors in the query's own document, the exact matches in the suffix index, and
   DeepNet's logits of the tokens that can win.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from beam_pipelines.build_index import OneAtATime
from beam_pipelines.runner import count, run_units
from beam_pipelines.search_job import Lookup, QueryShard, SearchJob, part_name, query_shards
from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import Queries, common
from resmem_lm.evaluation.sources import document_arrays, memory_arrays
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encode_documents import EncodingWorker, write_arrays
from resmem_lm.memory.encoder import QueryRows
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.index import Index, Nearest
from resmem_lm.memory.nearest import add_neighbors, merge_parts, no_neighbors
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.memory.schema import KEY_FILES
from resmem_lm.memory.suffix_index import Suffixes, open_suffixes
from resmem_lm.model.checkpoints import Model, load_model
from resmem_lm.text.shards import QUERY_SPLITS, checksum_of_queries, group_numbers, read_shard, shard_paths
from resmem_lm.workdir.arrays import array_files, publish_arrays, published_arrays
from resmem_lm.workdir.artifacts import find_record, folder_of, publish, remove_orphans, require_record
from resmem_lm.workdir.lock import assert_held
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors, stage
from resmem_lm.workdir.storage import Record, drop_copy, remove, sha256, write_json

DOCUMENT_ARRAYS = ("document_lengths", "document_groups")
ENCODED = array_files(*QueryRows._fields, "tokens", *DOCUMENT_ARRAYS)
PART = ("rows", "distances", "exact_rows", "exact_distances")


@dataclasses.dataclass(frozen=True)
class EncodeQueries:
    """Encode a shard of documents: publish the key and the hidden state of each token."""

    job: SearchJob

    def setup(self) -> EncodingWorker:
        """Load the model."""
        return self.job.encoding_worker()

    def process(self, name: str, worker: EncodingWorker) -> Iterator[str]:
        """Yield the shard's name once it is published."""
        folder, provenance = self.job.encoded, self.job.encoded_provenance()
        if not find_record(folder, name, provenance):
            documents = read_shard(self.job.run.documents / f"{name}.jsonl")
            tokens = worker.vocabulary.encode_documents(documents)
            with disk_errors(folder), publish(folder, name, provenance, ENCODED) as attempt:
                attempt.facts = write_arrays(attempt.folder, tokens, worker.encoder, name)
                np.save(attempt.folder / "tokens.npy", np.concatenate([*tokens, np.zeros(0, np.int32)]))
                np.save(attempt.folder / "document_lengths.npy", np.array([len(document) for document in tokens], np.int64))
                np.save(attempt.folder / "document_groups.npy", group_numbers(documents))
            count("query_tokens", attempt.facts["tokens"])
        yield name


@dataclasses.dataclass(frozen=True)
class OpenIndex:
    """A loaded index shard."""

    shard: int
    index: Index
    first_row: int


class HeldIndex(OneAtATime):
    """The index shard that a process has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._held: OpenIndex | None = None

    def get(self, job: SearchJob, shard: int) -> OpenIndex:
        """Load an index shard and free the previous one. The caller holds `lock` and keeps no reference to the result."""
        if self._held is None or self._held.shard != shard:
            self._release(job)
            index, first_row = open_index(job.run, job.open_datastore(), job.index, shard)
            index.datastore.check_files(*KEY_FILES)
            self._held = OpenIndex(shard, index, first_row)
        return self._held

    def _release(self, job: SearchJob) -> None:
        """Free the memory and the disk space of the shard before the next one is loaded."""
        if self._held is None:
            return
        part, record = self._held.index.datastore, job.index["shards"][self._held.shard]
        self._held = None
        drop_copy(folder_of(job.run.index, record))
        for shard in part.shards:
            for name in KEY_FILES:
                drop_copy(folder_of(part.folder, shard) / name)


class QuerySearch:
    """Accumulate the nearest neighbors of a query shard, and those of a sample by exact search."""

    def __init__(self, keys: Float[np.ndarray, "queries emb"], sample: Int[np.ndarray, " sample"], k: int) -> None:
        self.keys, self.sample = keys, sample
        self.nearest, self.exact = no_neighbors(len(keys), k), no_neighbors(len(sample), k)

    def look_up(self, opened: OpenIndex) -> None:
        """Search one more index shard."""
        add_neighbors(self.nearest, opened.index, self.keys, opened.first_row)
        add_neighbors(self.exact, ExactIndex(opened.index.datastore), self.keys[self.sample], opened.first_row)


@dataclasses.dataclass(frozen=True)
class SearchShards:
    """Look query shards up in a group of index shards, and publish the nearest neighbors of the group."""

    job: SearchJob

    def setup(self) -> HeldIndex:
        """Return a place for the process's index shard."""
        return HeldIndex()

    def process(self, lookup: Lookup, held: HeldIndex) -> Iterator[str]:
        """Yield the names of the published parts."""
        job = self.job
        provenances = {query: job.part_provenance(query, lookup.index_shards) for query in lookup.queries}
        todo = [query for query in lookup.queries if not find_record(job.parts, part_name(query, lookup.group), provenances[query])]
        with held.lock, contextlib.ExitStack() as copies:
            searches = {query: self._start(query, copies) for query in todo}
            for shard in lookup.index_shards:
                for search in searches.values():
                    search.look_up(held.get(job, shard))
            for query, search in searches.items():
                arrays = dict(zip(PART, (*search.nearest, *search.exact), strict=True))
                publish_arrays(job.parts, part_name(query, lookup.group), provenances[query], arrays)
                count("searched_tokens", query.tokens)
        yield from (part_name(query, lookup.group) for query in todo)

    def _start(self, query: QueryShard, copies: contextlib.ExitStack) -> QuerySearch:
        (keys,) = copies.enter_context(published_arrays(self.job.encoded, query.name, self.job.encoded_provenance(), "keys"))
        return QuerySearch(keys, self.job.sample(query), self.job.neighbors)


@dataclasses.dataclass(frozen=True)
class MergeWorker:
    """The memory and the model, which a worker process opens once for all of its shards."""

    datastore: Datastore
    suffixes: list[Suffixes]
    model: Model


@dataclasses.dataclass(frozen=True)
class MergeNeighbors:
    """Merge the parts of a query shard, add DeepNet's logits, and publish the result."""

    job: SearchJob

    def setup(self) -> MergeWorker:
        """Check the tokens of the datastore, open the suffix index, and load the model."""
        job = self.job
        datastore = job.open_datastore()
        datastore.check_files("tokens.npy")
        return MergeWorker(datastore, open_suffixes(job.run, datastore, job.index), load_model(job.run.checkpoints))

    def process(self, query: QueryShard, worker: MergeWorker) -> Iterator[str]:
        """Yield the shard's name once it is published."""
        folder, provenance = self.job.run.neighbors, self.job.provenance(query)
        if not find_record(folder, query.name, provenance):
            nearest, exact = self._merge(query, *PART[:2]), self._merge(query, *PART[2:])
            arrays, sample = self._arrays(query, nearest, worker), self.job.sample(query)
            facts = {"tokens": len(arrays["tokens"]), "documents": len(arrays["document_lengths"])}
            facts |= {"sampled": int((exact[0] >= 0).sum()), "recalled": common(nearest[0][sample], exact[0])}
            publish_arrays(folder, query.name, provenance, {name: arrays[name] for name in Queries._fields}, facts)
            count("merged_tokens", facts["tokens"])
        yield query.name

    def _merge(self, query: QueryShard, rows: str, distances: str) -> Nearest:
        job = self.job
        with contextlib.ExitStack() as copies:
            parts: list[Nearest] = []
            for group, shards in enumerate(job.groups()):
                part = published_arrays(job.parts, part_name(query, group), job.part_provenance(query, shards), rows, distances)
                part_rows, part_distances = copies.enter_context(part)
                parts.append((part_rows, part_distances))
            return merge_parts(parts, job.neighbors)

    def _arrays(self, query: QueryShard, nearest: Nearest, worker: MergeWorker) -> dict[str, np.ndarray]:
        """Return the arrays of `Queries`."""
        names = (*QueryRows._fields, "tokens", *DOCUMENT_ARRAYS)
        with published_arrays(self.job.encoded, query.name, self.job.encoded_provenance(), *names) as encoded:
            arrays = {name: np.asarray(array) for name, array in zip(names, encoded, strict=True)}
        arrays |= document_arrays(arrays, self.job.document_neighbors)
        return arrays | memory_arrays(worker.model, worker.datastore, worker.suffixes, nearest, arrays)


@stage(name="search", after=("build", "index"), policy="extend", free=("pipeline_options",))
def search(run: Run, *, neighbors: int = 50, document_neighbors: int = 16, recall_queries: int = 500, pipeline_options: str = "") -> Record:
    """Write WORKDIR/neighbors: for every validation and test token, what the memory and its own document know.

    These are its nearest neighbors, the exact matches of the tokens before it, and its nearest neighbors among these tokens.

    Args:
        neighbors: neighbors of each query, the largest k that can be chosen later (paper: 50).
        document_neighbors: neighbors of each query among the earlier tokens of its own document; 0 for none.
        recall_queries: number of evenly spaced queries of each split that measure the recall of the index.
        pipeline_options: Beam's options, such as "--runner=..."; without a runner, Beam's in-process runner.

    Returns:
        The checksum of WORKDIR/neighbors/neighbors.json, and for each split the numbers of tokens and documents and the recall at k.

    Raises:
        UserError: more neighbors than rows, no query to compare, or a checkpoint that the datastore was not built with.
    """
    job = _job(run, neighbors, document_neighbors, recall_queries)
    for folder in (run.neighbors, job.encoded, job.parts):
        folder.mkdir(parents=True, exist_ok=True)
    names = {split: [path.name.removesuffix(".jsonl") for path in shard_paths(run, split)] for split in QUERY_SPLITS}
    every = [name for split in QUERY_SPLITS for name in names[split]]

    unencoded = [name for name in every if not find_record(job.encoded, name, job.encoded_provenance())]
    run_units("Encode queries", unencoded, EncodeQueries(job), pipeline_options, published=job.encoded, names=every)

    queries = {split: query_shards(job, names[split]) for split in QUERY_SPLITS}
    unmerged = [
        query for split in QUERY_SPLITS for query in queries[split] if not find_record(run.neighbors, query.name, job.provenance(query))
    ]
    parts = [part_name(query, group) for group in range(len(job.groups())) for query in unmerged]
    run_units("Search", job.lookups(unmerged), SearchShards(job), pipeline_options, published=job.parts, names=parts)

    run_units("Merge", unmerged, MergeNeighbors(job), pipeline_options, published=run.neighbors, names=every)
    assert_held(run.path)
    return _write_manifest(job, queries)


def _job(run: Run, neighbors: int, document_neighbors: int, recall_queries: int) -> SearchJob:
    if recall_queries < 1:
        raise UserError(f"search.recall_queries = {recall_queries}: take 1 or more, to measure the recall of the index")
    datastore = open_datastore(run.datastore)
    if not 1 <= neighbors <= datastore.live_rows:
        raise UserError(
            f"search.neighbors = {neighbors}, but the datastore has {datastore.live_rows} rows: take 1 to {datastore.live_rows}"
        )
    if document_neighbors < 0:
        raise UserError(f"search.document_neighbors = {document_neighbors}: take 1 or more, or 0 for none")
    checksums = sha256(run.datastore / "manifest.json"), checksum_of_queries(run)
    return SearchJob(run, datastore.manifest, *checksums, index_manifest(run, datastore), neighbors, document_neighbors, recall_queries)


def _write_manifest(job: SearchJob, queries: dict[str, list[QueryShard]]) -> Record:
    """Write neighbors.json, remove what it does not list, and return the stage's result."""
    folder = job.run.neighbors
    manifest: Record = {"datastore": job.datastore_checksum}
    result: Record = {}
    for split in QUERY_SPLITS:
        records = [require_record(folder, query.name, job.provenance(query)) for query in queries[split]]
        total = {name: sum(record[name] for record in records) for name in ("tokens", "documents", "sampled", "recalled")}
        sampled, recalled = total.pop("sampled"), total.pop("recalled")
        result[split] = total | {"recall_at_k": recalled / sampled if sampled else 1.0}
        manifest[split] = result[split] | {"shards": records}
    write_json(folder / "neighbors.json", manifest)
    remove_orphans(folder, [record for split in QUERY_SPLITS for record in manifest[split]["shards"]])
    for temporary in (job.encoded, job.parts):
        remove(temporary)
    return result | {"neighbors": sha256(folder / "neighbors.json")}
