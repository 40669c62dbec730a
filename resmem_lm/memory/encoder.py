"""Encode windows of tokens as datastore rows (key, sparse residual, token) or as queries (key, hidden state)."""

from collections import Counter
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, UInt, UInt8

from resmem_lm.memory.quantization import quantize_keys, quantize_probabilities
from resmem_lm.memory.schema import DatastoreRows, token_dtype
from resmem_lm.model.checkpoints import Model
from resmem_lm.resmem import sparse_residual
from resmem_lm.text.packing import shift_right
from resmem_lm.text.windows import WindowSpec, window_rows

ROWS = 16  # windows in one forward pass
TOKENS = 256  # emitted tokens in one call of the head: few enough that the logits stay in the cache and padding is small

Head = Callable[[dict[str, Any], Array, Array, Array], Any]  # (parameters, keys, hidden, targets) to a named tuple of arrays


def log_partition(logits: Float[Array, "rows vocab"], temperatures: tuple[float, ...]) -> Float[Array, "rows temperatures"]:
    """Return log Z_T = logsumexp(f / T) for each T."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # The barrier gives each sum its own pass: XLA's single loop for several sums is three times slower on a CPU.
    sums = [jax.lax.optimization_barrier(jnp.sum(jnp.exp((logits - largest) / temperature), axis=-1)) for temperature in temperatures]
    return jnp.stack([jnp.log(total) + largest[:, 0] / temperature for total, temperature in zip(sums, temperatures, strict=True)], axis=-1)


class Residuals(NamedTuple):
    """The arrays of `DatastoreRows` that describe residuals."""

    residual_ids: UInt[Array, "rows others"]
    quantized_residuals: UInt8[Array, "rows others"]
    target_log_probability: Float16[Array, " rows"]
    dropped: Float16[Array, " rows"]
    log_power_sums: Float16[Array, "rows temperatures"]


def residuals(
    logits: Float[Array, "rows vocab"],
    targets: Int[Array, " rows"],
    log_z: Float[Array, "rows temperatures"],
    temperatures: tuple[float, ...],
    entries: int,
) -> Residuals:
    """Return residuals with `entries` entries at T = 1. `log_z` is the log-partition at each temperature; 1.0 must be one of them."""
    unit = temperatures.index(1.0)
    ids, p, dropped = sparse_residual(logits, targets, log_z[:, unit], entries)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return Residuals(
        residual_ids=ids.astype(token_dtype(logits.shape[1])),
        quantized_residuals=quantize_probabilities(p),
        target_log_probability=(target_logits - log_z[:, unit]).astype(jnp.float16),
        dropped=(dropped * (1 + 2**-10) + 2**-24).astype(jnp.float16),  # rounded up, because it is an upper bound
        log_power_sums=(log_z - log_z[:, unit, None] / jnp.array(temperatures, jnp.float32)).astype(jnp.float16),
    )


def residual_head(model: Model, entries: int, temperatures: tuple[float, ...]) -> Head:
    """Return the head that computes datastore rows with `entries` residual entries at T = 1.

    The temperatures, which must include 1.0, are those of `log_power_sums`, from which the residuals at other temperatures follow.
    """

    def head(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> DatastoreRows:
        logits = model.logits(parameters, hidden)
        found = residuals(logits, targets, log_partition(logits, temperatures), temperatures, entries)
        quantized_keys, scales = quantize_keys(keys)
        tokens = targets.astype(token_dtype(model.config.vocab_size))
        return DatastoreRows(quantized_keys=quantized_keys, key_scales=scales, tokens=tokens, **found._asdict())

    return head


class QueryRows(NamedTuple):
    """The keys and the last hidden states of query tokens."""

    keys: Float[Array, "rows emb"]
    hidden: Float[Array, "rows emb"]


def query_head(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> QueryRows:
    """Return keys and hidden states in float32. The evaluation computes logits from the hidden states."""
    return QueryRows(keys.astype(jnp.float32), hidden.astype(jnp.float32))


class Encoder:
    """Apply the model to the windows of documents, and a head to the emitted tokens. Project the keys if a projection is given."""

    def __init__(self, model: Model, spec: WindowSpec, head: Head, projection: Float[np.ndarray, "emb dimensions"] | None = None) -> None:
        self.spec, self.parameters = spec, model.parameters
        self._hidden = jax.jit(model.hidden)

        def select(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array, places: Array) -> Any:
            flat_keys, flat_hidden = (x.reshape(-1, x.shape[-1]) for x in (keys, hidden))
            some_keys = flat_keys[places] if projection is None else flat_keys[places] @ projection
            return head(parameters, some_keys, flat_hidden[places], targets.reshape(-1)[places])

        self._head = jax.jit(select)

    def __call__(
        self, documents: list[Int[np.ndarray, "_"]], counts: Counter[str] | None = None
    ) -> Iterator[tuple[Int[np.ndarray, " rows"], Any]]:
        """Yield (positions, head's output) for batches that contain each token of the documents once, in no fixed order.

        `counts` is increased by the number of windows, of window tokens (including context) and of computed tokens (including padding).
        """
        for batch in window_rows(documents, self.spec, ROWS):
            if counts is not None:
                counts["windows"] += int(batch.segment_ids.max(axis=1).sum())
                counts["window_tokens"] += int((batch.segment_ids > 0).sum())
                counts["computed_tokens"] += batch.tokens.size
            inputs = shift_right(batch.tokens, batch.segment_ids)
            keys, hidden = self._hidden(self.parameters, inputs, batch.segment_ids)
            places = np.flatnonzero(batch.positions >= 0)
            for start in range(0, len(places), TOKENS):
                some = places[start : start + TOKENS]
                padded = np.pad(some, (0, TOKENS - len(some)))
                output = jax.device_get(self._head(self.parameters, keys, hidden, batch.tokens, padded))
                yield batch.positions.reshape(-1)[some], jax.tree.map(itemgetter(slice(len(some))), output)
