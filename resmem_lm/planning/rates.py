"""Measurements of what each stage costs on this machine: small real runs, with the configured shapes, in a temporary work directory.

Runs of two sizes separate what a stage costs once (compilation, reading of checkpoints) from what it costs per unit of work.
"""

import contextlib
import dataclasses
import io
import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import gin
import jax
import numpy as np
from jaxtyping import Float

from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.search_neighbors import search
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import ROWS
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.index import QUERY_BLOCK, SMALL, Index
from resmem_lm.memory.index_kinds import library
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.model.take_checkpoint import take_checkpoint
from resmem_lm.model.train import train
from resmem_lm.planning.machine import least, peak_memory, reset_peak_memory
from resmem_lm.planning.sizes import Number, StageSettings, check_numbers, count, key_dimensions, model_of, save_fresh_checkpoint, window_of
from resmem_lm.text.documents import prepare_documents
from resmem_lm.text.shards import position, shard_content
from resmem_lm.text.sources import Document
from resmem_lm.text.vocabulary import Vocabulary, make_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath

SIZES = (1, 6, 24)  # of the small runs: the first warms up this process, the other two compile the same programs
QUERIES = 2048  # of the smaller split in a run of size 1: a batch of the adaptive gate
TRAIN_TOKENS = 2048  # at most, in a step of a small run: the batch of an accelerator would take a processor minutes
RECALL_QUERIES = 500
PIECE, PIECES = 4000, 500  # characters of the texts to measure on, and their number
SPLITS = ("test", "validation", "train")  # as `prepare_documents` orders them by position


@gin.register(module="resmem_lm")
@dataclasses.dataclass(frozen=True)
class Rates:
    """Speeds of one worker; None is measured.

    Attributes:
        train_tokens_per_second: in `train`.
        tokens_per_second: window tokens, context included, in `build`.
        index_rows_per_second: in `index`.
        query_tokens_per_second: window tokens in `search`, without the index.
        queries_per_second: in one shard of the index.
        evaluated_queries_per_second: in `evaluate`.
    """

    train_tokens_per_second: Number | None = None
    tokens_per_second: Number | None = None
    index_rows_per_second: Number | None = None
    query_tokens_per_second: Number | None = None
    queries_per_second: Number | None = None
    evaluated_queries_per_second: Number | None = None

    def check(self) -> None:
        """Raise UserError for a number out of its range."""
        check_numbers("Rates", 0, **dataclasses.asdict(self))


class Cost(NamedTuple):
    """Seconds of some work: once, and for each unit."""

    once: float
    each: float

    def seconds(self, units: int | float) -> float:
        """Return the seconds of some units of work."""
        return self.once + self.each * units


class Costs(NamedTuple):
    """Measured costs. The units of an index are in `build_work` and `query_work`."""

    stages: dict[str, Cost]  # by tokens in `train`, window tokens in `build` and `search` (without the index), queries in `evaluate`
    memory: dict[str, int]  # peak of each stage in bytes
    index_build: Cost
    index_query: Cost
    compared_row: float  # seconds of one query and one row in exact search


class _SmallRun(NamedTuple):
    run: Run
    rows: int
    lookup: float  # seconds of one query in the index
    units: dict[str, int]
    seconds: dict[str, float]
    memory: dict[str, int]


def build_work(kind: str, rows: int, dimensions: int, training_rows: int) -> float:
    """Return the multiplications of an index build: k-means compares a sample with all leaves, then each row is rotated and compared."""
    if kind == "exact" or rows < SMALL:
        return 0.0
    tree = library(kind).tree(rows, dimensions, training_rows)
    return float(dimensions * (tree.rounds * tree.sample * tree.leaves + rows * (dimensions + tree.leaves)))


def query_work(kind: str, rows: int, dimensions: int) -> float:
    """Return the comparisons of a query in an index with a tree: with all leaves, then with the rows in the probed leaves."""
    tree = library(kind).tree(rows, dimensions, rows)
    return float(tree.leaves + rows * tree.probed / tree.leaves)


