"""Windows -> (key, sparse residual, token), and for queries (key, hidden state)."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from resmem_lm.checkpoint import Model
from resmem_lm.model import shift_right
from resmem_lm.resmem import residual, sparse_residual
from resmem_lm.windows import WindowSpec, window_rows

ROWS = 16  # windows in one forward pass
TOKENS = 256  # emitted tokens whose logits exist at a time: they stay in the cache, and little is computed for padding

Head = Callable[[dict[str, Any], Array, Array, Array], Any]


class DatastoreRows(NamedTuple):
    """What the datastore holds of some tokens, in its dtypes."""

    keys: Float[Array, "rows emb"]
    residual_ids: UInt[Array, "rows entries"]
    residual_values: Float[Array, "rows entries"]
    tokens: UInt[Array, " rows"]
    dropped: Float[Array, " rows"]
    log_partition: Float[Array, "rows temperatures"]
    target_log_probability: Float[Array, " rows"]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def log_partition(logits: Float[Array, "rows vocab"], temperatures: tuple[float, ...]) -> Float[Array, "rows temperatures"]:
    """log Z_T = logsumexp(f / T) for each T."""
    return jnp.stack([jax.nn.logsumexp(logits / temperature, axis=-1) for temperature in temperatures], axis=-1)


def residual_head(model: Model, entries: int, temperatures: tuple[float, ...]) -> Head:
    """Datastore rows of emitted tokens: residuals at T = 1, and log Z_T for the other temperatures."""

    def head(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> DatastoreRows:
        logits = model.logits(parameters, hidden)
        ids, values, dropped = sparse_residual(residual(logits, targets), entries)
        log_z = log_partition(logits, temperatures)
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        dtype = token_dtype(model.config.vocab_size)
        return DatastoreRows(
            keys=keys.astype(jnp.float16),
            residual_ids=ids.astype(dtype),
            residual_values=values.astype(jnp.float16),
            tokens=targets.astype(dtype),
            dropped=dropped,
            log_partition=log_z,
            target_log_probability=target_logits - jax.nn.logsumexp(logits, axis=-1),
        )

    return head


class QueryRows(NamedTuple):
    """What a search needs of some tokens."""

    keys: Float[Array, "rows emb"]
    hidden: Float[Array, "rows emb"]


def query_head(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> QueryRows:
    """Keys and last hidden states of emitted tokens in float32; logits are made from the latter when neighbours are known."""
    return QueryRows(keys.astype(jnp.float32), hidden.astype(jnp.float32))


def _first(output: Any, count: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[:count], output)


class Encoder:
    """Runs the model over the windows of documents and a head over the tokens that they emit."""

    def __init__(self, model: Model, spec: WindowSpec, head: Head) -> None:
        self.spec, self.parameters = spec, model.parameters
        self._hidden = jax.jit(model.hidden)

        def select(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array, places: Array) -> Any:
            flat_keys, flat_hidden = (x.reshape(-1, x.shape[-1]) for x in (keys, hidden))
            return head(parameters, flat_keys[places], flat_hidden[places], targets.reshape(-1)[places])

        self._head = jax.jit(select)

    def __call__(
        self, documents: list[Int[np.ndarray, "_"]], counts: Counter[str] | None = None
    ) -> Iterator[tuple[Int[np.ndarray, " rows"], Any]]:
        """Yields (positions, the head's output for them): every token of the documents once, in no set order.

        Adds to `counts` the windows, their tokens (context included), and the tokens computed (padding included).
        """
        for batch in window_rows(documents, self.spec, ROWS):
            if counts is not None:
                counts["windows"] += int(batch.segment_ids.max(axis=1).sum())
                counts["window_tokens"] += int((batch.segment_ids > 0).sum())
                counts["computed_tokens"] += batch.tokens.size
            inputs = shift_right(batch.tokens, batch.segment_ids)
            keys, hidden = self._hidden(self.parameters, inputs, batch.segment_ids)
            places = np.flatnonzero(batch.emitted)
            for start in range(0, len(places), TOKENS):
                some = places[start : start + TOKENS]
                padded = np.pad(some, (0, TOKENS - len(some)))
                output = self._head(self.parameters, keys, hidden, batch.tokens, padded)
                yield batch.positions.reshape(-1)[some], _first(output, len(some))
