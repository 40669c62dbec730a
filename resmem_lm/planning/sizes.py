"""Sizes of all files, from amounts of text and the shapes of the arrays."""

import dataclasses
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
from etils import epy

from beam_pipelines.search_job import GROUPS
from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import Queries
from resmem_lm.evaluation.sources import BASE_CANDIDATES
from resmem_lm.memory.encoder import ROWS, residual_head
from resmem_lm.memory.index_kinds import index_bytes
from resmem_lm.memory.schema import ARRAYS, document_line, token_dtype
from resmem_lm.memory.suffix_index import CONTINUATIONS
from resmem_lm.model.checkpoints import Model, checkpoint_manager, save_checkpoint
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train_loop import optimizer, restore_or_init, to_train_state
from resmem_lm.text.shards import QUERY_SPLITS, read_shard, shard_paths
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.text.windows import WindowSpec, window_rows
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, files_below

with epy.lazy_imports():
    from resmem_lm.model import decoder

Number = int | float
StageSettings = dict[str, dict[str, Any]]  # of every stage, by the name of its function

NPY_HEADER = 128
KEPT_CHECKPOINTS = 2
ID_CHARACTERS = 100  # of a document that is assumed: C4's ids are an address and a checksum
TOKENS_PER_DOCUMENT = 450  # C4's


def check_numbers(of: str, least: int, **values: Number | None) -> None:
    """Raise UserError for a number that is below `least`, not above 0, or infinite; None is allowed."""
    for name, value in values.items():
        if value is not None and not (0 < value < math.inf and value >= least):
            raise UserError(f"{of}.{name} = {value:g}: take a number {'of 1 or more' if least else 'above 0'}")


@gin.register(module="resmem_lm")
@dataclasses.dataclass(frozen=True)
class Amounts:
    """Amounts of text; None is counted in the work directory.

    Attributes:
        rows: tokens in the datastore.
        queries: tokens of validation and test.
        documents: of rows and queries; 450 tokens each if neither given nor counted.
        bytes_per_token: where the text is not counted.
    """

    rows: Number | None = None
    queries: Number | None = None
    documents: Number | None = None
    bytes_per_token: Number = 4.5

    def check(self) -> None:
        """Raise UserError for a number out of its range."""
        check_numbers("Amounts", 1, rows=self.rows, queries=self.queries, documents=self.documents)
        check_numbers("Amounts", 0, bytes_per_token=self.bytes_per_token)


class Split(NamedTuple):
    """Counted or assumed amounts of some documents."""

    documents: int
    tokens: int
    window_tokens: int  # that the model computes for them
    record_bytes: int  # in datastore/documents.jsonl


