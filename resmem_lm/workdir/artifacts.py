"""Published folders: work that many workers do at once, some of it twice, each piece of it whole or not there.

    NAME.json            names the folder, what it was made from, and the size and checksum of each of its files
    NAME.1f3a9c2e/       the files

An attempt writes into a folder whose name no other attempt uses, and its record last. Records are replaced as a whole, on a disk as in
object storage; so a killed attempt leaves at most a folder that no record names, which `remove_orphans` takes away.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from resmem_lm.errors import DamagedError, UserError
from resmem_lm.workdir.storage import AnyPath, Record, children, read_json, remove, sha256, sizes, upload, write_json


class Attempt:
    """A folder on this machine to write into, and facts for the record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: Record = {}


def file_facts(folder: AnyPath) -> dict[str, Record]:
    """Size and checksum of each file directly in a folder."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in children(folder)}


@contextlib.contextmanager
def publish(parent: AnyPath, name: str, provenance: Record, expected: Iterable[str] = ()) -> Iterator[Attempt]:
    """Publishes under `name` what the block writes; nothing, if it raises, or if not all of the `expected` files are there then.

    They are not if another command took the folder for one that was left behind: what is written into it is lost without an error.
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
                raise UserError(f"{folder} was taken away while it was written: end the other command, and run this one again")
            if not isinstance(folder, Path):
                upload(attempt.folder, folder)
            write_json(parent / f"{name}.json", record)
        except BaseException:
            remove(folder)
            raise


def find_record(parent: AnyPath, name: str, provenance: Record) -> Record | None:
    """The record of what is published under `name`, if it was made from the same and no file is missing or cut."""
    path = parent / f"{name}.json"
    if not path.exists():
        return None
    try:
        record = read_json(path)
        whole = record["provenance"] == provenance and not list(damaged_files(parent, record))
    except (DamagedError, KeyError):
        return None  # it is made again
    return record if whole else None


def record_path(parent: AnyPath, record: Record) -> AnyPath:
    """Where a record itself lies, beside its folder."""
    return parent / f"{name_of(record)}.json"


def name_of(record: Record) -> str:
    """The name under which something is published: that of its folder without the attempt."""
    name: str = record["folder"].rpartition(".")[0]
    return name


def require_record(parent: AnyPath, name: str, provenance: Record) -> Record:
    """The record of what must be published under `name`; UserError if it is not, or was made from something else."""
    record = find_record(parent, name, provenance)
    if record is None:
        raise UserError(f"{parent / name} is missing, damaged or made from something else: run the same command again")
    return record


def folder_of(parent: AnyPath, record: Record) -> AnyPath:
    """Where a record's files lie. UserError if it names a place outside `parent`: it was not written by this package."""
    names = [record["folder"], *record["files"]]
    outside = next((name for name in names if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..")), None)
    if outside is not None:
        raise UserError(
            f"{parent}: a manifest names {outside!r}, which is outside its folder: nothing of it is used; get it from its maker again"
        )
    return parent / record["folder"]


def damaged_files(parent: AnyPath, record: Record, *, checksums: bool = False, names: Iterable[str] | None = None) -> Iterator[str]:
    """A line for every file that is missing, of another size or (if asked) of another content than the record says."""
    folder = folder_of(parent, record)
    found = sizes(folder)
    for name in record["files"] if names is None else names:
        path, expected = folder / name, record["files"][name]
        if name not in found:
            yield f"{path} is missing"
        elif found[name] != expected["bytes"]:
            yield f"{path} has {found[name]} bytes, its manifest says {expected['bytes']}"
        elif checksums and sha256(path) != expected["sha256"]:
            yield f"{path} was altered: its checksum is not that of the manifest"


def remove_orphans(parent: AnyPath, kept: Iterable[Record]) -> None:
    """Removes every folder of an attempt that no kept record names, and records of no kept folder."""
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
            with contextlib.suppress(UserError):  # its folder may never have been there: object storage has none without files
                record = read_json(path)
                if "folder" in record and record["folder"] not in folders:
                    remove(path)
