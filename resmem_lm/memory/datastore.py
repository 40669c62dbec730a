"""Open a datastore: row-aligned .npy files per shard, and a manifest, written last, that binds them to the model and vocabulary.

    datastore/manifest.json
    datastore/shard-00003-of-00016.json
    datastore/shard-00003-of-00016.1f3a9c2e/{quantized_keys,residual_ids,quantized_residuals,tokens,...}.npy, documents.jsonl

Row i of every array of a shard belongs to the same token. The rows of a document are consecutive and in order; `documents.jsonl` lists the
documents (`id`, `first_row`, `rows`). NumPy alone can read the arrays. Rows of deleted documents stay in the arrays until `resmem compact`.
The manifest lists them as deleted, and no search returns them.
"""

import bisect
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Bool, Float, Int, Shaped

from resmem_lm.errors import UserError
from resmem_lm.memory.projection import projection_of
from resmem_lm.memory.quantization import dequantize_keys, dequantize_powers
from resmem_lm.memory.schema import COUNTERS, FORMAT, Binding, deleted_first_rows
from resmem_lm.resmem import at_temperature
from resmem_lm.workdir.arrays import ShardedArray, load_array
from resmem_lm.workdir.artifacts import Checksums, damaged_files, folder_of, record_path
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, Record, read_json, sha256

with epy.lazy_imports():
    import numba


def rebuild_hint(folder: AnyPath, record: Record) -> str:
    """Return the instructions to repair a damaged shard."""
    build = folder.parent / "stages" / "build.json"
    return f"delete {record_path(folder, record)} and {build}, and run `resmem build`, which rebuilds this shard"


