"""Bytes of every kind of file, and memory of the index, from amounts of text and the shapes that the code itself gives."""

import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epy

from beam_pipelines.search_neighbors import GROUPS
from resmem_lm.evaluation.candidates import choose_candidates
from resmem_lm.evaluation.neighbors import BASE_CANDIDATES, Queries
from resmem_lm.memory.encoder import ROWS, residual_head
from resmem_lm.memory.index_kinds import index_bytes
from resmem_lm.memory.schema import ARRAYS, COUNTERS, Binding, document_line, shard_name, token_dtype
from resmem_lm.model.checkpoints import Model, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.planning.rates import bytes_of, save_fresh_checkpoint, window_tokens
from resmem_lm.text.shards import QUERY_SPLITS, read_shard, shard_paths
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, files_below, inside, with_checksum

with epy.lazy_imports():
    from resmem_lm.model import decoder

StageSettings = dict[str, dict[str, Any]]

NPY_HEADER = 128
KEPT_CHECKPOINTS = 2
NAME_CHARACTERS = 100  # of a document's id, where documents were not counted: C4's are addresses and checksums


class Split(NamedTuple):
    """Text, or what is assumed of it."""

    documents: int
    tokens: int
    window_tokens: int  # that the model computes for it
    record_bytes: int  # of datastore/documents.jsonl


class Counts(NamedTuple):
    """Amounts from which everything else follows."""

    shards: tuple[Split, ...]  # of the datastore
    queries: dict[str, Split]
    query_shards: int  # of both splits together
    train_tokens: int
    document_bytes: int
    vocabulary_bytes: int

    @property
    def rows(self) -> int:
        """Of the datastore."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def all_queries(self) -> int:
        """Of validation and test."""
        return sum(split.tokens for split in self.queries.values())


def window_of(settings: StageSettings) -> WindowSpec:
    """The windows of rows and queries."""
    return WindowSpec(settings["build_datastore"]["window_length"], settings["build_datastore"]["window_context"])


def model_of(settings: StageSettings) -> ModelConfig:
    """The shape of the model, trained here or elsewhere."""
    model: ModelConfig = settings.get("take_checkpoint", settings.get("train", {}))["model"]
    return model


def count(run: Run, settings: StageSettings) -> Counts:
    """Counts the text of a work directory whose documents and vocabulary are made."""
    vocabulary, window = load_vocabulary(run), window_of(settings)

    def counted(paths: list[AnyPath]) -> Split:
        documents = [document for path in paths for document in read_shard(path)]
        tokens = vocabulary.encode_documents(documents)
        lengths = [len(document) for document in tokens]
        first_rows = itertools.accumulate(lengths, initial=0)
        lines = (document_line(d.id, first, rows) for d, first, rows in zip(documents, first_rows, lengths, strict=False))
        return Split(len(documents), sum(lengths), window_tokens(tokens, window), sum(map(len, lines)))

    train = [counted([path]) for path in shard_paths(run, "train")]
    chosen = settings["build_datastore"]["shards"]
    return Counts(
        shards=tuple(train if chosen is None else train[:chosen]),
        queries={split: counted(shard_paths(run, split)) for split in QUERY_SPLITS},
        query_shards=sum(len(shard_paths(run, split)) for split in QUERY_SPLITS),
        train_tokens=sum(shard.tokens for shard in train),
        document_bytes=bytes_of(run.documents),
        vocabulary_bytes=bytes_of(run.vocabulary),
    )


def assume(settings: StageSettings, *, rows: int, queries: int, documents: int, bytes_per_token: int | float) -> Counts:
    """What so many rows and queries mean, of so many documents together: shards of one size, lengths spread exponentially."""
    text = settings.get("sample_documents", settings.get("prepare_documents", {}))
    shards = settings["build_datastore"]["shards"] or text["shards"]
    held_out = text["validation_fraction"] + text["test_fraction"] if "test_fraction" in text else 1
    validation = min(queries, max(1, round(queries * text["validation_fraction"] / held_out))) if held_out else queries // 2
    window, mean = window_of(settings), (rows + queries) / documents
    of_rows = round(rows / mean)

    def split(tokens: int, number: int) -> Split:
        # Windows behind a document's first: the mean of ceil((n - length) / stride) over n.
        more = math.exp(-window.length / mean) / -math.expm1(-window.stride / mean)
        computed, batch = tokens + number * more * window.context, ROWS * window.length
        records = number * len(document_line("x" * NAME_CHARACTERS, tokens // 2, round(mean)))
        return Split(number, tokens, math.ceil(computed / batch) * batch, records)

    trained = settings.get("make_vocabulary", {}).get("model") is None
    pieces = settings["make_vocabulary"]["size"] if trained else model_of(settings).vocab_size
    return Counts(
        shards=tuple(split((rows + shard) // shards, (of_rows + shard) // shards) for shard in range(shards)),
        queries={
            "validation": split(validation, documents - of_rows - round((queries - validation) / mean)),
            "test": split(queries - validation, round((queries - validation) / mean)),
        },
        query_shards=2 * text.get("query_shards", 1),
        train_tokens=rows * text["shards"] // shards,
        document_bytes=round((rows * text["shards"] / shards + queries) * bytes_per_token),
        vocabulary_bytes=242_000 + 17 * pieces,  # SentencePiece's table of normal forms, and each piece
    )


def key_dimensions(settings: StageSettings) -> int:
    """Of a key in the datastore."""
    dimensions: int | None = settings["build_datastore"]["key_dimensions"]
    return model_of(settings).emb_dim if dimensions is None else dimensions


def row_bytes(model: ModelConfig, entries: int, temperatures: tuple[float, ...] | list[float], dimensions: int) -> dict[str, int]:
    """Bytes of one row in each of the datastore's arrays."""
    parameters = jax.eval_shape(lambda: decoder.init_parameters(model, 0))
    head = residual_head(Model(model, parameters), entries, tuple(temperatures))
    key, hidden = (jax.ShapeDtypeStruct((1, width), jnp.float32) for width in (dimensions, model.emb_dim))
    row = jax.eval_shape(head, parameters, key, hidden, jax.ShapeDtypeStruct((1,), jnp.int32))
    return {name: math.prod(array.shape) * array.dtype.itemsize for name, array in row._asdict().items()}


