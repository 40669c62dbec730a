"""Documents -> datastore, as a Beam pipeline.

One unit of work is a shard of documents: it is read, cut into windows, encoded and published by one worker; the manifest is written when
all are there. A shard is published when it is finished and not in a later step, because runners finish a whole step before the next: a
build that is killed would lose all of it. A shard that an earlier run finished is not made again.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from beam_pipelines.runner import count, run_units
from resmem_lm.errors import DamagedError, UserError, check_least
from resmem_lm.memory.datastore import datastore_summary
from resmem_lm.memory.encode_documents import EncodingWorker, write_arrays
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.projection import principal_components, projection_path, save_projection
from resmem_lm.memory.schema import COUNTERS, FILES, Binding, document_line, shard_name
from resmem_lm.model.checkpoints import Model, load_model
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.artifacts import damaged_files, find_record, name_of, publish, record_path, remove_orphans, require_record
from resmem_lm.workdir.lock import assert_held
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors, stage
from resmem_lm.workdir.storage import AnyPath, Record, read_json, sha256, write_json

PROJECTED_TOKENS = 20_000  # whose keys tell the principal components
LEAST_TEMPERATURE = 0.2  # below, powers of probabilities leave the range of float32


class ShardJob(NamedTuple):
    """A shard of documents, and the name of the shard that it becomes."""

    documents: str
    name: str


class EncodeShard:
    """Encodes a shard of documents and publishes it."""

    def __init__(self, run: Run, binding: Binding) -> None:
        self.run, self.binding = run, binding

    def setup(self) -> EncodingWorker:
        """Loads the model."""
        return EncodingWorker(self.run, self.binding)

    def process(self, unit: ShardJob, worker: EncodingWorker) -> Iterator[str]:
        """The shard's name, when it is published."""
        run, provenance = self.run, self.binding.to_json() | {"documents": unit.documents}
        folder = run.datastore
        if not find_record(folder, unit.name, provenance):  # a runner may repeat what is finished
            documents = read_shard(run.documents / unit.documents)
            tokens = worker.vocabulary.encode_documents(documents)
            with disk_errors(folder), publish(folder, unit.name, provenance, FILES) as attempt:
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


def units_of(run: Run, shards: int | None) -> list[ShardJob]:
    """The shards of documents that the datastore remembers: the first so many of the train split, and all that were added."""
    train, added = (shard_paths(run, split) for split in ("train", "added"))
    count = len(train) if shards is None else shards
    if not 1 <= count <= len(train):
        raise UserError(f"build_datastore.shards = {shards}, but the train split has {len(train)}: take 1 to {len(train)}, or None for all")
    units = [ShardJob(path.name, shard_name(number, count)) for number, path in enumerate(train[:count])]
    return units + [ShardJob(path.name, path.name.removesuffix(".jsonl")) for path in added]


def encode_units(run: Run, binding: Binding, units: list[ShardJob], pipeline_options: str) -> None:
    """Publishes what is not yet published of the units, and writes the manifest of all."""
    folder = run.datastore
    folder.mkdir(parents=True, exist_ok=True)

    def provenance(unit: ShardJob) -> Record:
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
            or record["provenance"] != provenance(unit)
            or list(damaged_files(folder, record))
        ):
            record = find_record(folder, unit.name, provenance(unit))
        if record:
            finished[unit.name] = record
    remove_orphans(folder, [*finished.values(), *listed])
    names = [unit.name for unit in units]
    todo = [unit for unit in units if unit.name not in finished]
    run_units("Build", todo, EncodeShard(run, binding), pipeline_options, published=folder, names=names)
    assert_held(run.path)
    write_manifest(folder, binding, [finished.get(unit.name) or require_record(folder, unit.name, provenance(unit)) for unit in units])


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


@stage(name="build", after=("documents", "vocabulary", "train"), free=("pipeline_options",))
def build_datastore(
    run: Run,
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
    units = units_of(run, shards)  # refused before anything is written
    model, vocabulary = load_model(run.checkpoints), load_vocabulary(run)
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
        path = projection_path(run.datastore, model.fingerprint, key_dimensions)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk_errors(path.parent):
                save_projection(path, principal_components(_sample_keys(run, model, vocabulary, binding.window), key_dimensions))
        binding = dataclasses.replace(binding, key_dimensions=key_dimensions, projection=sha256(path))
    encode_units(run, binding, units, pipeline_options)
    return datastore_summary(run)


def _sample_keys(run: Run, model: Model, vocabulary: Vocabulary, window: WindowSpec) -> Float[np.ndarray, "rows emb"]:
    """Of some train tokens: whole documents from every shard in turn."""
    paths, tokens, count = shard_paths(run, "train"), [], 0
    for number, path in enumerate(paths, start=1):
        for document in read_shard(path):
            if count * len(paths) >= PROJECTED_TOKENS * number:
                break
            tokens.append(vocabulary.encode(document.text))
            count += len(tokens[-1])
    return np.concatenate([encoded.keys for _, encoded in Encoder(model, window, query_head)(tokens)])
