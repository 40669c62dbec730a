"""WORKDIR/index -> opened shards, and a search through all of them."""

import numpy as np
from jaxtyping import Float, Int

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.index import ApproximateIndex, Index, merge_nearest
from resmem_lm.memory.index_kinds import library
from resmem_lm.workdir.artifacts import damaged_files, folder_of
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, local_path, read_json

SEARCH_BLOCK = 4096  # queries looked up before what they found is merged


def index_manifest(run: Run, datastore: Datastore) -> Record:
    """What stands in index.json; UserError if the index was made from another datastore or is damaged."""
    folder = run.index
    facts = read_json(folder / "index.json")
    if [shard["folder"] for shard in datastore.shards] != [name for shard in facts["shards"] for name in shard["provenance"]["folders"]]:
        raise UserError(
            f"{folder} was made from another datastore: run `resmem index`; if that changes nothing, "
            f"delete {folder} and {run.record_path('index')} first"
        )
    for shard in facts["shards"]:
        for problem in damaged_files(folder, shard):
            raise UserError(f"{problem}: {_mend(run)}")
    return facts


def _mend(run: Run) -> str:
    return f"delete {run.index} and {run.record_path('index')}, and run `resmem index`"


def open_index(run: Run, datastore: Datastore, manifest: Record, shard: int) -> tuple[Index, int]:
    """One shard of the index, and the datastore's row that is its row 0. UserError if it cannot be read."""
    counts = [len(record["provenance"]["folders"]) for record in manifest["shards"]]
    first = sum(counts[:shard])
    part, record = datastore.part(first, counts[shard]), manifest["shards"][shard]
    if not record["files"]:  # an exact one, or of few rows
        return ExactIndex(part), int(datastore.offsets[first])
    folder = folder_of(run.index, record)
    try:
        proposer = library(manifest["kind"]).Searcher(part, local_path(folder), record)
        return ApproximateIndex(part, proposer, manifest["candidates"]), int(datastore.offsets[first])
    except (RuntimeError, ValueError, OSError, KeyError) as error:  # KeyError: of a version that recorded less
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be read ({reason}): {_mend(run)}") from None


def search_shards(
    run: Run, datastore: Datastore, queries: Float[np.ndarray, "queries emb"], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """Rows and distances of the k nearest in all shards of WORKDIR/index, one shard in memory at a time.

    Args:
        run: of a finished index.
        datastore: from which the index was made; rows that it calls deleted are passed over.
        queries: keys.
        k: neighbors of each query.

    Raises:
        UserError: the index was made from another datastore or is damaged.
    """
    rows, distances = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32)
    manifest = index_manifest(run, datastore)
    for shard in range(len(manifest["shards"])):
        index, first = open_index(run, datastore, manifest, shard)
        for start in range(0, len(queries), SEARCH_BLOCK):
            some = slice(start, start + SEARCH_BLOCK)
            found, its = index.search(queries[some], k)
            both = [(rows[some], distances[some]), (np.where(found < 0, -1, found + first), its)]
            rows[some], distances[some] = merge_nearest(both, k)
        del index  # its memory, before the next is loaded
    return rows, distances