def measure(settings: StageSettings, documents: Iterable[Document], vocabulary: Path | None, *, training: bool, validation: float) -> Costs:
    """Return the costs of all stages, from small real runs.

    Args:
        settings: of every stage, by the names of their functions.
        documents: text to run on, of any amount.
        vocabulary: a SentencePiece model; None trains a small one on the documents.
        training: whether to train; otherwise the other stages take fresh parameters.
        validation: share of the queries that are of the validation split.
    """
    stderr = sys.stderr
    with tempfile.TemporaryDirectory(prefix="resmem-plan-") as name, contextlib.redirect_stderr(io.StringIO()):
        folder, texts = Path(name), _pieces(documents)
        save_fresh_checkpoint(folder / "checkpoints", model_of(settings))
        stages = _small_settings(settings, folder, training)
        stages["make_vocabulary"] = {"model": str(vocabulary or _small_vocabulary(folder, texts, model_of(settings).vocab_size))}

        def run(size: int) -> _SmallRun:
            print(f"measure: a small run of size {size}", file=stderr, flush=True)
            return _small_run(folder / f"run-{size}", stages, texts, size, min(0.8, max(0.2, validation)))

        first, small, large = map(run, SIZES)
        costs, compared_row = _stage_costs(first, small, large), _compared_row(large.run, stages)
        return Costs(costs, large.memory, *_index_costs(first, small, large, stages), compared_row)


def _line(small: float, large: float, small_units: int | float, large_units: int | float) -> Cost:
    """Return the cost that fits two measurements."""
    each = max(large - small, 1e-9) / (large_units - small_units)
    return Cost(max(0.0, small - each * small_units), each)


def _stage_costs(first: _SmallRun, small: _SmallRun, large: _SmallRun) -> dict[str, Cost]:
    """Return each stage's cost: once from the first run, which warms up the process, and for each unit from the other two."""
    costs = {}
    for stage, units in first.units.items():
        each = _line(small.seconds[stage], large.seconds[stage], small.units[stage], large.units[stage]).each
        costs[stage] = Cost(max(0.0, first.seconds[stage] - units * each), each)
    return costs


def _index_costs(first: _SmallRun, small: _SmallRun, large: _SmallRun, stages: StageSettings) -> tuple[Cost, Cost]:
    """Return the cost of a build, and of a query in an index with a tree."""
    kind, training_rows, dimensions = stages["build_index"]["kind"], stages["build_index"]["training_rows"], key_dimensions(stages)
    if kind == "exact":
        return Cost(first.seconds["index"], 0.0), Cost(0.0, 0.0)
    build, query = (
        [work(kind, run.rows, dimensions, *rest) for run in (small, large)] for work, *rest in ((build_work, training_rows), (query_work,))
    )
    return _line(small.seconds["index"], large.seconds["index"], *build), _line(small.lookup, large.lookup, *query)


def _pieces(documents: Iterable[Document]) -> list[str]:
    texts = (d.text[start : start + PIECE] for d in documents for start in range(0, len(d.text), PIECE))
    return list(itertools.islice((text for text in texts if text.strip()), PIECES))


def _small_vocabulary(folder: Path, texts: list[str], pieces: int) -> AnyPath:
    """Train a vocabulary. Its pieces hardly change what a token costs."""
    run, file = Run(folder / "vocabulary"), folder / "vocabulary.jsonl"
    file.write_text(shard_content(Document(str(number), text) for number, text in enumerate(texts)), encoding="utf-8")
    prepare_documents(run, text=str(file), shards=1)
    make_vocabulary(run, size=min(1000, pieces))
    return run.vocabulary / "vocabulary.model"


