"""Queries and index -> neighbors, as three Beam pipelines with files between them.

Encode each shard of the queries' documents; look each up in each group of shards of the index; merge what the groups found. A process
holds one shard of the index at a time.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from beam_pipelines.build_index import OneAtATime
from beam_pipelines.runner import count, run_units
from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import Queries, common, deepnet_outputs
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encode_documents import EncodingWorker, write_arrays
from resmem_lm.memory.encoder import query_head
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.index import Index, merge_nearest
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.memory.schema import KEY_FILES
from resmem_lm.memory.sharded import load_array
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.shards import QUERY_SPLITS, digest, read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.artifacts import find_record, folder_of, publish, remove_orphans, require_record
from resmem_lm.workdir.lock import assert_held
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors, stage
from resmem_lm.workdir.storage import AnyPath, Record, drop_copy, read_json, remove, sha256, write_json

ENCODED, PARTS = "queries", "parts"  # folders of what is kept only until all is merged
SEARCH_BLOCK = 4096
LOOKUP_TOKENS = 2**20  # of several query shards in one piece of work: 1.2 GB of neighbors at k = 50, while they are merged
OF_DOCUMENTS = ("document_lengths", "document_groups")
FOUND = ("rows", "distances", "exact_rows", "exact_distances")
GROUPS = 16  # of shards of the index: each keeps k neighbors of every query in files until all are merged

Found = tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]


class QueryShard(NamedTuple):
    """A shard of a split's documents, and which of the split's tokens are its own."""

    name: str
    first: int
    tokens: int
    split_tokens: int


class Lookup(NamedTuple):
    """Query shards, and consecutive shards of the index in which they are looked up."""

    group: int
    index_shards: tuple[int, ...]
    queries: tuple[QueryShard, ...]


@dataclasses.dataclass(frozen=True)
class SearchJob:
    """What every worker of a search needs."""

    run: Run
    datastore: Record  # its manifest
    checksum: str  # of that
    documents: str  # of the queries' documents
    index: Record  # as the datastore's
    neighbors: int
    recall_queries: int

    def open(self) -> tuple[AnyPath, Datastore]:
        """The folder of the neighbors, and the datastore."""
        return self.run.neighbors, Datastore(self.run.datastore, self.datastore)

    def worker(self) -> EncodingWorker:
        """The model, and an encoder of queries."""
        return EncodingWorker(self.run, self.open()[1].binding, query_head)

    def sample(self, query: QueryShard) -> Int[np.ndarray, " sample"]:
        """The shard's share of the split's evenly spaced queries that are compared with exact search; none if the index is exact."""
        if self.index["kind"] == "exact":
            return np.zeros(0, np.int64)
        spaced = np.linspace(0, query.split_tokens - 1, min(self.recall_queries, query.split_tokens)).astype(np.int64)
        inside = spaced[(spaced >= query.first) & (spaced < query.first + query.tokens)]
        return np.unique(inside) - query.first

    def encoded_from(self) -> Record:
        """What a shard's encoded queries are made from."""
        described = {name: self.datastore[name] for name in ("model", "vocabulary", "window", "key_dimensions", "projection")}
        return {"documents": self.documents, **described}

    def found_from(self, query: QueryShard, index_shards: tuple[int, ...]) -> Record:
        """What a shard's neighbors in some shards of the index are made from."""
        return self.merged_from(query) | {"index": [self.index["shards"][shard]["folder"] for shard in index_shards]}

    def merged_from(self, query: QueryShard) -> Record:
        """What a shard's neighbors are made from."""
        return {
            **self.encoded_from(),
            "datastore": self.checksum,
            "kind": [self.index["kind"], self.index["candidates"]],
            "index": [shard["folder"] for shard in self.index["shards"]],
            "neighbors": self.neighbors,
            "recall_queries": self.recall_queries,
            "tokens": [query.first, query.tokens, query.split_tokens],
        }

    def groups(self) -> list[tuple[int, ...]]:
        """The shards of the index, in groups that are each searched as one piece of work."""
        shards = len(self.index["shards"])
        count = min(shards, GROUPS)
        return [tuple(range(group * shards // count, (group + 1) * shards // count)) for group in range(count)]


def part_name(query: QueryShard, group: int) -> str:
    """Of a query shard's neighbors in one group of the shards of the index."""
    return f"{query.name}.group-{group:02d}"


def group_numbers(documents: list[Document]) -> Int[np.ndarray, " documents"]:
    """A number for each document, the same whichever shard it is in; equal if they are of one group."""
    names = (f"document {document.id}" if document.group is None else f"group {document.group}" for document in documents)
    return np.array([int(digest(name), 16) >> 1 for name in names], np.int64)


class EncodeQueries:
    """Name of a shard of documents -> its tokens' keys and hidden states, published."""

    def __init__(self, settings: SearchJob) -> None:
        self.settings = settings

    def setup(self) -> EncodingWorker:
        """Loads the model."""
        return self.settings.worker()

    def process(self, name: str, worker: EncodingWorker) -> Iterator[str]:
        """The shard's name, when it is published."""
        neighbors, _ = self.settings.open()
        folder, provenance = neighbors / ENCODED, self.settings.encoded_from()
        if not find_record(folder, name, provenance):
            documents = read_shard(neighbors.parent / "documents" / f"{name}.jsonl")
            tokens = worker.vocabulary.encode_documents(documents)
            expected = [f"{array}.npy" for array in ("keys", "hidden", "tokens", *OF_DOCUMENTS)]
            with disk_errors(folder), publish(folder, name, provenance, expected) as attempt:
                attempt.facts = write_arrays(attempt.folder, tokens, worker.encoder, name)
                np.save(attempt.folder / "tokens.npy", np.concatenate([*tokens, np.zeros(0, np.int32)]))
                np.save(attempt.folder / "document_lengths.npy", np.array([len(document) for document in tokens], np.int64))
                np.save(attempt.folder / "document_groups.npy", group_numbers(documents))
                count("query_tokens", attempt.facts["tokens"])
        yield name


class _OpenIndex(OneAtATime):
    """The shard of the index that a process holds."""

    def __init__(self) -> None:
        super().__init__()
        self._number: int | None = None
        self._index: tuple[Index, int] | None = None

    def get(self, settings: SearchJob, number: int) -> tuple[Index, int]:
        """A shard of the index and its first row; call it with `lock` held."""
        if self._number != number or self._index is None:
            neighbors, datastore = settings.open()
            if self._index is not None and self._number is not None:  # its memory and its copies, before the next is loaded
                part, record = self._index[0].datastore, settings.index["shards"][self._number]
                self._index = None
                drop_copy(folder_of(settings.run.index, record))
                for shard in part.shards:
                    for name in KEY_FILES:
                        drop_copy(folder_of(datastore.folder, shard) / name)
            index, first_row = open_index(settings.run, datastore, settings.index, number)
            index.datastore.check_files(*KEY_FILES)
            self._index, self._number = (index, first_row), number
        return self._index


class SearchShard:
    """Looks query shards up in some shards of the index, one after another, and publishes the nearest of all."""

    def __init__(self, settings: SearchJob) -> None:
        self.settings = settings

    def setup(self) -> _OpenIndex:
        """Makes the place of the process's index."""
        return _OpenIndex()

    def process(self, unit: Lookup, opened: _OpenIndex) -> Iterator[str]:
        """The published names."""
        settings, (neighbors, _) = self.settings, self.settings.open()
        todo = {
            part_name(query, unit.group): query
            for query in unit.queries
            if not find_record(neighbors / PARTS, part_name(query, unit.group), settings.found_from(query, unit.index_shards))
        }
        with opened.lock, contextlib.ExitStack() as copies:
            keys, found, exact = {}, {}, {}
            for name, query in todo.items():
                arrays = copies.enter_context(_arrays(neighbors / ENCODED, query.name, settings.encoded_from(), "keys"))
                keys[name] = arrays[0]
                found[name] = _nothing(query.tokens, settings.neighbors)
                exact[name] = _nothing(len(settings.sample(query)), settings.neighbors)
            for shard in unit.index_shards if todo else ():
                index, first_row = opened.get(settings, shard)
                for name, query in todo.items():
                    _search(index, keys[name], first_row, found[name])
                    _search(ExactIndex(index.datastore), keys[name][settings.sample(query)], first_row, exact[name])
                del index  # or it would stay until the next is loaded
            for name, query in todo.items():
                contents = dict(zip(FOUND, (*found[name], *exact[name]), strict=True))
                provenance = settings.found_from(query, unit.index_shards)
                with disk_errors(neighbors), publish(neighbors / PARTS, name, provenance, [f"{array}.npy" for array in FOUND]) as attempt:
                    for array, content in contents.items():
                        np.save(attempt.folder / f"{array}.npy", content)
                count("searched_tokens", query.tokens)
        yield from todo


@contextlib.contextmanager
def _arrays(parent: AnyPath, name: str, provenance: Record, *arrays: str) -> Iterator[list[np.ndarray]]:
    """Some published arrays; UserError if they were made from something else."""
    folder = folder_of(parent, require_record(parent, name, provenance))
    try:
        yield [load_array(folder / f"{array}.npy") for array in arrays]
    finally:
        for array in arrays:
            drop_copy(folder / f"{array}.npy")


def _nothing(queries: int, k: int) -> Found:
    return np.full((queries, k), -1, np.int64), np.full((queries, k), np.inf, np.float32)


def _search(index: Index, keys: Float[np.ndarray, "queries emb"], first_row: int, found: Found) -> None:
    """Puts what a shard of the index finds among what was found before."""
    for start in range(0, len(keys), SEARCH_BLOCK):
        some = slice(start, start + SEARCH_BLOCK)
        before, k = (found[0][some], found[1][some]), found[0].shape[1]
        rows, distances = index.search(keys[some], k)
        found[0][some], found[1][some] = merge_nearest([before, (np.where(rows < 0, -1, rows + first_row), distances)], k)


class MergeNeighbors:
    """Merges what the shards of the index found for a query shard, adds what DeepNet says, and publishes it."""

    def __init__(self, settings: SearchJob) -> None:
        self.settings = settings

    def setup(self) -> EncodingWorker:
        """Checks the tokens that are told of neighbors, and loads the model."""
        self.settings.open()[1].check_files("tokens.npy")
        return self.settings.worker()

    def process(self, query: QueryShard, worker: EncodingWorker) -> Iterator[str]:
        """The shard's name, when it is published."""
        settings, (neighbors, datastore) = self.settings, self.settings.open()
        provenance = settings.merged_from(query)
        if not find_record(neighbors, query.name, provenance):
            rows, distances = _merged(settings, neighbors, query, *FOUND[:2])
            exact, _ = _merged(settings, neighbors, query, *FOUND[2:])
            with _arrays(neighbors / ENCODED, query.name, settings.encoded_from(), "tokens", "hidden", *OF_DOCUMENTS) as encoded:
                tokens, hidden, *of_documents = (np.asarray(array) for array in encoded)
            neighbor_tokens = datastore.take("tokens", np.maximum(rows, 0))
            parts = list(deepnet_outputs(worker.model, datastore, hidden, tokens, neighbor_tokens))
            if not parts:  # a shard without documents: arrays without rows, as wide as any
                one = (np.zeros((1, hidden.shape[1]), np.float32), np.zeros(1, np.int32), np.zeros((1, settings.neighbors), np.int32))
                parts = [tuple(array[:0] for array in part) for part in deepnet_outputs(worker.model, datastore, *one)]
            described = dict(
                zip(
                    ("target_logits", "candidate_ids", "candidate_logits", "bound", "log_partition"),
                    (np.concatenate(part) for part in zip(*parts, strict=True)),
                    strict=True,
                )
            )
            arrays = {"rows": rows, "distances": distances, "tokens": tokens, "neighbor_tokens": neighbor_tokens, **described}
            expected = [f"{name}.npy" for name in Queries._fields]
            with disk_errors(neighbors), publish(neighbors, query.name, provenance, expected) as attempt:
                for name, array in (arrays | dict(zip(OF_DOCUMENTS, of_documents, strict=True))).items():
                    np.save(attempt.folder / f"{name}.npy", array)
                sample = settings.sample(query)
                found = {"sampled": int((exact >= 0).sum()), "recalled": common(rows[sample], exact)}
                attempt.facts = {"tokens": len(tokens), "documents": len(of_documents[0]), **found}
            count("merged_tokens", len(tokens))
        yield query.name


def _merged(settings: SearchJob, neighbors: AnyPath, query: QueryShard, rows: str, distances: str) -> Found:
    with contextlib.ExitStack() as copies:
        parts = [
            copies.enter_context(
                _arrays(neighbors / PARTS, part_name(query, group), settings.found_from(query, index_shards), rows, distances)
            )
            for group, index_shards in enumerate(settings.groups())
        ]
        merged = _nothing(len(parts[0][0]), settings.neighbors)
        for start in range(0, len(merged[0]), SEARCH_BLOCK):
            some = slice(start, start + SEARCH_BLOCK)
            merged[0][some], merged[1][some] = merge_nearest([(part[0][some], part[1][some]) for part in parts], settings.neighbors)
    return merged


@stage(name="search", after=("build", "index"), policy="extend", free=("pipeline_options",))
def search(run: Run, *, neighbors: int = 50, recall_queries: int = 500, pipeline_options: str = "") -> Record:
    """Writes WORKDIR/neighbors for the validation and the test split.

    Args:
        neighbors: the largest k that can be chosen later (paper: 50).
        recall_queries: queries of each split, evenly spaced, on which the index is compared with exact search.
        pipeline_options: Beam's own, such as "--runner=..."; without a runner, Beam's in-process one.

    Returns:
        The checksum of WORKDIR/neighbors/neighbors.json, and per split the number of tokens and documents, and the measured recall at k.

    Raises:
        UserError: more neighbors than rows, no query to compare, or a datastore or index made with another checkpoint.
    """
    if recall_queries < 1:
        raise UserError(f"search.recall_queries = {recall_queries}: take 1 or more, so that the index's recall can be told")
    fingerprint, vocabulary = load_model(run.checkpoints).fingerprint, load_vocabulary(run)
    datastore = open_datastore(run.datastore, model=fingerprint, vocabulary=vocabulary.sha256)
    if not 1 <= neighbors <= datastore.live_rows:
        raise UserError(
            f"search.neighbors = {neighbors}, but the datastore has {datastore.live_rows} rows: take 1 to {datastore.live_rows}"
        )
    settings = SearchJob(
        run,
        datastore.manifest,
        sha256(run.datastore / "manifest.json"),
        _checksum_of_queries(run),
        index_manifest(run, datastore),
        neighbors,
        recall_queries,
    )
    folder = run.neighbors
    for name in ("", ENCODED, PARTS):
        (folder / name).mkdir(parents=True, exist_ok=True)

    names = {split: [path.name.removesuffix(".jsonl") for path in shard_paths(run, split)] for split in QUERY_SPLITS}
    every = [name for split in QUERY_SPLITS for name in names[split]]
    todo = [name for name in every if not find_record(folder / ENCODED, name, settings.encoded_from())]
    run_units("Encode queries", todo, EncodeQueries(settings), pipeline_options, published=folder / ENCODED, names=every)

    queries = [query for split in QUERY_SPLITS for query in _query_shards(folder / ENCODED, names[split])]
    merged = [query for query in queries if not find_record(folder, query.name, settings.merged_from(query))]
    groups = list(enumerate(settings.groups()))
    lookups = [Lookup(group, shards, some) for group, shards in groups for some in _together(merged)]
    parts = [part_name(query, group) for group, _ in groups for query in merged]
    run_units("Search", lookups, SearchShard(settings), pipeline_options, published=folder / PARTS, names=parts)
    run_units("Merge", merged, MergeNeighbors(settings), pipeline_options, published=folder, names=every)

    assert_held(run.path)
    facts: Record = {"datastore": settings.checksum}
    result: Record = {}
    for split in QUERY_SPLITS:
        records = [require_record(folder, query.name, settings.merged_from(query)) for query in queries if query.name in names[split]]
        sampled, recalled = (sum(record[name] for record in records) for name in ("sampled", "recalled"))
        result[split] = {name: sum(record[name] for record in records) for name in ("tokens", "documents")}
        result[split]["recall_at_k"] = recalled / sampled if sampled else 1.0
        facts[split] = result[split] | {"shards": records}
    write_json(folder / "neighbors.json", facts)
    remove_orphans(folder, [record for split in QUERY_SPLITS for record in facts[split]["shards"]])
    for name in (ENCODED, PARTS):
        remove(folder / name)
    return result | {"neighbors": sha256(folder / "neighbors.json")}


def _together(queries: list[QueryShard]) -> Iterator[tuple[QueryShard, ...]]:
    """Query shards that share the loading of an index: so many that their neighbors fit in memory."""
    some: list[QueryShard] = []
    for query in queries:
        if some and sum(other.tokens for other in some) + query.tokens > LOOKUP_TOKENS:
            yield tuple(some)
            some = []
        some.append(query)
    if some:
        yield tuple(some)


def _checksum_of_queries(run: Run) -> str:
    """Of the documents of validation and test, which stay when others are added or deleted."""
    files = read_json(run.documents / "manifest.json")["files"]
    checksums = [files[path.name]["sha256"] for split in QUERY_SPLITS for path in shard_paths(run, split)]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def _query_shards(encoded: AnyPath, names: list[str]) -> list[QueryShard]:
    tokens = [read_json(encoded / f"{name}.json")["tokens"] for name in names]
    return [QueryShard(name, sum(tokens[:number]), tokens[number], sum(tokens)) for number, name in enumerate(names)]
