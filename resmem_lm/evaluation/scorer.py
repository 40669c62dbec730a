"""Cached neighbors -> counts of right predictions and predictions of many settings, block by block.

Two formulas are tried at every (k, sigma, T, lambda): ResMem, p_T + lambda r_kNN, of which lambda = 0 is DeepNet; and kNN-LM,
(1 - lambda) p_T + lambda p_kNN, of which lambda = 1 is kNN alone. What is on the simplex (`resmem_lm.calibrated`, `resmem_lm.adaptive`) has
probabilities besides.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.evaluation.adaptive import Gate, GateFeatures, distribution, gate_features
from resmem_lm.evaluation.calibrated import SimplexFormula, is_first, of_target, on_simplex
from resmem_lm.evaluation.candidates import Candidates, Formula, Neighbors, Scores, Setting, best, quantized_at, score
from resmem_lm.evaluation.neighbors import Queries
from resmem_lm.memory.datastore import Datastore
from resmem_lm.workdir.progress import progress

with epy.lazy_imports():
    import grain

BLOCK = 256
T = TypeVar("T", bound=Any)


def totals(
    scores: Scores, is_resmem: Bool[Array, " weightings"], lambdas: Float[Array, " weightings"]
) -> Float[Array, "weightings queries candidates"]:
    """Either formula's scores. With lambda = 1 kNN-LM's are p_kNN to the last bit: rounding is not to break its ties, which are many."""
    lambda_ = lambdas[:, None, None]
    resmem, knn_lm = scores.base + lambda_ * scores.residual, (1 - lambda_) * scores.base + lambda_ * scores.knn
    return jnp.where(is_resmem[:, None, None], resmem, knn_lm)


@jax.jit
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
) -> Int[Array, "weightings lambdas"]:
    """Right predictions for every lambda in one pass: scores are lines in lambda, so the target wins on one interval, its ends among it."""
    scores = score(candidates, neighbors, ks, sigmas, temperature, temperature_number)
    slopes = jnp.where(is_resmem[:, None, None], scores.residual, scores.knn - scores.base)
    is_target = candidates.ids == targets[:, None]
    # A target that stands twice is not its own rival by rounding.
    lead = jnp.where(is_target, 0, _of_target(scores.base, is_target) - scores.base)
    slope = jnp.where(is_target, 0, _of_target(slopes, is_target) - slopes)
    crossing = -lead / jnp.where(slope == 0, 1.0, slope)
    low = jnp.max(jnp.where(slope > 0, crossing, -jnp.inf), axis=-1)
    high = jnp.min(jnp.where(slope < 0, crossing, jnp.inf), axis=-1)
    possible = jnp.any(is_target, axis=-1) & jnp.all((slope != 0) | (lead >= 0), axis=-1)
    within = (low[:, None] <= lambdas[:, None]) & (lambdas[:, None] <= high[:, None])
    return jnp.sum(within & possible[:, None], axis=-1)


@jax.jit
def _correct_of_knn_alone(
    candidates: Candidates,
    neighbors: Neighbors,
    targets: Int[Array, " queries"],
    ks: Int[Array, " weightings"],
    sigmas: Float[Array, " weightings"],
) -> Int[Array, " weightings"]:
    """Right predictions of p_kNN, which has many ties: they go to the lowest id as in `_predictions`. It has no temperature."""
    knn = score(candidates, neighbors, ks, sigmas, 1.0, 0).knn
    return jnp.sum(best(knn, candidates.ids)[0] == targets, axis=-1)


def _of_target(values: Float[Array, "... candidates"], is_target: Bool[Array, "queries candidates"]) -> Float[Array, "... 1"]:
    return jnp.max(jnp.where(is_target, values, -jnp.inf), axis=-1, keepdims=True)


@jax.jit
def _predictions(
    candidates: Candidates,
    neighbors: Neighbors,
    ks: Int[Array, " weightings"],
    sigmas: Float[Array, " weightings"],
    is_resmem: Bool[Array, " weightings"],
    lambdas: Float[Array, " weightings"],
    temperature: Float[Array, ""],
    temperature_number: Int[Array, ""],
) -> tuple[Int[Array, "weightings queries"], Bool[Array, "weightings queries"]]:
    scores = score(candidates, neighbors, ks, sigmas, temperature, temperature_number)
    winners, top = best(totals(scores, is_resmem, lambdas), candidates.ids)
    bound = jnp.where(is_resmem[:, None], scores.bound, (1 - lambdas[:, None]) * scores.bound)
    return winners, top >= bound  # certified: no token outside the candidates scores more


class Predictions(NamedTuple):
    """A method's prediction for every token, whether it is certified, its probability, and that of the true token."""

    predictions: Int[np.ndarray, " queries"]
    certified: Bool[np.ndarray, " queries"]
    confidence: Float[np.ndarray, " queries"]
    target_probability: Float[np.ndarray, " queries"]


