"""Queries and index -> neighbours, as three Beam pipelines with files between them.

Encode each shard of the queries' documents; look each up in each group of shards of the index; merge what the groups found. A process
holds one shard of the index at a time.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared
from jaxtyping import Float, Int

from beam_pipelines.datastore import EncodingWorker, write_arrays
from beam_pipelines.index import OneAtATime
from beam_pipelines.runner import run_units
from resmem_lm.checkpoint import load_model
from resmem_lm.datastore import Datastore, open_datastore
from resmem_lm.documents import read_shard, shard_paths
from resmem_lm.encode import query_head
from resmem_lm.errors import UserError
from resmem_lm.index import ExactIndex, Index, index_manifest, merge_nearest, open_index
from resmem_lm.published import Record, folder_of, publish, record_of, remove_orphans
from resmem_lm.search import QUERY_SPLITS, common, describe_queries
from resmem_lm.sharded import load_array
from resmem_lm.storage import AnyPath, drop_copy, read_json, remove, sha256, to_path, write_json
from resmem_lm.vocabulary import load_vocabulary
from resmem_lm.workdir import disk_errors, stage

ENCODED, PARTS = "queries", "parts"  # folders of what is kept only until all is merged
SEARCH_BLOCK = 4096
GROUPS = 16  # of shards of the index: each keeps k neighbours of every query in files until all are merged

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
class Settings:
    """What every worker of a search needs."""

    workdir: str
    datastore: Record  # its manifest
    checksum: str  # of that
    index: Record  # likewise
    neighbors: int
    recall_queries: int

    def open(self) -> tuple[AnyPath, Datastore]:
        """The folder of the neighbours, and the datastore."""
        workdir = to_path(self.workdir)
        return workdir / "neighbors", Datastore(workdir / "datastore", self.datastore)

    def sample(self, query: QueryShard) -> Int[np.ndarray, " sample"]:
        """The shard's share of the split's evenly spaced queries that are compared with exact search; none if the index is exact."""
        if self.index["kind"] == "exact":
            return np.zeros(0, np.int64)
        spaced = np.linspace(0, query.split_tokens - 1, min(self.recall_queries, query.split_tokens)).astype(np.int64)
        inside = spaced[(spaced >= query.first) & (spaced < query.first + query.tokens)]
        return np.unique(inside) - query.first

    def encoded_from(self) -> Record:
        """What a shard's encoded queries are made from."""
        return {name: self.datastore[name] for name in ("model", "vocabulary", "window")}

    def found_from(self, query: QueryShard, index_shards: tuple[int, ...]) -> Record:
        """What a shard's neighbours in some shards of the index are made from."""
        return {"index": [self.index["shards"][shard]["folder"] for shard in index_shards], **self.merged_from(query)}

    def merged_from(self, query: QueryShard) -> Record:
        """What a shard's neighbours are made from."""
        return {
            **self.encoded_from(),
            "datastore": self.checksum,
            "kind": [self.index["kind"], self.index["candidates"]],
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
    """Of a query shard's neighbours in one group of the shards of the index."""
    return f"{query.name}.group-{group:02d}"


class EncodeQueries(beam.DoFn):
    """Name of a shard of documents -> its tokens' keys and hidden states, published."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._shared, self._tokens = Shared(), Metrics.counter("resmem", "query_tokens")

    def setup(self) -> None:
        """Loads the model once a process."""
        self._worker = self._shared.acquire(
            lambda: EncodingWorker(to_path(self.settings.workdir), self.settings.open()[1].binding, query_head)
        )

    def process(self, name: str) -> Iterator[str]:
        """The shard's name, when it is published."""
        neighbors, _ = self.settings.open()
        folder, made_from = neighbors / ENCODED, self.settings.encoded_from()
        if not record_of(folder, name, made_from):
            tokens = self._worker.vocabulary.encode_documents(read_shard(neighbors.parent / "documents" / f"{name}.jsonl"))
            with disk_errors(folder), publish(folder, name, made_from) as attempt:
                attempt.facts = write_arrays(attempt.folder, tokens, self._worker.encoder, name)
                np.save(attempt.folder / "tokens.npy", np.concatenate([*tokens, np.zeros(0, np.int32)]))
                np.save(attempt.folder / "document_lengths.npy", np.array([len(document) for document in tokens], np.int64))
                self._tokens.inc(attempt.facts["tokens"])
        yield name


class _OpenIndex(OneAtATime):
    """The shard of the index that a process holds."""

    def __init__(self) -> None:
        super().__init__()
        self._number: int | None = None
        self._index: tuple[Index, int] | None = None

    def get(self, settings: Settings, number: int) -> tuple[Index, int]:
        """A shard of the index and its first row; call it with `lock` held."""
        if self._number != number or self._index is None:
            neighbors, datastore = settings.open()
            if self._index is not None:  # its memory and its copies, before the next is loaded
                part, record = self._index[0].datastore, settings.index["shards"][self._number or 0]
                self._index = None
                drop_copy(folder_of(neighbors.parent / "index", record))
                for shard in part.shards:
                    drop_copy(folder_of(datastore.folder, shard) / "keys.npy")
            self._index, self._number = open_index(neighbors.parent, datastore, settings.index, number), number
            self._index[0].datastore.check_arrays("keys")
        return self._index


class SearchShard(beam.DoFn):
    """Looks query shards up in some shards of the index, one after another, and publishes the nearest of all."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._shared, self._searched = Shared(), Metrics.counter("resmem", "searched_tokens")

    def setup(self) -> None:
        """Takes the process's index."""
        self._open = self._shared.acquire(_OpenIndex)

    def process(self, unit: Lookup) -> Iterator[str]:
        """The published names."""
        neighbors, _ = self.settings.open()
        for query in unit.queries:
            name, made_from = part_name(query, unit.group), self.settings.found_from(query, unit.index_shards)
            with self._open.lock:
                if not record_of(neighbors / PARTS, name, made_from):
                    keys = _arrays(neighbors / ENCODED, query.name, "keys")[0]
                    sample = keys[self.settings.sample(query)]
                    found, exact = (_nothing(len(queries), self.settings.neighbors) for queries in (keys, sample))
                    for shard in unit.index_shards:
                        index, first_row = self._open.get(self.settings, shard)
                        _search(index, keys, first_row, found)
                        _search(ExactIndex(index.datastore), sample, first_row, exact)
                        del index  # or it would stay until the next is loaded
                    with disk_errors(neighbors), publish(neighbors / PARTS, name, made_from) as attempt:
                        for array, content in zip(("rows", "distances", "exact_rows", "exact_distances"), (*found, *exact), strict=True):
                            np.save(attempt.folder / f"{array}.npy", content)
                    self._searched.inc(len(keys))
            yield name


def _arrays(parent: AnyPath, name: str, *arrays: str) -> list[np.ndarray]:
    folder = folder_of(parent, read_json(parent / f"{name}.json"))
    return [load_array(folder / f"{array}.npy") for array in arrays]


def _nothing(queries: int, k: int) -> Found:
    return np.full((queries, k), -1, np.int64), np.full((queries, k), np.inf, np.float32)


def _search(index: Index, keys: Float[np.ndarray, "queries emb"], first_row: int, found: Found) -> None:
    """Puts what a shard of the index finds among what was found before."""
    for start in range(0, len(keys), SEARCH_BLOCK):
        some = slice(start, start + SEARCH_BLOCK)
        before, k = (found[0][some], found[1][some]), found[0].shape[1]
        rows, distances = index.search(keys[some], k)
        found[0][some], found[1][some] = merge_nearest([before, (np.where(rows < 0, -1, rows + first_row), distances)], k)


class MergeNeighbors(beam.DoFn):
    """Merges what the shards of the index found for a query shard, adds what DeepNet says, and publishes it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._shared, self._merged = Shared(), Metrics.counter("resmem", "merged_tokens")

    def setup(self) -> None:
        """Loads the model once a process."""
        self._worker = self._shared.acquire(
            lambda: EncodingWorker(to_path(self.settings.workdir), self.settings.open()[1].binding, query_head)
        )

    def process(self, query: QueryShard) -> Iterator[str]:
        """The shard's name, when it is published."""
        settings, (neighbors, datastore) = self.settings, self.settings.open()
        made_from = settings.merged_from(query)
        if not record_of(neighbors, query.name, made_from):
            names = [part_name(query, group) for group in range(len(settings.groups()))]
            rows, distances = _merged(neighbors, names, "rows", "distances", settings.neighbors)
            exact, _ = _merged(neighbors, names, "exact_rows", "exact_distances", settings.neighbors)
            tokens, hidden, lengths = _arrays(neighbors / ENCODED, query.name, "tokens", "hidden", "document_lengths")
            neighbor_tokens = datastore.take("tokens", np.maximum(rows, 0))
            parts = list(describe_queries(self._worker.model, datastore, hidden, tokens, neighbor_tokens))
            if not parts:  # a shard without documents: arrays without rows, as wide as any
                one = (np.zeros((1, hidden.shape[1]), np.float32), np.zeros(1, np.int32), np.zeros((1, settings.neighbors), np.int32))
                parts = [tuple(array[:0] for array in part) for part in describe_queries(self._worker.model, datastore, *one)]
            described = dict(
                zip(
                    ("target_logits", "candidate_ids", "candidate_logits", "bound", "log_partition"),
                    (np.concatenate(part) for part in zip(*parts, strict=True)),
                    strict=True,
                )
            )
            arrays = {"rows": rows, "distances": distances, "tokens": tokens, "neighbor_tokens": neighbor_tokens, **described}
            with disk_errors(neighbors), publish(neighbors, query.name, made_from) as attempt:
                for name, array in (arrays | {"document_lengths": lengths}).items():
                    np.save(attempt.folder / f"{name}.npy", array)
                sample = settings.sample(query)
                found = {"sampled": int((exact >= 0).sum()), "recalled": common(rows[sample], exact)}
                attempt.facts = {"tokens": len(tokens), "documents": len(lengths), **found}
            self._merged.inc(len(tokens))
        yield query.name


def _merged(neighbors: AnyPath, names: list[str], rows: str, distances: str, k: int) -> Found:
    parts = [_arrays(neighbors / PARTS, name, rows, distances) for name in names]
    merged = _nothing(len(parts[0][0]), k)
    for start in range(0, len(merged[0]), SEARCH_BLOCK):
        some = slice(start, start + SEARCH_BLOCK)
        merged[0][some], merged[1][some] = merge_nearest([(part[0][some], part[1][some]) for part in parts], k)
    return merged


@stage(name="search", after=("build", "index"), output="neighbors", extend=True, free=("pipeline_options",))
def search(workdir: AnyPath, *, neighbors: int = 50, recall_queries: int = 500, pipeline_options: str = "") -> Record:
    """Writes WORKDIR/neighbors for the validation and the test split.

    Args:
        neighbors: the largest k that can be chosen later (paper: 50).
        recall_queries: queries of each split, evenly spaced, on which the index is compared with exact search.
        pipeline_options: Beam's own, such as "--runner=..."; without a runner, Beam's in-process one.

    Returns:
        Per split the number of tokens and documents, and the measured recall at k.

    Raises:
        UserError: more neighbours than rows, or a datastore or index made with another checkpoint.
    """
    fingerprint, vocabulary = load_model(workdir / "checkpoints").fingerprint, load_vocabulary(workdir)
    datastore = open_datastore(workdir / "datastore", model=fingerprint, vocabulary=vocabulary.sha256)
    if not 1 <= neighbors <= datastore.remembered_rows:
        raise UserError(
            f"search.neighbors = {neighbors}, but the datastore has {datastore.remembered_rows} rows: take 1 to {datastore.remembered_rows}"
        )
    settings = Settings(
        str(workdir.absolute()),
        datastore.manifest,
        sha256(workdir / "datastore" / "manifest.json"),
        index_manifest(workdir, datastore),
        neighbors,
        recall_queries,
    )
    folder = workdir / "neighbors"
    for name in ("", ENCODED, PARTS):
        (folder / name).mkdir(parents=True, exist_ok=True)

    names = {split: [path.name.removesuffix(".jsonl") for path in shard_paths(workdir, split)] for split in QUERY_SPLITS}
    every = [name for split in QUERY_SPLITS for name in names[split]]
    todo = [name for name in every if not record_of(folder / ENCODED, name, settings.encoded_from())]
    run_units("Encode queries", todo, EncodeQueries(settings), pipeline_options, published=folder / ENCODED, names=every)

    queries = [query for split in QUERY_SPLITS for query in _query_shards(folder / ENCODED, names[split])]
    merged = [query for query in queries if not record_of(folder, query.name, settings.merged_from(query))]
    groups = list(enumerate(settings.groups()))
    # In one process, an index is loaded once for all queries where it can be; on many workers, each pair is work of its own.
    together = [(query,) for query in merged] if pipeline_options else [tuple(merged)]
    lookups = [Lookup(group, shards, some) for group, shards in groups for some in together if some]
    parts = [part_name(query, group) for group, _ in groups for query in merged]
    run_units("Search", lookups, SearchShard(settings), pipeline_options, published=folder / PARTS, names=parts)
    run_units("Merge", merged, MergeNeighbors(settings), pipeline_options, published=folder, names=every)

    facts: Record = {"datastore": settings.checksum}
    result: Record = {}
    for split in QUERY_SPLITS:
        records = [read_json(folder / f"{name}.json") for name in names[split]]
        sampled, recalled = (sum(record[name] for record in records) for name in ("sampled", "recalled"))
        result[split] = {name: sum(record[name] for record in records) for name in ("tokens", "documents")}
        result[split]["recall_at_k"] = recalled / sampled if sampled else 1.0
        facts[split] = result[split] | {"shards": records}
    write_json(folder / "neighbors.json", facts)
    remove_orphans(folder, [record for split in QUERY_SPLITS for record in facts[split]["shards"]])
    for name in (ENCODED, PARTS):
        remove(folder / name)
    return result


def _query_shards(encoded: AnyPath, names: list[str]) -> list[QueryShard]:
    tokens = [read_json(encoded / f"{name}.json")["tokens"] for name in names]
    return [QueryShard(name, sum(tokens[:number]), tokens[number], sum(tokens)) for number, name in enumerate(names)]