class Counts(NamedTuple):
    """The amounts from which all sizes and times follow."""

    shards: tuple[Split, ...]  # of the datastore
    queries: dict[str, Split]
    query_shards: int  # of both splits together
    train_tokens: int
    document_bytes: int
    vocabulary_bytes: int

    @property
    def rows(self) -> int:
        """Tokens in the datastore."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def all_queries(self) -> int:
        """Tokens of validation and test."""
        return sum(split.tokens for split in self.queries.values())


def window_of(settings: StageSettings) -> WindowSpec:
    """Return the windows of rows and queries."""
    return WindowSpec(settings["build_datastore"]["window_length"], settings["build_datastore"]["window_context"])


def model_of(settings: StageSettings) -> ModelConfig:
    """Return the shape of the model, trained here or elsewhere."""
    model: ModelConfig = settings.get("take_checkpoint", settings.get("train", {}))["model"]
    return model


def key_dimensions(settings: StageSettings) -> int:
    """Return the dimensions of a key in the datastore."""
    dimensions: int | None = settings["build_datastore"]["key_dimensions"]
    return model_of(settings).emb_dim if dimensions is None else dimensions


def bytes_of(folder: AnyPath) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in files_below(folder))


def count(run: Run, settings: StageSettings) -> Counts:
    """Return the amounts in a work directory that has documents and a vocabulary."""
    vocabulary, window = load_vocabulary(run), window_of(settings)

    def counted(paths: list[AnyPath]) -> Split:
        documents = [document for path in paths for document in read_shard(path)]
        tokens = vocabulary.encode_documents(documents)
        lengths = [len(document) for document in tokens]
        first_rows = itertools.accumulate(lengths, initial=0)
        lines = (document_line(d.id, first, rows) for d, first, rows in zip(documents, first_rows, lengths, strict=False))
        computed = sum(batch.tokens.size for batch in window_rows(tokens, window, ROWS))
        return Split(len(documents), sum(lengths), computed, sum(map(len, lines)))

    train = [counted([path]) for path in shard_paths(run, "train")]
    return Counts(
        shards=tuple(train[: settings["build_datastore"]["shards"]]),
        queries={split: counted(shard_paths(run, split)) for split in QUERY_SPLITS},
        query_shards=sum(len(shard_paths(run, split)) for split in QUERY_SPLITS),
        train_tokens=sum(shard.tokens for shard in train),
        document_bytes=bytes_of(run.documents),
        vocabulary_bytes=bytes_of(run.vocabulary),
    )


def assume(settings: StageSettings, amounts: Amounts) -> Counts:
    """Return the amounts that a number of rows and queries implies: equal shards, and documents of exponentially distributed lengths."""
    assert amounts.rows is not None
    assert amounts.queries is not None
    rows, queries = int(amounts.rows), int(amounts.queries)
    documents = int(amounts.documents or max(1.0, (rows + queries) / TOKENS_PER_DOCUMENT))
    text = settings.get("sample_documents", settings.get("prepare_documents", {}))
    shards = settings["build_datastore"]["shards"] or text["shards"]
    held_out = text["validation_fraction"] + text["test_fraction"] if "test_fraction" in text else 1
    validation = min(queries, max(1, round(queries * text["validation_fraction"] / held_out))) if held_out else queries // 2
    window, mean = window_of(settings), (rows + queries) / documents
    of_rows, of_test = round(rows / mean), round((queries - validation) / mean)

    def split(tokens: int, number: int) -> Split:
        # Windows after a document's first: the mean of ceil((n - length) / stride) over the lengths n.
        more = math.exp(-window.length / mean) / -math.expm1(-window.stride / mean)
        computed, batch = tokens + number * more * window.context, ROWS * window.length
        records = number * len(document_line("x" * ID_CHARACTERS, tokens // 2, round(mean)))
        return Split(number, tokens, math.ceil(computed / batch) * batch, records)

    trained = settings.get("make_vocabulary", {}).get("model") is None
    pieces = settings["make_vocabulary"]["size"] if trained else model_of(settings).vocab_size
    return Counts(
        shards=tuple(split((rows + shard) // shards, (of_rows + shard) // shards) for shard in range(shards)),
        queries={"validation": split(validation, documents - of_rows - of_test), "test": split(queries - validation, of_test)},
        query_shards=2 * text.get("query_shards", 1),
        train_tokens=rows * text["shards"] // shards,
        document_bytes=round((rows * text["shards"] / shards + queries) * amounts.bytes_per_token),
        vocabulary_bytes=242_000 + 17 * pieces,  # SentencePiece's table of normal forms, and each piece
    )


def row_bytes(settings: StageSettings) -> dict[str, int]:
    """Return the bytes of one row in each array of the datastore."""
    model, build = model_of(settings), settings["build_datastore"]
    parameters = jax.eval_shape(lambda: decoder.init_parameters(model, 0))
    head = residual_head(Model(model, parameters), build["entries"], tuple(build["temperatures"]))
    key, hidden = (jax.ShapeDtypeStruct((1, width), jnp.float32) for width in (key_dimensions(settings), model.emb_dim))
    row = jax.eval_shape(head, parameters, key, hidden, jax.ShapeDtypeStruct((1,), jnp.int32))
    return {name: math.prod(array.shape) * array.dtype.itemsize for name, array in row._asdict().items()}


def query_bytes(settings: StageSettings) -> int:
    """Return the bytes of one query in WORKDIR/neighbors."""
    build, search, vocabulary = settings["build_datastore"], settings["search"], model_of(settings).vocab_size
    k, document, temperatures = search["neighbors"], search["document_neighbors"], len(build["temperatures"])
    candidates = min(BASE_CANDIDATES, vocabulary - 1) + CONTINUATIONS + document + k
    neighbors = k * (8 + 4 + token_dtype(vocabulary).itemsize + 1) + document * (4 + 4 + 1)  # row, distance, token, match
    # The token, the target's logit and the bound; id, logit and probability of each candidate; the longest match; the partition functions.
    return neighbors + residual_bytes(settings) + 3 * 4 + (4 + 4 + 2) * candidates + 12 + 4 * temperatures


def residual_bytes(settings: StageSettings) -> int:
    """Return the bytes of a query's own residual, which later queries of its document use."""
    build, vocabulary = settings["build_datastore"], model_of(settings).vocab_size
    others = min(build["entries"], vocabulary) - 1 if settings["search"]["document_neighbors"] else 0
    return others * (token_dtype(vocabulary).itemsize + 1) + 2 + 2 * len(build["temperatures"])


