"""Count right predictions, predict, and compute probabilities for many settings, block by block, from cached neighbors.

Two formulas run at every (k, sigma, T, lambda). ResMem is p_T + lambda r_kNN, and DeepNet at lambda = 0. kNN-LM is (1 - lambda) p_T +
lambda p_kNN, and kNN alone at lambda = 1. Formulas on the simplex (`calibrated`, `adaptive`) also give probabilities.
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
from resmem_lm.evaluation.calibrated import SimplexFormula, is_first, on_simplex, target_probability
from resmem_lm.evaluation.candidates import Block, Candidates, Formula, Neighbors, Scores, Setting, best, quantized_at, score
from resmem_lm.evaluation.neighbors import Queries
from resmem_lm.memory.datastore import Datastore
from resmem_lm.workdir.progress import progress

with epy.lazy_imports():
    import grain

BLOCK = 256  # queries
T = TypeVar("T", bound=Any)


class Weightings(NamedTuple):
    """Formulas, each with its k and sigma."""

    ks: Int[Array, " weightings"]
    sigmas: Float[Array, " weightings"]
    is_resmem: Bool[Array, " weightings"]  # the others are kNN-LM

    @classmethod
    def of(cls, triples: list[tuple[Formula, int, float]]) -> "Weightings":
        """Make the arrays from triples of formula, k and sigma."""
        formulas, ks, sigmas = zip(*triples, strict=True)
        is_resmem = jnp.array([formula == "resmem" for formula in formulas])
        return cls(jnp.array(ks, jnp.int32), jnp.array(sigmas, jnp.float32), is_resmem)


class Temperature(NamedTuple):
    """A temperature and its index among the datastore's temperatures."""

    value: Float[Array, ""]
    position: Int[Array, ""]


class Predictions(NamedTuple):
    """A method's prediction for every token, whether it is certified, its probability, and the true token's probability."""

    predictions: Int[np.ndarray, " queries"]
    certified: Bool[np.ndarray, " queries"]
    confidence: Float[np.ndarray, " queries"]
    target_probability: Float[np.ndarray, " queries"]


def totals(
    scores: Scores, is_resmem: Bool[Array, " weightings"], lambdas: Float[Array, " weightings"]
) -> Float[Array, "weightings queries candidates"]:
    """Return the scores of ResMem or kNN-LM. At lambda = 1, kNN-LM's are exactly p_kNN: rounding must not break its many ties."""
    lambda_ = lambdas[:, None, None]
    resmem, knn_lm = scores.base + lambda_ * scores.residual, (1 - lambda_) * scores.base + lambda_ * scores.knn
    return jnp.where(is_resmem[:, None, None], resmem, knn_lm)


@jax.jit
def _count_correct(
    block: Block, weightings: Weightings, lambdas: Float[Array, " lambdas"], temperature: Temperature
) -> Int[Array, "weightings lambdas"]:
    """Count right predictions for every lambda at once: scores are linear in lambda, so the target wins on one closed interval."""
    candidates = block.candidates
    scores = score(candidates, block.neighbors, weightings.ks, weightings.sigmas, *temperature)
    slopes = jnp.where(weightings.is_resmem[:, None, None], scores.residual, scores.knn - scores.base)
    is_target = candidates.ids == block.targets[:, None]
    # A target that occurs twice must not lose to itself by rounding.
    lead = jnp.where(is_target, 0, _at_target(scores.base, is_target) - scores.base)
    slope = jnp.where(is_target, 0, _at_target(slopes, is_target) - slopes)
    crossing = -lead / jnp.where(slope == 0, 1.0, slope)
    low = jnp.max(jnp.where(slope > 0, crossing, -jnp.inf), axis=-1)
    high = jnp.min(jnp.where(slope < 0, crossing, jnp.inf), axis=-1)
    possible = jnp.any(is_target, axis=-1) & jnp.all((slope != 0) | (lead >= 0), axis=-1)
    within = (low[:, None] <= lambdas[:, None]) & (lambdas[:, None] <= high[:, None])
    return jnp.sum(within & possible[:, None], axis=-1)


def _at_target(values: Float[Array, "... candidates"], is_target: Bool[Array, "queries candidates"]) -> Float[Array, "... 1"]:
    return jnp.max(jnp.where(is_target, values, -jnp.inf), axis=-1, keepdims=True)


