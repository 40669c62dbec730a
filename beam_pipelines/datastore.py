"""Documents -> datastore, as a Beam pipeline.

One unit of work is a shard of documents: it is read, cut into windows, encoded and published by one worker; the manifest is written when
all are there. A shard is published when it is finished and not in a later step, because runners finish a whole step before the next: a
build that is killed would lose all of it. A shard that an earlier run finished is not made again.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from beam_pipelines.work import count, run_units
from resmem_lm.checkpoint import Model, load_model
from resmem_lm.datastore import FILES, Binding, document_line, open_datastore, projection_of, shard_name
from resmem_lm.documents import Document, read_shard, shard_paths
from resmem_lm.encode import Encoder, Head, query_head, residual_head
from resmem_lm.errors import DamagedError, UserError, check_least
from resmem_lm.lock import assert_held
from resmem_lm.projection import principal_components, projection_path, save_projection
from resmem_lm.published import Record, damaged_files, expect, name_of, publish, record_of, record_path, remove_orphans
from resmem_lm.storage import AnyPath, read_json, sha256, to_path, write_json
from resmem_lm.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.windows import WindowSpec
from resmem_lm.workdir import disk_errors, stage

PROJECTED_TOKENS = 20_000  # whose keys tell the principal components
LEAST_TEMPERATURE = 0.2  # below, powers of probabilities leave the range of float32
COUNTERS = ("documents", "tokens", "windows", "window_tokens", "computed_tokens")


class Unit(NamedTuple):
    """A shard of documents, and the name of the shard that it becomes."""

    documents: str
    name: str


class EncodingWorker:
    """What a worker process keeps for all of its shards."""

    def __init__(self, workdir: AnyPath, binding: Binding, head: Head | None = None) -> None:
        self.vocabulary: Vocabulary = load_vocabulary(workdir)
        self.model = load_model(workdir / "checkpoints")
        if (self.model.fingerprint, self.vocabulary.sha256) != (binding.model, binding.vocabulary):
            raise UserError(f"{workdir}: the checkpoint or the vocabulary changed while it was in use: build the datastore again")
        head = head or residual_head(self.model, binding.entries, binding.temperatures)
        self.encoder = Encoder(self.model, binding.window, head, projection_of(workdir / "datastore", binding))


class EncodeShard:
    """Encodes a shard of documents and publishes it."""

    def __init__(self, workdir: str, binding: Binding) -> None:
        self.workdir, self.binding = workdir, binding

    def setup(self) -> EncodingWorker:
        """Loads the model."""
        return EncodingWorker(to_path(self.workdir), self.binding)

    def process(self, unit: Unit, worker: EncodingWorker) -> Iterator[str]:
        """The shard's name, when it is published."""
        workdir, made_from = to_path(self.workdir), self.binding.to_json() | {"documents": unit.documents}
        folder = workdir / "datastore"
        if not record_of(folder, unit.name, made_from):  # a runner may repeat what is finished
            documents = read_shard(workdir / "documents" / unit.documents)
            tokens = worker.vocabulary.encode_documents(documents)
            with disk_errors(folder), publish(folder, unit.name, made_from, FILES) as attempt:
                _write_documents(attempt.folder / "documents.jsonl", documents, tokens)
                counts = write_arrays(attempt.folder, tokens, worker.encoder, unit.documents)
                attempt.facts |= {"rows": counts["tokens"], "counts": counts}
            for name in COUNTERS:
                count(name, counts[name])
        yield unit.name


def _write_documents(path: Path, documents: list[Document], tokens: list[np.ndarray]) -> None:
    first_row = 0
    with path.open("w", encoding="utf-8") as file:
        for document, document_tokens in zip(documents, tokens, strict=True):
            file.write(document_line(document.id, first_row, len(document_tokens)))
            first_row += len(document_tokens)


