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
from resmem_lm.memory.document_memory import nearest_earlier
from resmem_lm.memory.encoder import TOKENS, log_partition, residuals
from resmem_lm.memory.index import Nearest
from resmem_lm.memory.matches import match_lengths
from resmem_lm.memory.suffix_index import Suffixes, find_matches
from resmem_lm.model.checkpoints import Model

Arrays = dict[str, np.ndarray]

BASE_CANDIDATES = 32  # tokens of DeepNet's largest logits
RESIDUAL_ARRAYS = ("residual_ids", "quantized_residuals", "target_log_probability", "log_power_sums")  # of a query's own row
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
    """Return the k nearest earlier rows of each query's document, their distances, and the lengths of their matches with the query."""
    back, distances = nearest_earlier(arrays["keys"], arrays["document_lengths"], k)
    rows = np.where(back > 0, np.arange(len(back))[:, None] - back, -1)
    matches = match_lengths(rows, lambda some: arrays["tokens"][some], arrays["tokens"], positions_of(arrays["document_lengths"]))
    return {"document_back": back, "document_distances": distances, "document_matches": matches}


def proposed_tokens(
    arrays: Arrays, neighbor_tokens: Integer[np.ndarray, "queries k"], continuations: Int[np.ndarray, "queries exact"]
) -> Int[np.ndarray, "queries proposed"]:
    """Return the candidates of the exact matches, of the document and of the neighbors, in this order; -1 where one is missing."""
    back = arrays["document_back"]
    document = np.where(back > 0, arrays["tokens"][np.arange(len(back))[:, None] - back], -1)
    return np.concatenate([continuations, document, neighbor_tokens], axis=1).astype(np.int32)


# The model's method is a static argument and compares equal for the same model, so JAX compiles once per model.
@functools.partial(jax.jit, static_argnames=("logits_of", "temperatures", "entries"))
def _outputs(
    parameters: dict[str, Any],
    hidden: Array,
    targets: Array,
    tokens: Array,
    *,
    logits_of: Callable[[dict[str, Any], Array], Array],
    temperatures: tuple[float, ...],
    entries: int,
) -> dict[str, Array]:
    """Return `deepnet_arrays` of a block. One computation of the logits serves the candidates and the queries' residuals."""
    logits = logits_of(parameters, hidden)
    log_z = log_partition(logits, temperatures)
    ids, candidate_logits, bound = choose_candidates(logits, tokens, BASE_CANDIDATES)
    own = residuals(logits, targets, log_z, temperatures, entries)._asdict()
    return {
        "target_logits": jax.numpy.take_along_axis(logits, targets[:, None], axis=1)[:, 0],
        "candidate_ids": ids,
        "candidate_logits": candidate_logits,
        "bound": bound,
        "log_partition": log_z,
        **{name: own[name] for name in RESIDUAL_ARRAYS},
    }


def deepnet_arrays(
    model: Model, temperatures: tuple[float, ...], entries: int, arrays: Arrays, proposed: Int[np.ndarray, "queries proposed"]
) -> Arrays:
    """Return DeepNet's logits of the true token and of the candidates, and the residual of the query, from the last hidden states.

    The memory's candidates are `proposed`. A residual has `entries` entries.
    """
    targets = arrays["tokens"]
    blocks = []
    for start in range(0, max(1, len(targets)), TOKENS):  # without queries, one block gives the arrays' widths
        count = min(TOKENS, len(targets) - start)
        some = [
            np.pad(array[start : start + count], [(0, TOKENS - count)] + [(0, 0)] * (array.ndim - 1))
            for array in (arrays["hidden"], targets, proposed)
        ]
        parts = _outputs(model.parameters, *some, logits_of=model.logits, temperatures=temperatures, entries=entries)
        blocks.append({name: np.asarray(part)[:count] for name, part in parts.items()})
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def memory_arrays(model: Model, datastore: Datastore, suffixes: list[Suffixes], nearest: Nearest, arrays: Arrays) -> Arrays:
    """Return what the memory knows about each query: `neighbor_arrays`, `deepnet_arrays`, and the probabilities by exact matches.

    `arrays` are the encoded queries and their `document_arrays`. Without rows of the document, the queries' own residuals are not needed,
    and only their tokens' entries are stored.
    """
    found = neighbor_arrays(datastore, nearest, arrays)
    matches = find_matches(suffixes, arrays["tokens"], positions_of(arrays["document_lengths"]), model.config.vocab_size)
    temperatures = datastore.binding.temperatures
    entries = datastore.binding.entries if arrays["document_back"].shape[1] else 1
    proposed = proposed_tokens(arrays, found["neighbor_tokens"], matches.continuations())
    found |= deepnet_arrays(model, temperatures, entries, arrays, proposed)
    log_z = found["log_partition"][:, temperatures.index(1.0), None]
    smoothed, longest = matches.smooth(found["candidate_ids"], np.exp(found["candidate_logits"] - log_z))
    log_probability = np.log(np.maximum(smoothed, LEAST)).astype(np.float16)
    return found | {"exact_log_probability": log_probability, "exact_match": longest}
