"""Read documents from files, directories and globs, or from a text that every installation has."""

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

Source = str | list[str] | tuple[str, ...]  # files, directories and globs, or one of the two names below
DOCSTRINGS, DESCRIPTIONS = "docstrings", "descriptions"  # texts that every installation has

_KINDS = {".txt": "text", ".md": "text", ".jsonl": "lines", ".json": "lines"}
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd.open, ".bz2": bz2.open}


class Document(NamedTuple):
    """A text file, or one record of a JSON-lines file. All documents of a `group` go into one split."""

    id: str
    text: str
    group: str | None = None


def read_documents(text: Source, *, duplicate_threshold: float, group: str | None = None) -> Iterator[Document]:
    """Yield every document of a text, including empty ones. Raise UserError with the name of a file or line that cannot be read.

    `group` is a field of the JSON lines. `duplicate_threshold` applies to docstrings only; files are not compared here.
    """
    if text == DOCSTRINGS:
        yield from (Document(*pair) for pair in docstrings.documents(duplicate_threshold=duplicate_threshold))
    elif text == DESCRIPTIONS:
        yield from (Document(*pair) for pair in descriptions.documents())
    else:
        for path in text_files(text):
            field = group if _kind(path) == "lines" else None
            for place, record in read_records(path):
                if field:
                    _check_text(record, field, place, "prepare_documents.group names a field of every line")
                yield Document(place, record["text"], record[field] if field else None)


def text_files(text: Source) -> list[AnyPath]:
    """Return each file of a text once, in a stable order. Directories are searched recursively."""
    suffixes = ", ".join(_KINDS)
    found: list[AnyPath] = []
    for pattern in [text] if isinstance(text, str) else text:
        matches = _matches(pattern)
        inside = [file for match in matches if match.is_dir() for file in files_below(match) if _kind(file)]
        files = [match for match in matches if match.is_file()]
        for file in files:
            if _kind(file) is None:
                raise UserError(f"{file} has an unknown suffix: TEXT takes {suffixes}, also with {', '.join(_OPENERS)}")
        if not files and not inside:
            raise UserError(f"no text found at {pattern!r}: TEXT takes files, directories and globs of {suffixes}")
        found += files + inside
    return list(dict.fromkeys(found))


def _matches(pattern: str) -> list[AnyPath]:
    if "://" in pattern:
        return storage.glob(pattern)
    if pattern.startswith("~/"):
        pattern = str(with_home(pattern))
    # An existing file takes precedence over a glob: "notes[1].txt" may be a file.
    names = [pattern] if pattern and Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    return [Path(name) for name in names]


def _kind(path: AnyPath) -> str | None:
    unpacked = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return _KINDS.get(unpacked.suffix.lower())


def read_records(path: AnyPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (document id, record with a `text`) for each document of a file. Raise UserError if the file or a line cannot be read."""
    name = os.fsencode(str(path)).decode("utf-8", "replace")
    try:
        opener = _OPENERS.get(path.suffix.lower(), contextlib.nullcontext)
        with path.open("rb") as raw, opener(raw) as file:
            if _kind(path) == "text":
                text = _decode(file.read(), name)
                yield name, {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{name}#{number}", _record(line, f"{name}, line {number}")
    except (OSError, EOFError, lzma.LZMAError, zstd.ZstdError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{name} cannot be read ({error.strerror}): make it readable or leave it out of TEXT") from None
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
        raise UserError(f"{place} is not JSON ({error}): correct or remove the line") from None
    record = record if isinstance(record, dict) else {}
    _check_text(record, "text", place, 'every line must be {"text": "..."}')
    return record


def _check_text(record: dict[str, Any], field: str, place: str, advice: str) -> None:
    if not isinstance(record.get(field), str):
        raise UserError(f'{place} has no field "{field}" with a string: {advice}')
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{place} has a "{field}" that is not Unicode ({error.reason}): correct or remove the line') from None