def planned_bytes(settings: StageSettings, counts: Counts, *, index_rows: list[int], checkpoint: int) -> dict[str, int]:
    """Return the bytes of each kind of file of a work directory, without records (3 kB a shard), metrics and the report.

    Args:
        settings: of every stage.
        counts: amounts of text.
        index_rows: rows of each shard of the index.
        checkpoint: bytes of all checkpoints.
    """
    row, kind, dimensions = row_bytes(settings), settings["build_index"]["kind"], key_dimensions(settings)
    files = {"documents": counts.document_bytes, "vocabulary": counts.vocabulary_bytes, "checkpoints": checkpoint}
    files |= {f"datastore/{name}.npy": counts.rows * row[name] + NPY_HEADER * len(counts.shards) for name in ARRAYS}
    files["datastore/documents.jsonl"] = sum(shard.record_bytes for shard in counts.shards)
    suffixes = counts.rows * (4 + row["tokens"]) + 2 * NPY_HEADER * len(index_rows)
    files["index"] = suffixes + sum(index_bytes(kind, rows, dimensions) for rows in index_rows)
    per_document = 2 * 8 * sum(split.documents for split in counts.queries.values())
    headers = NPY_HEADER * counts.query_shards * len(Queries._fields)
    files["neighbors"] = counts.all_queries * query_bytes(settings) + per_document + headers
    return files


def searching_bytes(settings: StageSettings, counts: Counts, index_shards: int) -> int:
    """Return the bytes that only the search needs: keys and hidden states of queries, and neighbors in each group of index shards."""
    found = min(index_shards, GROUPS) * settings["search"]["neighbors"] * (8 + 4)
    encoded = 4 * (model_of(settings).emb_dim + key_dimensions(settings)) + 4
    return counts.all_queries * (encoded + found)


def save_fresh_checkpoint(directory: Path, model: ModelConfig) -> None:
    """Write a checkpoint like `train`'s after its first step."""
    adafactor = optimizer(lambda _: 0.0)
    with checkpoint_manager(directory) as manager:
        fresh = restore_or_init(manager, model, adafactor, seed=0)
        _, moments = jax.jit(adafactor.update)(fresh.parameters, fresh.optimizer, fresh.parameters)  # zeros would be compressed to nothing
        save_checkpoint(manager, 1, to_train_state(fresh.parameters, moments, 1))


def checkpoint_bytes(settings: StageSettings) -> int:
    """Return the bytes of the checkpoints that are kept. Fresh parameters and moments compress as trained ones do.

    A checkpoint that was not trained here has no moments. They are less than 1% of a model whose dimensions are multiples of 128.
    """
    with tempfile.TemporaryDirectory(prefix="resmem-plan-") as folder:
        save_fresh_checkpoint(Path(folder), model_of(settings))
        steps = settings["train"]["steps"] / settings["train"]["checkpoint_steps"] if "train" in settings else 1
        return bytes_of(Path(folder)) * min(math.ceil(steps), KEPT_CHECKPOINTS)
