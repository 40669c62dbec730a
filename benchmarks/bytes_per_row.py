"""Measure the bytes of a row on disk, and the accuracy compared with rows as in the paper: float32, all dimensions, 128 entries.

All memories have the same train tokens, exact search, and the paper's formula over the whole vocabulary. Each has the sigma and lambda
that are best on validation. Rows have the configured number of entries, and keys of several numbers of dimensions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.encode import fast_argmax
from benchmarks.inputs import train_documents
from benchmarks.measure import table
from resmem_lm.evaluation.statistics import bootstrap_interval
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder, QueryRows, query_head, residual_head
from resmem_lm.memory.faiss_index import index_bytes
from resmem_lm.memory.projection import principal_components
from resmem_lm.memory.quantization import dequantize_keys, dequantize_probabilities
from resmem_lm.model.checkpoints import Model, load_model
from resmem_lm.report.tables import interval
from resmem_lm.resmem import largest, merge_sparse, neighbor_weights, residual
from resmem_lm.text.packing import first_tokens
from resmem_lm.text.shards import query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run

ROWS, QUERIES, K, ENTRIES = 60_000, {"validation": 15_000, "test": 90_000}, 50, 128
DIMENSIONS = (512, 320, 256, 192)
SIGMAS, LAMBDAS = (0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.25, 0.4, 0.6, 0.8, 1.0)
BLOCK = 64  # queries whose dense scores exist at a time


class Memory(NamedTuple):
    """Rows in float32, and the projection of their keys."""

    keys: Float[Array, "rows dimensions"]
    ids: Int[np.ndarray, "rows entries"]
    values: Float[np.ndarray, "rows entries"]
    projection: Float[np.ndarray, "emb dimensions"] | None


class Split(NamedTuple):
    """Queries with their true tokens."""

    queries: QueryRows
    targets: Int[np.ndarray, " queries"]
    documents: Int[np.ndarray, " queries"]  # the number of the document of each


def encode_all(model: Model, head: Any, documents: list[np.ndarray]) -> Any:
    """Return the head's output for every token, in order."""
    arrays: list[np.ndarray] | None = None
    count = sum(map(len, documents))
    for positions, rows in Encoder(model, WindowSpec(), head)(documents):
        if arrays is None:
            arrays = [np.empty((count, *part.shape[1:]), part.dtype) for part in rows]
        for array, part in zip(arrays, rows, strict=True):
            array[positions] = part
        kind = type(rows)
    assert arrays is not None
    return kind(*arrays)


class BothRows(NamedTuple):
    """Rows as in the paper, and the input from which `residual_head` makes the datastore's rows."""

    keys: Float[Array, "rows emb"]
    ids: Int[Array, "rows entries"]
    values: Float[Array, "rows entries"]
    own: Int[Array, " rows"]
    hidden: Float[Array, "rows emb"]


@functools.partial(jax.jit, static_argnames="k")
def _nearest(queries: Array, keys: Array, norms: Array, k: int) -> tuple[Array, Array]:
    _, rows = largest(queries @ keys.T - norms, k)
    return rows, jnp.sqrt(jnp.sum(jnp.square(queries[:, None] - keys[rows]), axis=-1))


