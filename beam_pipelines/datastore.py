"""Documents -> datastore, as a Beam pipeline.

One linear chain, in which no array crosses a stage: each shard of the train split is read, cut into windows, encoded and
published by one worker; only its number goes on; the manifest is written last. A shard is published when it is finished and
not in a later step, because runners finish a whole step before the next: a build that is killed would lose all of it. A
shard that an earlier run finished is not made again.
"""

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from beam_pipelines.runner import open_pipeline
from resmem_lm.checkpoint import load_model
from resmem_lm.datastore import Binding, damaged_files, document_line, open_datastore, shard_folder
from resmem_lm.documents import Document, read_shard, shard_path, shard_paths
from resmem_lm.encode import Encoder, residual_head
from resmem_lm.errors import UserError
from resmem_lm.progress import progress
from resmem_lm.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.windows import WindowSpec
from resmem_lm.workdir import Record, disk_errors, read_json, sha256, stage, write_json


class _Worker:
    """What a worker process keeps for all of its shards."""

    def __init__(self, workdir: Path, binding: Binding) -> None:
        self.vocabulary: Vocabulary = load_vocabulary(workdir)
        model = load_model(workdir / "checkpoints")
        if (model.fingerprint, self.vocabulary.sha256) != (binding.model, binding.vocabulary):
            raise UserError(f"{workdir}: the checkpoint or the vocabulary changed while the datastore was built: build it again")
        self.encoder = Encoder(model, binding.window, residual_head(model, binding.entries, binding.temperatures))


class EncodeShard(beam.DoFn):
    """Shard number -> the finished shard's folder, and its number again."""

    def __init__(self, workdir: str, binding: Binding, shards: int, split_shards: int) -> None:
        self.workdir, self.binding, self.shards, self.split_shards = Path(workdir), binding, shards, split_shards
        self._shared = Shared()
        self._counters = {name: Metrics.counter("resmem", name) for name in ("documents", "tokens", "shards")}

    def setup(self) -> None:
        """Loads the model once a process."""
        self._worker = self._shared.acquire(lambda: _Worker(self.workdir, self.binding))

    def process(self, shard: int) -> Iterator[int]:
        """Encodes one shard in a folder whose name no other attempt uses, and publishes it by one rename."""
        final = shard_folder(self.workdir / "datastore", shard, self.shards)
        attempt = final.with_name(f".tmp-{uuid.uuid4().hex}")
        documents = read_shard(shard_path(self.workdir / "documents", "train", shard, self.split_shards))
        tokens = self._worker.vocabulary.encode_documents(documents)
        with disk_errors(attempt):
            attempt.mkdir()
            try:
                _write_documents(attempt / "documents.jsonl", documents, tokens)
                _write_arrays(attempt, shard, tokens, self._worker.encoder)
                files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(attempt.iterdir())}
                write_json(attempt / "shard.json", {"binding": self.binding.to_json(), "rows": sum(map(len, tokens)), "files": files})
                _publish(attempt, final)
            finally:
                shutil.rmtree(attempt, ignore_errors=True)
        self._counters["documents"].inc(len(documents))
        self._counters["tokens"].inc(sum(map(len, tokens)))
        self._counters["shards"].inc()
        yield shard


def _write_documents(path: Path, documents: list[Document], tokens: list[np.ndarray]) -> None:
    first_row = 0
    with path.open("w", encoding="utf-8") as file:
        for document, document_tokens in zip(documents, tokens, strict=True):
            file.write(document_line(document.id, first_row, len(document_tokens)))
            first_row += len(document_tokens)


def _write_arrays(folder: Path, shard: int, tokens: list[np.ndarray], encoder: Encoder) -> None:
    arrays: dict[str, np.ndarray] = {}
    if not tokens:  # fewer documents than shards: files without rows, as wide as any
        _, encoded = next(encoder([np.zeros(1, np.int32)]))
        for name, value in encoded._asdict().items():
            np.save(folder / f"{name}.npy", value[:0])
    for positions, encoded in encoder(tokens):
        for name, value in encoded._asdict().items():
            if name not in arrays:
                arrays[name] = _create(folder / f"{name}.npy", (sum(map(len, tokens)), *value.shape[1:]), value.dtype)
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise UserError(
                    f"{name} of train shard {shard} has numbers that {value.dtype} cannot hold: the checkpoint may have diverged"
                )
            arrays[name][positions] = value
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A mapped .npy file whose blocks are all allocated, so that a full disk is an error here and not a crash later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _publish(attempt: Path, final: Path) -> None:
    try:
        attempt.rename(final)
    except OSError:
        # Another attempt at the same shard was first; its rows are as good.
        if not (final / "shard.json").exists():
            raise