class Datastore:
    """A datastore, or consecutive shards of one. Arrays are memory-mapped. Rows are numbered from 0 over all of its shards."""

    def __init__(self, folder: AnyPath, manifest: Record) -> None:
        self.folder, self.manifest = folder, manifest
        self.shards: list[Record] = manifest["shards"]
        self.offsets = np.concatenate([[0], np.cumsum([shard["rows"] for shard in self.shards])])
        self.binding = Binding.from_json(manifest)
        self._arrays: dict[str, ShardedArray] = {}
        self._documents: dict[int, list[Record]] = {}

    def part(self, first: int, shards: int) -> "Datastore":
        """Return `shards` consecutive shards, from shard `first` on, as a datastore."""
        return Datastore(self.folder, self.manifest | {"shards": self.shards[first : first + shards]})

    @property
    def rows(self) -> int:
        """Return the number of rows, including deleted ones."""
        return int(self.offsets[-1])

    @property
    def live_rows(self) -> int:
        """Return the number of rows that are not deleted."""
        return self.rows - int(sum(end - begin for begin, end in self._deleted))

    @property
    def bytes(self) -> int:
        """Return the total size of the shards' files."""
        return sum(file["bytes"] for shard in self.shards for file in shard["files"].values())

    @functools.cached_property
    def _deleted(self) -> Int[np.ndarray, "ranges 2"]:
        """Return the ranges [begin, end) of deleted rows, in order."""
        ranges = [
            (offset + first, offset + first + rows)
            for offset, shard in zip(self.offsets, self.shards, strict=False)
            for first, rows in sorted(shard.get("deleted", []))
            if rows
        ]
        return np.array(ranges, np.int64).reshape(-1, 2)

    def is_deleted(self, rows: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        """Return the mask of deleted rows."""
        # The ranges are in order and disjoint, so an odd number of their bounds are at or before a row inside a range.
        return np.searchsorted(self._deleted.ravel(), rows, side="right") % 2 == 1

    def array(self, name: str) -> ShardedArray:
        """Return an array over all shards."""
        if name not in self._arrays:
            self._arrays[name] = ShardedArray([self._load(shard, name) for shard in self.shards])
        return self._arrays[name]

    def _load(self, shard: Record, name: str) -> np.ndarray:
        path = folder_of(self.folder, shard) / f"{name}.npy"
        array = load_array(path)
        if len(array) != shard["rows"]:
            raise UserError(f"{path} has {len(array)} rows, not {shard['rows']} as in its manifest: {rebuild_hint(self.folder, shard)}")
        return array

    def shard_arrays(self, name: str) -> list[Shaped[np.ndarray, "rows ..."]]:
        """Return an array as a list of one part per shard."""
        return self.array(name).parts

    def take(self, name: str, rows: Int[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Return rows of an array."""
        return self.array(name)[rows]

    @functools.cached_property
    def projection(self) -> Float[np.ndarray, "emb dimensions"] | None:
        """Return the projection of the keys, or None. Raise UserError if its file was altered."""
        return projection_of(self.folder, self.binding)

    def keys(self, rows: Int[np.ndarray, "*some"]) -> Float[np.ndarray, "*some emb"]:
        """Return the keys of rows in float32."""
        return dequantize_keys(self.take("quantized_keys", rows), self.take("key_scales", rows))

    def shard_keys(self, shard: int, some: slice = slice(None)) -> Float[np.ndarray, "rows emb"]:
        """Return the keys of the rows `some` of one shard, counted from its first row."""
        return dequantize_keys(*(self.shard_arrays(name)[shard][some] for name in ("quantized_keys", "key_scales")))

    @functools.cached_property
    def key_parts(self) -> tuple[Any, Any]:
        """Return the arguments `quantized_keys` and `scales` of `memory.kernels.distances`."""
        keys, scales = ([np.asarray(part) for part in self.shard_arrays(name)] for name in ("quantized_keys", "key_scales"))
        scales = [part.view(np.uint16) for part in scales]
        for part in (*keys, *scales):
            part.flags.writeable = False  # as mapped arrays are: a typed list accepts one type only
        return numba.typed.List(keys), numba.typed.List(scales)

    def residuals(
        self, rows: Int[np.ndarray, "*some"], temperature: float = 1.0
    ) -> tuple[Int[np.ndarray, "*some entries"], Float[np.ndarray, "*some entries"]]:
        """Return the ids and the values of the residual entries of rows. The entry of the row's own token is first."""
        ids = np.concatenate([self.take("tokens", rows)[..., None], self.take("residual_ids", rows)], axis=-1).astype(np.int32)
        number = self.binding.temperatures.index(temperature)
        values = at_temperature(
            dequantize_powers(np.pad(self.take("quantized_residuals", rows), [(0, 0)] * rows.ndim + [(1, 0)]), temperature),
            jnp.arange(ids.shape[-1]) == 0,
            jnp.asarray(self.take("target_log_probability", rows), jnp.float32),
            jnp.asarray(self.take("log_power_sums", rows)[..., number], jnp.float32),
            temperature,
        )
        return ids, np.asarray(values)

    def documents(self, shard: int) -> list[Record]:
        """Return `id`, `first_row` (counted within the shard) and `rows` of each document of a shard, in order."""
        if shard not in self._documents:
            self.part(shard, 1).check_files("documents.jsonl")
            with (folder_of(self.folder, self.shards[shard]) / "documents.jsonl").open("r", encoding="utf-8") as file:
                self._documents[shard] = [json.loads(line) for line in file]
        return self._documents[shard]

    def deleted_documents(self, shard: int) -> set[str]:
        """Return the ids of the deleted documents whose rows are still in a shard."""
        first_rows = deleted_first_rows(self.shards[shard])
        return {document["id"] for document in self.documents(shard) if document["first_row"] in first_rows} if first_rows else set()

    def locate(self, row: int) -> tuple[int, str, int]:
        """Return the shard of a row, its document's id, and the position of its token in the document."""
        shard = int(np.searchsorted(self.offsets, row, side="right") - 1)
        inside = row - int(self.offsets[shard])
        documents = self.documents(shard)
        number = bisect.bisect_right(documents, inside, key=lambda document: document["first_row"]) - 1
        return shard, documents[number]["id"], inside - documents[number]["first_row"]

    def damaged(self, *, checksums: Checksums) -> Iterator[str]:
        """Yield a message with the repair for each file that differs from the manifest."""
        for shard in self.shards:
            for problem in damaged_files(self.folder, shard, checksums=checksums):
                yield f"{problem}; {rebuild_hint(self.folder, shard)}"
        try:
            _ = self.projection
        except UserError as error:
            yield str(error)

    def check_files(self, *names: str) -> None:
        """Raise UserError if one of the named files of any shard differs from its checksum."""
        for shard in self.shards:
            for problem in damaged_files(self.folder, shard, checksums=names):
                raise UserError(f"{problem}; {rebuild_hint(self.folder, shard)}")


def open_datastore(folder: AnyPath, *, model: str | None = None, vocabulary: str | None = None, checksums: Checksums = False) -> Datastore:
    """Open a finished datastore after checking the size of every file, and the checksums that `checksums` selects.

    Raise UserError if it is unfinished or damaged, or if it was built with another model (a fingerprint) or vocabulary (a checksum).
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} has no finished datastore: run `resmem build`")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has the format {manifest.get('format')!r}, this version reads {FORMAT!r}: run `resmem build` again")
    for what, used in (("model", model), ("vocabulary", vocabulary)):
        if used is not None and manifest[what] != used:
            raise UserError(f"{folder} was built with another {what}: run `resmem build` again, or use the {what} that it was built with")
    datastore = Datastore(folder, manifest)
    for problem in datastore.damaged(checksums=checksums):
        raise UserError(problem)
    return datastore


def datastore_summary(run: Run) -> Record:
    """Return the result of the stage `build`."""
    datastore = open_datastore(run.datastore)
    counts = {name: sum(shard["counts"][name] for shard in datastore.shards) for name in COUNTERS}
    return {"manifest": sha256(run.datastore / "manifest.json"), "rows": datastore.live_rows, "bytes": datastore.bytes, "counts": counts}
