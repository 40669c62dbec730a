"""Read the cached neighbors of every validation and test token. A sweep of hyperparameters needs no new search.

`WORKDIR/neighbors/` has a folder of row-aligned .npy files for each shard of the queries' documents. They hold the neighbors (`rows`,
`distances`, nearest first), the nearest rows of the query's own document, the query's token and its row for later queries of the document,
DeepNet's logits of the candidates (see `resmem_lm.evaluation.candidates`), and their probabilities by exact matches.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from resmem_lm.errors import UserError
from resmem_lm.workdir.arrays import ShardedArray, load_array
from resmem_lm.workdir.artifacts import damaged_files, folder_of
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, sha256

BY_NEIGHBOR = ("rows", "distances", "neighbor_tokens", "matches", "candidate_ids", "candidate_logits", "exact_log_probability")


class Queries(NamedTuple):
    """A split's cached arrays. Row i is the i-th token of the split's documents in order. Sharded arrays are memory-mapped."""

    rows: ShardedArray  # Int[queries k]
    distances: ShardedArray  # Float[queries k]
    tokens: Int[np.ndarray, " queries"]
    neighbor_tokens: ShardedArray  # Integer[queries k]
    matches: ShardedArray  # UInt8[queries k]
    document_back: ShardedArray  # Int[queries rows], how many tokens before the query; 0 if missing
    document_distances: ShardedArray  # Float[queries rows]
    document_matches: ShardedArray  # UInt8[queries rows]
    residual_ids: ShardedArray  # UInt[queries others], as in the datastore; without columns if the document is not used
    quantized_residuals: ShardedArray  # UInt8[queries others]
    target_log_probability: ShardedArray  # Float[queries]
    log_power_sums: ShardedArray  # Float[queries temperatures]
    target_logits: ShardedArray  # Float[queries]
    candidate_ids: ShardedArray  # Int[queries candidates]
    candidate_logits: ShardedArray  # Float[queries candidates]
    bound: ShardedArray  # Float[queries]
    log_partition: ShardedArray  # Float[queries temperatures]
    exact_log_probability: ShardedArray  # Float[queries candidates]
    exact_match: ShardedArray  # Float[queries 3]
    document_lengths: Int[np.ndarray, " documents"]
    document_groups: Int[np.ndarray, " documents"]  # equal for documents with equal `prepare_documents.group`

    @property
    def groups(self) -> Int[np.ndarray, " queries"]:
        """Return the number of each token's group of documents, in order of appearance. Tokens of one group are not independent."""
        _, first, numbers = np.unique(self.document_groups, return_index=True, return_inverse=True)
        return np.repeat(np.argsort(np.argsort(first))[numbers], self.document_lengths)


def open_queries(run: Run, split: str) -> Queries:
    """Open the cached neighbors of a split. Raise UserError if they are damaged or from another datastore or version."""
    folder = run.neighbors
    facts = read_json(folder / "neighbors.json")
    fix = f"delete {folder} and {run.record_path('search')}, and run `resmem evaluate`"
    if facts["datastore"] != sha256(run.datastore / "manifest.json"):
        raise UserError(f"{folder} was made from another datastore: {fix}")
    for shard in facts[split]["shards"]:
        for problem in damaged_files(folder, shard, checksums=True):
            raise UserError(f"{problem}: {fix}")
        if missing := [name for name in Queries._fields if f"{name}.npy" not in shard["files"]]:
            raise UserError(f"{folder} was made by another version, without {', '.join(missing)}: {fix}")

    def array(name: str) -> ShardedArray:
        return ShardedArray([load_array(folder_of(folder, shard) / f"{name}.npy") for shard in facts[split]["shards"]])

    arrays: dict[str, Any] = {name: array(name) for name in Queries._fields}
    return Queries(**arrays | {name: np.asarray(arrays[name]) for name in ("tokens", "document_lengths", "document_groups")})


def truncate_neighbors(queries: Queries, k: int) -> Queries:
    """Return the queries as a search for k neighbors finds them. Raise UserError if the search was for fewer."""
    searched = queries.rows.shape[1]
    if not 1 <= k <= searched:
        raise UserError(f"k = {k}: {searched} neighbors were searched; choose from 1 to {searched}")

    def cut(*names: str) -> dict[str, Any]:
        """Drop the last columns, which belong to the farthest neighbors. The other candidates come first."""
        drop = k - searched or None
        return {name: ShardedArray([part[:, :drop] for part in getattr(queries, name).parts]) for name in names}

    return queries._replace(**cut(*BY_NEIGHBOR))


def common(found: Int[np.ndarray, "queries k"], exact: Int[np.ndarray, "queries k"]) -> int:
    """Count the found rows among the exact k nearest. Negative rows stand for missing neighbors."""
    return sum(len(np.intersect1d(a, b[b >= 0])) for a, b in zip(found, exact, strict=True))


def recall(found: Int[np.ndarray, "queries k"], exact: Int[np.ndarray, "queries k"]) -> float:
    """Return the share of the exact k nearest that were found."""
    return common(found, exact) / max(1, int((exact >= 0).sum()))
