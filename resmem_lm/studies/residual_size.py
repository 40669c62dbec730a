"""Study how many residual entries a row needs (paper, appendix C: 128 of 32,128), by accuracy and bytes per row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beam_pipelines.build_datastore import build_datastore
from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import Candidates, Neighbors, Setting, best, score
from resmem_lm.evaluation.neighbors import Queries, open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.quantization import upper_probabilities
from resmem_lm.memory.schema import ARRAYS
from resmem_lm.report.plots import INK, Figure, line, log_ticks
from resmem_lm.resmem import neighbor_weights
from resmem_lm.studies.derived import derive
from resmem_lm.studies.study import check_some, study, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json, remove


class Cut(NamedTuple):
    """Predictions with some entries of each residual, and whether each provably equals that with all quantized entries."""

    predictions: Int[Array, " queries"]
    certified: Bool[Array, " queries"]


@study(name="residual-size")
def study_residual_size(run: Run, *, sizes: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)) -> Record:
    """Measure test accuracy with only the largest entries of each residual, at the paper's k, sigma, T and lambda.

    If a size exceeds the entries of the datastore, the study rebuilds its rows with more entries in WORKDIR/derived/residual-size.

    Args:
        sizes: numbers of entries; those above the vocabulary's size are skipped.

    Raises:
        UserError: no usable size, or rows that cannot be rebuilt because documents were deleted.
    """
    datastore = open_datastore(run.datastore)
    vocabulary = read_json(run.checkpoints / "model.json")["config"]["vocab_size"]
    usable = sorted(set(check_some("study_residual_size.sizes", sizes, lambda size: 1 <= size <= vocabulary, f"from 1 to {vocabulary}")))
    if usable[-1] > datastore.binding.entries:
        datastore = with_entries(run, datastore, usable[-1])
    queries = open_queries(run, "test")
    paper = Setting.of("resmem", read_json(run.results)["splits"]["test"]["methods"]["resmem_paper"]["hyperparameters"])
    rows = [_row(datastore, queries, paper, size) for size in usable]
    text = (
        "ResMem with the paper's hyperparameters and only the largest entries of each row. Certified: the share of predictions that "
        "provably equal those with all quantized entries, because the winner leads by more than the dropped entries can change."
    )
    return write_study(run, "residual-size", title="Size of the residual (appendix C)", text=text, rows=rows, draw=_draw)


@functools.partial(jax.jit, static_argnames=("setting", "unit"))
def predict_with(candidates: Candidates, neighbors: Neighbors, dropped: Float[Array, "queries k"], setting: Setting, unit: int) -> Cut:
    """Return ResMem's predictions at T = 1 (index `unit` in the datastore) with some entries of each residual.

    `dropped` bounds every |r| that a row drops. A dropped entry changes a score by at most lambda times the weighted mean of `dropped`. A
    prediction whose winner leads by more is certified. A dropped entry can only lower a score, because the row's own token is always kept.
    """
    scores = score(candidates, neighbors, jnp.array([setting.k]), jnp.array([setting.sigma], jnp.float32), 1.0, unit)
    total = scores.base + setting.lambda_ * scores.residual[0]
    winner, top = best(total, candidates.ids)
    second = jnp.max(jnp.where(candidates.ids == winner[:, None], -jnp.inf, total), axis=-1)
    rank = jnp.arange(neighbors.distances.shape[1])
    weights = neighbor_weights(jnp.where(rank < setting.k, neighbors.distances, jnp.inf), setting.sigma)
    moved = setting.lambda_ * jnp.sum(weights * dropped, axis=-1)
    return Cut(winner, top - jnp.maximum(second, scores.bound) > moved)


def largest_dropped(datastore: Datastore, rows: Int[np.ndarray, "queries k"], entries: int) -> Float[np.ndarray, "queries k"]:
    """Return an upper bound of every |r| beyond the first `entries` of each row. Rows store entries in descending order."""
    quantized = datastore.take("quantized_residuals", rows)  # without the first entry, the row's own token
    if entries <= quantized.shape[-1]:
        return upper_probabilities(quantized[..., entries - 1])
    return datastore.take("dropped", rows).astype(np.float32)


def with_entries(run: Run, datastore: Datastore, entries: int) -> Datastore:
    """Rebuild the rows with at least `entries` entries in WORKDIR/derived/residual-size. Raise UserError if they are not the same."""
    alternative = f"take study_residual_size.sizes up to {datastore.binding.entries}"
    if datastore.live_rows < datastore.rows:
        raise UserError(
            f"{datastore.folder} has rows of deleted documents, which cannot be rebuilt: run `resmem compact` first, or {alternative}"
        )
    derived = derive(run, "residual-size", ("documents", "vocabulary", "train"))
    settings, record = run.finished("build")["settings"], derived.record("build").get("settings", {})
    if record.get("entries", 0) >= entries and record == settings | {"entries": record["entries"]}:
        entries = record["entries"]
    else:
        remove(derived.datastore)
        remove(derived.record_path("build"))
    build_datastore(derived, **settings | {"entries": entries})
    rebuilt = open_datastore(derived.datastore)
    # Cached neighbors are row numbers, so the rows must be in the same order.
    if not np.array_equal(np.asarray(rebuilt.array("tokens")), np.asarray(datastore.array("tokens"))):
        raise UserError(f"{rebuilt.folder} has other rows than {datastore.folder}: delete {derived} and start again, or {alternative}")
    return rebuilt


def _row(datastore: Datastore, queries: Queries, setting: Setting, size: int) -> Record:
    """Return the table's row for a number of entries."""
    scorer = SplitScorer("test", queries, datastore, entries=size)
    right, certified, count = 0, 0, len(queries.tokens)
    for some, block in scorer.blocks(f"{size} entries"):
        rows = np.maximum(queries.rows[np.arange(some.start, some.stop)], 0)
        dropped = np.zeros(block.neighbors.distances.shape, np.float32)
        dropped[: len(rows)] = largest_dropped(datastore, rows, size)
        cut = predict_with(block.candidates, block.neighbors, jnp.asarray(dropped), setting, scorer.unit_number)
        right += int(np.sum(np.asarray(cut.predictions)[: len(rows)] == queries.tokens[some]))
        certified += int(np.sum(np.asarray(cut.certified)[: len(rows)]))
    return {
        "entries": size,
        "bytes per row": _bytes_per_row(datastore, size),
        "test accuracy, %": 100 * right / count,
        "certified, %": 100 * certified / count,
    }


def _bytes_per_row(datastore: Datastore, entries: int) -> int:
    """Return the bytes of a row in all arrays, with the given number of entries."""
    arrays = {name: datastore.shard_arrays(name)[0] for name in ARRAYS}
    by_entry = ("residual_ids", "quantized_residuals")  # the own token's entry is in other arrays
    fixed = sum(array.itemsize * int(np.prod(array.shape[1:])) for name, array in arrays.items() if name not in by_entry)
    return fixed + sum(arrays[name].itemsize for name in by_entry) * (entries - 1)


def _draw(figure: Figure, rows: list[Record]) -> None:
    sizes = [row["entries"] for row in rows]
    for axes, (number, column) in zip(figure.subplots(1, 2), enumerate(("test accuracy, %", "certified, %")), strict=True):
        line(axes, number, sizes, [row[column] for row in rows], column)
        log_ticks(axes, sizes)
        axes.set_xlabel("entries")
        axes.set_ylabel(column)
        axes.tick_params(colors=f"{INK}0")
