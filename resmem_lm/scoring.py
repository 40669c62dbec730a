"""Cached neighbours -> counts of right predictions and predictions of many settings, block by block.

Every method here is one of two formulas at some (k, sigma, T, lambda): ResMem, p_T + lambda r_kNN, of which lambda = 0 is DeepNet;
and kNN-LM, (1 - lambda) p_T + lambda p_kNN, of which lambda = 1 is kNN alone.
"""

import functools
import itertools
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.candidates import Candidates, Formula, Neighbors, Scores, Setting, best, residuals_at, score
from resmem_lm.datastore import Datastore
from resmem_lm.progress import progress
from resmem_lm.resmem import neighbor_weights
from resmem_lm.search import Queries

BLOCK = 256
PROBABILITY_BLOCK = 2**16


def directions(scores: Scores, is_resmem: Bool[Array, " weightings"]) -> Float[Array, "weightings queries candidates"]:
    """Both formulas are lines in lambda, base + lambda * direction: r_kNN for ResMem, p_kNN - p for kNN-LM."""
    return jnp.where(is_resmem[:, None, None], scores.residual, scores.knn - scores.base)


@functools.partial(jax.jit, static_argnames="unit_number")
def _correct_counts(
    candidates: Candidates,
    neighbors: Neighbors,
    targets: Int[Array, " queries"],
    ks: Int[Array, " weightings"],
    sigmas: Float[Array, " weightings"],
    is_resmem: Bool[Array, " weightings"],
    lambdas: Float[Array, " lambdas"],
    temperature: Float[Array, ""],
    temperature_number: Int[Array, ""],
    *,
    unit_number: int,
) -> Int[Array, "weightings lambdas"]:
    """Right predictions for every lambda in one pass: scores are lines in lambda, so the target wins on one interval."""
    scores = score(candidates, neighbors, ks, sigmas, temperature, temperature_number, unit_number)
    slopes, is_target = directions(scores, is_resmem), candidates.ids == targets[:, None]
    lead = _of_target(scores.base, is_target) - scores.base
    slope = _of_target(slopes, is_target) - slopes
    crossing = -lead / jnp.where(slope == 0, 1.0, slope)
    low = jnp.max(jnp.where(slope > 0, crossing, -jnp.inf), axis=-1)
    high = jnp.min(jnp.where(slope < 0, crossing, jnp.inf), axis=-1)
    possible = jnp.any(is_target, axis=-1) & jnp.all((slope != 0) | (lead >= 0), axis=-1)
    within = (low[:, None] <= lambdas[:, None]) & (lambdas[:, None] <= high[:, None])
    return jnp.sum(within & possible[:, None], axis=-1)


def _of_target(values: Float[Array, "... candidates"], is_target: Bool[Array, "queries candidates"]) -> Float[Array, "... 1"]:
    return jnp.max(jnp.where(is_target, values, -jnp.inf), axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames="unit_number")
def _predictions(
    candidates: Candidates,
    neighbors: Neighbors,
    ks: Int[Array, " weightings"],
    sigmas: Float[Array, " weightings"],
    is_resmem: Bool[Array, " weightings"],
    lambdas: Float[Array, " weightings"],
    temperature: Float[Array, ""],
    temperature_number: Int[Array, ""],
    *,
    unit_number: int,
) -> tuple[Int[Array, "weightings queries"], Bool[Array, "weightings queries"]]:
    scores = score(candidates, neighbors, ks, sigmas, temperature, temperature_number, unit_number)
    winners, top = best(scores.base + lambdas[:, None, None] * directions(scores, is_resmem), candidates.ids)
    bound = jnp.where(is_resmem[:, None], scores.bound, (1 - lambdas[:, None]) * scores.bound)
    return winners, top >= bound  # certified: no token outside the candidates scores more


def _weightings(pairs: list[tuple[Formula, int, float]]) -> tuple[Array, Array, Array]:
    """ks, sigmas, and which of them are ResMem's."""
    formulas, ks, sigmas = zip(*pairs, strict=True)
    return jnp.array(ks, jnp.int32), jnp.array(sigmas, jnp.float32), jnp.array([formula == "resmem" for formula in formulas])


