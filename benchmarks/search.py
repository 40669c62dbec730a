"""Search and build of the index, against exact search and the peers, each tuned to the same recall on the same keys.

`python -m pip install 'resmem_lm[bench]'` brings the peers. All use as many threads as there are cores. IVF-PQ with refine is faiss as one
would use it alone, with our lists: it keeps a float16 copy of the keys, from which it ranks its candidates; ours ranks from the datastore.
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

from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.evaluation.neighbors import recall
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.faiss_index import Searcher
from resmem_lm.memory.index import ApproximateIndex, Index
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.shards import query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.artifacts import folder_of
from resmem_lm.workdir.run import Run

QUERIES, K, RECALL = 2048, 50, 0.95
EXACT_QUERIES = 256  # exact search takes long; its time is of so many queries
LINKS, EFFORT = 16, 100  # of the graphs: neighbors of a node (M), candidates when one is put in (ef_construction)

TUNED_FARTHER, TUNED_CANDIDATES = (1.1, 1.15, 1.2, 1.225, 1.25, 1.275, 1.3, 1.35), 200

FAST, BUILD_ROUNDS = "faiss IVF-PQ with refine", 3  # of the peers' builds, the one that takes seconds

Search = Callable[[Float[np.ndarray, "queries emb"]], Int[np.ndarray, "queries k"]]


class Peer(NamedTuple):
    """An index as built: seconds, bytes on disk, and its search as a function of the effort, in rising order of which one is chosen."""

    seconds: float
    size: int
    search: Callable[[int], Search]
    efforts: tuple[int, ...]


def size_of(save: Callable[[str], Any]) -> int:
    """Bytes of the file or the folder that `save` writes."""
    with tempfile.TemporaryDirectory(prefix="resmem-bench-") as folder:
        path = Path(folder) / "index"
        save(str(path))
        return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]))


def query_keys(workdir: Path, count: int) -> Float[np.ndarray, "queries emb"]:
    """Keys of test tokens, evenly spaced."""
    datastore, model, vocabulary = open_datastore(workdir / "datastore"), load_model(workdir / "checkpoints"), load_vocabulary(Run(workdir))
    documents = vocabulary.encode_documents(query_documents(Run(workdir), "test"))[:200]
    keys = np.concatenate([rows.keys for _, rows in Encoder(model, datastore.binding.window, query_head, datastore.projection)(documents)])
    return keys[np.linspace(0, len(keys) - 1, count).astype(np.int64)]


def all_keys(workdir: Path) -> Float[np.ndarray, "rows emb"]:
    """The datastore's."""
    datastore = open_datastore(workdir / "datastore")
    return np.concatenate([datastore.shard_keys(shard) for shard in range(len(datastore.shards))])


def our_index(workdir: Path, datastore: Datastore) -> tuple[Index, dict[str, Any]]:
    """The index as built, of the whole datastore, and its record."""
    manifest = index_manifest(Run(workdir), datastore)
    assert len(manifest["shards"]) == 1, "an index of one shard is wanted: raise build_index.memory_gib"
    return open_index(Run(workdir), datastore, manifest, 0)[0], manifest["shards"][0]


def ivf_pq_refine(keys: Float[np.ndarray, "rows emb"]) -> Peer:
    """faiss, 4-bit codes of 2 dimensions of keys rotated at random, then float16 copies of the keys."""
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
    """faiss, a graph over float32 keys."""
    index = faiss.IndexHNSWFlat(keys.shape[1], LINKS)
    index.hnsw.efConstruction = EFFORT
    start = perf_counter()
    index.add(keys)

    def search(effort: int) -> Search:
        return lambda queries: index.search(queries, K, params=faiss.SearchParametersHNSW(efSearch=effort))[1]

    return Peer(perf_counter() - start, size_of(lambda path: faiss.write_index(index, path)), search, (50, 100, 200, 400, 800))


def hnswlib_graph(keys: Float[np.ndarray, "rows emb"]) -> Peer:
    """hnswlib, likewise."""
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
    """usearch, likewise over float16 keys."""
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
    """ScaNN as its documentation advises for so many keys: twice the root of the rows as leaves, 4-bit codes of 2 dimensions, reordered.

    As with faiss, keys are rotated at random: codes of principal components as such find a fifth of the neighbors. For distances ScaNN
    has codes of the keys themselves and not of what they differ in from their leaf's center, so many candidates are reordered.
    """
    leaves, turn = 2 * int(np.sqrt(len(keys))), np.linalg.qr(np.random.default_rng(0).normal(size=2 * keys.shape[1:]))[0].astype(np.float32)
    start = perf_counter()
    keys = keys @ turn
    builder = scann.scann_ops_pybind.builder(keys, K, "squared_l2").tree(leaves, 10, training_sample_size=100_000)
    index = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(60 * K).build()
    seconds = perf_counter() - start

    def save(path: str) -> None:
        Path(path).mkdir()
        index.serialize(path)

    def search(effort: int) -> Search:
        return lambda queries: index.search_batched_parallel(queries @ turn, K, leaves_to_search=effort)[0].astype(np.int64)

    return Peer(seconds, size_of(save), search, (10, 15, 20, 30, 40, 60, 80, 120, 200))


