"""Compare search and build of the index with exact search and other libraries, on the same keys and at the same recall.

`python -m pip install 'resmem_lm[bench]'` installs the other libraries. All use as many threads as there are cores. "IVF-PQ with refine" is
faiss alone, with as many lists as our index. It ranks candidates by a float16 copy of the keys; our index by the datastore's keys.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import faiss
import hnswlib
import numpy as np
import scann
from jaxtyping import Float, Int
from usearch.index import Index as UsearchIndex

from beam_pipelines.build_index import build_index
from benchmarks.inputs import all_keys, our_index, query_keys
from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.evaluation.neighbors import recall
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.faiss_index import Searcher
from resmem_lm.memory.index import ApproximateIndex
from resmem_lm.workdir.artifacts import folder_of
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import files_below

QUERIES, K, RECALL = 2048, 50, 0.95
EXACT_QUERIES = 256  # exact search is slow, so it is timed on fewer queries
LINKS, EFFORT = 16, 100  # of the graphs: neighbors of a node (M), candidates for a new node (ef_construction)

TUNED_RADII, TUNED_CANDIDATES = (1.1, 1.15, 1.2, 1.225, 1.25, 1.275, 1.3, 1.35), 200

FAST, BUILD_ROUNDS = "faiss IVF-PQ with refine", 3  # the peer that builds in seconds, and the number of builds

Search = Callable[[Float[np.ndarray, "queries emb"]], Int[np.ndarray, "queries k"]]


class Peer(NamedTuple):
    """A built index: seconds, bytes on disk, and its search as a function of the effort. The least sufficient effort is chosen."""

    seconds: float
    size: int
    search: Callable[[int], Search]
    efforts: tuple[int, ...]


def size_of(save: Callable[[str], Any]) -> int:
    """Return the bytes of the file or the folder that `save` writes."""
    with tempfile.TemporaryDirectory(prefix="resmem-bench-") as folder:
        path = Path(folder) / "index"
        save(str(path))
        return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]))


def ivf_pq_refine(keys: Float[np.ndarray, "rows emb"]) -> Peer:
    """Build faiss's IVF-PQ: 4-bit codes of 2 dimensions of randomly rotated keys, then float16 copies of the keys."""
    rows, dimensions = keys.shape
    index = faiss.index_factory(dimensions, f"RR{dimensions},IVF{int(np.sqrt(rows)) // 2},PQ{dimensions // 2}x4fsr,Refine(SQfp16)")
    start = perf_counter()
    index.train(keys[:: max(1, rows // 100_000)])
    index.add(keys)

    def search(effort: int) -> Search:
        inner = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(nprobe=effort))
        parameters = faiss.IndexRefineSearchParameters(k_factor=4.0, base_index_params=inner)
        return lambda queries: index.search(queries, K, params=parameters)[1]

    return Peer(
        perf_counter() - start, size_of(lambda path: faiss.write_index(index, path)), search, (3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
    )


def faiss_hnsw(keys: Float[np.ndarray, "rows emb"]) -> Peer:
    """Build faiss's graph over float32 keys."""
    index = faiss.IndexHNSWFlat(keys.shape[1], LINKS)
    index.hnsw.efConstruction = EFFORT
    start = perf_counter()
    index.add(keys)

    def search(effort: int) -> Search:
        return lambda queries: index.search(queries, K, params=faiss.SearchParametersHNSW(efSearch=effort))[1]

    return Peer(perf_counter() - start, size_of(lambda path: faiss.write_index(index, path)), search, (50, 100, 200, 400, 800))


def hnswlib_graph(keys: Float[np.ndarray, "rows emb"]) -> Peer:
    """Build hnswlib's graph over float32 keys."""
    index = hnswlib.Index("l2", keys.shape[1])
    index.init_index(len(keys), M=LINKS, ef_construction=EFFORT)
    start = perf_counter()
    index.add_items(keys)

    def search(effort: int) -> Search:
        def found(queries: Float[np.ndarray, "queries emb"]) -> Int[np.ndarray, "queries k"]:
            index.set_ef(effort)
            return index.knn_query(queries, K)[0].astype(np.int64)

        return found

    return Peer(perf_counter() - start, size_of(index.save_index), search, (50, 100, 200, 400, 800))


def usearch_graph(keys: Float[np.ndarray, "rows emb"]) -> Peer:
    """Build usearch's graph over float16 keys."""
    index = UsearchIndex(ndim=keys.shape[1], metric="l2sq", dtype="f16", connectivity=LINKS, expansion_add=EFFORT)
    start = perf_counter()
    index.add(np.arange(len(keys)), keys, threads=os.cpu_count())

    def search(effort: int) -> Search:
        def found(queries: Float[np.ndarray, "queries emb"]) -> Int[np.ndarray, "queries k"]:
            index.expansion_search = effort
            return index.search(queries, K, threads=os.cpu_count()).keys.astype(np.int64)

        return found

    return Peer(perf_counter() - start, size_of(index.save), search, (50, 100, 200, 400, 800))


def scann_tree(keys: Float[np.ndarray, "rows emb"]) -> Peer:
    """Build ScaNN's tree as its documentation recommends: twice the root of the rows as leaves, 4-bit codes of 2 dimensions, reordering.

    Keys are rotated at random, as with faiss; otherwise codes of principal components find only a fifth of the neighbors. ScaNN quantizes
    the keys, not their differences to the center of the leaf, so it needs many candidates for reordering.
    """
    leaves, random = 2 * int(np.sqrt(len(keys))), np.random.default_rng(0)
    rotation = np.linalg.qr(random.normal(size=2 * keys.shape[1:]))[0].astype(np.float32)
    start = perf_counter()
    keys = keys @ rotation
    builder = scann.scann_ops_pybind.builder(keys, K, "squared_l2").tree(leaves, 10, training_sample_size=100_000)
    index = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(60 * K).build()
    seconds = perf_counter() - start

    def save(path: str) -> None:
        Path(path).mkdir()
        index.serialize(path)

    def search(effort: int) -> Search:
        return lambda queries: index.search_batched_parallel(queries @ rotation, K, leaves_to_search=effort)[0].astype(np.int64)

    return Peer(seconds, size_of(save), search, (10, 15, 20, 30, 40, 60, 80, 120, 200))


PEERS = {
    FAST: ivf_pq_refine,
    "faiss HNSW": faiss_hnsw,
    "hnswlib": hnswlib_graph,
    "usearch": usearch_graph,
    "ScaNN": scann_tree,
}


def run(run: Run) -> None:
    """Print the tables."""
    datastore = open_datastore(run.datastore)
    ours, record = our_index(run, datastore)
    exact, queries = ExactIndex(datastore), query_keys(run, QUERIES)
    truth = exact.search(queries, K)[0]
    ways: dict[str, Search] = {"ours, as built": lambda some: ours.search(some, K)[0]}
    recalls = {"ours, as built": f"{recall(ways['ours, as built'](queries), truth):.3f}"}
    for probe_radius in TUNED_RADII:
        searcher = Searcher(datastore, folder_of(run.index, record), record | {"probe_radius": probe_radius})
        tuned = ApproximateIndex(datastore, searcher, TUNED_CANDIDATES)
        found = recall(tuned.search(queries, K)[0], truth)
        if found >= RECALL:
            ways["ours, tuned to the same recall"] = lambda some, tuned=tuned: tuned.search(some, K)[0]
            recalls["ours, tuned to the same recall"] = f"{found:.3f} (radius {probe_radius}, {TUNED_CANDIDATES} candidates)"
            break
    keys, builds = all_keys(datastore), {"ours": [_our_build(run)]}
    for name, build in PEERS.items():
        peer = build(keys)
        builds[name] = [(peer.seconds, peer.size)]
        for effort in peer.efforts:
            found = recall(peer.search(effort)(queries), truth)
            if found >= RECALL or effort == peer.efforts[-1]:
                ways[name], recalls[name] = peer.search(effort), f"{found:.3f} (effort {effort})"
                break
    for _ in range(BUILD_ROUNDS - 1):
        builds["ours"].append(_our_build(run))
        builds[FAST].append(PEERS[FAST](keys)[:2])
    del keys, peer
    times = interleaved({name: lambda way=way: way(queries) for name, way in ways.items()}, rounds=15)
    alone = interleaved({"exact": lambda: exact.search(queries[:EXACT_QUERIES], K), "ours": lambda: ours.search(queries, K)}, rounds=3)
    exact_times = {"exact": [seconds * QUERIES / EXACT_QUERIES for seconds in alone["exact"]], "ours": alone["ours"]}
    rows, dimensions = datastore.rows, queries.shape[1]
    table(
        f"Search ({rows:,} keys of {dimensions}, {QUERIES:,} test tokens, k = {K}; other libraries at a recall of {RECALL} or more)",
        ("index", "recall@50", "times ours", "us per query"),
        [
            *((name, recalls[name], ratio(times, name, "ours, as built"), f"{1e6 * median(times, name) / QUERIES:,.0f}") for name in times),
            ("exact, in JAX", "1", ratio(exact_times, "exact", "ours"), f"{1e6 * median(exact_times, 'exact') / QUERIES:,.0f}"),
        ],
    )
    seconds = {name: sorted(s for s, _ in runs) for name, runs in builds.items()}
    table(
        f"Build of the index (ours and {FAST} {BUILD_ROUNDS} times, others once; ours is the stage, which reads the datastore)",
        ("index", "seconds", "times ours", "bytes per row"),
        (
            (
                name,
                f"{median(seconds, name):.1f}" + (f" ({some[0]:.1f} to {some[-1]:.1f})" if len(some) > 1 else ""),
                f"{median(seconds, name) / median(seconds, 'ours'):.2f}",
                f"{builds[name][0][1] / rows:.0f}",
            )
            for name, some in seconds.items()
        ),
    )


def _our_build(run: Run) -> tuple[float, int]:
    """Run the stage again in a scratch directory; return its seconds and the bytes of the index."""
    settings = run.record("index")["settings"]
    with tempfile.TemporaryDirectory(prefix="resmem-bench-") as name:
        scratch = Run(name)
        for folder in (run.datastore, run.checkpoints, run.vocabulary, run.documents):
            Path(name, folder.name).symlink_to(folder.absolute())
        scratch.stages.mkdir()
        for stage in ("documents", "vocabulary", "train", "build"):
            scratch.record_path(stage).write_bytes(run.record_path(stage).read_bytes())
        start = perf_counter()
        build_index(scratch, **settings)
        return perf_counter() - start, sum(path.stat().st_size for path in files_below(scratch.index))