def _trimmed(arrays: T, some: slice) -> T:
    """Without what a block was filled up with."""
    return type(arrays)(*(np.asarray(array)[: some.stop - some.start] for array in arrays))


def _joined(parts: list[T]) -> T:
    """The arrays of all blocks."""
    return type(parts[0])(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnames="formulas")
def _log_losses(
    candidates: Candidates,
    neighbors: Neighbors,
    targets: Int[Array, " queries"],
    target_base: Float[Array, " queries"],
    sigmas: Float[Array, " sigmas"],
    lambdas: Float[Array, " lambdas"],
    temperature: Float[Array, ""],
    temperature_number: Int[Array, ""],
    *,
    formulas: tuple[SimplexFormula, ...],
) -> Float[Array, "formulas lambdas sigmas"]:
    ks = jnp.full(len(sigmas), neighbors.distances.shape[1])
    scores = score(candidates, neighbors, ks, sigmas, temperature, temperature_number)
    first = is_first(candidates.ids)

    def losses(formula: SimplexFormula, lambda_: Float[Array, ""]) -> Float[Array, " sigmas"]:
        q = on_simplex(formula, scores.base, scores.residual, scores.knn, first, lambda_)
        log_p = jnp.log(of_target(q, candidates.ids == targets[:, None], target_base) + 1e-12)
        return -jnp.sum(jnp.where(targets >= 0, log_p, 0), axis=-1)

    return jnp.stack([jax.lax.map(functools.partial(losses, formula), lambdas) for formula in formulas])


@functools.partial(jax.jit, static_argnames="formula")
def _predict_on_simplex(
    candidates: Candidates,
    neighbors: Neighbors,
    targets: Int[Array, " queries"],
    target_base: Float[Array, " queries"],
    k: Int[Array, ""],
    sigma: Float[Array, ""],
    lambda_: Float[Array, ""],
    temperature: Float[Array, ""],
    temperature_number: Int[Array, ""],
    *,
    formula: SimplexFormula,
) -> Predictions:
    scores = score(candidates, neighbors, k[None], sigma[None], temperature, temperature_number)
    q = on_simplex(formula, scores.base, scores.residual[0], scores.knn[0], is_first(candidates.ids), lambda_)
    winners, top = best(q.candidates, candidates.ids)
    probability = of_target(q, candidates.ids == targets[:, None], target_base)
    return Predictions(winners, top >= q.other * scores.bound, top, probability)  # type: ignore[arg-type]


_gate_features = jax.jit(gate_features, static_argnames="unit_number")


