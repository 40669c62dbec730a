"""Count right predictions, predict, and compute probabilities for many settings, block by block, from cached neighbors.

Two formulas run at every (k, sigma, T, lambda). ResMem is p_T + lambda r_kNN, and DeepNet at lambda = 0. kNN-LM is (1 - lambda) p_T +
lambda p_kNN, and kNN alone at lambda = 1. Formulas on the simplex (`calibrated`, `adaptive`) also give probabilities.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
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
Temperature = tuple[Float[Array, ""], Int[Array, ""]]  # T, and its index among the datastore's temperatures


class Weightings(NamedTuple):
    """Settings at the same temperature, as arrays."""

    ks: Int[Array, " weightings"]
    sigmas: Float[Array, " weightings"]
    lambdas: Float[Array, " weightings"]
    is_resmem: Bool[Array, " weightings"]  # the others are kNN-LM

    @classmethod
    def of(cls, settings: list[Setting]) -> "Weightings":
        """Make the arrays. The settings' temperatures are ignored."""
        formulas, ks, sigmas, _, lambdas = zip(*settings, strict=True)
        is_resmem = jnp.array([formula == "resmem" for formula in formulas])
        return cls(jnp.array(ks, jnp.int32), jnp.array(sigmas, jnp.float32), jnp.array(lambdas, jnp.float32), is_resmem)


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
def _count_correct_knn(block: Block, weightings: Weightings) -> Int[Array, "weightings 1"]:
    """Count right predictions of p_kNN, which has no temperature. Ties go to the lowest id, as in `_predict`."""
    knn = score(block.candidates, block.neighbors, weightings.ks, weightings.sigmas, 1.0, 0).knn
    return jnp.sum(best(knn, block.candidates.ids)[0] == block.targets, axis=-1, keepdims=True)


@jax.jit
def _predict(
    block: Block, weightings: Weightings, temperature: Temperature
) -> tuple[Int[Array, "weightings queries"], Bool[Array, "weightings queries"]]:
    ks, sigmas, lambdas, is_resmem = weightings
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
    first, base = is_first(candidates.ids), target_base[:, temperature[1]]

    def losses(formula: SimplexFormula, lambda_: Float[Array, ""]) -> Float[Array, " sigmas"]:
        q = on_simplex(formula, scores.base, scores.residual, scores.knn, first, lambda_)
        log_p = jnp.log(target_probability(q, candidates.ids == targets[:, None], base) + 1e-12)
        return -jnp.sum(jnp.where(targets >= 0, log_p, 0), axis=-1)

    return jnp.stack([jax.lax.map(functools.partial(losses, formula), lambdas) for formula in formulas])


