"""Divide a search for neighbors into shards of queries and groups of index shards."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.encode_documents import EncodingWorker
from resmem_lm.memory.encoder import query_head
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, Record, read_json

GROUPS = 16  # most groups of index shards; files hold k neighbors per query and group until the merge
LOOKUP_TOKENS = 2**20  # most queries in one lookup; their neighbors take 1.2 GB of memory at k = 50


class QueryShard(NamedTuple):
    """A shard of a split's documents, and the place of its tokens in the split."""

    name: str
    first: int
    tokens: int
    split_tokens: int


class Lookup(NamedTuple):
    """Query shards, and the group of consecutive index shards to search for their neighbors."""

    group: int
    index_shards: tuple[int, ...]
    queries: tuple[QueryShard, ...]


@dataclasses.dataclass(frozen=True)
class SearchJob:
    """The inputs that every worker of a search needs."""

    run: Run
    datastore: Record  # its manifest
    datastore_checksum: str  # of the manifest
    documents_checksum: str  # of the queries' documents
    index: Record  # its manifest
    neighbors: int
    document_neighbors: int
    recall_queries: int

    @property
    def encoded(self) -> AnyPath:
        """Return the temporary folder of the encoded queries."""
        return self.run.neighbors / "queries"

    @property
    def parts(self) -> AnyPath:
        """Return the temporary folder of the neighbors in each group of index shards."""
        return self.run.neighbors / "parts"

    def open_datastore(self) -> Datastore:
        """Open the datastore."""
        return Datastore(self.run.datastore, self.datastore)

    def encoding_worker(self) -> EncodingWorker:
        """Load the model with an encoder of queries."""
        return EncodingWorker(self.run, self.open_datastore().binding, lambda _: query_head)

    def sample(self, query: QueryShard) -> Int[np.ndarray, " sample"]:
        """Return the queries of a shard to compare with exact search, evenly spaced over the split; none for an exact index."""
        if self.index["kind"] == "exact":
            return np.zeros(0, np.int64)
        spaced = np.linspace(0, query.split_tokens - 1, min(self.recall_queries, query.split_tokens)).astype(np.int64)
        inside = spaced[(spaced >= query.first) & (spaced < query.first + query.tokens)]
        return np.unique(inside) - query.first

    def encoded_provenance(self) -> Record:
        """Return the provenance of the encoded queries of any shard."""
        binding = {
            name: self.datastore[name]
            for name in ("model", "vocabulary", "window", "key_dimensions", "projection", "entries", "temperatures")
        }
        return {"documents": self.documents_checksum, **binding}

    def part_provenance(self, query: QueryShard, index_shards: tuple[int, ...]) -> Record:
        """Return the provenance of a query shard's neighbors in some index shards."""
        return self.provenance(query) | {"index": [self.index["shards"][shard]["folder"] for shard in index_shards]}

    def provenance(self, query: QueryShard) -> Record:
        """Return the provenance of a query shard's neighbors in the whole index."""
        return {
            **self.encoded_provenance(),
            "datastore": self.datastore_checksum,
            "kind": [self.index["kind"], self.index["candidates"]],
            "index": [shard["folder"] for shard in self.index["shards"]],
            "suffixes": [shard["folder"] for shard in self.index["suffixes"]],
            "neighbors": self.neighbors,
            "document_neighbors": self.document_neighbors,
            "recall_queries": self.recall_queries,
            "tokens": [query.first, query.tokens, query.split_tokens],
        }

    def groups(self) -> list[tuple[int, ...]]:
        """Return the index shards of each group."""
        shards = len(self.index["shards"])
        count = min(shards, GROUPS)
        return [tuple(range(group * shards // count, (group + 1) * shards // count)) for group in range(count)]

    def lookups(self, queries: list[QueryShard]) -> list[Lookup]:
        """Return the lookups of some query shards."""
        return [Lookup(group, shards, some) for group, shards in enumerate(self.groups()) for some in _batches(queries)]


def _batches(queries: list[QueryShard]) -> Iterator[tuple[QueryShard, ...]]:
    """Yield batches of query shards. A lookup loads an index shard once for a batch."""
    batch: list[QueryShard] = []
    for query in queries:
        if batch and sum(other.tokens for other in batch) + query.tokens > LOOKUP_TOKENS:
            yield tuple(batch)
            batch = []
        batch.append(query)
    if batch:
        yield tuple(batch)


def part_name(query: QueryShard, group: int) -> str:
    """Return the name of a query shard's neighbors in one group of index shards."""
    return f"{query.name}.group-{group:02d}"


def query_shards(job: SearchJob, names: list[str]) -> list[QueryShard]:
    """Return the query shards of a split, once they are encoded."""
    tokens = [read_json(job.encoded / f"{name}.json")["tokens"] for name in names]
    return [QueryShard(name, sum(tokens[:number]), tokens[number], sum(tokens)) for number, name in enumerate(names)]