def neighbors(memory: Memory, queries: Float[np.ndarray, "queries emb"]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and distances of the K nearest keys by exact search."""
    keys = queries if memory.projection is None else queries @ memory.projection
    norms = jnp.sum(jnp.square(memory.keys), axis=-1) / 2
    parts = [_nearest(jnp.asarray(keys[i : i + BLOCK]), memory.keys, norms, K) for i in range(0, len(keys), BLOCK)]
    return tuple(np.concatenate([np.asarray(part[n]) for part in parts]) for n in (0, 1))  # type: ignore[return-value]


@jax.jit
def _predictions(base: Array, distances: Array, ids: Array, values: Array, sigma: Array, lambdas: Array) -> Array:
    change = merge_sparse(jnp.zeros_like(base), neighbor_weights(distances, sigma), ids, values)
    return jax.lax.map(lambda lambda_: fast_argmax(base + lambda_ * change), lambdas)


def predictions(model: Model, memory: Memory, split: Split, sigmas: tuple[float, ...], lambdas: tuple[float, ...]) -> np.ndarray:
    """Return the predictions for every sigma and lambda: Int[sigmas lambdas queries]."""
    rows, distances = neighbors(memory, split.queries.keys)
    blocks = []
    for start in range(0, len(rows), BLOCK):
        some = slice(start, start + BLOCK)
        base = jax.nn.softmax(model.logits(model.parameters, jnp.asarray(split.queries.hidden[some])))
        arrays = [jnp.asarray(array) for array in (distances[some], memory.ids[rows[some]], memory.values[rows[some]])]
        blocks.append(np.stack([np.asarray(_predictions(base, *arrays, sigma, jnp.array(lambdas))) for sigma in sigmas]))
    return np.concatenate(blocks, axis=-1)


def run(run: Run) -> None:
    """Print the table."""
    model, vocabulary, datastore = load_model(run.checkpoints), load_vocabulary(run), open_datastore(run.datastore)
    binding = datastore.binding
    compact = jax.jit(residual_head(model, binding.entries, binding.temperatures))

    def both(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> BothRows:
        logits = model.logits(parameters, hidden)
        r = residual(logits, targets)
        _, ids = largest(jnp.abs(r), ENTRIES)
        return BothRows(keys, ids, jnp.take_along_axis(r, ids, axis=1), targets, hidden)

    train = train_documents(run, ROWS)
    paper = encode_all(model, both, train)

    def as_configured(dimensions: int) -> Memory:
        projection = None if dimensions >= paper.keys.shape[1] else principal_components(paper.keys, dimensions)
        projected = paper.keys if projection is None else paper.keys @ projection
        parts = [
            compact(model.parameters, *(jnp.asarray(array[i : i + 256]) for array in (projected, paper.hidden, paper.own)))
            for i in range(0, len(projected), 256)
        ]
        rows = type(parts[0])(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        own = -np.expm1(rows.target_log_probability.astype(np.float32))[:, None]
        return Memory(
            jnp.asarray(dequantize_keys(rows.quantized_keys, rows.key_scales)),
            np.concatenate([rows.tokens[:, None], rows.residual_ids], axis=1).astype(np.int32),
            np.concatenate([own, -dequantize_probabilities(rows.quantized_residuals)], axis=1),
            projection,
        )

    splits = {}
    for name, count in QUERIES.items():
        documents = first_tokens(vocabulary.encode_documents(query_documents(run, name)), count)
        numbers = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
        splits[name] = Split(encode_all(model, query_head, documents), np.concatenate(documents), numbers)
    as_paper = Memory(jnp.asarray(paper.keys), paper.ids, paper.values, None)

    def right(memory: Memory) -> tuple[Float[np.ndarray, " queries"], str]:
        counts = (predictions(model, memory, splits["validation"], SIGMAS, LAMBDAS) == splits["validation"].targets).sum(-1)
        place = np.unravel_index(np.argmax(counts), counts.shape)
        sigma, lambda_ = SIGMAS[place[0]], LAMBDAS[place[1]]
        found = predictions(model, memory, splits["test"], (sigma,), (lambda_,))[0, 0] == splits["test"].targets
        return found.astype(np.float64), f"sigma {sigma:g}, lambda {lambda_:g}"

    (expected, chosen), emb = right(as_paper), paper.keys.shape[1]
    cells = [(f"as in the paper, {emb}", f"{4 * emb + 8 * ENTRIES:,}", "", chosen, f"{100 * expected.mean():.2f}", "", "")]
    for dimensions in DIMENSIONS:
        found, chosen = right(as_configured(dimensions))
        own = datastore.bytes / datastore.rows - (binding.key_dimensions or emb) + dimensions
        whole = own + index_bytes(datastore.rows, dimensions) / datastore.rows
        difference = f"{100 * (found - expected).mean():+.2f}", interval(bootstrap_interval(found - expected, splits["test"].documents))
        cells.append((str(dimensions), f"{own:.0f}", f"{whole:.0f}", chosen, f"{100 * found.mean():.2f}", *difference))
    table(
        f"Bytes a row (accuracy: {ROWS:,} rows, {len(expected):,} test tokens, exact search)",
        ("dimensions of a key", "bytes", "with index", "chosen on validation", "test accuracy, %", "difference", "95%"),
        cells,
    )