def query_bytes(model: ModelConfig, k: int, temperatures: int) -> dict[str, int]:
    """Bytes of one query in each array of WORKDIR/neighbors, without `document_lengths`."""
    logits, tokens = jax.ShapeDtypeStruct((1, model.vocab_size), jnp.float32), jax.ShapeDtypeStruct((1, k), jnp.int32)
    ids, _, _ = jax.eval_shape(lambda logits, tokens: choose_candidates(logits, tokens, BASE_CANDIDATES), logits, tokens)
    width, per_neighbor = ids.shape[1], {"rows": 8, "distances": 4, "neighbor_tokens": token_dtype(model.vocab_size).itemsize}
    alone = dict.fromkeys(("tokens", "target_logits", "bound"), 4)
    return (
        {name: k * size for name, size in per_neighbor.items()}
        | alone
        | {"candidate_ids": 4 * width, "candidate_logits": 4 * width, "log_partition": 4 * temperatures}
    )


def sizes(settings: StageSettings, counts: Counts, *, index_rows: list[int], checkpoint: int) -> dict[str, int]:
    """Bytes of each kind of file of a work directory, but for a few hundred kB of records, metrics and the report."""
    model, build = model_of(settings), settings["build_datastore"]
    arrays = row_bytes(model, build["entries"], build["temperatures"], key_dimensions(settings))
    files = {"documents": counts.document_bytes, "vocabulary": counts.vocabulary_bytes, "checkpoints": checkpoint}
    for name in ARRAYS:
        files[f"datastore/{name}.npy"] = counts.rows * arrays[name] + NPY_HEADER * len(counts.shards)
    files["datastore/documents.jsonl"] = sum(shard.record_bytes for shard in counts.shards)
    files["datastore/*.json"] = sum(_datastore_records(settings, counts, arrays))
    files["index"] = sum(index_bytes(settings["build_index"]["kind"], rows, key_dimensions(settings)) for rows in index_rows)
    k = settings["search"]["neighbors"]
    each = query_bytes(model, k, len(build["temperatures"]))
    for name in Queries._fields:
        lengths = 8 * sum(split.documents for split in counts.queries.values())
        files[f"neighbors/{name}.npy"] = (counts.all_queries * each[name] if name in each else lengths) + NPY_HEADER * counts.query_shards
    return files


def searching_bytes(settings: StageSettings, counts: Counts, index_shards: int) -> int:
    """Of what the search keeps until it has finished: keys and hidden states of queries, and what each group of index shards found."""
    found = min(index_shards, GROUPS) * settings["search"]["neighbors"] * (8 + 4)
    return counts.all_queries * (4 * (model_of(settings).emb_dim + key_dimensions(settings)) + 4 + found)


def _datastore_records(settings: StageSettings, counts: Counts, arrays: dict[str, int]) -> Iterator[int]:
    """Bytes of every shard's record and of the manifest."""
    build, checksum = settings["build_datastore"], "0" * 64
    binding = Binding(checksum, checksum, window_of(settings), tuple(float(t) for t in build["temperatures"]), build["entries"]).to_json()
    shards = []
    for number, shard in enumerate(counts.shards):
        name = shard_name(number, len(counts.shards))
        content = {f"{name}.npy": NPY_HEADER + shard.tokens * arrays[name] for name in ARRAYS} | {"documents.jsonl": shard.record_bytes}
        files = {name: {"bytes": size, "sha256": checksum} for name, size in content.items()}
        numbers = dict.fromkeys(COUNTERS, shard.tokens)
        provenance = binding | {"documents": f"{name.replace('shard', 'train')}.jsonl"}
        shards.append({"folder": f"{name}.{'0' * 8}", "provenance": provenance, "rows": shard.tokens, "counts": numbers, "files": files})
        yield len(with_checksum(shards[-1]))
    yield len(with_checksum(binding | {"rows": counts.rows, "shards": shards}))


def checkpoint_bytes(settings: StageSettings) -> int:
    """Of the checkpoints that stay: fresh parameters and moments are compressed no better than trained ones."""
    with tempfile.TemporaryDirectory(prefix="resmem-plan-") as folder:
        taken = "take_checkpoint" in settings
        directory = Path(folder) / "checkpoints"
        save_fresh_checkpoint(directory, model_of(settings), optimizer_state=not taken)
        one = bytes_of(directory)
        save_config(directory, model_of(settings), "0" * 64)
        saves = 1 if taken else -(-settings["train"]["steps"] // settings["train"]["checkpoint_steps"])
        return one * min(saves, KEPT_CHECKPOINTS) + bytes_of(directory) - one


def file_bytes(run: Run) -> dict[str, int]:
    """Bytes of each kind of file of a finished run, as `sizes` names them."""
    found: dict[str, int] = {}
    for path in files_below(run.path):
        kind = inside(path, run.path).split("/")[0]
        if kind in ("datastore", "neighbors", "index"):
            record, is_array = path.suffix == ".json" and path.parent == run.path / kind, kind != "index"
            kind += "/*.json" if record else f"/{path.name}" if is_array else ""
        found[kind] = found.get(kind, 0) + path.stat().st_size
    return found
