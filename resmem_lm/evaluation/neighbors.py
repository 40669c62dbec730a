"""Read the cached neighbors of every validation and test token. A sweep of hyperparameters needs no new search.

`WORKDIR/neighbors/` has a folder of row-aligned .npy files for each shard of the queries' documents. They hold the neighbors (`rows`,
`distances`, nearest first), the query's token, and DeepNet's logits of the candidates (see `resmem_lm.evaluation.candidates`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import choose_candidates
from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.encoder import TOKENS, log_partition
from resmem_lm.model.checkpoints import Model
from resmem_lm.workdir.arrays import ShardedArray, load_array
from resmem_lm.workdir.artifacts import damaged_files, folder_of
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, sha256

BASE_CANDIDATES = 32
DEEPNET_ARRAYS = ("target_logits", "candidate_ids", "candidate_logits", "bound", "log_partition")


class Queries(NamedTuple):
    """A split's cached arrays. Row i is the i-th token of the split's documents in order. Sharded arrays are memory-mapped."""

    rows: ShardedArray  # Int[queries k]
    distances: ShardedArray  # Float[queries k]
    tokens: Int[np.ndarray, " queries"]
    neighbor_tokens: ShardedArray  # Integer[queries k]
    target_logits: ShardedArray  # Float[queries]
    candidate_ids: ShardedArray  # Int[queries candidates]
    candidate_logits: ShardedArray  # Float[queries candidates]
    bound: ShardedArray  # Float[queries]
    log_partition: ShardedArray  # Float[queries temperatures]
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
        """Drop the last columns, which belong to the farthest neighbors. Columns of DeepNet's own candidates come first."""
        drop = k - searched or None
        return {name: ShardedArray([part[:, :drop] for part in getattr(queries, name).parts]) for name in names}

    return queries._replace(**cut("rows", "distances", "neighbor_tokens", "candidate_ids", "candidate_logits"))


def common(found: Int[np.ndarray, "queries k"], exact: Int[np.ndarray, "queries k"]) -> int:
    """Count the found rows among the exact k nearest. Negative rows stand for missing neighbors."""
    return sum(len(np.intersect1d(a, b[b >= 0])) for a, b in zip(found, exact, strict=True))


def recall(found: Int[np.ndarray, "queries k"], exact: Int[np.ndarray, "queries k"]) -> float:
    """Return the share of the exact k nearest that were found."""
    return common(found, exact) / max(1, int((exact >= 0).sum()))


# The model's method is a static argument and compares equal for the same model, so JAX compiles once per model.
@functools.partial(jax.jit, static_argnames=("logits_of", "temperatures"))
def _outputs(
    parameters: dict[str, Any],
    hidden: Array,
    targets: Array,
    tokens: Array,
    *,
    logits_of: Callable[[dict[str, Any], Array], Array],
    temperatures: tuple[float, ...],
) -> tuple[Array, ...]:
    logits = logits_of(parameters, hidden)
    target_logits = jax.numpy.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return target_logits, *choose_candidates(logits, tokens, BASE_CANDIDATES), log_partition(logits, temperatures)


def deepnet_arrays(
    model: Model,
    datastore: Datastore,
    hidden: Float[np.ndarray, "queries emb"],
    targets: Int[np.ndarray, " queries"],
    neighbor_tokens: Integer[np.ndarray, "queries k"],
) -> dict[str, np.ndarray]:
    """Compute `DEEPNET_ARRAYS`, the arrays of `Queries` that come from DeepNet, from the last hidden states."""
    blocks = []
    for start in range(0, max(1, len(targets)), TOKENS):  # without queries, one block gives the arrays' widths
        count = min(TOKENS, len(targets) - start)
        some = [
            np.pad(array[start : start + count], [(0, TOKENS - count)] + [(0, 0)] * (array.ndim - 1))
            for array in (hidden, targets, neighbor_tokens.astype(np.int32))
        ]
        parts = _outputs(model.parameters, *some, logits_of=model.logits, temperatures=datastore.binding.temperatures)
        blocks.append([np.asarray(part)[:count] for part in parts])
    return {name: np.concatenate(parts) for name, parts in zip(DEEPNET_ARRAYS, zip(*blocks, strict=True), strict=True)}