@jax.jit
def _count_correct_knn(block: Block, weightings: Weightings) -> Int[Array, " weightings"]:
    """Count right predictions of p_kNN, which has no temperature. Ties go to the lowest id, as in `_predict`."""
    knn = score(block.candidates, block.neighbors, weightings.ks, weightings.sigmas, 1.0, 0).knn
    return jnp.sum(best(knn, block.candidates.ids)[0] == block.targets, axis=-1)


@jax.jit
def _predict(
    block: Block, weightings: Weightings, lambdas: Float[Array, " weightings"], temperature: Temperature
) -> tuple[Int[Array, "weightings queries"], Bool[Array, "weightings queries"]]:
    ks, sigmas, is_resmem = weightings
    scores = score(block.candidates, block.neighbors, ks, sigmas, *temperature)
    winners, top = best(totals(scores, is_resmem, lambdas), block.candidates.ids)
    bound = jnp.where(is_resmem[:, None], scores.bound, (1 - lambdas[:, None]) * scores.bound)
    return winners, top >= bound  # certified: no token outside of the candidates scores more


@functools.partial(jax.jit, static_argnames="formulas")
def _log_losses(
    block: Block,
    sigmas: Float[Array, " sigmas"],
    lambdas: Float[Array, " lambdas"],
    temperature: Temperature,
    *,
    formulas: tuple[SimplexFormula, ...],
) -> Float[Array, "formulas lambdas sigmas"]:
    candidates, neighbors, targets, target_base = block
    ks = jnp.full(len(sigmas), neighbors.distances.shape[1])
    scores = score(candidates, neighbors, ks, sigmas, *temperature)
    first, base = is_first(candidates.ids), target_base[:, temperature.position]

    def losses(formula: SimplexFormula, lambda_: Float[Array, ""]) -> Float[Array, " sigmas"]:
        q = on_simplex(formula, scores.base, scores.residual, scores.knn, first, lambda_)
        log_p = jnp.log(target_probability(q, candidates.ids == targets[:, None], base) + 1e-12)
        return -jnp.sum(jnp.where(targets >= 0, log_p, 0), axis=-1)

    return jnp.stack([jax.lax.map(functools.partial(losses, formula), lambdas) for formula in formulas])


@functools.partial(jax.jit, static_argnames="formula")
def _predict_on_simplex(
    block: Block, weighting: Weightings, lambda_: Float[Array, ""], temperature: Temperature, *, formula: SimplexFormula
) -> Predictions:
    candidates, neighbors, targets, target_base = block
    scores = score(candidates, neighbors, weighting.ks, weighting.sigmas, *temperature)
    q = on_simplex(formula, scores.base, scores.residual[0], scores.knn[0], is_first(candidates.ids), lambda_)
    winners, top = best(q.candidates, candidates.ids)
    probability = target_probability(q, candidates.ids == targets[:, None], target_base[:, temperature.position])
    return Predictions(winners, top >= q.other * scores.bound, top, probability)  # type: ignore[arg-type]


_gate_features = jax.jit(gate_features, static_argnames="unit")


@functools.partial(jax.jit, static_argnames="unit")
def _predict_adaptive(gate: Gate, block: Block, sigma: Float[Array, ""], *, unit: int) -> Predictions:
    candidates, neighbors = block.candidates, block.neighbors
    some = gate_features(block, sigma, unit)
    q, k = distribution(gate, some), neighbors.tokens.shape[1]
    log_z = candidates.log_partition[:, unit]
    own = jnp.exp(candidates.logits[:, :-k] - log_z[:, None])
    # A token that is both DeepNet's candidate and a neighbor's counts once, as the neighbor's.
    held = jnp.any((candidates.ids[:, :-k, None] == neighbors.tokens[:, None, :]) & some.counted[:, None, :], axis=-1)
    probabilities = jnp.concatenate([jnp.where(held, 0, q.other[:, None] * own), jnp.where(some.counted, q.candidates, 0)], axis=1)
    winners, top = best(probabilities, candidates.ids)
    sure = top >= q.other * jnp.exp(candidates.bound - log_z)
    return Predictions(winners, sure, top, target_probability(q, some.target, some.target_base))  # type: ignore[arg-type]


