"""Look up what each source of memory knows about a query: its neighbors, exact matches, and its own document.

The results are arrays of `resmem_lm.evaluation.neighbors.Queries`, by name.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Integer

from resmem_lm.evaluation.candidates import choose_candidates
from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.document_memory import DocumentRows, nearest_earlier
from resmem_lm.memory.encoder import TOKENS, log_partition
from resmem_lm.memory.index import Nearest
from resmem_lm.memory.matches import match_lengths
from resmem_lm.memory.suffix_index import Suffixes, find_matches
from resmem_lm.model.checkpoints import Model

Arrays = dict[str, np.ndarray]

BASE_CANDIDATES = 32  # tokens of DeepNet's largest logits
DEEPNET_ARRAYS = ("target_logits", "candidate_ids", "candidate_logits", "bound", "log_partition")
LEAST = 1e-7  # of a probability, so that its logarithm is finite


def positions_of(lengths: Int[np.ndarray, " documents"]) -> Int[np.ndarray, " tokens"]:
    """Return the position of each token in its document."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def neighbor_arrays(datastore: Datastore, nearest: Nearest, arrays: Arrays) -> Arrays:
    """Return the nearest rows of the datastore, their distances and tokens, and the lengths of their matches with the query."""
    rows, distances = nearest
    positions = positions_of(arrays["document_lengths"])
    matches = match_lengths(rows, lambda some: datastore.take("tokens", some), arrays["tokens"], positions)
    return {
        "rows": rows,
        "distances": distances,
        "neighbor_tokens": datastore.take("tokens", np.maximum(rows, 0)),
        "matches": matches,
    }


def document_arrays(arrays: Arrays, k: int) -> Arrays:
    """Return the nearest earlier rows of each query's document, and the query's own row for later queries."""
    back, distances = nearest_earlier(arrays["keys"], arrays["document_lengths"], k)
    rows = np.where(back > 0, np.arange(len(back))[:, None] - back, -1)
    matches = match_lengths(rows, lambda some: arrays["tokens"][some], arrays["tokens"], positions_of(arrays["document_lengths"]))
    own = {name: arrays[name] for name in DocumentRows._fields[2:]}
    return {"document_back": back, "document_distances": distances, "document_matches": matches} | own


def proposed_tokens(
    arrays: Arrays, neighbor_tokens: Integer[np.ndarray, "queries k"], continuations: Int[np.ndarray, "queries exact"]
) -> Int[np.ndarray, "queries proposed"]:
    """Return the candidates of the exact matches, of the document and of the neighbors, in this order; -1 where one is missing."""
    back = arrays["document_back"]
    document = np.where(back > 0, arrays["tokens"][np.arange(len(back))[:, None] - back], -1)
    return np.concatenate([continuations, document, neighbor_tokens], axis=1).astype(np.int32)


# The model's method is a static argument and compares equal for the same model, so JAX compiles once per model.
@functools.partial(jax.jit, static_argnames=("logits_of", "temperatures"))
def _outputs(
    parameters: dict[str, Any],
    hidden: Array,
    targets: Array,
    tokens: Array,
    *,
    logits_of: Callable[[dict[str, Any], Array], Array],
    temperatures: tuple[float, ...],
) -> tuple[Array, ...]:
    logits = logits_of(parameters, hidden)
    target_logits = jax.numpy.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return target_logits, *choose_candidates(logits, tokens, BASE_CANDIDATES), log_partition(logits, temperatures)


def deepnet_arrays(model: Model, temperatures: tuple[float, ...], arrays: Arrays, proposed: Int[np.ndarray, "queries proposed"]) -> Arrays:
    """Return DeepNet's logits of the true token and of the candidates, from the last hidden states. The memory's are `proposed`."""
    targets = arrays["tokens"]
    blocks = []
    for start in range(0, max(1, len(targets)), TOKENS):  # without queries, one block gives the arrays' widths
        count = min(TOKENS, len(targets) - start)
        some = [
            np.pad(array[start : start + count], [(0, TOKENS - count)] + [(0, 0)] * (array.ndim - 1))
            for array in (arrays["hidden"], targets, proposed)
        ]
        parts = _outputs(model.parameters, *some, logits_of=model.logits, temperatures=temperatures)
        blocks.append([np.asarray(part)[:count] for part in parts])
    return {name: np.concatenate(parts) for name, parts in zip(DEEPNET_ARRAYS, zip(*blocks, strict=True), strict=True)}


def memory_arrays(model: Model, datastore: Datastore, suffixes: list[Suffixes], nearest: Nearest, arrays: Arrays) -> Arrays:
    """Return what the memory knows about each query: `neighbor_arrays`, `deepnet_arrays`, and the probabilities by exact matches.

    `arrays` are the encoded queries and their `document_arrays`.
    """
    found = neighbor_arrays(datastore, nearest, arrays)
    matches = find_matches(suffixes, arrays["tokens"], positions_of(arrays["document_lengths"]), model.config.vocab_size)
    temperatures = datastore.binding.temperatures
    found |= deepnet_arrays(model, temperatures, arrays, proposed_tokens(arrays, found["neighbor_tokens"], matches.continuations()))
    log_z = found["log_partition"][:, temperatures.index(1.0), None]
    smoothed, longest = matches.smooth(found["candidate_ids"], np.exp(found["candidate_logits"] - log_z))
    log_probability = np.log(np.maximum(smoothed, LEAST)).astype(np.float16)
    return found | {"exact_log_probability": log_probability, "exact_match": longest}
