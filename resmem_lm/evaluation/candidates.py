"""Score only the few tokens that can win, so that a sweep of hyperparameters needs no pass over the vocabulary.

The candidates are the tokens of DeepNet's largest logits, the continuations of the longest exact match, the tokens of the nearest rows of
the document, and the neighbors' tokens. A row's residual is positive only at its own token. With lambda >= 0, any other token scores at
most DeepNet's probability at the next-largest logit. If the best candidate reaches this bound, the prediction is certified: the formula
over the whole vocabulary, with the residuals as stored, gives the same prediction.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Float, Int, Integer, UInt8

from resmem_lm.memory.quantization import dequantize_powers
from resmem_lm.memory.suffix_index import CONTINUATIONS
from resmem_lm.resmem import at_temperature, largest, neighbor_weights

with epy.lazy_imports():
    from resmem_lm.memory import kernels

Formula = Literal["resmem", "knnlm", "boosted", "clipped", "confident"]


class Setting(NamedTuple):
    """A formula and its hyperparameters."""

    formula: Formula
    k: int
    sigma: float
    temperature: float
    lambda_: float

    def hyperparameters(self) -> dict[str, int | float]:
        """Return the hyperparameters under their names in results.json."""
        return {"k": self.k, "sigma": self.sigma, "temperature": self.temperature, "lambda": self.lambda_}

    @classmethod
    def of(cls, formula: Formula, chosen: dict[str, Any]) -> "Setting":
        """Make a setting from the hyperparameters in results.json."""
        return cls(formula, chosen["k"], float(chosen["sigma"]), float(chosen["temperature"]), float(chosen["lambda"]))


DEEPNET = Setting("resmem", 1, 1.0, 1.0, 0.0)


class Candidates(NamedTuple):
    """For each query: the tokens that DeepNet, the exact matches, the document and the neighbors propose. A token may occur twice."""

    ids: Int[Array, "queries candidates"]
    logits: Float[Array, "queries candidates"]
    bound: Float[Array, " queries"]  # the largest logit outside of DeepNet's candidates
    log_partition: Float[Array, "queries temperatures"]


class Neighbors(NamedTuple):
    """The nearest rows of each query in the datastore or in its own document, nearest first."""

    distances: Float[Array, "queries k"]
    tokens: Int[Array, "queries k"]
    matches: UInt8[Array, "queries k"]  # the number of equal tokens before the row and the query
    quantized: UInt8[Array, "queries k candidates"]  # the row's stored probability of each candidate, or 0
    target_log_probability: Float[Array, "queries k"]
    log_power_sums: Float[Array, "queries k temperatures"]


class Exact(NamedTuple):
    """Probabilities by the counts of the datastore's tokens, and the longest match of each query (see `memory.suffix_index`)."""

    log_probability: Float[Array, "queries candidates"]
    match: Float[Array, "queries 3"]  # its length, its occurrences, and the distinct tokens that follow


class Block(NamedTuple):
    """Queries that are scored together."""

    candidates: Candidates
    neighbors: Neighbors
    document: Neighbors
    exact: Exact
    targets: Int[Array, " queries"]  # the true tokens; -1 for padding
    target_base: Float[Array, "queries temperatures"]  # DeepNet's probability of the target

    @property
    def widths(self) -> dict[str, int]:
        """Return the number of candidates that each source proposes, in their order."""
        proposed = {
            "exact": CONTINUATIONS,
            "document": self.document.tokens.shape[1],
            "neighbors": self.neighbors.tokens.shape[1],
        }
        return {"deepnet": self.candidates.ids.shape[1] - sum(proposed.values()), **proposed}


class Scores(NamedTuple):
    """DeepNet's probabilities of the candidates at one temperature, and their r_kNN and p_kNN for pairs of k and sigma."""

    base: Float[Array, "queries candidates"]
    residual: Float[Array, "weightings queries candidates"]
    knn: Float[Array, "weightings queries candidates"]
    bound: Float[Array, " queries"]


def choose_candidates(
    logits: Float[Array, "queries vocab"], proposed: Int[Array, "queries proposed"], base: int
) -> tuple[Int[Array, "queries candidates"], Float[Array, "queries candidates"], Float[Array, " queries"]]:
    """Return ids and logits of the candidates, and the largest logit below the `base` largest.

    The memory's candidates are `proposed`; where one is missing (-1), DeepNet's first candidate takes its place.
    """
    base = min(base, logits.shape[1] - 1)
    top, ids = largest(logits, base + 1)
    ids = jnp.concatenate([ids[:, :base], jnp.where(proposed < 0, ids[:, :1], proposed)], axis=1)
    return ids, jnp.take_along_axis(logits, ids, axis=1), top[:, base]


def quantized_at(
    candidates: Int[np.ndarray, "queries candidates"],
    ids: Integer[np.ndarray, "queries k others"],
    quantized: UInt8[np.ndarray, "queries k others"],
) -> UInt8[np.ndarray, "queries k candidates"]:
    """Return each row's quantized probability of each candidate, or 0. `ids` and `quantized` are the row's stored entries."""
    vocabulary = int(max(candidates.max(initial=0), ids.max(initial=0))) + 1
    found: np.ndarray = kernels.quantized_at(candidates, ids, quantized, vocabulary)
    return found


def score(
    candidates: Candidates,
    neighbors: Neighbors,
    ks: Int[Array, " weightings"],
    sigmas: Float[Array, " weightings"],
    temperature: float | Float[Array, ""],
    position: int | Int[Array, ""],
) -> Scores:
    """Return the parts of every method's score for each pair of k and sigma. `position` is T's index in the datastore."""
    is_token = neighbors.tokens[..., None] == candidates.ids[:, None, :]
    r = at_temperature(
        dequantize_powers(neighbors.quantized, temperature),
        is_token,
        neighbors.target_log_probability,
        neighbors.log_power_sums[..., position],
        temperature,
    )
    rank = jnp.arange(neighbors.distances.shape[1])
    weights = jax.vmap(lambda k, sigma: neighbor_weights(jnp.where(rank < k, neighbors.distances, jnp.inf), sigma))(ks, sigmas)
    log_z = candidates.log_partition[:, position]
    return Scores(
        base=jnp.exp(candidates.logits / temperature - log_z[:, None]),
        residual=jnp.einsum("wqk,qkc->wqc", weights, r),
        knn=jnp.einsum("wqk,qkc->wqc", weights, is_token.astype(jnp.float32)),
        bound=jnp.exp(candidates.bound / temperature - log_z),
    )


def best(
    scores: Float[Array, "*some queries candidates"], ids: Int[Array, "queries candidates"]
) -> tuple[Int[Array, "*some queries"], Float[Array, "*some queries"]]:
    """Return the winning tokens and their scores. The lowest id wins a tie, as in `resmem.predict`."""
    top = jnp.max(scores, axis=-1)
    winners = jnp.where(scores == top[..., None], ids, jnp.iinfo(ids.dtype).max)
    return jnp.min(winners, axis=-1), top