@functools.partial(jax.jit, static_argnames="unit_number")
def _predict_adaptive(
    gate: Gate,
    candidates: Candidates,
    neighbors: Neighbors,
    targets: Int[Array, " queries"],
    target_base: Float[Array, " queries"],
    sigma: Float[Array, ""],
    *,
    unit_number: int,
) -> Predictions:
    some = gate_features(candidates, neighbors, targets, target_base, sigma, unit_number)
    q, k = distribution(gate, some), neighbors.tokens.shape[1]
    log_z = candidates.log_partition[:, unit_number]
    own = jnp.exp(candidates.logits[:, :-k] - log_z[:, None])
    # DeepNet's candidates that no neighbor holds; the others stand among the neighbors' tokens.
    held = jnp.any((candidates.ids[:, :-k, None] == neighbors.tokens[:, None, :]) & some.counted[:, None, :], axis=-1)
    probabilities = jnp.concatenate([jnp.where(held, 0, q.other[:, None] * own), jnp.where(some.counted, q.candidates, 0)], axis=1)
    winners, top = best(probabilities, candidates.ids)
    sure = top >= q.other * jnp.exp(candidates.bound - log_z)
    return Predictions(winners, sure, top, of_target(q, some.target, some.target_base))  # type: ignore[arg-type]


def _weightings(pairs: list[tuple[Formula, int, float]]) -> tuple[Array, Array, Array]:
    """ks, sigmas, and which of them are ResMem's."""
    formulas, ks, sigmas = zip(*pairs, strict=True)
    return jnp.array(ks, jnp.int32), jnp.array(sigmas, jnp.float32), jnp.array([formula == "resmem" for formula in formulas])