@functools.partial(jax.jit, static_argnames="formula")
def _predict_on_simplex(block: Block, weighting: Weightings, temperature: Temperature, *, formula: SimplexFormula) -> Predictions:
    candidates, neighbors, targets, target_base = block
    scores = score(candidates, neighbors, weighting.ks, weighting.sigmas, *temperature)
    q = on_simplex(formula, scores.base, scores.residual[0], scores.knn[0], is_first(candidates.ids), weighting.lambdas[0])
    winners, top = best(q.candidates, candidates.ids)
    probability = target_probability(q, candidates.ids == targets[:, None], target_base[:, temperature[1]])
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
        candidates = [array[padded] for array in (q.candidate_ids, q.candidate_logits, q.bound, q.log_partition)]
        entries = (self.datastore.take(name, rows)[..., : self.others] for name in ("residual_ids", "quantized_residuals"))
        neighbors = (
            q.distances[padded],
            q.neighbor_tokens[padded].astype(np.int32),
            quantized_at(candidates[0], *entries),
            self.datastore.take("target_log_probability", rows).astype(np.float32),
            self.datastore.take("log_power_sums", rows).astype(np.float32),
        )
        targets = np.pad(q.tokens[some].astype(np.int32), (0, padding), constant_values=-1)
        target_logits = q.target_logits[padded].astype(np.float64)[:, None] / np.array(self.temperatures)
        target_base = np.exp(target_logits - candidates[-1]).astype(np.float32)
        return some, Block(
            Candidates(*map(jnp.asarray, candidates)),
            Neighbors(*map(jnp.asarray, neighbors)),
            jnp.asarray(targets),
            jnp.asarray(target_base),
        )

    def _collect(self, name: str, compute: Callable[[Block], T], *, every: int = 1) -> T:
        """Join the arrays that `compute` returns for each of the `blocks`, without the padding."""
        total = int(self._in_blocks(every).sum())
        found: list[np.ndarray] = []
        for some, block in self.blocks(name, every=every):
            arrays, structure = jax.tree.flatten(compute(block))
            # Arrays are filled in place: for large splits, a second copy would not fit into memory.
            found = found or [np.empty((total, *array.shape[1:]), array.dtype) for array in arrays]
            start = some.start // every
            for whole, array in zip(found, arrays, strict=True):
                whole[start : start + BLOCK] = np.asarray(array)[: total - start]
        return jax.tree.unflatten(structure, found)

    def _in_blocks(self, every: int) -> Bool[np.ndarray, " queries"]:
        """Mark the queries of one block in `every`."""
        return np.arange(len(self.queries.tokens)) // BLOCK % every == 0

    def _temperature(self, value: float) -> Temperature:
        return jnp.float32(value), jnp.int32(self.temperatures.index(value))

    def count_correct(
        self,
        ks: list[int],
        sigmas: list[float],
        temperatures: list[float],
        lambdas: dict[Formula, list[float]],
        among: Bool[np.ndarray, " queries"] | None = None,
    ) -> dict[Setting, int]:
        """Count right predictions for every combination of hyperparameters, over all tokens or those that `among` marks."""
        kinds = [Setting(formula, k, sigma, 1.0, 1.0) for formula in lambdas for k in ks for sigma in sigmas]
        weightings, every_lambda = Weightings.of(kinds), sorted(set(itertools.chain(*lambdas.values())))
        lambda_array = np.array(every_lambda, np.float32)
        counts = np.zeros((len(temperatures), len(kinds), len(every_lambda)), np.int64)
        knn_counts = np.zeros((len(kinds), 1), np.int64)
        for some, block in self.blocks("tune"):
            if among is not None:
                counted = np.pad(among[some], (0, BLOCK - (some.stop - some.start)))
                block = block._replace(targets=jnp.where(counted, block.targets, -1))
            for number, temperature in enumerate(temperatures):
                counts[number] += _count_correct(block, weightings, lambda_array, self._temperature(temperature))
            knn_counts += _count_correct_knn(block, weightings)
        counts = np.where(weightings.is_resmem[:, None] | (lambda_array != 1), counts, knn_counts)
        return {
            kind._replace(temperature=temperature, lambda_=lambda_): int(counts[t, number, every_lambda.index(lambda_)])
            for t, temperature in enumerate(temperatures)
            for number, kind in enumerate(kinds)
            for lambda_ in lambdas[kind.formula]
        }

    def predict(self, settings: list[Setting]) -> dict[Setting, tuple[Int[np.ndarray, " queries"], Bool[np.ndarray, " queries"]]]:
        """Return each setting's prediction for every token, and whether it is certified."""
        temperatures = sorted({setting.temperature for setting in settings})
        by_temperature = {value: [setting for setting in settings if setting.temperature == value] for value in temperatures}

        def compute(block: Block) -> dict[Setting, Any]:
            found: dict[Setting, Any] = {}
            for temperature, some in by_temperature.items():
                arrays = map(np.asarray, _predict(block, Weightings.of(some), self._temperature(temperature)))
                found |= zip(some, zip(*arrays, strict=True), strict=True)
            return found

        return self._collect("score", compute)

    def log_losses(
        self, sigmas: list[float], temperatures: list[float], lambdas: dict[SimplexFormula, list[float]]
    ) -> dict[Setting, float]:
        """Sum the log losses of all tokens for every combination of these hyperparameters, with all neighbors."""
        k, every_lambda = self.queries.rows.shape[1], sorted(set(itertools.chain(*lambdas.values())))
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

        def compute(block: Block, setting: Setting) -> Predictions:
            formula = "boosted" if setting.formula == "resmem" else setting.formula
            return _predict_on_simplex(block, Weightings.of([setting]), self._temperature(setting.temperature), formula=formula)

        return self._collect("score", lambda block: {setting: compute(block, setting) for setting in settings})

    def gate_features(self, sigma: float, most: int) -> tuple[GateFeatures, Int[np.ndarray, " some"]]:
        """Return the adaptive gate's features of about `most` tokens, in evenly spaced blocks, and their `groups`."""
        every = -(-len(self.queries.tokens) // most)
        features = self._collect("adapt", lambda block: _gate_features(block, sigma, unit=self.unit_number), every=every)
        return features, self.queries.groups[self._in_blocks(every)]

    def adaptive(self, gate: Gate, sigma: float) -> Predictions:
        """Return Adaptive ResMem's predictions."""
        return self._collect("adapt", lambda block: _predict_adaptive(gate, block, sigma, unit=self.unit_number))