PEERS = {
    FAST: ivf_pq_refine,
    "faiss HNSW": faiss_hnsw,
    "hnswlib": hnswlib_graph,
    "usearch": usearch_graph,
    "ScaNN": scann_tree,
}


def run(workdir: Path) -> None:
    """Prints the tables."""
    datastore = open_datastore(workdir / "datastore")
    ours, record = our_index(workdir, datastore)
    exact, queries = ExactIndex(datastore), query_keys(workdir, QUERIES)
    truth = exact.search(queries, K)[0]
    ways: dict[str, Search] = {"ours, as built": lambda some: ours.search(some, K)[0]}
    reached = {"ours, as built": f"{recall(ways['ours, as built'](queries), truth):.3f}"}
    for probe_radius in TUNED_FARTHER:
        searcher = Searcher(datastore, folder_of(workdir / "index", record), record | {"probe_radius": probe_radius})
        tuned = ApproximateIndex(datastore, searcher, TUNED_CANDIDATES)
        found = recall(tuned.search(queries, K)[0], truth)
        if found >= RECALL:
            ways["ours, tuned likewise"] = lambda some, tuned=tuned: tuned.search(some, K)[0]
            reached["ours, tuned likewise"] = f"{found:.3f} (centers to {probe_radius} of the nearest, {TUNED_CANDIDATES} candidates)"
            break
    keys, builds = all_keys(workdir), {"ours": [_our_build(workdir)]}
    for name, build in PEERS.items():
        peer = build(keys)
        builds[name] = [(peer.seconds, peer.size)]
        for effort in peer.efforts:
            found = recall(peer.search(effort)(queries), truth)
            if found >= RECALL or effort == peer.efforts[-1]:
                ways[name], reached[name] = peer.search(effort), f"{found:.3f} (effort {effort})"
                break
    for _ in range(BUILD_ROUNDS - 1):
        builds["ours"].append(_our_build(workdir))
        builds[FAST].append(PEERS[FAST](keys)[:2])
    del keys, peer
    times = interleaved({name: lambda way=way: way(queries) for name, way in ways.items()}, rounds=15)
    alone = interleaved({"exact": lambda: exact.search(queries[:EXACT_QUERIES], K), "ours": lambda: ours.search(queries, K)}, rounds=3)
    exact_times = {"exact": [seconds * QUERIES / EXACT_QUERIES for seconds in alone["exact"]], "ours": alone["ours"]}
    rows, dimensions = datastore.rows, queries.shape[1]
    table(
        f"Search ({rows:,} keys of {dimensions}, {QUERIES:,} test tokens, k = {K}; peers at a recall of {RECALL} or more)",
        ("index", "recall@50", "time over ours", "us a query"),
        [
            *((name, reached[name], ratio(times, name, "ours, as built"), f"{1e6 * median(times, name) / QUERIES:,.0f}") for name in times),
            ("exact, in JAX", "1", ratio(exact_times, "exact", "ours"), f"{1e6 * median(exact_times, 'exact') / QUERIES:,.0f}"),
        ],
    )
    seconds = {name: sorted(s for s, _ in runs) for name, runs in builds.items()}
    table(
        f"Build of the index (ours and {FAST} {BUILD_ROUNDS} times in turns, others once; ours as a stage, which reads the datastore)",
        ("index", "seconds", "time over ours", "bytes a row"),
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


def _our_build(workdir: Path) -> tuple[float, int]:
    """Seconds and bytes of the stage, done again beside the finished one."""
    from beam_pipelines.build_index import build_index
    from resmem_lm.workdir.storage import read_json

    settings = read_json(workdir / "stages" / "index.json")["settings"]
    with tempfile.TemporaryDirectory(prefix="resmem-bench-") as name:
        scratch = Path(name)
        for folder in ("datastore", "checkpoints", "vocabulary", "documents"):
            (scratch / folder).symlink_to((workdir / folder).absolute())
        (scratch / "stages").mkdir()
        for path in (workdir / "stages").glob("*.json"):
            if path.stem in ("documents", "vocabulary", "train", "build"):
                (scratch / "stages" / path.name).write_bytes(path.read_bytes())
        start = perf_counter()
        build_index(scratch, **settings)
        seconds = perf_counter() - start
        return seconds, sum(path.stat().st_size for path in (scratch / "index").rglob("*") if path.is_file())
