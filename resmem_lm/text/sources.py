"""Files, directories, globs and the installation -> documents."""

import bz2
import contextlib
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from backports import zstd

from resmem_lm.errors import UserError
from resmem_lm.text import descriptions, docstrings
from resmem_lm.workdir import storage
from resmem_lm.workdir.storage import AnyPath, files_below, with_home

TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl", ".json")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
EMBEDDED, DESCRIPTIONS = "docstrings", "descriptions"  # texts of the installation


class Document(NamedTuple):
    """One file, or one record of a JSON-lines file; documents of one `group`, such as the chapters of a book, go into one split."""

    id: str
    text: str
    group: str | None = None


def _kind(path: AnyPath) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSED_SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1].lower() if suffixes else ""
    return "text" if suffix in TEXT_SUFFIXES else "lines" if suffix in LINES_SUFFIXES else None


@contextlib.contextmanager
def _open(path: AnyPath) -> Iterator[Any]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zstd.open}
    with path.open("rb") as raw, openers.get(path.suffix.lower(), lambda file, _: contextlib.nullcontext(file))(raw, "rb") as file:
        yield file


def text_files(text: str | list[str] | tuple[str, ...]) -> list[AnyPath]:
    """The files that `text` names: files, directories (searched through) and globs, in a stable order."""
    known = ", ".join((*TEXT_SUFFIXES, *LINES_SUFFIXES))
    found: list[AnyPath] = []
    for pattern in [text] if isinstance(text, str) else text:
        matches = _matches(pattern)
        inside = [f for m in matches if m.is_dir() for f in files_below(m) if _kind(f)]
        files = [m for m in matches if m.is_file()]
        for file in files:
            if _kind(file) is None:
                raise UserError(f"{file} is no text that can be read: TEXT takes {known}, also with {', '.join(COMPRESSED_SUFFIXES)}")
        if not files and not inside:
            raise UserError(f"no text found at {pattern!r}: TEXT takes files, directories and globs of {known}")
        found += files + inside
    return list(dict.fromkeys(found))


def _matches(pattern: str) -> list[AnyPath]:
    if "://" in pattern:
        return storage.glob(pattern)
    # A name is taken as it is before it is taken as a glob: "notes[1].txt" may be a file.
    if pattern.startswith("~/"):
        pattern = os.fspath(with_home(pattern))
    names = [pattern] if pattern and Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    return [Path(name) for name in names]


def read_file(path: AnyPath, *, group: str | None = None) -> Iterator[Document]:
    """The documents of one file, empty ones included. Raises UserError naming the file and the line that is wrong."""
    for place, record in read_records(path):
        if group and _kind(path) == "lines":
            if not isinstance(record.get(group), str):
                raise UserError(f'{place} has no field "{group}" with a string: prepare_documents.group names a field of every line')
            _check_unicode(record[group], group, place)
        yield Document(place, record["text"], record.get(group) if group else None)


def read_records(path: AnyPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the file, record with a `text`) of everything in one file. Raises UserError as `read_file` does."""
    name = os.fsencode(str(path)).decode("utf-8", "replace")
    try:
        with _open(path) as file:
            if _kind(path) == "text":
                text = _decode(file.read(), name)
                yield name, {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{name}#{number}", _record(line, f"{name}, line {number}")
    except OSError as error:
        if error.errno is None:
            raise UserError(f"{name} cannot be decompressed ({error}): fetch it again") from None
        raise UserError(f"{name} cannot be read ({error.strerror}): make it readable or leave it out of TEXT") from None
    except (EOFError, lzma.LZMAError, zstd.ZstdError, zlib.error) as error:
        raise UserError(f"{name} cannot be decompressed ({error}): fetch it again") from None


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}): convert it, for example with iconv") from None


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(_decode(line, place))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): mend or remove the line") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place} has no field "text" with a string: every line must be {{"text": "..."}}')
    _check_unicode(text, "text", place)
    return dict(record)


def _check_unicode(value: str, field: str, place: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{place} has a "{field}" that is not Unicode ({error.reason}): mend or remove the line') from None


def read_documents(text: str | list[str] | tuple[str, ...], *, duplicate_threshold: float, group: str | None = None) -> Iterator[Document]:
    """Every document of `text`, or of the installation for the words "docstrings" and "descriptions"; `group` is a field of JSON lines."""
    if text == EMBEDDED:
        yield from (Document(*pair) for pair in docstrings.documents(duplicate_threshold=duplicate_threshold))
        return
    if text == DESCRIPTIONS:
        yield from (Document(*pair) for pair in descriptions.documents())
        return
    for path in text_files(text):
        yield from read_file(path, group=group)
