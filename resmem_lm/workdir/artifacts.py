"""Artifacts: folders that many workers publish at once, some of them twice, each complete or absent.

    NAME.json            the record: the folder, its provenance, and the size and checksum of each file
    NAME.1f3a9c2e/       the files

Each attempt writes into a folder of its own, and its record last. A record is replaced as a whole, on a disk as in object storage. So a
killed attempt leaves at most a folder without a record, which `remove_orphans` removes.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from resmem_lm.errors import DamagedError, UserError
from resmem_lm.workdir.storage import AnyPath, Record, children, read_json, remove, sha256, sizes, upload, write_json

Checksums = bool | tuple[str, ...]  # whether to compare the checksums of all files, or the names of those to compare


class Attempt:
    """A local folder to write into, and facts for the record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: Record = {}


def file_facts(folder: AnyPath) -> dict[str, Record]:
    """Return size and checksum of each file directly in a folder."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in children(folder)}


@contextlib.contextmanager
def publish(parent: AnyPath, name: str, provenance: Record, expected: Iterable[str] = ()) -> Iterator[Attempt]:
    """Publish under `name` what the block writes; nothing if the block raises.

    Args:
        parent: the folder to publish in.
        name: of the artifact.
        provenance: what the artifact is made from.
        expected: files that the block must have written. One is missing if another command has removed the folder as an orphan.

    Raises:
        UserError: an expected file is missing.
    """
    folder = parent / f"{name}.{os.urandom(4).hex()}"
    with contextlib.ExitStack() as stack:
        if isinstance(folder, Path):
            folder.mkdir(parents=True)
            attempt = Attempt(folder)
        else:
            attempt = Attempt(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resmem-"))))
        try:
            yield attempt
            record = {"folder": folder.name, "provenance": provenance, **attempt.facts, "files": file_facts(attempt.folder)}
            if not attempt.folder.exists() or not record["files"].keys() >= set(expected):
                raise UserError(f"{folder} was removed while it was written: end the other command, and run this one again")
            if not isinstance(folder, Path):
                upload(attempt.folder, folder)
            write_json(parent / f"{name}.json", record)
        except BaseException:
            remove(folder)
            raise


def find_record(parent: AnyPath, name: str, provenance: Record) -> Record | None:
    """Return the record of an artifact if its provenance is the given one and every file has its size; otherwise None."""
    path = parent / f"{name}.json"
    if not path.exists():
        return None
    try:
        record = read_json(path)
        whole = record["provenance"] == provenance and not list(damaged_files(parent, record))
    except (DamagedError, KeyError):
        return None
    return record if whole else None


def record_path(parent: AnyPath, record: Record) -> AnyPath:
    """Return the path of a record, which is beside its folder."""
    return parent / f"{name_of(record)}.json"


def name_of(record: Record) -> str:
    """Return the name of an artifact: the name of its folder without the attempt."""
    name: str = record["folder"].rpartition(".")[0]
    return name


def require_record(parent: AnyPath, name: str, provenance: Record) -> Record:
    """Return the record of an artifact.

    Raises:
        UserError: the artifact is missing or damaged, or has another provenance.
    """
    record = find_record(parent, name, provenance)
    if record is None:
        raise UserError(f"{parent / name} is missing, damaged or made from something else: run the same command again")
    return record


def folder_of(parent: AnyPath, record: Record) -> AnyPath:
    """Return the folder of an artifact.

    Raises:
        UserError: the record names a path outside `parent`, which this package never writes.
    """
    names = [record["folder"], *record["files"]]
    outside = next((name for name in names if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..")), None)
    if outside is not None:
        raise UserError(f"{parent}: a manifest names {outside!r}, which is outside its folder: copy the directory from its source again")
    return parent / record["folder"]


def damaged_files(parent: AnyPath, record: Record, *, checksums: Checksums = False) -> Iterator[str]:
    """Yield a line for each file that is missing or differs from its record in size or, where `checksums` asks for it, in content."""
    folder = folder_of(parent, record)
    found = sizes(folder)
    for name, expected in record["files"].items():
        path, compared = folder / name, checksums if isinstance(checksums, bool) else name in checksums
        if name not in found:
            yield f"{path} is missing"
        elif found[name] != expected["bytes"]:
            yield f"{path} has {found[name]} bytes, its manifest has {expected['bytes']}"
        elif compared and sha256(path) != expected["sha256"]:
            yield f"{path} was altered: its checksum differs from the manifest"


def remove_orphans(parent: AnyPath, kept: Iterable[Record]) -> None:
    """Remove the folders that no kept record names, and the records without a kept folder."""
    kept = list(kept)
    folders, names = {record["folder"] for record in kept}, {name_of(record) for record in kept}
    for path in children(parent):
        attempt = re.fullmatch(r"(.+)\.[0-9a-f]{8}", path.name)
        if attempt and path.name not in folders:
            remove(path)
            with contextlib.suppress(UserError):
                if read_json(beside := parent / f"{attempt[1]}.json")["folder"] == path.name:
                    remove(beside)
        elif path.suffix == ".json" and path.stem not in names:
            with contextlib.suppress(UserError):  # object storage has no empty folders, so its folder may be absent
                record = read_json(path)
                if "folder" in record and record["folder"] not in folders:
                    remove(path)
