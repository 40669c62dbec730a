"""The datastore: row-aligned .npy files per shard, bound to what made them by one manifest that is written last.

    datastore/manifest.json
    datastore/shard-00003-of-00016/{keys,residual_ids,residual_values,tokens,...}.npy, documents.jsonl, shard.json

Row i of every array of a shard belongs to the same token. A document's rows are consecutive and in order, so
`documents.jsonl` (`id`, `first_row`, `rows`) tells where each row came from. NumPy alone can read all of it. A shard is a
folder because one rename then publishes all of its files, or none.
"""

import bisect
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from resmem_lm.encode import DatastoreRows
from resmem_lm.errors import UserError
from resmem_lm.windows import WindowSpec
from resmem_lm.workdir import read_json, sha256

FORMAT = "resmem-datastore-1"
KEY_POSITION = "last layer, after the pre-MLP LayerNorm, before the MLP"
ARRAYS = DatastoreRows._fields


@dataclasses.dataclass(frozen=True)
class Binding:
    """What made a datastore. One opened with anything else is refused."""

    model: str
    vocabulary: str
    window: WindowSpec
    temperatures: tuple[float, ...]
    entries: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        value: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "key": KEY_POSITION, **dataclasses.asdict(self)}))
        return value


def shard_folder(folder: Path, shard: int, shards: int) -> Path:
    """shard-00003-of-00016: it exists when all of its files do."""
    return folder / f"shard-{shard:05d}-of-{shards:05d}"


def document_line(name: str, first_row: int, rows: int) -> str:
    """A document's line in documents.jsonl."""
    return json.dumps({"id": name, "first_row": first_row, "rows": rows}) + "\n"


def _mend(folder: Path) -> str:
    return f"delete {folder.parent / 'stages' / 'build.json'} and run `resmem build` again: it makes damaged shards anew"


class Datastore:
    """An opened datastore: arrays over all shards, mapped and not read until asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.shards: list[dict[str, Any]] = manifest["shards"]
        self.offsets = np.concatenate([[0], np.cumsum([shard["rows"] for shard in self.shards])])
        window = WindowSpec(**manifest["window"])
        self.binding = Binding(manifest["model"], manifest["vocabulary"], window, tuple(manifest["temperatures"]), manifest["entries"])

    @property
    def rows(self) -> int:
        """Tokens in all shards."""
        return int(self.offsets[-1])

    @property
    def bytes(self) -> int:
        """Size of all shards' files."""
        return sum(file["bytes"] for shard in self.shards for file in shard["files"].values())

    @functools.cached_property
    def _arrays(self) -> dict[str, list[np.ndarray]]:
        def load(name: str, shard: int) -> np.ndarray:
            path = shard_folder(self.folder, shard, len(self.shards)) / f"{name}.npy"
            array = np.load(path, mmap_mode="r" if self.shards[shard]["rows"] else None, allow_pickle=False)
            if len(array) != self.shards[shard]["rows"]:
                raise UserError(f"{path} has {len(array)} rows, its manifest says {self.shards[shard]['rows']}; {_mend(self.folder)}")
            return array

        return {name: [load(name, shard) for shard in range(len(self.shards))] for name in ARRAYS}

    def shard_arrays(self, name: str) -> list[Shaped[np.ndarray, "rows ..."]]:
        """One array as its shards hold it."""
        return self._arrays[name]

    def take(self, name: str, rows: Int[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The given rows of one array, by their numbers through all shards."""
        arrays = self._arrays[name]
        flat = rows.reshape(-1)
        found = np.empty((len(flat), *arrays[0].shape[1:]), arrays[0].dtype)
        shards = np.searchsorted(self.offsets, flat, side="right") - 1
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            found[mine] = arrays[shard][flat[mine] - self.offsets[shard]]
        return found.reshape(*rows.shape, *found.shape[1:])

    @functools.cache  # noqa: B019 - a datastore lives as long as its command
    def documents(self, shard: int) -> list[dict[str, Any]]:
        """`id`, `first_row` (within the shard) and `rows` of a shard's documents, in order."""
        with (shard_folder(self.folder, shard, len(self.shards)) / "documents.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def locate(self, row: int) -> tuple[int, int, int]:
        """Where a row came from: shard, number of the document in it, and the token's position in the document."""
        shard = int(np.searchsorted(self.offsets, row, side="right") - 1)
        inside = row - int(self.offsets[shard])
        documents = self.documents(shard)
        number = bisect.bisect_right(documents, inside, key=lambda document: document["first_row"]) - 1
        return shard, number, inside - documents[number]["first_row"]

    def damaged(self, *, checksums: bool) -> Iterator[str]:
        """See `damaged_files`, for all shards."""
        for number, shard in enumerate(self.shards):
            yield from damaged_files(shard_folder(self.folder, number, len(self.shards)), shard["files"], checksums=checksums)


def damaged_files(folder: Path, files: dict[str, dict[str, Any]], *, checksums: bool) -> Iterator[str]:
    """A line for every file that is missing, of another size or (if asked) of another content than was recorded."""
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            yield f"{path} is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
        elif checksums and sha256(path) != expected["sha256"]:
            yield f"{path} was altered: its checksum is not that of the manifest"


def open_datastore(folder: Path, *, model: str | None = None, vocabulary: str | None = None, checksums: bool = False) -> Datastore:
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
        raise UserError(f"{problem}; {_mend(folder)}")
    return datastore