def _trimmed(arrays: T, some: slice) -> T:
    """Remove a block's padding."""
    return type(arrays)(*(np.asarray(array)[: some.stop - some.start] for array in arrays))


def _joined(parts: list[T]) -> T:
    """Concatenate the arrays of all blocks."""
    return type(parts[0])(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class SplitScorer:
    """Read a split's cached neighbors and residuals block by block. `entries` limits the entries per row, the row's own token included."""

    def __init__(self, name: str, queries: Queries, datastore: Datastore, *, entries: int | None = None) -> None:
        self.name, self.queries, self.datastore = name, queries, datastore
        self.others = None if entries is None else entries - 1  # besides the token's own
        self.temperatures = list(datastore.binding.temperatures)
        self.unit_number = self.temperatures.index(1.0)

    def blocks(self, name: str, *, every: int = 1) -> Iterator[tuple[slice, Block]]:
        """Yield blocks of BLOCK queries with their slices of the split: all, or one in `every`. The first query pads the last block."""
        count = len(self.queries.tokens)
        starts = grain.MapDataset.range(0, count, BLOCK * every)
        # Other threads fetch rows while a block is scored.
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        with progress(f"{name} {self.name}", total=count, unit="tokens") as bar:
            for some, block in starts.map(self._load).to_iter_dataset(ahead):
                yield some, block
                bar.update(some.stop)

    def _load(self, start: int) -> tuple[slice, Block]:
        q, some = self.queries, slice(start, min(start + BLOCK, len(self.queries.tokens)))
        padding = BLOCK - (some.stop - start)
        padded = np.concatenate([np.arange(start, some.stop), np.full(padding, start)])
        rows = np.maximum(q.rows[padded], 0)
        arrays = [array[padded] for array in (q.candidate_ids, q.candidate_logits, q.bound, q.log_partition)]
        ids, quantized = (self.datastore.take(name, rows)[..., : self.others] for name in ("residual_ids", "quantized_residuals"))
        neighbors = Neighbors(
            jnp.asarray(q.distances[padded]),
            jnp.asarray(q.neighbor_tokens[padded].astype(np.int32)),
            jnp.asarray(quantized_at(arrays[0], ids, quantized)),
            jnp.asarray(self.datastore.take("target_log_probability", rows).astype(np.float32)),
            jnp.asarray(self.datastore.take("log_power_sums", rows).astype(np.float32)),
        )
        targets = jnp.asarray(np.pad(q.tokens[some].astype(np.int32), (0, padding), constant_values=-1))
        target_logits = q.target_logits[padded].astype(np.float64)[:, None] / np.array(self.temperatures)
        target_base = np.exp(target_logits - arrays[-1])
        return some, Block(Candidates(*map(jnp.asarray, arrays)), neighbors, targets, jnp.asarray(target_base.astype(np.float32)))

    def _temperature(self, value: float) -> Temperature:
        return Temperature(jnp.float32(value), jnp.int32(self.temperatures.index(value)))

    def count_correct(
        self,
        ks: list[int],
        sigmas: list[float],
        temperatures: list[float],
        lambdas: dict[Formula, list[float]],
        among: Bool[np.ndarray, " queries"] | None = None,
    ) -> dict[Setting, int]:
        """Count right predictions for every combination of hyperparameters, over all tokens or those that `among` marks."""
        triples = [(formula, k, sigma) for formula in lambdas for k in ks for sigma in sigmas]
        weightings = Weightings.of(triples)
        every_lambda = sorted({lambda_ for some in lambdas.values() for lambda_ in some})
        lambda_array = np.array(every_lambda, np.float32)
        counts = np.zeros((len(temperatures), len(triples), len(every_lambda)), np.int64)
        alone = [number for number, triple in enumerate(triples) if triple[0] == "knnlm" and 1 in lambdas["knnlm"]]
        knn = Weightings(*(array[np.array(alone, int)] for array in weightings))
        knn_counts = np.zeros(len(alone), np.int64)
        for some, block in self.blocks("tune"):
            if among is not None:
                counted = np.pad(among[some], (0, BLOCK - (some.stop - some.start)))
                block = block._replace(targets=jnp.where(counted, block.targets, -1))
            for number, temperature in enumerate(temperatures):
                counts[number] += _count_correct(block, weightings, lambda_array, self._temperature(temperature))
            if alone:
                knn_counts += _count_correct_knn(block, knn)
        if alone:
            counts[:, alone, every_lambda.index(1)] = knn_counts
        return {
            Setting(formula, k, sigma, temperature, lambda_): int(counts[t, p, every_lambda.index(lambda_)])
            for t, temperature in enumerate(temperatures)
            for p, (formula, k, sigma) in enumerate(triples)
            for lambda_ in lambdas[formula]
        }

    def predict(self, settings: list[Setting]) -> dict[Setting, tuple[Int[np.ndarray, " queries"], Bool[np.ndarray, " queries"]]]:
        """Return each setting's prediction for every token, and whether it is certified."""
        count = len(self.queries.tokens)
        found = {setting: (np.empty(count, np.int32), np.empty(count, bool)) for setting in settings}
        by_temperature = itertools.groupby(sorted(settings, key=lambda s: s.temperature), key=lambda s: s.temperature)
        groups = [(self._temperature(temperature), list(group)) for temperature, group in by_temperature]
        for some, block in self.blocks("score"):
            for temperature, group in groups:
                weightings = Weightings.of([(s.formula, s.k, s.sigma) for s in group])
                arrays = _predict(block, weightings, np.array([s.lambda_ for s in group], np.float32), temperature)
                for setting, winners, sure in zip(group, *map(np.asarray, arrays), strict=True):
                    found[setting][0][some] = winners[: some.stop - some.start]
                    found[setting][1][some] = sure[: some.stop - some.start]
        return found

    def log_losses(
        self, sigmas: list[float], temperatures: list[float], lambdas: dict[SimplexFormula, list[float]]
    ) -> dict[Setting, float]:
        """Sum the log losses of all tokens for every combination of these hyperparameters, with all neighbors."""
        k, every_lambda = self.queries.rows.shape[1], sorted({lambda_ for some in lambdas.values() for lambda_ in some})
        arrays = np.array(sigmas, np.float32), np.array(every_lambda, np.float32)
        losses = np.zeros((len(temperatures), len(lambdas), len(every_lambda), len(sigmas)))
        for _, block in self.blocks("calibrate"):
            for number, temperature in enumerate(temperatures):
                losses[number] += _log_losses(block, *arrays, self._temperature(temperature), formulas=tuple(lambdas))
        return {
            Setting(formula, k, sigma, temperature, lambda_): float(losses[t, f, every_lambda.index(lambda_), s])
            for t, temperature in enumerate(temperatures)
            for f, formula in enumerate(lambdas)
            for lambda_ in lambdas[formula]
            for s, sigma in enumerate(sigmas)
        }

    def distributions(self, settings: list[Setting]) -> dict[Setting, Predictions]:
        """Return each setting's predictions with probabilities. A "resmem" setting has probabilities only at lambda = 0."""
        parts: dict[Setting, list[Predictions]] = {setting: [] for setting in settings}
        for some, block in self.blocks("score"):
            for setting, predictions in parts.items():
                weighting = Weightings.of([(setting.formula, setting.k, setting.sigma)])
                formula = "boosted" if setting.formula == "resmem" else setting.formula
                temperature = self._temperature(setting.temperature)
                found = _predict_on_simplex(block, weighting, np.float32(setting.lambda_), temperature, formula=formula)
                predictions.append(_trimmed(found, some))
        return {setting: _joined(predictions) for setting, predictions in parts.items()}

    def gate_features(self, sigma: float, most: int) -> tuple[GateFeatures, Int[np.ndarray, " some"]]:
        """Return the adaptive gate's features of about `most` tokens, in evenly spaced blocks, and their `groups`."""
        every, every_group = -(-len(self.queries.tokens) // most), self.queries.groups
        parts, groups = [], []
        for some, block in self.blocks("adapt", every=every):
            parts.append(_trimmed(_gate_features(block, sigma, unit=self.unit_number), some))
            groups.append(every_group[some])
        return _joined(parts), np.concatenate(groups)

    def adaptive(self, gate: Gate, sigma: float) -> Predictions:
        """Return Adaptive ResMem's predictions."""
        blocks = self.blocks("adapt")
        return _joined([_trimmed(_predict_adaptive(gate, block, sigma, unit=self.unit_number), some) for some, block in blocks])
