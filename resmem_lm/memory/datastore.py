"""The datastore: row-aligned .npy files per shard, bound to what made them by one manifest that is written last.

    datastore/manifest.json
    datastore/shard-00003-of-00016.json
    datastore/shard-00003-of-00016.1f3a9c2e/{quantized_keys,residual_ids,quantized_residuals,tokens,...}.npy, documents.jsonl

Row i of every array of a shard belongs to the same token. A document's rows are consecutive and in order, so
`documents.jsonl` (`id`, `first_row`, `rows`) tells where each row came from. NumPy alone can read all of it. Rows of deleted
documents stay where they are until `resmem compact`, but the manifest names them and nothing returns them.
"""

import bisect
import dataclasses
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
from resmem_lm.memory.schema import COUNTERS, FORMAT, Binding
from resmem_lm.memory.sharded import ShardedArray, load_array
from resmem_lm.resmem import at_temperature
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.artifacts import damaged_files, folder_of, record_path
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, Record, read_json, sha256

with epy.lazy_imports():
    import numba


def rebuild_hint(folder: AnyPath, record: Record) -> str:
    """What to do about a damaged shard."""
    return (
        f"delete {record_path(folder, record)} and {folder.parent / 'stages' / 'build.json'} and run `resmem build` again: "
        "it makes this shard anew"
    )


