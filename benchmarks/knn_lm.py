"""Compare the reads of our datastore with those of other kNN-LM implementations, on the same keys and queries.

fairseq's kNN-LM (Khandelwal et al. 2020) searches 1,024 neighbors in a faiss IVF-PQ index of 64 bytes per key (32 lists of 4,096), uses the
distances that faiss returns, and sums the weights of the neighbors whose token is the true token. knn-transformers (Alon et al. 2022) does
the same for the whole vocabulary. This benchmark repeats their reads with faiss and NumPy or JAX, also with 50 neighbors. ResMem finds 50
neighbors, ranks them by true distance and reads their residuals. The benchmarks `evaluation` and `merge` measure the model and the merge.
Bytes per row are those on disk and those that a search reads: the others read the keys only to build their index.
"""

import functools

import faiss
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.inputs import all_keys, our_index, query_keys
from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.evaluation.neighbors import recall
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.resmem import knn_probabilities, neighbor_weights
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import files_below, read_json

QUERIES, K, THEIR_K = 1024, 50, 1024
LISTS, CODE_BYTES, PROBES = 4096, 64, 32
SIGMA = 1.0


@functools.partial(jax.jit, static_argnames="vocab")
def _all_tokens(distances: Float[Array, "queries k"], tokens: Int[Array, "queries k"], vocab: int) -> Int[Array, " queries"]:
    """Return the most probable token of knn-transformers' distribution over the vocabulary."""
    return jnp.argmax(knn_probabilities(neighbor_weights(distances, SIGMA), tokens, vocab), axis=-1)


def run(run: Run) -> None:
    """Print the table."""
    datastore = open_datastore(run.datastore)
    ours, _ = our_index(run, datastore)
    queries, keys = query_keys(run, QUERIES), all_keys(datastore)
    tokens = np.concatenate(datastore.shard_arrays("tokens")).astype(np.int32)
    truth = ExactIndex(datastore).search(queries, K)[0]
    targets = np.zeros(QUERIES, np.int32)  # any token costs the same

    dimensions = keys.shape[1]
    quantizer = faiss.IndexFlatL2(dimensions)
    theirs = faiss.IndexIVFPQ(quantizer, dimensions, LISTS, CODE_BYTES, 8)
    theirs.train(keys[:: max(1, len(keys) // (40 * LISTS))])
    theirs.add(keys)
    theirs.nprobe = PROBES
    model = read_json(run.checkpoints / "model.json")["config"]
    read = 4 + CODE_BYTES + 8  # token, code, id
    kept = 2 * model["emb_dim"] + read  # and the key in float16, as in fairseq
    del keys

    def fairseq(k: int) -> Float[np.ndarray, " queries"]:
        distances, rows = theirs.search(queries, k)
        weights = np.exp(-distances + distances.min(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.sum(weights * (tokens[rows] == targets[:, None]), axis=1)

    def transformers(k: int) -> Int[np.ndarray, " queries"]:
        distances, rows = theirs.search(queries, k)
        return np.asarray(_all_tokens(distances, tokens[rows], model["vocab_size"]))

    def resmem() -> tuple[np.ndarray, ...]:
        rows, distances = ours.search(queries, K)
        names = ("tokens", "residual_ids", "quantized_residuals", "target_log_probability", "log_power_sums")
        return rows, distances, *(datastore.take(name, rows) for name in names)

    ways = {
        "ResMem (50 neighbors with their residuals)": resmem,
        "fairseq (1,024 neighbors)": lambda: fairseq(THEIR_K),
        "fairseq (50)": lambda: fairseq(K),
        "knn-transformers (1,024)": lambda: transformers(THEIR_K),
        "knn-transformers (50)": lambda: transformers(K),
    }
    first = next(iter(ways))
    recalls = {name: recall(theirs.search(queries, K)[1], truth) for name in ways} | {first: recall(ours.search(queries, K)[0], truth)}
    index_bytes = sum(path.stat().st_size for path in files_below(run.index))
    own = (datastore.bytes + index_bytes) / datastore.rows
    sizes = dict.fromkeys(ways, (kept, read)) | {first: (own, own)}
    times = interleaved(ways, rounds=5)
    table(
        f"Reads of kNN-LM ({datastore.rows:,} keys of {dimensions}, {QUERIES:,} test tokens)",
        ("way", "recall@50", "times ResMem", "tokens/s", "bytes per row", "bytes read by the search"),
        (
            (
                name,
                f"{recalls[name]:.3f}",
                ratio(times, name, first),
                f"{QUERIES / median(times, name):,.0f}",
                *(f"{size:,.0f}" for size in sizes[name]),
            )
            for name in ways
        ),
    )
