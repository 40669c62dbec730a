"""Read and write files on this machine or in object storage (gs://, s3://, ...) through fsspec.

Object storage cannot rename or memory-map files. So an artifact is published by writing one small file last, which is atomic in both kinds
of storage. `local_path` copies a file to this machine if it must be memory-mapped or a library needs its path.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from resmem_lm.errors import DamagedError, UserError

AnyPath = Path | UPath
Record = dict[str, Any]  # a JSON object
CHECKSUM = "checksum"


def to_path(name: str | AnyPath) -> AnyPath:
    """Return the path of a name or an address. Raise UserError if fsspec cannot open this kind of storage."""
    if not isinstance(name, str):
        return name
    if address := re.match(r"([a-z][a-z0-9]+):/(?!/)", name):
        raise UserError(f"{name}: an address of {address[1]} needs two slashes: write {address[1]}://{name[address.end() :]}")
    if "://" not in name:
        return with_home(name)
    try:
        path = UPath(name, use_listings_cache=False)  # other processes also write there
        path = UPath(path.fs.unstrip_protocol(path.path), use_listings_cache=False)  # s3a:// becomes s3://, as in listings
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: {reason}: install the package of that storage (gcsfs for gs://, s3fs for s3://)") from None
    return Path(path.path) if path.protocol in ("file", "local") else path


def with_home(name: str) -> Path:
    """Return a local path with a leading ~ expanded. Shells do not expand it in --workdir=~/run."""
    return Path(name).expanduser() if name == "~" or name.startswith("~/") else Path(name)


def is_local(path: AnyPath) -> bool:
    """Return whether a path is on this machine."""
    return isinstance(path, Path)


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Write a file atomically: readers see either the old or the new content."""
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def with_checksum(value: Record) -> bytes:
    """Return a JSON object with its checksum as bytes."""

    def text(fields: Record) -> bytes:
        return json.dumps(fields, indent=2).encode() + b"\n"

    return text(value | {CHECKSUM: hashlib.sha256(text(value)).hexdigest()})


def write_json(path: AnyPath, value: Record) -> None:
    """Write a JSON object atomically with a checksum, so that `read_json` detects any changed byte."""
    write_bytes(path, with_checksum(value))


def read_json(path: AnyPath) -> Record:
    """Return a JSON object that `write_json` wrote.

    Raises:
        DamagedError: the file is missing or was altered.
        UserError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
        value = {name: field for name, field in json.loads(content.decode()).items() if name != CHECKSUM}
        whole = content == with_checksum(value)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: run the stage that writes it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): make it readable, and run the same command again") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}): delete it and run its stage again") from None
    if not whole:
        raise DamagedError(f"{path} is damaged (its checksum does not match its content): delete it and run its stage again")
    return value


def sha256(path: AnyPath) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        opened: Any = file  # fsspec's files also have the methods that hashlib needs
        return hashlib.file_digest(opened, "sha256").hexdigest()


def remove(path: AnyPath) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if isinstance(path, Path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def files_below(folder: AnyPath) -> list[AnyPath]:
    """Return every file below a folder, in order. Raise PermissionError if a folder cannot be read."""
    if isinstance(folder, Path):
        found = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=_refuse_unreadable) for name in names]
        return sorted((path for path in found if path.is_file()), key=str)
    return [to_path(folder.fs.unstrip_protocol(name)) for name in sorted(folder.fs.find(folder.path))]


def _refuse_unreadable(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise error


def sizes(folder: AnyPath) -> dict[str, int]:
    """Return the size in bytes of each file in a folder, from one listing. Return {} if the folder does not exist."""
    if not isinstance(folder, Path):
        return {name.rpartition("/")[2]: facts["size"] for name, facts in folder.fs.find(folder.path, maxdepth=1, detail=True).items()}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    return {}


def children(folder: AnyPath, pattern: str = "*") -> list[AnyPath]:
    """Return the entries of a folder in order of names. Return [] if the folder does not exist."""
    found: list[AnyPath] = [path for path in folder.glob(pattern)] if folder.exists() else []  # noqa: C416 - mypy needs one type of path
    return sorted(found, key=str)


def inside(file: AnyPath, folder: AnyPath) -> str:
    """Return the path of a file relative to a parent folder, with forward slashes."""
    return str(file).removeprefix(str(folder)).replace(os.sep, "/").lstrip("/")


def glob(pattern: str) -> list[AnyPath]:
    """Return the paths in object storage that match a pattern."""
    path = to_path(pattern)
    if isinstance(path, Path) or path.exists():
        return [path]
    return [to_path(path.fs.unstrip_protocol(name)) for name in sorted(path.fs.glob(path.path))]


def upload(folder: Path, target: AnyPath, *, last: str = "") -> None:
    """Copy the files of a local folder to `target` in object storage. Files named `last` are copied after the others."""
    for file in sorted(files_below(folder), key=lambda file: file.name == last):
        place = target / inside(file, folder)
        assert isinstance(place, UPath)
        place.fs.put_file(str(file), place.path)


def download(folder: UPath, target: Path) -> None:
    """Copy the files of a folder in object storage to a local folder."""
    for file in files_below(folder):
        assert isinstance(file, UPath)
        place = target / inside(file, folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.fs.get_file(file.path, str(place))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="resmem-")


def local_path(path: AnyPath) -> Path:
    """Return a local path unchanged. Copy any other path to this machine and return the copy, which is deleted when the process ends."""
    if isinstance(path, Path):
        return path
    files = [] if path.is_file() else files_below(path)
    place = _place(path)
    if not files:
        return _copy(path, place / path.name)
    for file in files:
        _copy(file, place / inside(file, path))
    return place


def _place(path: AnyPath) -> Path:
    return Path(_scratch().name, hashlib.sha256(str(path).encode()).hexdigest()[:16])


def drop_copy(path: AnyPath) -> None:
    """Delete the copy that `local_path` created."""
    if not isinstance(path, Path):
        shutil.rmtree(_place(path), ignore_errors=True)


def _copy(file: AnyPath, here: Path) -> Path:
    assert isinstance(file, UPath)
    known = here.with_name(f".{here.name}.{file.fs.ukey(file.path)}")  # its name changes with the content
    if not known.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        temporary = here.with_name(f".{here.name}.{os.urandom(4).hex()}.tmp")
        file.fs.get_file(file.path, str(temporary))
        temporary.replace(here)
        known.touch()
    return here


@contextlib.contextmanager
def new_directory(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary directory. It replaces `path` if the block succeeds, and is removed otherwise."""
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="resmem-") as scratch:
            yield Path(scratch)
            remove(path)
            upload(Path(scratch), path)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
