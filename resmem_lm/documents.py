"""Text -> documents: read, drop duplicates, split by document into train, validation and test.

`WORKDIR/documents/` holds JSON lines (`id`, `text`), one or more shards per split, and a manifest with their checksums. A train shard
becomes a shard of the datastore; so do shards that were added later (`beam_pipelines.append`), in which the model was not trained.
"""

import bisect
import bz2
import contextlib
import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from backports import zstd

from resmem_lm import descriptions, docstrings, storage
from resmem_lm.duplicates import mark_duplicates
from resmem_lm.errors import UserError, check_least
from resmem_lm.progress import progress
from resmem_lm.storage import AnyPath, children, files_below, new_directory, read_json, sha256, with_home, write_json
from resmem_lm.workdir import Record, stage

SPLITS = ("train", "validation", "test")
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


def digest(text: str) -> str:
    """16 hexadecimal digits that depend on the text alone."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: where it falls decides the split."""
    return int(digest(text), 16) / 2**64


def assign_splits(documents: Iterable[Document], *, validation_fraction: float, test_fraction: float) -> Iterator[tuple[str, Document]]:
    """(split, document): test below `test_fraction`, validation above it, then train, by `position`.

    A document's split does not change when others are added. Only where a split would stay empty, because there are few
    documents, the lowest position fills test, the one after it validation, and the highest train. Documents of one group have one position,
    and are not moved to fill a split.
    """

    def natural(place: float) -> str:
        return "test" if place < test_fraction else "validation" if place < test_fraction + validation_fraction else "train"

    held: list[tuple[float, int, Document]] = []  # by position: the two lowest and the highest
    filled = set()
    for number, document in enumerate(documents):
        if document.group is not None:
            filled.add(split := natural(position(document.group)))
            yield split, document
            continue
        bisect.insort(held, (position(document.text), number, document))
        if len(held) > 3:
            place, _, document = held.pop(2)
            filled.add(natural(place))
            yield natural(place), document
    for rank, (place, _, document) in reversed(list(enumerate(held))):
        wanted = ("test", "validation", "train")[rank]
        split = natural(place) if wanted in filled else wanted
        filled.add(split)
        yield split, document


def shard_name(split: str, shard: int, shards: int) -> str:
    """The file of one shard, named as everywhere in this project: train-00003-of-00016.jsonl."""
    return f"{split}-{shard:05d}-of-{shards:05d}.jsonl"


def shard_paths(workdir: AnyPath, split: str) -> list[AnyPath]:
    """The shards of a split in WORKDIR/documents, in order; of the split "added" those that were added later."""
    folder = workdir / "documents"
    return [folder / name for name in read_json(folder / "manifest.json")["files"] if name.startswith(f"{split}-")]


def read_shard(path: AnyPath) -> list[Document]:
    """The documents of one shard that `prepare_documents` wrote."""
    try:
        with path.open("r", encoding="utf-8") as file:
            return [Document(**json.loads(line)) for line in file]
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): `resmem verify` says what to do") from None


def shard_content(documents: Iterable[Document]) -> str:
    """The content of a shard."""
    parts = ({name: value for name, value in document._asdict().items() if value is not None} for document in documents)
    return "".join(json.dumps(part, ensure_ascii=False) + "\n" for part in parts)


def write_manifest(folder: AnyPath, changed: dict[str, bytes] | None = None) -> Record:
    """Writes manifest.json: size and checksum of every shard in `folder`, by name; returns the checksums.

    With `changed`, contents by name, what the manifest says of other shards stays.
    """
    if changed is None:
        paths = children(folder, "*-*-of-*.jsonl")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    else:
        files = read_json(folder / "manifest.json")["files"]
        files |= {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in changed.items()}
    write_json(folder / "manifest.json", {"files": dict(sorted(files.items()))})
    return {name: facts["sha256"] for name, facts in sorted(files.items())}


@stage(name="documents", output="documents", replaces="manifest.json")
def prepare_documents(
    workdir: AnyPath,
    *,
    text: str | list[str] | tuple[str, ...] = EMBEDDED,
    group: str | None = None,
    validation_fraction: float = 0.02,
    test_fraction: float = 0.02,
    duplicate_threshold: float = 0.7,
    shards: int = 16,
) -> Record:
    """Writes WORKDIR/documents: the text's documents without duplicates, split and sharded.

    Args:
        text: files, directories or globs (.txt, .md, .jsonl, .json; also .gz, .xz, .zst, .bz2), or of the installation: "docstrings" of
            its modules, "descriptions" of its packages.
        group: a field of JSON lines: documents in which it is equal, such as the chapters of a book, go into one split.
        validation_fraction: share of the documents on which hyperparameters are chosen.
        test_fraction: share of the documents on which results are told.
        duplicate_threshold: Jaccard similarity of word 5-grams from which the later of two documents is dropped.
        shards: number of train shards, of which `build_datastore.shards` says how many are remembered.

    Returns:
        Counts of documents per split, of dropped ones by reason, and the checksum of every shard.

    Raises:
        UserError: no text, unreadable text, fewer than three documents, or a setting out of its range.
    """
    check_least("prepare_documents", 1, shards=shards)
    if not 0 < duplicate_threshold <= 1:
        raise UserError(f"prepare_documents.duplicate_threshold = {duplicate_threshold}: take a number above 0 and up to 1")
    if not (0 <= validation_fraction <= 1 and 0 <= test_fraction <= 1):
        raise UserError(
            f"prepare_documents.validation_fraction = {validation_fraction}, test_fraction = {test_fraction}: take numbers from 0 to 1"
        )
    counts = dict.fromkeys((*SPLITS, "empty", "duplicate"), 0)

    def distinct() -> Iterator[Document]:
        def nonempty() -> Iterator[tuple[Document, str]]:
            for document in read_documents(text, duplicate_threshold=duplicate_threshold, group=group):
                if document.text.strip():
                    yield document, document.text
                else:
                    counts["empty"] += 1

        for document, duplicate in mark_duplicates(nonempty(), threshold=duplicate_threshold):
            counts["duplicate"] += duplicate
            if not duplicate:
                yield document

    with new_directory(workdir / "documents") as folder:
        shards_of = {split: shards if split == "train" else 1 for split in SPLITS}
        with contextlib.ExitStack() as opened:
            files = {
                (split, shard): opened.enter_context((folder / shard_name(split, shard, shards_of[split])).open("w", encoding="utf-8"))
                for split in SPLITS
                for shard in range(shards_of[split])
            }
            splits = assign_splits(distinct(), validation_fraction=validation_fraction, test_fraction=test_fraction)
            bar = opened.enter_context(progress("documents", total=None, unit="documents"))
            for split, document in splits:
                bar.update(sum(counts.values()))
                shard = counts[split] % shards_of[split]
                counts[split] += 1
                files[split, shard].write(shard_content([document]))
        if not all(counts[split] for split in SPLITS):
            total = sum(counts[split] for split in SPLITS)
            raise UserError(
                f"{text!r} has {total} different documents for {len(SPLITS)} splits "
                f"({counts['empty']} more are empty, {counts['duplicate']} repeat others): give at least {len(SPLITS)}"
                f"{', or larger validation_fraction and test_fraction, because groups stay together' if group else ''}"
            )
        checksums = write_manifest(folder)
    return {"documents": counts, "checksums": checksums}
