"""Build the datastore from documents, as a Beam pipeline.

A unit of work is a shard of documents. One worker reads it, cuts it into windows, encodes them and publishes the result. Publishing is not
a step of its own: runners finish a whole step before the next, so a killed build would lose everything. A finished shard is not rebuilt.
The manifest is written when all shards are published.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beam_pipelines.runner import count, run_units
from resmem_lm.errors import UserError, check_least
from resmem_lm.memory.datastore import datastore_summary
from resmem_lm.memory.encode_documents import EncodingWorker, write_arrays
from resmem_lm.memory.fit_projection import project_keys
from resmem_lm.memory.manifest import finished_shards, listed_shards, write_manifest
from resmem_lm.memory.schema import COUNTERS, FILES, Binding, document_line, shard_name
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.artifacts import find_record, publish, remove_orphans, require_record
from resmem_lm.workdir.lock import assert_held
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors, stage
from resmem_lm.workdir.storage import Record

LEAST_TEMPERATURE = 0.2  # below it, powers of probabilities leave the range of float32


class ShardJob(NamedTuple):
    """A shard of documents, and the name of its shard of the datastore."""

    documents: str
    name: str

    def provenance(self, binding: Binding) -> Record:
        """Return the provenance of the shard of the datastore."""
        return binding.to_json() | {"documents": self.documents}


@dataclasses.dataclass(frozen=True)
class EncodeShard:
    """Encode a shard of documents and publish it."""

    run: Run
    binding: Binding

    def setup(self) -> EncodingWorker:
        """Load the model."""
        return EncodingWorker(self.run, self.binding)

    def process(self, unit: ShardJob, worker: EncodingWorker) -> Iterator[str]:
        """Yield the shard's name once it is published."""
        folder, provenance = self.run.datastore, unit.provenance(self.binding)
        if not find_record(folder, unit.name, provenance):  # a runner may repeat finished work
            documents = read_shard(self.run.documents / unit.documents)
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
    """Return the first `shards` shards of the train split and all added shards. Raise UserError if there are fewer."""
    train, added = (shard_paths(run, split) for split in ("train", "added"))
    count = len(train) if shards is None else shards
    if not 1 <= count <= len(train):
        raise UserError(f"build_datastore.shards = {shards}, but the train split has {len(train)}: take 1 to {len(train)}, or None for all")
    units = [ShardJob(path.name, shard_name(number, count)) for number, path in enumerate(train[:count])]
    return units + [ShardJob(path.name, path.name.removesuffix(".jsonl")) for path in added]


def encode_units(run: Run, binding: Binding, units: list[ShardJob], pipeline_options: str) -> None:
    """Publish the shards that are missing, and write the manifest of all."""
    folder = run.datastore
    folder.mkdir(parents=True, exist_ok=True)
    provenances = {unit.name: unit.provenance(binding) for unit in units}
    listed = listed_shards(folder)
    finished = finished_shards(folder, listed, provenances)
    remove_orphans(folder, [*finished.values(), *listed])
    todo = [unit for unit in units if unit.name not in finished]
    run_units("Build", todo, EncodeShard(run, binding), pipeline_options, published=folder, names=list(provenances))
    assert_held(run.path)
    records = [finished.get(name) or require_record(folder, name, provenance) for name, provenance in provenances.items()]
    write_manifest(folder, binding, records)


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
    """Write WORKDIR/datastore: the key, the sparse residual and the token of every train token.

    Args:
        window_length: tokens in a window of the model (paper: 256).
        window_context: tokens at the start of a window that serve as context only (paper: 64).
        entries: components kept of each residual (paper: 128).
        temperatures: the choices of T for the evaluation; 1.0 must be one of them, and none may be below 0.2.
        key_dimensions: principal components kept of each key; None keeps the whole key (as in the paper).
        shards: how many shards of the train split to encode, from the first; None for all. (The paper's datastore is 1% of C4.)
        pipeline_options: Beam's options, such as "--runner=..."; without a runner, Beam's in-process runner.

    Returns:
        The manifest's checksum, the number of rows, the bytes on disk, and the counters of the encoding.

    Raises:
        UserError: no space left, a number out of its range, another vocabulary than the checkpoint's, or an error in a worker.
    """
    if 1.0 not in temperatures or min(temperatures) < LEAST_TEMPERATURE:
        raise UserError(
            f"build_datastore.temperatures = {temperatures}: include 1.0, the temperature of the stored residuals, and none below "
            f"{LEAST_TEMPERATURE}"
        )
    check_least("build_datastore", 1, entries=entries)
    units = units_of(run, shards)  # raises before anything is written
    model, vocabulary = load_model(run.checkpoints), load_vocabulary(run)
    binding = Binding(
        model=model.fingerprint,
        vocabulary=vocabulary.sha256,
        window=WindowSpec(window_length, window_context),
        temperatures=tuple(float(t) for t in temperatures),
        entries=entries,
    )
    if key_dimensions is not None:
        binding = project_keys(run, model, vocabulary, binding, key_dimensions)
    encode_units(run, binding, units, pipeline_options)
    return datastore_summary(run)