def write_arrays(folder: Path, tokens: list[np.ndarray], encoder: Encoder, source: str) -> dict[str, int]:
    """Writes what the encoder's head makes of some documents, an array a file, row by row; returns counts.

    Args:
        folder: to write into.
        tokens: of each document.
        encoder: whose head gives a named tuple of arrays.
        source: what the documents were read from, for messages.
    """
    arrays: dict[str, np.ndarray] = {}
    rows = sum(map(len, tokens))
    if not tokens:  # fewer documents than shards: files without rows, as wide as any
        _, encoded = next(encoder([np.zeros(1, np.int32)]))
        for name, value in encoded._asdict().items():
            np.save(folder / f"{name}.npy", value[:0])
    counts = Counter({"documents": len(tokens), "tokens": rows} | dict.fromkeys(COUNTERS[2:], 0))
    for positions, encoded in encoder(tokens, counts):
        for name, value in encoded._asdict().items():
            if name not in arrays:
                arrays[name] = create_array(folder / f"{name}.npy", (rows, *value.shape[1:]), value.dtype)
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise UserError(f"{name} of {source} has numbers that {value.dtype} cannot hold: the checkpoint may have diverged")
            arrays[name][positions] = value
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    return dict(counts)


def create_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A mapped .npy file whose blocks are all allocated, so that a full disk is an error here and not a crash later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def units_of(workdir: AnyPath, shards: int | None) -> list[Unit]:
    """The shards of documents that the datastore remembers: the first so many of the train split, and all that were added."""
    train, added = (shard_paths(workdir, split) for split in ("train", "added"))
    count = len(train) if shards is None else shards
    if not 1 <= count <= len(train):
        raise UserError(f"build_datastore.shards = {shards}, but the train split has {len(train)}: take 1 to {len(train)}, or None for all")
    units = [Unit(path.name, shard_name(number, count)) for number, path in enumerate(train[:count])]
    return units + [Unit(path.name, path.name.removesuffix(".jsonl")) for path in added]


def encode_units(workdir: AnyPath, binding: Binding, units: list[Unit], pipeline_options: str) -> None:
    """Publishes what is not yet published of the units, and writes the manifest of all."""
    folder = workdir / "datastore"
    folder.mkdir(parents=True, exist_ok=True)

    def made_from(unit: Unit) -> Record:
        return binding.to_json() | {"documents": unit.documents}

    # What the manifest says of a shard goes before its own record: a worker that was given up long ago may still write one. Without
    # a record of its own it is made again: that is how a damaged one is told.
    listed = read_json(folder / "manifest.json")["shards"] if (folder / "manifest.json").exists() else []
    in_manifest = {name_of(record): record for record in listed}
    finished: dict[str, Record] = {}
    for unit in units:
        record = in_manifest.get(unit.name)
        if (
            record is None
            or not (folder / f"{unit.name}.json").exists()
            or record["made_from"] != made_from(unit)
            or list(damaged_files(folder, record))
        ):
            record = record_of(folder, unit.name, made_from(unit))
        if record:
            finished[unit.name] = record
    remove_orphans(folder, [*finished.values(), *listed])
    names = [unit.name for unit in units]
    todo = [unit for unit in units if unit.name not in finished]
    run_units("Build", todo, EncodeShard(str(workdir.absolute()), binding), pipeline_options, published=folder, names=names)
    assert_held(workdir)
    write_manifest(folder, binding, [finished.get(unit.name) or expect(folder, unit.name, made_from(unit)) for unit in units])


def write_manifest(folder: AnyPath, binding: Binding, records: list[Record]) -> None:
    """Binds published shards together; what else is published in the folder is removed."""
    with disk_errors(folder):
        write_json(folder / "manifest.json", binding.to_json() | {"rows": sum(r["rows"] for r in records), "shards": records})
        remove_orphans(folder, records)
        for record in records:
            path = record_path(folder, record)
            with contextlib.suppress(DamagedError):
                if read_json(path) == record:
                    continue
            write_json(path, record)


