"""Publish artifacts: folders that are either complete or absent. Many workers may publish at once, and the same artifact twice.

    NAME.json            the record: the folder, its provenance, and the size and checksum of each file
    NAME.1f3a9c2e/       the files

Each attempt writes to a new folder and then replaces the record atomically. A killed attempt leaves at most a folder without a record,
which `remove_orphans` removes.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from resmem_lm.errors import DamagedError, UserError
from resmem_lm.workdir.storage import AnyPath, Record, children, read_json, remove, sha256, sizes, upload, write_json

Checksums = bool | tuple[str, ...]  # True: compare all checksums; False: none; names: those of these files


class Attempt:
    """A local folder to write to, and facts to add to the record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: Record = {}


def file_facts(folder: AnyPath) -> dict[str, Record]:
    """Return the size and the checksum of each file in a folder (subfolders excluded)."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in children(folder)}


@contextlib.contextmanager
def publish(parent: AnyPath, name: str, provenance: Record, expected: Iterable[str] = ()) -> Iterator[Attempt]:
    """Publish the files that the block writes as the artifact `name`, unless the block raises an exception.

    Raise UserError if an expected file is missing, because another command may have removed the folder as an orphan.
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
    """Return the record of an artifact, or None if it has another provenance or a file of it is missing or incomplete."""
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
    """Return the path of a record."""
    return parent / f"{name_of(record)}.json"


def name_of(record: Record) -> str:
    """Return the name of an artifact."""
    return record["folder"].rpartition(".")[0]


def require_record(parent: AnyPath, name: str, provenance: Record) -> Record:
    """Return the record of an artifact. Raise UserError if it is missing or damaged, or has another provenance."""
    record = find_record(parent, name, provenance)
    if record is None:
        raise UserError(f"{parent / name} is missing, is damaged or has another provenance: run the same command again")
    return record


def folder_of(parent: AnyPath, record: Record) -> AnyPath:
    """Return the folder of an artifact. Raise UserError if the record names a path outside `parent`."""
    names = [record["folder"], *record["files"]]
    outside = next((name for name in names if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..")), None)
    if outside is not None:
        raise UserError(f"{parent}: a manifest names {outside!r}, which is outside its folder: copy the directory from its source again")
    return parent / record["folder"]


def damaged_files(parent: AnyPath, record: Record, *, checksums: Checksums = False) -> Iterator[str]:
    """Yield a message for each file that is missing or differs from its record in size or, if compared, in checksum."""
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
    """Remove every folder and record of `parent` that does not belong to a kept record."""
    kept = list(kept)
    folders, names = {record["folder"] for record in kept}, {name_of(record) for record in kept}
    for path in children(parent):
        attempt = re.fullmatch(r"(.+)\.[0-9a-f]{8}", path.name)
        if attempt and path.name not in folders:
            remove(path)
            with contextlib.suppress(UserError):
                if read_json(beside := parent / f"{attempt[1]}.json")["folder"] == path.name:
                    remove(beside)
        elif path.suffix == ".json" and path.stem not in names:  # object storage keeps no empty folders
            with contextlib.suppress(UserError):  # damaged, or not a record
                record = read_json(path)
                if "folder" in record and record["folder"] not in folders:
                    remove(path)