def _small_settings(settings: StageSettings, folder: Path, training: bool) -> StageSettings:
    """Return the settings of the small runs' stages, in order; training and the text's size are set for each run."""
    stages: StageSettings = {
        "prepare_documents": {"validation_fraction": 1 / 3, "test_fraction": 1 / 3, "duplicate_threshold": 1.0, "shards": 2},
        "make_vocabulary": {},
        "take_checkpoint": {"model": model_of(settings), "checkpoint": str(folder / "checkpoints")},
        "build_datastore": settings["build_datastore"] | {"shards": None, "pipeline_options": ""},
        "build_index": settings["build_index"] | {"memory_gib": 1024.0, "pipeline_options": ""},
        "search": settings["search"] | {"recall_queries": 1, "pipeline_options": ""},
        "evaluate": settings["evaluate"],
    }
    if training:
        devices, length = len(jax.local_devices()), settings["train"]["sequence_length"]
        rows = min(settings["train"]["batch_size"], max(1, TRAIN_TOKENS // length))
        stages["train"] = settings["train"] | {"batch_size": -(-rows // devices) * devices}
    return stages


def _small_run(folder: Path, stages: StageSettings, texts: list[str], size: int, validation: float) -> _SmallRun:
    """Run all stages on an amount of text that grows with `size`; `validation` is the share of the validation split in the queries."""
    run, file, vocabulary = Run(folder), folder.with_suffix(".jsonl"), Vocabulary(Path(stages["make_vocabulary"]["model"]))
    window, k = window_of(stages), stages["search"]["neighbors"]
    # Half a batch of windows at least, or padding would hide that a larger run computes more.
    queries = int(max(QUERIES, ROWS * window.length // 2) * size**0.75 / min(validation, 1 - validation))
    # An index has a tree from SMALL rows on.
    rows = max(2 * size * ROWS * window.stride, 2 * k, SMALL * size // 5 if size > 1 else 0)
    wanted = {"train": rows, "validation": int(queries * validation), "test": int(queries * (1 - validation))}
    file.write_text(shard_content(_draw(texts, vocabulary, wanted)), encoding="utf-8")
    if "train" in stages:
        joint = -(-2 * size * stages["train"].get("memory_steps", 0) // stages["train"]["steps"])  # the same share of the steps
        stages = stages | {"train": stages["train"] | {"steps": 2 * size, "checkpoint_steps": 2 * size, "memory_steps": joint}}
    stages = stages | {"prepare_documents": stages["prepare_documents"] | {"text": str(file)}}
    memory = {}
    model = train if "train" in stages else take_checkpoint
    for stage in (prepare_documents, make_vocabulary, model, build_datastore, build_index, search, evaluate):
        reset_peak_memory()
        stage(run, **stages[stage.__name__])
        memory[stage.name] = peak_memory()
    counts = count(run, stages)
    splits = {"build": counts.shards, "search": tuple(counts.queries.values())}
    units = {stage: sum(split.window_tokens for split in some) for stage, some in splits.items()} | {"evaluate": counts.all_queries}
    if "train" in stages:
        units["train"] = 2 * size * stages["train"]["batch_size"] * stages["train"]["sequence_length"]
    seconds = {stage: run.record(stage)["seconds"] for stage in (*units, "index")}
    index, keys = _open(run)
    lookup = least(lambda: index.search(keys, k)) / len(keys)
    seconds["search"] -= counts.all_queries * lookup
    return _SmallRun(run, counts.rows, lookup, units, seconds, memory)


def _draw(texts: list[str], vocabulary: Vocabulary, wanted: dict[str, int]) -> Iterator[Document]:
    """Yield documents with the wanted numbers of tokens of each split. Repeated texts get different numbers."""
    pool, numbers = itertools.cycle(texts), itertools.count()
    for split, tokens in wanted.items():
        while tokens > 0:
            text = next(pool)
            length = len(vocabulary.encode(text))
            text = text if length <= tokens else text[: max(1, len(text) * tokens // length)]
            # `prepare_documents` chooses the split by a hash of the text.
            numbered = (f"{number} {text}" for number in numbers)
            yield Document("", next(some for some in numbered if SPLITS[int(3 * position(some))] == split))
            tokens -= length


def _open(run: Run) -> tuple[Index, Float[np.ndarray, "queries emb"]]:
    """Return the index of a run, and keys of its datastore as queries."""
    datastore = open_datastore(run.datastore)
    index, _ = open_index(run, datastore, index_manifest(run, datastore), 0)
    return index, datastore.keys(np.arange(min(datastore.rows, 2 * QUERY_BLOCK)))


def _compared_row(run: Run, stages: StageSettings) -> float:
    """Return the seconds of one query and one row in exact search."""
    index, keys = _open(run)
    sample = keys[:RECALL_QUERIES]
    exact = ExactIndex(index.datastore)
    return least(lambda: exact.search(sample, stages["search"]["neighbors"])) / len(sample) / index.datastore.rows