def _is_finished(folder: Path, binding: Binding) -> bool:
    """Whether a shard is whole and was made by the same model, vocabulary and settings."""
    if not (folder / "shard.json").exists():
        return False
    record = read_json(folder / "shard.json")
    return record["binding"] == binding.to_json() and not list(damaged_files(folder, record["files"], checksums=True))


def write_manifest(workdir: str, binding: Binding, shards: int) -> None:
    """Binds the finished shards together; their order is that of their numbers."""
    folder = Path(workdir) / "datastore"
    with disk_errors(folder):
        records = [read_json(shard_folder(folder, shard, shards) / "shard.json") for shard in range(shards)]
        manifest = {"rows": sum(r["rows"] for r in records), "shards": [{"rows": r["rows"], "files": r["files"]} for r in records]}
        write_json(folder / "manifest.json", binding.to_json() | manifest)


@contextlib.contextmanager
def _shown(folder: Path, shards: int) -> Iterator[None]:
    """Shows how many shards have their record, whichever process writes them."""
    done, over = len(list(folder.glob("shard-*"))), threading.Event()
    with progress("build", total=shards, done=done, unit="shards") as bar:

        def watch() -> None:
            while not over.wait(1.0):
                bar.update(len(list(folder.glob("shard-*"))))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            bar.update(len(list(folder.glob("shard-*"))))


@stage(name="build", after=("documents", "vocabulary", "train"), output="datastore", free=("pipeline_options",))
def build_datastore(
    workdir: Path,
    *,
    window_length: int = 256,
    window_context: int = 64,
    entries: int = 128,
    temperatures: tuple[float, ...] | list[float] = (0.5, 0.7, 1.0, 1.4, 2.0),
    shards: int | None = None,
    pipeline_options: str = "",
) -> Record:
    """Writes WORKDIR/datastore: key, sparse residual and token of every train token.

    Args:
        window_length: tokens the model sees at once (paper: 256).
        window_context: tokens at the head of a window that are context only (paper: 64).
        entries: residual components kept of each row (paper: 128).
        temperatures: for which log-partition values are kept, so that T can be chosen later; 1.0 must be among them.
        shards: the first so many shards of the train split; None takes all. (The paper's datastore is 1% of C4.)
        pipeline_options: Beam's own, such as "--runner=..."; without a runner, Beam's in-process one.

    Returns:
        The manifest's checksum, the number of rows and the bytes on disk.

    Raises:
        UserError: no space left, a checkpoint of another vocabulary, or what a worker reported.
    """
    if 1.0 not in temperatures:
        raise UserError(f"build_datastore.temperatures = {temperatures} must have 1.0 among them: residuals are kept at T = 1")
    folder = workdir / "datastore"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    for orphan in folder.glob(".tmp-*"):
        shutil.rmtree(orphan)
    binding = Binding(
        model=load_model(workdir / "checkpoints").fingerprint,
        vocabulary=load_vocabulary(workdir).sha256,
        window=WindowSpec(window_length, window_context),
        temperatures=tuple(float(t) for t in temperatures),
        entries=entries,
    )
    split_shards = len(shard_paths(workdir, "train"))
    shards = split_shards if shards is None else shards
    if not 1 <= shards <= split_shards:
        raise UserError(
            f"build_datastore.shards = {shards}, but the train split has {split_shards}: take 1 to {split_shards}, or None for all"
        )
    todo = [shard for shard in range(shards) if not _is_finished(shard_folder(folder, shard, shards), binding)]
    for shard in todo:
        shutil.rmtree(shard_folder(folder, shard, shards), ignore_errors=True)
    place = str(workdir.absolute())
    with _shown(folder, shards), open_pipeline(pipeline_options) as pipeline:
        _ = (
            pipeline
            | "Shards" >> beam.Create(todo)
            | "Spread shards" >> beam.Reshuffle()
            | "Encode shards" >> beam.ParDo(EncodeShard(place, binding, shards, split_shards))
            | "Wait for all" >> beam.combiners.ToList()
            | "Write manifest" >> beam.Map(lambda _: write_manifest(place, binding, shards))
        )
    datastore = open_datastore(folder)
    return {"manifest": sha256(folder / "manifest.json"), "rows": datastore.rows, "bytes": datastore.bytes}
