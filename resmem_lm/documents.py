"""Text -> documents: read, drop duplicates, split by document into train, validation and test.

`WORKDIR/documents/` holds JSON lines (`id`, `text`), one or more shards per split; a train shard becomes a shard of the
datastore.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import zstandard

from resmem_lm import docstrings
from resmem_lm.duplicates import mark_duplicates
from resmem_lm.errors import UserError
from resmem_lm.workdir import Record, new_directory, sha256, stage

SPLITS = ("train", "validation", "test")
TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl", ".json")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
EMBEDDED = "docstrings"


class Document(NamedTuple):
    """One file, or one record of a JSON-lines file."""

    id: str
    text: str


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSED_SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1].lower() if suffixes else ""
    return "text" if suffix in TEXT_SUFFIXES else "lines" if suffix in LINES_SUFFIXES else None


def _open(path: Path) -> TextIO:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zstandard.open}
    return io.TextIOWrapper(openers.get(path.suffix.lower(), open)(path, "rb"), encoding="utf-8-sig", newline=None)


def text_files(text: str | list[str] | tuple[str, ...]) -> list[Path]:
    """The files that `text` names: files, directories (searched through) and globs, in a stable order."""
    known = ", ".join((*TEXT_SUFFIXES, *LINES_SUFFIXES))
    found: list[Path] = []
    for pattern in [text] if isinstance(text, str) else text:
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        inside = [f for m in matches if m.is_dir() for f in sorted(m.rglob("*")) if f.is_file() and _kind(f)]
        files = [m for m in matches if m.is_file()]
        for file in files:
            if _kind(file) is None:
                raise UserError(f"{file} is no text that can be read: TEXT takes {known}, also with {', '.join(COMPRESSED_SUFFIXES)}")
        if not files and not inside:
            raise UserError(f"no text found at {pattern!r}: TEXT takes files, directories and globs of {known}")
        found += files + inside
    return list(dict.fromkeys(found))


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file, empty ones included. Raises UserError naming the file and the line that is wrong."""
    try:
        with _open(path) as file:
            if _kind(path) == "text":
                yield Document(str(path), file.read())
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Document(f"{path}#{number}", _record_text(path, number, line))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} near byte {error.start}): convert it, for example with iconv") from None
    except (EOFError, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be decompressed ({error}): fetch it again") from None


def _record_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON ({error}): mend or remove the line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{path}, line {number} has no field "text" with a string: every line must be {{"text": "..."}}')
    return record["text"]


def read_documents(text: str | list[str] | tuple[str, ...], *, duplicate_threshold: float) -> Iterator[Document]:
    """Every document of `text`, or the embedded docstrings for the word "docstrings"."""
    if text == EMBEDDED:
        yield from (Document(*pair) for pair in docstrings.documents(duplicate_threshold=duplicate_threshold))
        return
    for path in text_files(text):
        yield from read_file(path)


def position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: where it falls decides the split."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) / 2**64


def assign_splits(documents: Iterable[Document], *, validation_fraction: float, test_fraction: float) -> Iterator[tuple[str, Document]]:
    """(split, document): test below `test_fraction`, validation above it, then train, by `position`.

    A document's split does not change when others are added. Only where so few documents are given that a split would
    stay empty, the one or two lowest positions fill it.
    """
    lowest: list[tuple[float, int, Document]] = []
    filled = False
    for number, document in enumerate(documents):
        lowest.append((position(document.text), number, document))
        if len(lowest) < 3:
            continue
        place, _, document = lowest.pop(max(range(3), key=lambda i: lowest[i][:2]))
        in_validation = test_fraction <= place < test_fraction + validation_fraction
        filled |= in_validation
        yield "test" if place < test_fraction else "validation" if in_validation else "train", document
    for rank, (place, _, document) in enumerate(sorted(lowest, key=lambda entry: entry[:2])):
        yield (
            "test"
            if rank == 0 or (place < test_fraction and filled)
            else "validation"
            if (not filled or place < test_fraction + validation_fraction)
            else "train",
            document,
        )


def shard_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    """The file of one shard, named as everywhere in this project: train-00003-of-00016.jsonl."""
    return folder / f"{split}-{shard:05d}-of-{shards:05d}.jsonl"


def shard_paths(workdir: Path, split: str) -> list[Path]:
    """The shards of a split in WORKDIR/documents, in order."""
    return sorted((workdir / "documents").glob(f"{split}-*-of-*.jsonl"))


def read_shard(path: Path) -> list[Document]:
    """The documents of one shard that `prepare_documents` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


@stage(name="documents", output="documents")
def prepare_documents(
    workdir: Path,
    *,
    text: str | list[str] | tuple[str, ...] = EMBEDDED,
    validation_fraction: float = 0.02,
    test_fraction: float = 0.02,
    duplicate_threshold: float = 0.7,
    shards: int = 16,
) -> Record:
    """Writes WORKDIR/documents: the text's documents without duplicates, split and sharded.

    Args:
        text: files, directories or globs (.txt, .md, .jsonl, .json; also .gz, .xz, .zst, .bz2), or "docstrings".
        validation_fraction: share of the documents on which hyperparameters are chosen.
        test_fraction: share of the documents on which results are told.
        duplicate_threshold: Jaccard similarity of word 5-grams from which the later of two documents is dropped.
        shards: number of train shards, which is the number of datastore shards.

    Returns:
        Counts of documents per split, of dropped ones by reason, and the checksum of every shard.

    Raises:
        UserError: no text, unreadable text, or fewer than three documents.
    """
    counts = dict.fromkeys((*SPLITS, "empty", "duplicate"), 0)

    def distinct() -> Iterator[Document]:
        def nonempty() -> Iterator[tuple[Document, str]]:
            for document in read_documents(text, duplicate_threshold=duplicate_threshold):
                if document.text.strip():
                    yield document, document.text
                else:
                    counts["empty"] += 1

        for document, duplicate in mark_duplicates(nonempty(), threshold=duplicate_threshold):
            counts["duplicate"] += duplicate
            if not duplicate:
                yield document

    with new_directory(workdir / "documents") as folder:
        files = {
            (split, shard): shard_path(folder, split, shard, shards if split == "train" else 1).open("w", encoding="utf-8")
            for split in SPLITS
            for shard in range(shards if split == "train" else 1)
        }
        try:
            splits = assign_splits(distinct(), validation_fraction=validation_fraction, test_fraction=test_fraction)
            for split, document in splits:
                shard = counts[split] % shards if split == "train" else 0
                counts[split] += 1
                files[split, shard].write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
        finally:
            for file in files.values():
                file.close()
        if not all(counts[split] for split in SPLITS):
            total = sum(counts[split] for split in SPLITS)
            raise UserError(
                f"{text!r} has {total} different documents for {len(SPLITS)} splits "
                f"({', '.join(f'{counts[s]} {s}' for s in SPLITS)}): give more documents, or other split fractions"
            )
        checksums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    return {"documents": counts, "checksums": checksums}
