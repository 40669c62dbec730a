"""Documents -> datastore, as a Beam pipeline.

    python -m beam_pipelines.build_datastore --gin_file=configs/demo.gin --workdir=runs/demo \\
        --pipeline_options="--runner=PortableRunner --job_endpoint=..."

One linear chain, in which no array crosses a stage: each shard of the train split is read, cut into windows, encoded and
written to temporary files by one worker; small records go on; files get their names; the manifest is written last.
A shard that an earlier run finished is not made again.
"""

import contextlib
import json
import os
import re
import shlex
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared

from resmem_lm.checkpoint import load_model
from resmem_lm.datastore import ARRAYS, Binding, array_path, documents_path, open_datastore, record_path
from resmem_lm.documents import read_shard, shard_path, shard_paths
from resmem_lm.encode import Encoder, residual_head
from resmem_lm.errors import UserError
from resmem_lm.progress import progress
from resmem_lm.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.windows import WindowSpec
from resmem_lm.workdir import Record, disk_errors, read_json, sha256, stage, write_json

LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


class _Worker:
    """What a worker process keeps for all of its shards."""

    def __init__(self, workdir: Path, binding: Binding) -> None:
        self.vocabulary: Vocabulary = load_vocabulary(workdir)
        model = load_model(workdir / "checkpoints")
        if (model.fingerprint, self.vocabulary.sha256) != (binding.model, binding.vocabulary):
            raise UserError(f"{workdir}: the checkpoint or the vocabulary changed while the datastore was built: build it again")
        self.encoder = Encoder(model, binding.window, residual_head(model, binding.entries, binding.temperatures))


class EncodeShard(beam.DoFn):
    """Shard number -> a record of the temporary files that hold its rows."""

    def __init__(self, workdir: str, binding: Binding, shards: int) -> None:
        self.workdir, self.binding, self.shards = Path(workdir), binding, shards
        self._shared = Shared()
        self._counters = {name: Metrics.counter("resmem", name) for name in ("documents", "tokens", "shards")}

    def setup(self) -> None:
        """Loads the model once a process."""
        self._worker = self._shared.acquire(lambda: _Worker(self.workdir, self.binding))

    def process(self, shard: int) -> Iterator[Record]:
        """Encodes one shard into files whose names no other attempt uses."""
        folder, attempt = self.workdir / "datastore", uuid.uuid4().hex
        documents = read_shard(shard_path(self.workdir / "documents", "train", shard, self.shards))
        tokens = self._worker.vocabulary.encode_documents(documents)
        lengths = [len(t) for t in tokens]
        rows = sum(lengths)
        files: dict[str, str] = {}

        def temporary(final: Path) -> Path:
            files[final.name] = f".tmp-{attempt}-{final.name}"
            return folder / files[final.name]

        with disk_errors(folder):
            first_rows = np.concatenate([[0], np.cumsum(lengths)])
            with temporary(documents_path(folder, shard, self.shards)).open("w", encoding="utf-8") as file:
                for document, first_row, length in zip(documents, first_rows, lengths, strict=False):
                    file.write(json.dumps({"id": document.id, "first_row": int(first_row), "rows": length}) + "\n")
            arrays: dict[str, np.ndarray] = {}
            for positions, encoded in self._worker.encoder(tokens):
                for name, value in zip(ARRAYS, encoded, strict=True):
                    if name not in arrays:
                        arrays[name] = _create(
                            temporary(array_path(folder, name, shard, self.shards)), (rows, *value.shape[1:]), value.dtype
                        )
                    arrays[name][positions] = value
            for name, array in arrays.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise UserError(
                        f"{name} of train shard {shard} has numbers that {array.dtype} cannot hold: the checkpoint may have diverged"
                    )
                array.flush()  # type: ignore[attr-defined]
            del arrays
        self._counters["documents"].inc(len(documents))
        self._counters["tokens"].inc(rows)
        self._counters["shards"].inc()
        sizes = {final: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for final, name in files.items()}
        yield {"shard": shard, "rows": rows, "temporary": files, "files": sizes}


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A mapped .npy file whose blocks are all allocated, so that a full disk is an error here and not a crash later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


