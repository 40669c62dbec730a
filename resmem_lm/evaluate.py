"""Neighbours -> the table: hyperparameters chosen on validation, results told on test.

Every method is one of two formulas at some (k, sigma, T, lambda): ResMem, p_T + lambda r_kNN, of which lambda = 0 is DeepNet;
and kNN-LM, (1 - lambda) p_T + lambda p_kNN, of which lambda = 1 is kNN alone.
"""

import functools
import importlib.metadata
import itertools
import platform
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.candidates import Candidates, Formula, Neighbors, Scores, Setting, best, residuals_at, score
from resmem_lm.datastore import Datastore, open_datastore
from resmem_lm.errors import UserError
from resmem_lm.examples import mended_tokens
from resmem_lm.progress import progress
from resmem_lm.resmem import neighbor_weights
from resmem_lm.search import QUERY_SPLITS, Queries, open_queries
from resmem_lm.storage import AnyPath, read_json, sha256, write_json
from resmem_lm.workdir import Record, stage

BLOCK = 256
PROBABILITY_BLOCK = 2**16
BOOTSTRAP_SAMPLES = 2000


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


def tune(counts: dict[Setting, int]) -> dict[str, Setting]:
    """The settings with most right predictions: of kNN alone, kNN-LM, and ResMem with lambda 1 and with any lambda."""

    def winner(allowed: list[Setting]) -> Setting:
        return max(allowed, key=lambda s: (counts[s], -allowed.index(s)))

    resmem, knnlm = ([s for s in counts if s.formula == formula] for formula in ("resmem", "knnlm"))
    return {
        "knn": winner([s for s in knnlm if s.lambda_ == 1]),
        "knnlm": winner([s for s in knnlm if s.lambda_ < 1]),
        "resmem_lambda1": winner([s for s in resmem if s.lambda_ == 1]),
        "resmem": winner(resmem),
    }


def bootstrap_interval(values: Float[np.ndarray, " tokens"], document_lengths: Int[np.ndarray, " documents"]) -> tuple[float, float]:
    """95% interval of the mean of `values` over tokens, documents drawn with replacement (tokens of one are not independent)."""
    starts = np.concatenate([[0], np.cumsum(document_lengths)[:-1]])
    sums = np.add.reduceat(values.astype(np.float64), starts)
    documents = len(document_lengths)
    draws = np.random.default_rng(0).multinomial(documents, np.full(documents, 1 / documents), size=BOOTSTRAP_SAMPLES)
    means = (draws @ sums) / (draws @ document_lengths)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def describe(
    setting: Setting,
    found: tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]],
    deepnet: Int[np.ndarray, " tokens"],
    targets: Int[np.ndarray, " tokens"],
    document_lengths: Int[np.ndarray, " documents"],
) -> Record:
    """Accuracy, TPR (DeepNet wrong, this right), FPR (the reverse) and gain = TPR - FPR, as shares of all tokens (paper, Table 2)."""
    predictions, sure = found
    right, deepnet_right = predictions == targets, deepnet == targets
    tpr, fpr = float(np.mean(right & ~deepnet_right)), float(np.mean(~right & deepnet_right))
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_ci95": bootstrap_interval(right.astype(np.float64), document_lengths),
        "tpr": tpr,
        "fpr": fpr,
        "gain": tpr - fpr,
        "gain_ci95": bootstrap_interval(right.astype(np.float64) - deepnet_right, document_lengths),
        "certified": float(np.mean(sure)),
        "hyperparameters": setting.hyperparameters(),
    }