class SplitScorer:
    """A split's cached neighbours, read block by block with their residuals."""

    def __init__(self, name: str, queries: Queries, datastore: Datastore, *, entries: int | None = None) -> None:
        self.name, self.queries, self.datastore, self.entries = name, queries, datastore, entries  # so many of each residual; None is all
        self.temperatures = list(datastore.binding.temperatures)
        self.unit_number = self.temperatures.index(1.0)

    def blocks(self, name: str) -> Iterator[tuple[slice, Candidates, Neighbors]]:
        """Blocks of BLOCK queries; the last repeats its first query."""
        q, count = self.queries, len(self.queries.tokens)

        def load(start: int) -> tuple[slice, Candidates, Neighbors]:
            some = slice(start, min(start + BLOCK, count))
            padded = np.concatenate([np.arange(some.start, some.stop), np.full(BLOCK - (some.stop - some.start), start)])
            rows = np.maximum(q.rows[padded], 0)
            candidates = Candidates(
                *(jnp.asarray(array[padded]) for array in (q.candidate_ids, q.candidate_logits, q.bound, q.log_partition))
            )
            ids, values = (self.datastore.take(name, rows) for name in ("residual_ids", "residual_values"))
            neighbors = Neighbors(
                jnp.asarray(q.distances[padded]),
                jnp.asarray(q.neighbor_tokens[padded].astype(np.int32)),
                jnp.asarray(residuals_at(q.candidate_ids[padded], ids[..., : self.entries], values[..., : self.entries])),
                jnp.asarray(self.datastore.take("target_log_probability", rows)),
                jnp.asarray(self.datastore.take("log_partition", rows)),
            )
            return some, candidates, neighbors

        # Rows are fetched by other threads while the last block is scored.
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        with progress(f"{name} {self.name}", total=count, unit="tokens") as bar:
            for block in grain.MapDataset.range(0, count, BLOCK).map(load).to_iter_dataset(ahead):
                yield block
                bar.update(block[0].stop)

    def count_correct(
        self,
        ks: list[int],
        sigmas: list[float],
        temperatures: list[float],
        lambdas: dict[Formula, list[float]],
        among: Bool[np.ndarray, " queries"] | None = None,
    ) -> dict[Setting, int]:
        """Right predictions for every combination of hyperparameters, of all tokens or `among` some."""
        pairs = [(formula, k, sigma) for formula in lambdas for k in ks for sigma in sigmas]
        weightings = _weightings(pairs)
        every_lambda = sorted({lambda_ for some in lambdas.values() for lambda_ in some})
        counts = np.zeros((len(temperatures), len(pairs), len(every_lambda)), np.int64)
        for some, candidates, neighbors in self.blocks("tune"):
            targets = np.full(BLOCK, -1, np.int32)
            targets[: some.stop - some.start] = np.where(True if among is None else among[some], self.queries.tokens[some], -1)
            for number, temperature in enumerate(temperatures):
                counts[number] += _correct_counts(
                    candidates,
                    neighbors,
                    targets,
                    *weightings,
                    np.array(every_lambda, np.float32),
                    np.float32(temperature),
                    np.int32(self.temperatures.index(temperature)),
                    unit_number=self.unit_number,
                )
        return {
            Setting(formula, k, sigma, temperature, lambda_): int(counts[t, p, every_lambda.index(lambda_)])
            for t, temperature in enumerate(temperatures)
            for p, (formula, k, sigma) in enumerate(pairs)
            for lambda_ in lambdas[formula]
        }

    def predict(self, settings: list[Setting]) -> dict[Setting, tuple[Int[np.ndarray, " queries"], Bool[np.ndarray, " queries"]]]:
        """Each setting's prediction for every token, and whether it is certified."""
        count = len(self.queries.tokens)
        found = {setting: (np.empty(count, np.int32), np.empty(count, bool)) for setting in settings}
        by_temperature = itertools.groupby(sorted(settings, key=lambda s: s.temperature), key=lambda s: s.temperature)
        groups = [(temperature, list(group)) for temperature, group in by_temperature]
        for some, candidates, neighbors in self.blocks("score"):
            for temperature, group in groups:
                winners, sure = _predictions(
                    candidates,
                    neighbors,
                    *_weightings([(s.formula, s.k, s.sigma) for s in group]),
                    np.array([s.lambda_ for s in group], np.float32),
                    np.float32(temperature),
                    np.int32(self.temperatures.index(temperature)),
                    unit_number=self.unit_number,
                )
                for setting, setting_winners, setting_sure in zip(group, np.asarray(winners), np.asarray(sure), strict=True):
                    found[setting][0][some] = setting_winners[: some.stop - some.start]
                    found[setting][1][some] = setting_sure[: some.stop - some.start]
        return found

    def target_probability(self, setting: Setting) -> Float[np.ndarray, " queries"]:
        """What DeepNet (lambda = 0) or kNN-LM gives the true token."""
        q, number = self.queries, self.temperatures.index(setting.temperature)

        def block(some: Int[np.ndarray, " some"]) -> Float[np.ndarray, " some"]:
            base = np.exp(q.target_logits[some].astype(np.float64) / setting.temperature - q.log_partition[some][:, number])
            weights = np.asarray(neighbor_weights(jnp.asarray(q.distances[some][:, : setting.k]), setting.sigma))
            knn = np.sum(weights * (q.neighbor_tokens[some][:, : setting.k] == q.tokens[some, None]), axis=1)
            return (1 - setting.lambda_) * base + setting.lambda_ * knn

        count = len(q.tokens)
        return np.concatenate(
            [block(np.arange(start, min(start + PROBABILITY_BLOCK, count))) for start in range(0, count, PROBABILITY_BLOCK)]
        )
