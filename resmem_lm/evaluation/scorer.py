"""Count right predictions, predict, and compute probabilities for many settings, block by block, from cached neighbors.

Two formulas run at every (k, sigma, T, lambda). ResMem is p_T + lambda r_kNN, and DeepNet at lambda = 0. kNN-LM is (1 - lambda) p_T +
lambda p_kNN, and kNN alone at lambda = 1. Formulas on the simplex (`calibrated`, `adaptive`) also give probabilities.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.evaluation.adaptive import Adaptive, Gate, GateInputs, distribution, gate_inputs
from resmem_lm.evaluation.calibrated import SimplexFormula, confident, is_first, on_simplex, target_probability
from resmem_lm.evaluation.candidates import Block, Candidates, Exact, Formula, Neighbors, Scores, Setting, best, quantized_at, score
from resmem_lm.evaluation.features import Source, columns_of, without
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


def _nearest_of(neighbors: Neighbors, document: Neighbors) -> Neighbors:
    """Return the k nearest of k neighbors and the rows of the document."""
    order = jnp.argsort(jnp.concatenate([neighbors.distances, document.distances], axis=1), axis=1)[:, : neighbors.distances.shape[1]]

    def nearest(one: Array, other: Array) -> Array:
        both = jnp.concatenate([one, other], axis=1)
        return jnp.take_along_axis(both, order.reshape(*order.shape, *[1] * (both.ndim - 2)), axis=1)

    return Neighbors(*map(nearest, neighbors, document))


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
    candidates, neighbors, _, _, targets, target_base = block
    ks = jnp.full(len(sigmas), neighbors.distances.shape[1])
    scores = score(candidates, neighbors, ks, sigmas, *temperature)
    first, base = is_first(candidates.ids), target_base[:, temperature[1]]

    def losses(formula: SimplexFormula, lambda_: Float[Array, ""]) -> Float[Array, " sigmas"]:
        q = on_simplex(formula, scores.base, scores.residual, scores.knn, first, lambda_)
        log_p = jnp.log(target_probability(q, candidates.ids == targets[:, None], base) + 1e-12)
        return -jnp.sum(jnp.where(targets >= 0, log_p, 0), axis=-1)

    return jnp.stack([jax.lax.map(functools.partial(losses, formula), lambdas) for formula in formulas])


@functools.partial(jax.jit, static_argnames="formula")
def _predict_on_simplex(
    block: Block, weighting: Weightings, temperature: Temperature, *, formula: SimplexFormula | Literal["confident"]
) -> Predictions:
    candidates, neighbors, _, _, targets, target_base = block
    scores = score(candidates, neighbors, weighting.ks, weighting.sigmas, *temperature)
    base, residual, knn = scores.base, scores.residual[0], scores.knn[0]
    if formula == "confident":
        q = confident(base, knn, neighbors.distances)
    else:
        q = on_simplex(formula, base, residual, knn, is_first(candidates.ids), weighting.lambdas[0])
    winners, top = best(q.candidates, candidates.ids)
    probability = target_probability(q, candidates.ids == targets[:, None], target_base[:, temperature[1]])
    return Predictions(winners, top >= q.other * scores.bound, top, probability)  # type: ignore[arg-type]


_gate_inputs = jax.jit(gate_inputs, static_argnames=("unit", "sources"))


@functools.partial(jax.jit, static_argnames=("unit", "sources"))
def _predict_adaptive(gate: Gate, block: Block, sigma: Float[Array, ""], *, unit: int, sources: tuple[Source, ...]) -> Predictions:
    candidates, columns = block.candidates, columns_of(block, sources)
    some = gate_inputs(block, sigma, unit, sources)
    q, ids = distribution(gate, some), candidates.ids[:, columns]
    log_z = candidates.log_partition[:, unit]
    own = slice(block.widths["deepnet"])
    own_ids, base = candidates.ids[:, own], jnp.exp(candidates.logits[:, own] - log_z[:, None])
    # A token that both DeepNet and the memory propose counts once, as the memory's.
    held = jnp.any(own_ids[:, :, None] == ids[:, None, :], axis=-1)
    probabilities = jnp.concatenate([jnp.where(held, 0, q.other[:, None] * base), jnp.where(some.counted, q.candidates, 0)], axis=1)
    winners, top = best(probabilities, jnp.concatenate([own_ids, ids], axis=1))
    sure = top >= q.other * jnp.exp(candidates.bound - log_z)
    return Predictions(winners, sure, top, target_probability(q, some.target, some.target_base))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("unit", "sources"))
def _influence(
    gate: Gate, block: Block, sigma: Float[Array, ""], *, unit: int, sources: tuple[Source, ...]
) -> Float[Array, "parts queries"]:
    """Return the probability of each query's target, and what it loses without each source."""
    candidates = block.candidates
    is_target = candidates.ids == block.targets[:, None]
    base = jnp.exp(candidates.logits - candidates.log_partition[:, unit, None])
    target_base = jnp.max(jnp.where(is_target, base, 0), axis=1)

    def probability(some: Block) -> Float[Array, " queries"]:
        inputs = gate_inputs(some, sigma, unit, sources)
        return target_probability(distribution(gate, inputs), inputs.target, target_base)

    whole = probability(block)
    return jnp.stack([whole, *(whole - probability(without(block, source, unit)) for source in sources)])