@stage(name="build", after=("documents", "vocabulary", "train"), output="datastore", free=("pipeline_options",))
def build_datastore(
    workdir: AnyPath,
    *,
    window_length: int = 256,
    window_context: int = 64,
    entries: int = 128,
    temperatures: tuple[float, ...] | list[float] = (0.5, 0.7, 1.0, 1.4, 2.0),
    key_dimensions: int | None = None,
    shards: int | None = None,
    pipeline_options: str = "",
) -> Record:
    """Writes WORKDIR/datastore: key, sparse residual and token of every train token.

    Args:
        window_length: tokens the model sees at once (paper: 256).
        window_context: tokens at the head of a window that are context only (paper: 64).
        entries: residual components kept of each row (paper: 128).
        temperatures: for which the powers' sums are kept, so that T can be chosen later; 1.0 must be among them, and none below 0.2.
        key_dimensions: of a key, the principal components of a sample; None keeps all that the model has (as the paper).
        shards: the first so many shards of the train split; None takes all. (The paper's datastore is 1% of C4.)
        pipeline_options: Beam's own, such as "--runner=..."; without a runner, Beam's in-process one.

    Returns:
        The manifest's checksum, the number of rows, the bytes on disk, and what was counted on the way.

    Raises:
        UserError: no space left, a number out of its range, a checkpoint of another vocabulary, or what a worker reported.
    """
    if 1.0 not in temperatures or min(temperatures) < LEAST_TEMPERATURE:
        raise UserError(
            f"build_datastore.temperatures = {temperatures} must have 1.0 among them, at which residuals are kept, and none below "
            f"{LEAST_TEMPERATURE}"
        )
    check_least("build_datastore", 1, entries=entries)
    units = units_of(workdir, shards)  # refused before anything is written
    model, vocabulary = load_model(workdir / "checkpoints"), load_vocabulary(workdir)
    binding = Binding(
        model=model.fingerprint,
        vocabulary=vocabulary.sha256,
        window=WindowSpec(window_length, window_context),
        temperatures=tuple(float(t) for t in temperatures),
        entries=entries,
    )
    if key_dimensions is not None:
        if not 1 <= key_dimensions <= model.config.emb_dim:
            raise UserError(f"build_datastore.key_dimensions = {key_dimensions}: take 1 to {model.config.emb_dim}, or None for all")
        path = projection_path(workdir / "datastore", model.fingerprint, key_dimensions)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk_errors(path.parent):
                save_projection(path, principal_components(_sample_keys(workdir, model, vocabulary, binding.window), key_dimensions))
        binding = dataclasses.replace(binding, key_dimensions=key_dimensions, projection=sha256(path))
    encode_units(workdir, binding, units, pipeline_options)
    return describe(workdir)


def _sample_keys(workdir: AnyPath, model: Model, vocabulary: Vocabulary, window: WindowSpec) -> Float[np.ndarray, "rows emb"]:
    """Of some train tokens: whole documents from every shard in turn."""
    paths, tokens, count = shard_paths(workdir, "train"), [], 0
    for number, path in enumerate(paths, start=1):
        for document in read_shard(path):
            if count * len(paths) >= PROJECTED_TOKENS * number:
                break
            tokens.append(vocabulary.encode(document.text))
            count += len(tokens[-1])
    return np.concatenate([encoded.keys for _, encoded in Encoder(model, window, query_head)(tokens)])


def describe(workdir: AnyPath) -> Record:
    """The result of the stage `build`."""
    folder = workdir / "datastore"
    datastore = open_datastore(folder)
    counts = {name: sum(shard["counts"][name] for shard in datastore.shards) for name in COUNTERS}
    return {"manifest": sha256(folder / "manifest.json"), "rows": datastore.remembered_rows, "bytes": datastore.bytes, "counts": counts}
