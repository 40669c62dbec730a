"""Bytes of a row on disk, and what they cost in accuracy against rows as the paper has them: float32, all dimensions, 128 entries.

Both memories are of the same train tokens, searched exactly, scored by the paper's formula in its dense form, with the sigma and lambda
under which the paper's rows do best on validation tokens.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.encode import first_tokens, some_documents
from benchmarks.measure import table
from resmem_lm.checkpoint import Model, load_model
from resmem_lm.codes import decode_keys, decode_probabilities
from resmem_lm.datastore import open_datastore
from resmem_lm.encode import Encoder, QueryRows, query_head, residual_head
from resmem_lm.evaluate import bootstrap_interval
from resmem_lm.projection import principal_components
from resmem_lm.resmem import largest, merge_sparse, neighbor_weights, residual
from resmem_lm.search import query_documents
from resmem_lm.vocabulary import load_vocabulary
from resmem_lm.windows import WindowSpec

ROWS, QUERIES, K, ENTRIES = 60_000, 6000, 50, 128
PAPER_BYTES = 512 * 4 + ENTRIES * 8
SIGMAS, LAMBDAS = (0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.25, 0.4, 0.6, 0.8, 1.0)
BLOCK = 64  # queries whose dense scores exist at a time


class Memory(NamedTuple):
    """Rows decoded to float32, and how a query's key is made one of theirs."""

    keys: Float[Array, "rows dimensions"]
    ids: Int[np.ndarray, "rows entries"]
    values: Float[np.ndarray, "rows entries"]
    projection: Float[np.ndarray, "emb dimensions"] | None


class Split(NamedTuple):
    """Queries with their true tokens."""

    queries: QueryRows
    targets: Int[np.ndarray, " queries"]
    lengths: Int[np.ndarray, " documents"]


def encode_all(model: Model, head: Any, documents: list[np.ndarray]) -> Any:
    """The head's output for every token, in order."""
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
    """As the paper has them; what the datastore holds beside the key is in the same order."""

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
    """Rows and distances of the K nearest, exactly."""
    keys = queries if memory.projection is None else queries @ memory.projection
    norms = jnp.sum(jnp.square(memory.keys), axis=-1) / 2
    parts = [_nearest(jnp.asarray(keys[i : i + BLOCK]), memory.keys, norms, K) for i in range(0, len(keys), BLOCK)]
    return tuple(np.concatenate([np.asarray(part[n]) for part in parts]) for n in (0, 1))  # type: ignore[return-value]


@jax.jit
def _predictions(base: Array, distances: Array, ids: Array, values: Array, sigma: Array, lambdas: Array) -> Array:
    change = merge_sparse(jnp.zeros_like(base), neighbor_weights(distances, sigma), ids, values)
    return jax.lax.map(lambda lambda_: jnp.argmax(base + lambda_ * change, axis=-1), lambdas)


def predictions(model: Model, memory: Memory, split: Split, sigmas: tuple[float, ...], lambdas: tuple[float, ...]) -> np.ndarray:
    """Int[sigmas lambdas queries]."""
    rows, distances = neighbors(memory, split.queries.keys)
    blocks = []
    for start in range(0, len(rows), BLOCK):
        some = slice(start, start + BLOCK)
        base = jax.nn.softmax(model.logits(model.parameters, jnp.asarray(split.queries.hidden[some])))
        arrays = [jnp.asarray(array) for array in (distances[some], memory.ids[rows[some]], memory.values[rows[some]])]
        blocks.append(np.stack([np.asarray(_predictions(base, *arrays, sigma, jnp.array(lambdas))) for sigma in sigmas]))
    return np.concatenate(blocks, axis=-1)


def run(workdir: Path) -> None:
    """Prints the table."""
    model, vocabulary, datastore = load_model(workdir / "checkpoints"), load_vocabulary(workdir), open_datastore(workdir / "datastore")
    binding = datastore.binding
    compact = residual_head(model, binding.entries, binding.temperatures)

    def both(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> BothRows:
        logits = model.logits(parameters, hidden)
        r = residual(logits, targets)
        _, ids = largest(jnp.abs(r), ENTRIES)
        return BothRows(keys, ids, jnp.take_along_axis(r, ids, axis=1), targets, hidden)

    train = some_documents(workdir, ROWS)
    paper = encode_all(model, both, train)
    dimensions = binding.key_dimensions
    projection = None if dimensions is None else principal_components(paper.keys, dimensions)
    projected = paper.keys if projection is None else paper.keys @ projection
    parts = [
        jax.jit(compact)(model.parameters, *(jnp.asarray(array[i : i + 256]) for array in (projected, paper.hidden, paper.own)))
        for i in range(0, len(projected), 256)
    ]
    rows = type(parts[0])(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    memories = {
        "as the paper's": Memory(jnp.asarray(paper.keys), paper.ids, paper.values, None),
        "as configured": Memory(
            jnp.asarray(decode_keys(rows.key_codes, rows.key_scales)),
            np.concatenate([rows.tokens[:, None], rows.residual_ids], axis=1).astype(np.int32),
            np.concatenate(
                [-np.expm1(rows.target_log_probability.astype(np.float32))[:, None], -decode_probabilities(rows.residual_codes)], 1
            ),
            projection,
        ),
    }
    splits = {}
    for name in ("validation", "test"):
        documents = first_tokens(vocabulary.encode_documents(query_documents(workdir, name)), QUERIES)
        lengths = np.array([len(document) for document in documents])
        splits[name] = Split(encode_all(model, query_head, documents), np.concatenate(documents), lengths)
    counts = (predictions(model, memories["as the paper's"], splits["validation"], SIGMAS, LAMBDAS) == splits["validation"].targets).sum(-1)
    place = np.unravel_index(np.argmax(counts), counts.shape)
    sigma, lambda_ = SIGMAS[place[0]], LAMBDAS[place[1]]
    right = {
        name: (predictions(model, memory, splits["test"], (sigma,), (lambda_,))[0, 0] == splits["test"].targets).astype(np.float64)
        for name, memory in memories.items()
    }
    index = sum(path.stat().st_size for path in (workdir / "index").rglob("*") if path.is_file()) / datastore.rows
    own = datastore.bytes / datastore.rows
    difference = right["as configured"] - right["as the paper's"]
    low, high = bootstrap_interval(difference, splits["test"].lengths)
    table(
        f"Bytes a row (accuracy: {ROWS:,} rows, {len(difference):,} test tokens, exact search; sigma {sigma:g}, lambda {lambda_:g})",
        ("rows", "bytes", "with index", "test accuracy, %"),
        (
            (name, *sizes, f"{100 * right[name].mean():.2f}")
            for name, sizes in {
                "as the paper's": (f"{PAPER_BYTES:,}", ""),
                "as configured": (f"{own:.0f}", f"{own + index:.0f}"),
            }.items()
        ),
    )
    print(f"\nDifference: {100 * difference.mean():+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]")
