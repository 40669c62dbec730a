"""Compare the merge of 50 neighbors of 128 entries into DeepNet's probabilities with a dense sum over the vocabulary."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.inputs import train_documents
from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.evaluation.candidates import Candidates, Neighbors, best, choose_candidates, quantized_at, score
from resmem_lm.evaluation.scorer import BLOCK
from resmem_lm.evaluation.sources import BASE_CANDIDATES
from resmem_lm.memory.encoder import Encoder, query_head, residual_head
from resmem_lm.memory.quantization import dequantize_probabilities
from resmem_lm.model.checkpoints import Model, load_model
from resmem_lm.resmem import neighbor_weights
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run

QUERIES, K = 2048, 50
ENTRIES = (128, 16)  # of the paper, and of gin/compact.gin
SIGMA, LAMBDA = 1.0, 1.0
THREADS = 2  # threads that read the next blocks while one is scored, as in `SplitScorer.blocks`


def run(run: Run) -> None:
    """Print the tables."""
    model, documents = load_model(run.checkpoints), train_documents(run, 4 * QUERIES)
    for entries in ENTRIES:
        _compare(model, documents, entries)


def _compare(model: Model, documents: list[Int[np.ndarray, "_"]], entries: int) -> None:
    encoded = [rows for _, rows in Encoder(model, WindowSpec(), residual_head(model, entries, (1.0,)))(documents)]
    rows = type(encoded[0])(*(np.concatenate(arrays) for arrays in zip(*encoded, strict=True)))
    hidden = np.concatenate([some.hidden for _, some in Encoder(model, WindowSpec(), query_head)(documents)])[:QUERIES]
    logits = model.logits(model.parameters, jnp.asarray(hidden))
    rng, threads = np.random.default_rng(0), ThreadPoolExecutor(THREADS)
    picked = rng.integers(0, len(rows.tokens), (QUERIES, K))
    distances = np.sort(rng.gamma(4.0, size=(QUERIES, K)), axis=1).astype(np.float32)
    ids, codes = rows.residual_ids[picked], rows.quantized_residuals[picked]
    tokens, own = rows.tokens[picked].astype(np.int32), rows.target_log_probability[picked].astype(np.float32)
    candidate_ids, candidate_logits, bound = choose_candidates(logits, jnp.asarray(tokens), BASE_CANDIDATES)
    log_z = jax.nn.logsumexp(logits, axis=-1)[:, None]
    parts = (candidate_ids, candidate_logits, bound, log_z, distances, tokens, own)
    blocks = [tuple(map(jnp.asarray, some)) for some in zip(*map(_blocks, parts), strict=True)]
    stored = list(map(_blocks, (ids, codes)))
    candidate_blocks, logit_blocks = _blocks(np.asarray(candidate_ids)), _blocks(logits)

    @jax.jit
    def merged(block: tuple[Array, ...], codes: Array) -> Array:
        candidates, (distances, tokens, own) = Candidates(*block[:4]), block[4:]
        neighbors = Neighbors(distances, tokens, jnp.zeros(tokens.shape, jnp.uint8), codes, own, jnp.zeros((*tokens.shape, 1)))
        return best(_total(candidates, neighbors), candidates.ids)[0]

    def ours() -> Int[np.ndarray, " queries"]:
        return np.concatenate(
            [merged(block, codes) for block, codes in zip(blocks, threads.map(quantized_at, candidate_blocks, *stored), strict=True)]
        )

    choose = jax.jit(lambda logits, tokens: choose_candidates(logits, tokens, BASE_CANDIDATES))

    def chosen(logits: Array, tokens: Array, ids: np.ndarray, codes: np.ndarray) -> tuple[tuple[Array, ...], np.ndarray]:
        candidates = choose(logits, tokens)
        return candidates, quantized_at(np.asarray(candidates[0]), ids, codes)

    def with_choice() -> Int[np.ndarray, " queries"]:
        ahead = threads.map(chosen, logit_blocks, [block[5] for block in blocks], *stored)
        return np.concatenate([merged((*candidates, *block[3:]), codes) for block, (candidates, codes) in zip(blocks, ahead, strict=True)])

    base = np.asarray(jax.nn.softmax(logits))
    weights = np.asarray(neighbor_weights(jnp.asarray(distances), SIGMA))
    all_ids = np.concatenate([tokens[..., None], ids.astype(np.int32)], axis=-1)
    values = np.concatenate([-np.expm1(own)[..., None], -dequantize_probabilities(codes)], axis=-1)

    def dense_numpy() -> Int[np.ndarray, " queries"]:
        found, filled = [], np.empty((K, base.shape[1]), np.float32)
        for query in range(QUERIES):
            filled.fill(0)
            np.put_along_axis(filled, all_ids[query], values[query], axis=1)
            found.append(np.argmax(base[query] + LAMBDA * weights[query] @ filled))
        return np.array(found)

    @jax.jit
    def dense_jax(base: Array, weights: Array, ids: Array, values: Array) -> Array:
        def one(query: tuple[Array, ...]) -> Array:
            base, weights, ids, values = query
            filled = jnp.zeros((K, len(base))).at[jnp.arange(K)[:, None], ids].set(values)
            return jnp.argmax(base + LAMBDA * weights @ filled)

        return jax.lax.map(one, (base, weights, ids, values))

    arrays = [jnp.asarray(array) for array in (base, weights, all_ids, values)]
    ways = {
        "ours": ours,
        "ours, with the choice of candidates among all logits": with_choice,
        "dense, NumPy": dense_numpy,
        "dense, JAX": lambda: np.asarray(dense_jax(*arrays)),
    }
    expected = ours()
    for name, way in ways.items():
        assert (way() == expected).all(), f"{name} predicts other tokens"
    times = interleaved(ways, rounds=7)
    table(
        f"Merge ({K} neighbors x {entries} entries into {base.shape[1]:,}; the same predictions)",
        ("way", "times ours", "queries/s"),
        ((name, ratio(times, name, "ours"), f"{QUERIES / median(times, name):,.0f}") for name in ways),
    )


def _blocks(array: Any) -> list[Any]:
    return np.array_split(array, QUERIES // BLOCK)


def _total(candidates: Candidates, neighbors: Neighbors) -> Float[Array, "queries candidates"]:
    scores = score(candidates, neighbors, jnp.array([K]), jnp.array([SIGMA]), 1.0, 0)
    return scores.base + LAMBDA * scores.residual[0]