class SplitScorer:
    """Read a split's cached neighbors and residuals block by block.

    `entries` limits the entries per row, the row's own token included. With `document`, the neighbors of a query are the k nearest rows of
    the datastore and of its own document together.
    """

    def __init__(self, name: str, queries: Queries, datastore: Datastore, *, entries: int | None = None, document: bool = False) -> None:
        self.name, self.queries, self.datastore, self.document = name, queries, datastore, document
        self.others = None if entries is None else entries - 1  # besides the token's own
        self.temperatures = list(datastore.binding.temperatures)
        self.unit_number = self.temperatures.index(1.0)

    def with_document(self) -> "SplitScorer":
        """Return a scorer whose neighbors are the nearest rows of datastore and document together."""
        entries = None if self.others is None else self.others + 1
        return SplitScorer(f"{self.name}, with the document", self.queries, self.datastore, entries=entries, document=True)

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
        candidates = [array[padded] for array in (q.candidate_ids, q.candidate_logits, q.bound, q.log_partition)]
        neighbors, document = self._neighbors(padded, candidates[0]), self._document(padded, candidates[0])
        if self.document:
            neighbors = _nearest_of(neighbors, document)
        exact = Exact(*(jnp.asarray(array[padded].astype(np.float32)) for array in (q.exact_log_probability, q.exact_match)))
        targets = np.pad(q.tokens[some].astype(np.int32), (0, padding), constant_values=-1)
        target_logits = q.target_logits[padded].astype(np.float64)[:, None] / np.array(self.temperatures)
        target_base = np.exp(target_logits - candidates[-1]).astype(np.float32)
        return some, Block(
            Candidates(*map(jnp.asarray, candidates)), neighbors, document, exact, jnp.asarray(targets), jnp.asarray(target_base)
        )

    def _neighbors(self, queries: Int[np.ndarray, " queries"], candidates: Int[np.ndarray, "queries candidates"]) -> Neighbors:
        """Return the nearest rows of the datastore."""
        q = self.queries
        found = [array[queries] for array in (q.distances, q.neighbor_tokens, q.matches)]
        return self._read(self.datastore.take, np.maximum(q.rows[queries], 0), found, candidates)

    def _document(self, queries: Int[np.ndarray, " queries"], candidates: Int[np.ndarray, "queries candidates"]) -> Neighbors:
        """Return the nearest earlier rows of the document."""
        q = self.queries
        rows = queries[:, None] - q.document_back[queries]
        found = [q.document_distances[queries], q.tokens[rows], q.document_matches[queries]]
        return self._read(lambda name, rows: getattr(q, name)[rows], rows, found, candidates)

    def _read(
        self,
        take: Callable[[str, np.ndarray], np.ndarray],
        rows: Int[np.ndarray, "queries k"],
        found: list[np.ndarray],
        candidates: Int[np.ndarray, "queries candidates"],
    ) -> Neighbors:
        """Return rows with their residuals at the candidates. `take` reads arrays of rows; `found` has distances, tokens, matches."""
        distances, tokens, matches = found
        ids, quantized = (take(name, rows)[..., : self.others] for name in ("residual_ids", "quantized_residuals"))
        logs = [take(name, rows).astype(np.float32) for name in ("target_log_probability", "log_power_sums")]
        arrays = (distances, tokens.astype(np.int32), matches, quantized_at(candidates, ids, quantized), *logs)
        return Neighbors(*map(jnp.asarray, arrays))

    def collect(self, name: str, compute: Callable[[Block], T], *, every: int = 1) -> T:
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

    def temperature(self, value: float) -> Temperature:
        """Return a temperature and its index in the datastore as arrays."""
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
        knn_counts, is_knn = np.zeros((len(kinds), 1), np.int64), ~np.asarray(weightings.is_resmem)
        of_knn = Weightings(*(array[is_knn] for array in weightings))
        for some, block in self.blocks("tune"):
            if among is not None:
                counted = np.pad(among[some], (0, BLOCK - (some.stop - some.start)))
                block = block._replace(targets=jnp.where(counted, block.targets, -1))
            for number, temperature in enumerate(temperatures):
                counts[number] += _count_correct(block, weightings, lambda_array, self.temperature(temperature))
            if is_knn.any() and 1 in every_lambda:
                knn_counts[is_knn] += _count_correct_knn(block, of_knn)
        counts = np.where(is_knn[:, None] & (lambda_array == 1), knn_counts, counts)
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
                arrays = map(np.asarray, _predict(block, Weightings.of(some), self.temperature(temperature)))
                found |= zip(some, zip(*arrays, strict=True), strict=True)
            return found

        return self.collect("score", compute)

    def log_losses(
        self, sigmas: list[float], temperatures: list[float], lambdas: dict[SimplexFormula, list[float]]
    ) -> dict[Setting, float]:
        """Sum the log losses of all tokens for every combination of these hyperparameters, with all neighbors."""
        k, every_lambda = self.queries.rows.shape[1], sorted(set(itertools.chain(*lambdas.values())))
        arrays = np.array(sigmas, np.float32), np.array(every_lambda, np.float32)
        losses = np.zeros((len(temperatures), len(lambdas), len(every_lambda), len(sigmas)))
        for _, block in self.blocks("calibrate"):
            for number, temperature in enumerate(temperatures):
                losses[number] += _log_losses(block, *arrays, self.temperature(temperature), formulas=tuple(lambdas))
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
            return _predict_on_simplex(block, Weightings.of([setting]), self.temperature(setting.temperature), formula=formula)

        return self.collect("score", lambda block: {setting: compute(block, setting) for setting in settings})

    def gate_inputs(self, sigma: float, sources: tuple[Source, ...], most: int) -> tuple[GateInputs, Int[np.ndarray, " some"]]:
        """Return the adaptive gate's inputs for about `most` tokens, in evenly spaced blocks, and their `groups`."""
        every = -(-len(self.queries.tokens) // most)
        inputs = self.collect("adapt", lambda block: _gate_inputs(block, sigma, unit=self.unit_number, sources=sources), every=every)
        return inputs, self.queries.groups[self._in_blocks(every)]

    def adaptive(self, method: Adaptive) -> Predictions:
        """Return Adaptive ResMem's predictions."""
        gate, sigma, sources = method
        return self.collect("adapt", lambda block: _predict_adaptive(gate, block, sigma, unit=self.unit_number, sources=sources))

    def influence(self, method: Adaptive, queries: Int[np.ndarray, " some"], tokens: Int[np.ndarray, " some"]) -> list[dict[str, float]]:
        """Return Adaptive ResMem's probability of a candidate token of each query, and what it loses without each source.

        The sources are those of the gate. A loss below 0 means that the source lowers the probability.
        """
        gate, sigma, sources = method
        parts = np.zeros((len(queries), 1 + len(sources)))
        for start in np.unique(queries - queries % BLOCK).tolist():
            chosen = np.flatnonzero((start <= queries) & (queries < start + BLOCK))
            places = queries[chosen] - start
            targets = np.zeros(BLOCK, np.int32)
            targets[places] = tokens[chosen]
            block = self._load(start)[1]._replace(targets=jnp.asarray(targets))
            parts[chosen] = np.asarray(_influence(gate, block, sigma, unit=self.unit_number, sources=sources)).T[places]
        return [dict(zip(("probability", *sources), part, strict=True)) for part in parts.tolist()]

    def gate_hyperparameters(self, method: Adaptive) -> dict[str, int | float]:
        """Return the hyperparameters of Adaptive ResMem under their names in results.json."""
        return {"k": self.queries.rows.shape[1], "sigma": method.sigma}
