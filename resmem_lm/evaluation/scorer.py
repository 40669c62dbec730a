"""Count right predictions, predict, and compute probabilities for many settings, block by block, from cached neighbors."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Bool, Int

from resmem_lm.evaluation import block_scores
from resmem_lm.evaluation.adaptive import Adaptive, GateInputs
from resmem_lm.evaluation.block_scores import Predictions, Temperature, Weightings
from resmem_lm.evaluation.calibrated import SimplexFormula
from resmem_lm.evaluation.candidates import Block, Candidates, Exact, Formula, Neighbors, Setting, quantized_at
from resmem_lm.evaluation.features import Source
from resmem_lm.evaluation.neighbors import Queries
from resmem_lm.memory.datastore import Datastore
from resmem_lm.workdir.progress import progress

with epy.lazy_imports():
    import grain

BLOCK = 256  # queries
T = TypeVar("T", bound=Any)


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
            neighbors = block_scores.nearest_of(neighbors, document)
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
                counts[number] += block_scores.count_correct(block, weightings, lambda_array, self.temperature(temperature))
            if is_knn.any() and 1 in every_lambda:
                knn_counts[is_knn] += block_scores.count_correct_knn(block, of_knn)
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
                arrays = map(np.asarray, block_scores.predict(block, Weightings.of(some), self.temperature(temperature)))
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
                losses[number] += block_scores.log_losses(block, *arrays, self.temperature(temperature), formulas=tuple(lambdas))
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
            return block_scores.predict_on_simplex(block, Weightings.of([setting]), self.temperature(setting.temperature), formula=formula)

        return self.collect("score", lambda block: {setting: compute(block, setting) for setting in settings})

    def gate_inputs(self, sigma: float, sources: tuple[Source, ...], most: int) -> tuple[GateInputs, Int[np.ndarray, " some"]]:
        """Return the adaptive gate's inputs for about `most` tokens, in evenly spaced blocks, and their `groups`."""
        every = -(-len(self.queries.tokens) // most)

        def compute(block: Block) -> GateInputs:
            return block_scores.compiled_gate_inputs(block, sigma, unit=self.unit_number, sources=sources)

        return self.collect("adapt", compute, every=every), self.queries.groups[self._in_blocks(every)]

    def adaptive(self, method: Adaptive) -> Predictions:
        """Return Adaptive ResMem's predictions."""
        gate, sigma, sources = method
        unit = self.unit_number
        return self.collect("adapt", lambda block: block_scores.predict_adaptive(gate, block, sigma, unit=unit, sources=sources))

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
            changes = block_scores.influence(gate, block, sigma, unit=self.unit_number, sources=sources)
            parts[chosen] = np.asarray(changes).T[places]
        return [dict(zip(("probability", *sources), part, strict=True)) for part in parts.tolist()]

    def gate_hyperparameters(self, method: Adaptive) -> dict[str, int | float]:
        """Return the hyperparameters of Adaptive ResMem under their names in results.json."""
        return {"k": self.queries.rows.shape[1], "sigma": method.sigma}
