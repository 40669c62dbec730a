"""How many residual entries a row needs (the paper's appendix C keeps 128 of 32,128): accuracy and bytes for the largest so many."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beam_pipelines.build_datastore import build_datastore
from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import Candidates, Neighbors, best, score
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.quantization import upper_probabilities
from resmem_lm.memory.schema import ARRAYS
from resmem_lm.report.plots import INK, Figure, line
from resmem_lm.resmem import neighbor_weights
from resmem_lm.studies.derived import derive, settings_of
from resmem_lm.studies.study import study, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json, remove


class Kept(NamedTuple):
    """Predictions with some entries of each residual, and which of them are proved to be those of all entries, in the datastore's codes."""

    predictions: Int[Array, " queries"]
    certified: Bool[Array, " queries"]


def predict_with(
    candidates: Candidates, neighbors: Neighbors, dropped: Float[Array, "queries k"], k: int, sigma: float, lambda_: float, unit: int
) -> Kept:
    """ResMem's predictions at T = 1.

    A dropped entry is at most `dropped` in absolute value, so no score moves by more than lambda times the weighted mean of these: where
    the winner leads by more, it wins with the full residual too. (A dropped entry can only lower a score, unless it is that of the row's
    own token.)
    """
    scores = score(candidates, neighbors, jnp.array([k]), jnp.array([sigma], jnp.float32), 1.0, unit)
    total = scores.base + lambda_ * scores.residual[0]
    winner, top = best(total, candidates.ids)
    second = jnp.max(jnp.where(candidates.ids == winner[:, None], -jnp.inf, total), axis=-1)
    rank = jnp.arange(neighbors.distances.shape[1])
    weights = neighbor_weights(jnp.where(rank < k, neighbors.distances, jnp.inf), sigma)
    moved = lambda_ * jnp.sum(weights * dropped, axis=-1)
    return Kept(winner, top - jnp.maximum(second, scores.bound) > moved)


def largest_dropped(datastore: Datastore, rows: Int[np.ndarray, "queries k"], entries: int) -> Float[np.ndarray, "queries k"]:
    """A bound of every |r| of each row that is not among its `entries`. They are stored by size, behind the token's own."""
    codes = datastore.take("quantized_residuals", rows)
    return (
        upper_probabilities(codes[..., entries - 1]) if entries <= codes.shape[-1] else datastore.take("dropped", rows).astype(np.float32)
    )


def with_entries(run: Run, datastore: Datastore, entries: int) -> Datastore:
    """The datastore's rows with so many entries or more, made once in WORKDIR/derived/residual-size; one that was interrupted goes on."""
    mend = f"take study_residual_size.sizes up to {datastore.binding.entries}"
    if datastore.live_rows < datastore.rows:
        raise UserError(f"{datastore.folder} has rows of deleted documents, whose text is gone: run `resmem compact` first, or {mend}")
    derived, settings = derive(run, "residual-size", ("documents", "vocabulary", "train")), settings_of(run, "build")
    record = derived.record_path("build")
    held = read_json(record)["settings"] if record.exists() else {}
    if held.get("entries", 0) >= entries and held == settings | {"entries": held["entries"]}:
        entries = held["entries"]
    else:
        for place in (derived.datastore, record):
            remove(place)
    build_datastore(derived, **settings | {"entries": entries})
    made = open_datastore(derived.datastore)
    # Neighbors are cached by row: rows in another order would put other tokens there.
    if not np.array_equal(np.asarray(made.array("tokens")), np.asarray(datastore.array("tokens"))):
        raise UserError(f"{made.folder} has other rows than {datastore.folder}: delete {derived} and run the study again, or {mend}")
    return made


@study(name="residual-size")
def study_residual_size(run: Run, *, sizes: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)) -> Record:
    """Test accuracy with the largest entries of each residual only, at the paper's k, sigma, T and lambda.

    Where more entries are asked for than the datastore holds, its rows are made again with so many, in WORKDIR/derived/residual-size.

    Args:
        sizes: numbers of entries; those above the vocabulary's size are passed over.

    Raises:
        UserError: no usable size, or rows that can no more be made again because documents were deleted.
    """
    datastore = open_datastore(run.datastore)
    vocabulary = read_json(run.checkpoints / "model.json")["config"]["vocab_size"]
    usable = sorted({size for size in sizes if 1 <= size <= vocabulary})
    if not usable:
        raise UserError(f"study_residual_size.sizes = {sizes}: take numbers from 1 to {vocabulary}")
    if usable[-1] > datastore.binding.entries:
        datastore = with_entries(run, datastore, usable[-1])
    queries = open_queries(run, "test")
    chosen = read_json(run.results)["splits"]["test"]["methods"]["resmem_paper"]["hyperparameters"]
    fixed = sum(
        array.itemsize * int(np.prod(array.shape[1:]))
        for name in ARRAYS
        if not name.startswith("residual")
        for array in datastore.shard_arrays(name)[:1]
    )
    entry = sum(datastore.shard_arrays(name)[0].itemsize for name in ("residual_ids", "quantized_residuals"))
    rows: list[Record] = []
    for size in usable:
        scorer = SplitScorer("test", queries, datastore, entries=size)
        predict = jax.jit(predict_with, static_argnames=("k", "sigma", "lambda_", "unit"))
        right, sure = 0, 0
        for some, (candidates, neighbors, *_) in scorer.blocks(f"{size} entries"):
            places = np.arange(some.start, some.stop)
            dropped = largest_dropped(datastore, np.maximum(queries.rows[places], 0), size)
            padded = np.pad(dropped, ((0, len(candidates.ids) - len(places)), (0, 0)))
            kept = predict(
                candidates, neighbors, jnp.asarray(padded), chosen["k"], float(chosen["sigma"]), float(chosen["lambda"]), scorer.unit_number
            )
            right += int(np.sum(np.asarray(kept.predictions)[: len(places)] == queries.tokens[some]))
            sure += int(np.sum(np.asarray(kept.certified)[: len(places)]))
        count = len(queries.tokens)
        rows.append(
            {
                "entries": size,
                "bytes a row": fixed + entry * (size - 1),
                "test accuracy, %": 100 * right / count,
                "certified, %": 100 * sure / count,
            }
        )

    def draw(figure: Figure) -> None:
        x = [row["entries"] for row in rows]
        for axes, (number, column) in zip(figure.subplots(1, 2), enumerate(("test accuracy, %", "certified, %")), strict=True):
            line(axes, number, x, [row[column] for row in rows], column)
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(value) for value in x])
            axes.minorticks_off()
            axes.set_xlabel("entries")
            axes.set_ylabel(column)
            axes.tick_params(colors=f"{INK}0")

    text = (
        "ResMem with the paper's hyperparameters, its rows cut to their largest entries. Certified: the share of tokens whose prediction "
        "is proved to be that of all entries, in the datastore's codes, because the winner leads by more than what was dropped can change."
    )
    return write_study(run, "residual-size", title="Size of the residual (appendix C)", text=text, rows=rows, draw=draw)