class SplitScorer:
    """A split's cached neighbors, read block by block with their residuals."""

    def __init__(self, name: str, queries: Queries, datastore: Datastore, *, entries: int | None = None) -> None:
        self.name, self.queries, self.datastore = name, queries, datastore
        self.others = None if entries is None else entries - 1  # besides the token's own
        self.temperatures = list(datastore.binding.temperatures)
        self.unit_number = self.temperatures.index(1.0)

    def blocks(self, name: str, *, every: int = 1) -> Iterator[tuple[slice, Candidates, Neighbors]]:
        """Blocks of BLOCK queries, all or one in `every`; the last repeats its first query."""
        q, count = self.queries, len(self.queries.tokens)

        def load(start: int) -> tuple[slice, Candidates, Neighbors]:
            some = slice(start, min(start + BLOCK, count))
            padded = np.concatenate([np.arange(some.start, some.stop), np.full(BLOCK - (some.stop - some.start), start)])
            rows = np.maximum(q.rows[padded], 0)
            candidates = Candidates(
                *(jnp.asarray(array[padded]) for array in (q.candidate_ids, q.candidate_logits, q.bound, q.log_partition))
            )
            ids, codes = (self.datastore.take(name, rows) for name in ("residual_ids", "quantized_residuals"))
            neighbors = Neighbors(
                jnp.asarray(q.distances[padded]),
                jnp.asarray(q.neighbor_tokens[padded].astype(np.int32)),
                jnp.asarray(quantized_at(q.candidate_ids[padded], ids[..., : self.others], codes[..., : self.others])),
                jnp.asarray(self.datastore.take("target_log_probability", rows).astype(np.float32)),
                jnp.asarray(self.datastore.take("log_power_sums", rows).astype(np.float32)),
            )
            return some, candidates, neighbors

        # Rows are fetched by other threads while the last block is scored.
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        with progress(f"{name} {self.name}", total=count, unit="tokens") as bar:
            for block in grain.MapDataset.range(0, count, BLOCK * every).map(load).to_iter_dataset(ahead):
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
        alone = [number for number, pair in enumerate(pairs) if pair[0] == "knnlm" and 1 in lambdas["knnlm"]]
        of_alone = [array[np.array(alone, int)] for array in weightings[:2]]
        alone_counts = np.zeros(len(alone), np.int64)
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
                )
            if alone:
                alone_counts += _correct_of_knn_alone(candidates, neighbors, targets, *of_alone)
        if alone:
            counts[:, alone, every_lambda.index(1)] = alone_counts
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
                )
                for setting, setting_winners, setting_sure in zip(group, np.asarray(winners), np.asarray(sure), strict=True):
                    found[setting][0][some] = setting_winners[: some.stop - some.start]
                    found[setting][1][some] = setting_sure[: some.stop - some.start]
        return found

    def log_losses(
        self, sigmas: list[float], temperatures: list[float], lambdas: dict[SimplexFormula, list[float]]
    ) -> dict[Setting, float]:
        """Sum over tokens of -log of the target's probability, for all the neighbors and every combination of these."""
        k, every_lambda = self.queries.rows.shape[1], sorted({lambda_ for some in lambdas.values() for lambda_ in some})
        losses = np.zeros((len(temperatures), len(lambdas), len(every_lambda), len(sigmas)))
        for some, candidates, neighbors in self.blocks("calibrate"):
            for number, temperature in enumerate(temperatures):
                losses[number] += _log_losses(
                    candidates,
                    neighbors,
                    *self._targets(some, temperature),
                    np.array(sigmas, np.float32),
                    np.array(every_lambda, np.float32),
                    np.float32(temperature),
                    np.int32(self.temperatures.index(temperature)),
                    formulas=tuple(lambdas),
                )
        return {
            Setting(formula, k, sigma, temperature, lambda_): float(losses[t, f, every_lambda.index(lambda_), s])
            for t, temperature in enumerate(temperatures)
            for f, formula in enumerate(lambdas)
            for lambda_ in lambdas[formula]
            for s, sigma in enumerate(sigmas)
        }

    def distributions(self, settings: list[Setting]) -> dict[Setting, Predictions]:
        """Each setting's predictions with their probabilities; "resmem" settings are not on the simplex, but for lambda = 0."""
        parts: dict[Setting, list[Predictions]] = {setting: [] for setting in settings}
        for some, candidates, neighbors in self.blocks("score"):
            for setting in parts:  # a setting may have been chosen twice
                told = _predict_on_simplex(
                    candidates,
                    neighbors,
                    *self._targets(some, setting.temperature),
                    np.int32(setting.k),
                    np.float32(setting.sigma),
                    np.float32(setting.lambda_),
                    np.float32(setting.temperature),
                    np.int32(self.temperatures.index(setting.temperature)),
                    formula="boosted" if setting.formula == "resmem" else setting.formula,
                )
                parts[setting].append(_trimmed(told, some))
        return {setting: _joined(told) for setting, told in parts.items()}

    def known(self, sigma: float, most: int) -> tuple[GateFeatures, Int[np.ndarray, " some"]]:
        """What the adaptive gate sees of at most about `most` tokens, in blocks evenly spaced, and their `groups`."""
        every = -(-len(self.queries.tokens) // most)
        groups = self.queries.groups
        parts, numbers = [], []
        for some, candidates, neighbors in self.blocks("adapt", every=every):
            parts.append(
                _trimmed(_gate_features(candidates, neighbors, *self._targets(some, 1.0), sigma, unit_number=self.unit_number), some)
            )
            numbers.append(groups[some])
        return _joined(parts), np.concatenate(numbers)

    def adaptive(self, gate: Gate, sigma: float) -> Predictions:
        """Predictions with a lambda for each token."""
        parts = [
            _trimmed(_predict_adaptive(gate, candidates, neighbors, *self._targets(some, 1.0), sigma, unit_number=self.unit_number), some)
            for some, candidates, neighbors in self.blocks("adapt")
        ]
        return _joined(parts)

    def _targets(self, some: slice, temperature: float) -> tuple[Int[np.ndarray, " block"], Float[np.ndarray, " block"]]:
        """The true tokens of a block and DeepNet's probability of each; -1 and 1 where the block is filled up."""
        q, places = self.queries, np.arange(some.start, some.stop)
        targets, base = np.full(BLOCK, -1, np.int32), np.ones(BLOCK, np.float32)
        targets[: len(places)] = q.tokens[some]
        log_z = q.log_partition[places][:, self.temperatures.index(temperature)]
        base[: len(places)] = np.exp(q.target_logits[places].astype(np.float64) / temperature - log_z)
        return targets, base