class Datastore:
    """An opened datastore, or some consecutive shards of one: arrays over all shards, mapped and not read until asked for."""

    def __init__(self, folder: AnyPath, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.shards: list[Record] = manifest["shards"]
        self.offsets = np.concatenate([[0], np.cumsum([shard["rows"] for shard in self.shards])])
        window = WindowSpec(**manifest["window"])
        made = {field.name: manifest[field.name] for field in dataclasses.fields(Binding)}
        self.binding = Binding(**made | {"window": window, "temperatures": tuple(manifest["temperatures"])})
        self._arrays: dict[str, ShardedArray] = {}
        self._documents: dict[int, list[dict[str, Any]]] = {}

    def part(self, first: int, shards: int) -> "Datastore":
        """So many shards from the `first` on, whose rows are counted anew."""
        return Datastore(self.folder, self.manifest | {"shards": self.shards[first : first + shards]})

    @property
    def rows(self) -> int:
        """Tokens in all shards, deleted ones included."""
        return int(self.offsets[-1])

    @property
    def live_rows(self) -> int:
        """Tokens that can be neighbors."""
        return self.rows - int(sum(end - begin for begin, end in self._deleted))

    @property
    def bytes(self) -> int:
        """Size of all shards' files."""
        return sum(file["bytes"] for shard in self.shards for file in shard["files"].values())

    @functools.cached_property
    def _deleted(self) -> Int[np.ndarray, "ranges 2"]:
        """Ranges of deleted rows, [begin, end), in order."""
        ranges = [
            (offset + first, offset + first + rows)
            for offset, shard in zip(self.offsets, self.shards, strict=False)
            for first, rows in sorted(shard.get("deleted", []))
            if rows
        ]
        return np.array(ranges, np.int64).reshape(-1, 2)

    def is_deleted(self, rows: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        """Which of some rows are of deleted documents."""
        if not len(self._deleted):
            return np.zeros(rows.shape, bool)
        place = np.searchsorted(self._deleted[:, 0], rows, side="right") - 1
        return (place >= 0) & (rows < self._deleted[np.maximum(place, 0), 1])

    def array(self, name: str) -> ShardedArray:
        """One array over all shards."""
        if name not in self._arrays:
            self._arrays[name] = self._load(name)
        return self._arrays[name]

    def _load(self, name: str) -> ShardedArray:
        def load(shard: Record) -> np.ndarray:
            path = folder_of(self.folder, shard) / f"{name}.npy"
            array = load_array(path)
            if len(array) != shard["rows"]:
                raise UserError(f"{path} has {len(array)} rows, its manifest says {shard['rows']}; {rebuild_hint(self.folder, shard)}")
            return array

        return ShardedArray([load(shard) for shard in self.shards])

    def shard_arrays(self, name: str) -> list[Shaped[np.ndarray, "rows ..."]]:
        """One array as its shards hold it."""
        return self.array(name).parts

    def take(self, name: str, rows: Int[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The given rows of one array, by their numbers through all shards."""
        return self.array(name)[rows]

    @functools.cached_property
    def projection(self) -> Float[np.ndarray, "emb dimensions"] | None:
        """What makes a key of the model's activations; None where these are the key. UserError if it was altered."""
        return projection_of(self.folder, self.binding)

    def keys(self, rows: Int[np.ndarray, "*some"]) -> Float[np.ndarray, "*some emb"]:
        """The given rows' keys."""
        return dequantize_keys(self.take("quantized_keys", rows), self.take("key_scales", rows))

    @functools.cached_property
    def key_parts(self) -> tuple[Any, Any]:
        """The keys' codes and the bits of their scales by shard, as `resmem_lm.loops` takes them."""
        parts = ([np.asarray(part) for part in self.shard_arrays(name)] for name in ("quantized_keys", "key_scales"))
        codes, scales = next(parts), [part.view(np.uint16) for part in next(parts)]
        for part in (*codes, *scales):
            part.flags.writeable = False  # mapped ones are; a list has arrays of one kind
        return numba.typed.List(codes), numba.typed.List(scales)

    def residuals(
        self, rows: Int[np.ndarray, "*some"], temperature: float = 1.0
    ) -> tuple[Int[np.ndarray, "*some entries"], Float[np.ndarray, "*some entries"]]:
        """Ids and values of the given rows' residual entries, the token's own first."""
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

    def shard_keys(self, shard: int, some: slice = slice(None)) -> Float[np.ndarray, "rows emb"]:
        """Some rows' keys of one shard."""
        return dequantize_keys(*(self.shard_arrays(name)[shard][some] for name in ("quantized_keys", "key_scales")))

    def documents(self, shard: int) -> list[dict[str, Any]]:
        """`id`, `first_row` (within the shard) and `rows` of a shard's documents, in order."""
        if shard not in self._documents:
            self.part(shard, 1).check_files("documents.jsonl")
            with (folder_of(self.folder, self.shards[shard]) / "documents.jsonl").open("r", encoding="utf-8") as file:
                self._documents[shard] = [json.loads(line) for line in file]
        return self._documents[shard]

    def locate(self, row: int) -> tuple[int, str, int]:
        """Where a row came from: its shard, its document's id, and the token's position in the document."""
        shard = int(np.searchsorted(self.offsets, row, side="right") - 1)
        inside = row - int(self.offsets[shard])
        documents = self.documents(shard)
        number = bisect.bisect_right(documents, inside, key=lambda document: document["first_row"]) - 1
        return shard, documents[number]["id"], inside - documents[number]["first_row"]

    def damaged(self, *, checksums: bool) -> Iterator[str]:
        """A line for each file that is not as the manifest says, and what to do about it."""
        for shard in self.shards:
            for problem in damaged_files(self.folder, shard, checksums=checksums):
                yield f"{problem}; {rebuild_hint(self.folder, shard)}"
        try:
            _ = self.projection
        except UserError as error:
            yield str(error)

    def deleted_documents(self, shard: int) -> set[str]:
        """Ids of a shard's documents whose rows are deleted and still in its arrays."""
        first_rows = {first for first, rows in self.shards[shard].get("deleted", []) if rows}
        return {document["id"] for document in self.documents(shard) if document["first_row"] in first_rows} if first_rows else set()

    def check_files(self, *names: str) -> None:
        """Reads some files of every shard and compares their checksums; UserError if one was altered."""
        for shard in self.shards:
            for problem in damaged_files(self.folder, shard, checksums=True, names=names):
                raise UserError(f"{problem}; {rebuild_hint(self.folder, shard)}")


def open_datastore(folder: AnyPath, *, model: str | None = None, vocabulary: str | None = None, checksums: bool = False) -> Datastore:
    """Opens a finished datastore.

    Args:
        folder: where manifest.json lies.
        model: fingerprint of the model in use; another one's datastore is refused.
        vocabulary: checksum of the vocabulary in use, likewise.
        checksums: read every file and compare; otherwise sizes only.

    Raises:
        UserError: not finished, of another model or vocabulary, or damaged.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} has no finished datastore: run `resmem build`")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has the format {manifest.get('format')!r}, this version reads {FORMAT!r}: build it again")
    datastore = Datastore(folder, manifest)
    for what, mine in (("model", model), ("vocabulary", vocabulary)):
        if mine is not None and manifest[what] != mine:
            command = "the checkpoint" if what == "model" else "the vocabulary"
            raise UserError(f"{folder} was made with another {what} than {command} in use: build it again, or use the one it was made with")
    for problem in datastore.damaged(checksums=checksums):
        raise UserError(problem)
    return datastore


def datastore_summary(run: Run) -> Record:
    """The result of the stage `build`."""
    folder = run.datastore
    datastore = open_datastore(folder)
    counts = {name: sum(shard["counts"][name] for shard in datastore.shards) for name in COUNTERS}
    return {"manifest": sha256(folder / "manifest.json"), "rows": datastore.live_rows, "bytes": datastore.bytes, "counts": counts}
