"""Measure how the time of search and evaluation grows with the rows of the datastore, and fit exponents.

Beyond WORKDIR's rows, rows repeat with noise of a tenth of the keys' standard deviation. The queries are test tokens. As in
`resmem evaluate`, they are searched, and their residuals and predictions computed.
"""

import contextlib
import io
import tempfile
from pathlib import Path
from time import perf_counter

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from benchmarks.inputs import query_keys
from benchmarks.measure import table
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.neighbors import Queries, recall
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.sources import BASE_CANDIDATES, RESIDUAL_ARRAYS
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.faiss_index import Searcher, build
from resmem_lm.memory.index import ApproximateIndex
from resmem_lm.memory.quantization import quantize_keys
from resmem_lm.memory.schema import ARRAYS
from resmem_lm.memory.suffix_index import CONTINUATIONS
from resmem_lm.planning.machine import least
from resmem_lm.workdir.arrays import ShardedArray
from resmem_lm.workdir.run import Run

ROWS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
QUERIES, K, RECALL_QUERIES, CANDIDATES = 2048, 50, 128, 300
SHARD = 500_000
SETTING = Setting("resmem", K, 1.0, 1.0, 1.0)


def grown(source: Datastore, rows: int, folder: Path) -> Datastore:
    """Write a datastore with a number of rows, shard by shard."""
    rng, records = np.random.default_rng(0), []
    for shard, first in enumerate(range(0, rows, SHARD)):
        numbers = np.arange(first, min(rows, first + SHARD))
        name = f"shard-{shard:05d}"
        (folder / name).mkdir()
        for array in ARRAYS:
            if not array.startswith("key_"):
                np.save(folder / name / f"{array}.npy", source.take(array, numbers % source.rows))
        keys = source.keys(numbers % source.rows)
        again = numbers >= source.rows
        keys[again] += (0.1 * keys.std() * rng.normal(size=(int(again.sum()), keys.shape[1]))).astype(np.float32)
        for array, value in zip(("quantized_keys", "key_scales"), quantize_keys(jnp.asarray(keys)), strict=True):
            np.save(folder / name / f"{array}.npy", np.asarray(value))
        records.append({"folder": name, "rows": len(numbers), "files": {}})
    return Datastore(folder, source.manifest | {"shards": records})


def random_queries(index: ApproximateIndex, keys: Float[np.ndarray, "queries emb"], logits: Float[np.ndarray, "queries base"]) -> Queries:
    """Return cached neighbors as `resmem evaluate` has them, without the document. Other candidates are random, which costs the same."""
    rows, distances = index.search(keys, K)
    neighbor_tokens = index.datastore.take("tokens", rows)
    base = np.random.default_rng(0).integers(0, 30_000, (len(rows), logits.shape[1] + CONTINUATIONS)).astype(np.int32)
    ids = np.concatenate([base, neighbor_tokens.astype(np.int32)], axis=1)
    ones = np.ones((len(rows), len(index.datastore.binding.temperatures)), np.float32)
    zeros = np.zeros(len(rows), np.float32)
    arrays = {
        "rows": rows,
        "distances": distances,
        "neighbor_tokens": neighbor_tokens,
        "matches": np.zeros(rows.shape, np.uint8),
        **dict.fromkeys(("document_back", "document_distances", "document_matches"), np.zeros((len(rows), 0), np.int32)),
        **{name: index.datastore.take(name, np.arange(len(rows))) for name in RESIDUAL_ARRAYS},
        "target_logits": zeros,
        "candidate_ids": ids,
        "candidate_logits": np.zeros(ids.shape, np.float32),
        "bound": zeros,
        "exact_log_probability": np.zeros(ids.shape, np.float16),
        "exact_match": np.zeros((len(rows), 3), np.float32),
        "log_partition": 10 * ones,
    }
    sharded = {name: ShardedArray([array]) for name, array in arrays.items()}
    return Queries(
        tokens=np.zeros(len(rows), np.int32), document_lengths=np.array([len(rows)]), document_groups=np.zeros(1, np.int64), **sharded
    )


def exponent(rows: list[int], seconds: list[float]) -> str:
    """Return a of seconds = c rows^a, by least squares of the logarithms, with its standard error."""
    (slope, _), covariance = np.polyfit(np.log(rows), np.log(seconds), 1, cov=True)
    return f"{slope:.2f} +- {covariance[0, 0] ** 0.5:.2f}"


def run(run: Run) -> None:
    """Print the table."""
    source, keys = open_datastore(run.datastore), query_keys(run, QUERIES)
    logits = np.zeros((QUERIES, BASE_CANDIDATES), np.float32)
    cells, times = [], {"build": [], "search": [], "evaluation": []}
    for count in ROWS:
        with tempfile.TemporaryDirectory(prefix="resmem-bench-", dir=str(run)) as name:
            datastore = grown(source, count, Path(name))
            start = perf_counter()
            facts = build(datastore, Path(name), {"training_rows": 100_000})
            times["build"].append(perf_counter() - start)
            searcher = Searcher(datastore, Path(name), facts)
            index, lists = ApproximateIndex(datastore, searcher, CANDIDATES), searcher.lists(searcher.rotation.apply(keys))[2]
            found = index.search(keys[:RECALL_QUERIES], K)[0]
            measured = recall(found, ExactIndex(datastore).search(keys[:RECALL_QUERIES], K)[0])
            times["search"].append(least(lambda index=index: index.search(keys, K)))
            scorer = SplitScorer("bench", random_queries(index, keys, logits), datastore)
            with contextlib.redirect_stderr(io.StringIO()):
                times["evaluation"].append(least(lambda scorer=scorer: scorer.predict([SETTING])))
            each = [f"{1e6 * times[part][-1] / QUERIES:,.0f}" for part in ("search", "evaluation")]
            probed = f"{lists.mean():.1f} of {facts['leaves']:,} (radius {facts['probe_radius']})"
            cells.append((f"{count:,}", f"{measured:.3f}", f"{times['build'][-1]:.1f}", probed, *each))
    build_time, *others = (exponent(list(ROWS), seconds) for seconds in times.values())
    table(
        f"Growth ({keys.shape[1]} dimensions, {QUERIES:,} queries, the shortest of three times)",
        ("rows", "recall@50", "index build, s", "probed lists per query", "search, us per query", "scores, us per query"),
        [*cells, ("exponent", "", build_time, "", *others)],
    )