@stage(name="evaluate", after=("search", "build", "train"), output="results.json", redo=True)
def evaluate(
    workdir: AnyPath,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    temperatures: tuple[float, ...] | list[float] = (0.7, 1.0, 1.4),
    lambdas: tuple[float, ...] | list[float] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5),
) -> Record:
    """Chooses hyperparameters on validation, evaluates on test, and writes WORKDIR/results.json.

    Args:
        ks: numbers of neighbours to try; those above the searched number are passed over.
        sigmas: bandwidths to try.
        temperatures: temperatures to try, out of those the datastore was built for.
        lambdas: factors of r_kNN to try; those up to 1 are kNN-LM's too. 1.0 must be among them.

    Raises:
        UserError: a temperature that the datastore has no log-partition values for, or no usable k.
    """
    datastore = open_datastore(workdir / "datastore")
    datastore.check_files(*(f"{name}.npy" for name in ("residual_ids", "residual_values", "target_log_probability", "log_partition")))
    missing = [t for t in temperatures if t not in datastore.binding.temperatures]
    if missing:
        raise UserError(
            f"evaluate.temperatures: the datastore was built for {list(datastore.binding.temperatures)}, not {missing}: take some of those"
        )
    scorers = {split: SplitScorer(split, open_queries(workdir, split), datastore) for split in QUERY_SPLITS}
    if min(sigmas) <= 0 or min(lambdas) < 0:
        raise UserError(f"evaluate: sigmas must be above 0 and lambdas 0 or more; has {sigmas}, {lambdas}")
    searched = scorers["test"].queries.rows.shape[1]
    usable = [k for k in ks if 1 <= k <= searched]
    if not usable or 1.0 not in lambdas or min(lambdas) >= 1 or 1.0 not in temperatures:
        raise UserError(
            f"evaluate: needs 1 to {searched} in ks, 1.0 and less in lambdas, 1.0 in temperatures: {ks}, {lambdas}, {temperatures}"
        )

    grid: dict[Formula, list[float]] = {"resmem": list(lambdas), "knnlm": [value for value in lambdas if value <= 1]}
    tuned = tune(scorers["validation"].count_correct(usable, list(sigmas), list(temperatures), grid))
    paper = Setting("resmem", min(50, searched), 1.0, 1.0, 1.0)
    methods = {
        "deepnet": Setting("resmem", 1, 1.0, 1.0, 0.0),
        "knn": tuned["knn"],
        "knnlm": tuned["knnlm"],
        "resmem_paper": paper,
        "resmem_lambda1": tuned["resmem_lambda1"],
        "resmem": tuned["resmem"],
    }
    lines = ("knnlm", "resmem_lambda1", "resmem")
    curves = {
        "k": {name: [methods[name]._replace(k=k) for k in usable] for name in lines},
        "sigma": {name: [methods[name]._replace(sigma=sigma) for sigma in sigmas] for name in lines},
    }
    results: Record = {"splits": {}}
    for split, scorer in scorers.items():
        wanted = set(methods.values())
        if split == "test":
            wanted |= {setting for by_name in curves.values() for settings in by_name.values() for setting in settings}
        found = scorer.predict(sorted(wanted))
        results["splits"][split] = _describe_split(workdir, split, scorer, methods, found)
        if split == "test":
            targets = np.asarray(scorer.queries.tokens)
            results["curves"] = {
                axis: {
                    "values": usable if axis == "k" else list(sigmas),
                    "accuracy": {name: [float(np.mean(found[s][0] == targets)) for s in settings] for name, settings in by_name.items()},
                }
                for axis, by_name in curves.items()
            }
            deepnet, mended = found[methods["deepnet"]][0], found[methods["resmem"]][0]
            results["examples"] = mended_tokens(workdir, scorer.queries, datastore, methods["resmem"], deepnet, mended)
    results["datastore"] = {"rows": datastore.remembered_rows, "bytes_per_row": datastore.bytes / datastore.rows}
    index = read_json(workdir / "index" / "index.json")
    results["index"] = {"kind": index["kind"], "candidates": index["candidates"], "shards": len(index["shards"])}
    results["model"] = read_json(workdir / "checkpoints" / "model.json")["config"]
    records = {
        name: read_json(workdir / "stages" / f"{name}.json") for name in ("documents", "vocabulary", "train", "build", "index", "search")
    }
    results["documents"] = records["documents"]["result"]["documents"]
    results["seconds"] = {name: record["seconds"] for name, record in records.items()}
    results["versions"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name)
        for name in ("resmem_lm", "jax", "flax", "optax", "apache-beam", "scann", "sentencepiece", "numpy")
        if _installed(name)
    }
    write_json(workdir / "results.json", results)
    return {"sha256": sha256(workdir / "results.json")}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _describe_split(workdir: AnyPath, split: str, scorer: SplitScorer, methods: dict[str, Setting], found: dict[Setting, Any]) -> Record:
    lengths, targets = np.asarray(scorer.queries.document_lengths), np.asarray(scorer.queries.tokens)
    deepnet = found[methods["deepnet"]][0]
    described = {name: describe(setting, found[setting], deepnet, targets, lengths) for name, setting in methods.items()}
    described["deepnet"]["hyperparameters"] = {}
    for name in ("deepnet", "knnlm"):
        # ResMem's scores are not on the simplex, and kNN alone gives most tokens probability 0: no perplexity.
        described[name]["perplexity"] = float(np.exp(-np.mean(np.log(scorer.target_probability(methods[name])))))
    facts = read_json(workdir / "neighbors" / "neighbors.json")[split]
    return {name: facts[name] for name in ("tokens", "documents", "recall_at_k")} | {"methods": described}
