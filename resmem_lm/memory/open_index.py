"""Open and search the shards of WORKDIR/index."""

import numpy as np
from jaxtyping import Float

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.index import ApproximateIndex, Index, Nearest
from resmem_lm.memory.index_kinds import library
from resmem_lm.memory.nearest import add_neighbors, no_neighbors
from resmem_lm.workdir.artifacts import damaged_files, folder_of
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, local_path, read_json


def rebuild_index_hint(run: Run) -> str:
    """Return the instructions to repair a damaged index."""
    return f"delete {run.index} and {run.record_path('index')}, and run `resmem index`"


def index_manifest(run: Run, datastore: Datastore) -> Record:
    """Return the manifest of the index. Raise UserError if the index is damaged or was built from another datastore."""
    manifest = read_json(run.index / "index.json")
    if [shard["folder"] for shard in datastore.shards] != [name for shard in manifest["shards"] for name in shard["provenance"]["folders"]]:
        raise UserError(
            f"{run.index} was made from another datastore: run `resmem index`; if that does not help, {rebuild_index_hint(run)} again"
        )
    for shard in manifest["shards"]:
        for problem in damaged_files(run.index, shard):
            raise UserError(f"{problem}: {rebuild_index_hint(run)}")
    return manifest


def open_index(run: Run, datastore: Datastore, manifest: Record, shard: int) -> tuple[Index, int]:
    """Return an index shard, and the datastore row of its row 0. Raise UserError if the shard cannot be read."""
    counts = [len(record["provenance"]["folders"]) for record in manifest["shards"]]
    first = sum(counts[:shard])
    part, first_row, record = datastore.part(first, counts[shard]), int(datastore.offsets[first]), manifest["shards"][shard]
    if not record["files"]:  # exact search
        return ExactIndex(part), first_row
    folder = folder_of(run.index, record)
    try:
        proposer = library(manifest["kind"]).Searcher(part, local_path(folder), record)
        return ApproximateIndex(part, proposer, manifest["candidates"]), first_row
    except (RuntimeError, ValueError, OSError, KeyError) as error:  # KeyError: another version wrote the record
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be read ({reason}): {rebuild_index_hint(run)}") from None


def search_shards(run: Run, datastore: Datastore, queries: Float[np.ndarray, "queries emb"], k: int) -> Nearest:
    """Return the k nearest live rows of each query in WORKDIR/index. Only one index shard is in memory at a time.

    Raise UserError if the index is damaged or was built from another datastore.
    """
    nearest, manifest = no_neighbors(len(queries), k), index_manifest(run, datastore)
    for shard in range(len(manifest["shards"])):
        index, first_row = open_index(run, datastore, manifest, shard)
        add_neighbors(nearest, index, queries, first_row)
        del index  # frees its memory before the next is loaded
    return nearest