class FinishShard(beam.DoFn):
    """Gives a shard's files their names, then writes its record."""

    def __init__(self, workdir: str, shards: int) -> None:
        self.folder, self.shards = Path(workdir) / "datastore", shards

    def process(self, record: Record) -> Iterator[int]:
        """Renaming twice is renaming once: another attempt may have done it."""
        path = record_path(self.folder, record["shard"], self.shards)
        with disk_errors(self.folder):
            for final, temporary in record["temporary"].items():
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / temporary).replace(self.folder / final)
            write_json(path, {"rows": record["rows"], "files": record["files"]})
        yield record["shard"]


def _shard_is_finished(folder: Path, shard: int, shards: int) -> bool:
    path = record_path(folder, shard, shards)
    if not path.exists():
        return False
    return all(
        (folder / name).exists() and (folder / name).stat().st_size == file["bytes"] and sha256(folder / name) == file["sha256"]
        for name, file in read_json(path)["files"].items()
    )


def write_manifest(workdir: str, binding: Binding, shards: int) -> None:
    """Binds the finished shards together; their order is that of their numbers."""
    folder = Path(workdir) / "datastore"
    with disk_errors(folder):
        records = [read_json(record_path(folder, shard, shards)) for shard in range(shards)]
        write_json(folder / "manifest.json", {**binding.to_json(), "rows": sum(r["rows"] for r in records), "shards": records})


@contextlib.contextmanager
def _shown(folder: Path, shards: int) -> Iterator[None]:
    """Shows how many shards have their record, whichever process writes them."""
    done, over = len(list(folder.glob("shard-*.json"))), threading.Event()
    with progress("build", total=shards, done=done, unit="shards") as bar:

        def watch() -> None:
            while not over.wait(1.0):
                bar.update(len(list(folder.glob("shard-*.json"))))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            bar.update(len(list(folder.glob("shard-*.json"))))


def _pipeline_options(options: str) -> PipelineOptions:
    arguments = shlex.split(options)
    if not any(argument.startswith("--runner") for argument in arguments):
        arguments.append(f"--runner={LOCAL_RUNNER}")
    return PipelineOptions(arguments)


@stage(name="build", after=("documents", "vocabulary", "train"), output="datastore", free=("pipeline_options",))
def build_datastore(
    workdir: Path,
    *,
    window_length: int = 256,
    window_context: int = 64,
    entries: int = 128,
    temperatures: tuple[float, ...] | list[float] = (0.5, 0.7, 1.0, 1.4, 2.0),
    pipeline_options: str = "",
) -> Record:
    """Writes WORKDIR/datastore: key, sparse residual and token of every train token.

    Args:
        window_length: tokens the model sees at once (paper: 256).
        window_context: tokens at the head of a window that are context only (paper: 64).
        entries: residual components kept of each row (paper: 128).
        temperatures: for which log-partition values are kept, so that T can be chosen later; 1.0 must be among them.
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
        orphan.unlink()
    binding = Binding(
        model=load_model(workdir / "checkpoints").fingerprint,
        vocabulary=load_vocabulary(workdir).sha256,
        window=WindowSpec(window_length, window_context),
        temperatures=tuple(float(t) for t in temperatures),
        entries=entries,
    )
    shards = len(shard_paths(workdir, "train"))
    todo = []
    for shard in range(shards):
        if not _shard_is_finished(folder, shard, shards):
            record_path(folder, shard, shards).unlink(missing_ok=True)
            todo.append(shard)
    place = str(workdir.absolute())
    try:
        with _shown(folder, shards), beam.Pipeline(options=_pipeline_options(pipeline_options)) as pipeline:
            _ = (
                pipeline
                | "Shards" >> beam.Create(todo)
                | "Spread shards" >> beam.Reshuffle()
                | "Encode shards" >> beam.ParDo(EncodeShard(place, binding, shards))
                | "Keep attempts apart" >> beam.Reshuffle()
                | "Name files" >> beam.ParDo(FinishShard(place, shards))
                | "Wait for all" >> beam.combiners.ToList()
                | "Write manifest" >> beam.Map(lambda _: write_manifest(place, binding, shards))
            )
    except Exception as error:
        # Beam wraps a worker's exception in its own, with the traceback as text.
        reported = re.search(r"UserError: (.*?)(?: \[while running.*)?$", str(error), re.MULTILINE)
        if reported:
            raise UserError(reported[1]) from error
        raise
    datastore = open_datastore(folder)
    return {"manifest": sha256(folder / "manifest.json"), "rows": datastore.rows, "bytes": datastore.bytes}


if __name__ == "__main__":
    from resmem_lm.main import main

    sys.exit(main(["build", *sys.argv[1:]]))
