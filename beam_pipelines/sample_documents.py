"""Sample documents from text that is already split and too large for one process (C4), as Beam pipelines.

The output has the format of `text.documents.prepare_documents`: a sample of the train text, and all of the held-out text. The text of a
document alone determines its shard, whatever the number of workers, the order of files, or the source (TFDS or JSON lines).
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epy

from beam_pipelines.runner import open_pipeline, process_with
from resmem_lm.errors import UserError, check_least
from resmem_lm.text.duplicates import Signatures, minhash
from resmem_lm.text.shards import SPLITS, digest, position, read_shard, shard_content, shard_name, write_manifest
from resmem_lm.text.sources import Document, read_records, text_files
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors, stage
from resmem_lm.workdir.storage import AnyPath, Record, read_json, remove, to_path, write_bytes, write_json

with epy.lazy_imports():
    import apache_beam as beam
    import tensorflow as tf
    import tensorflow_datasets as tfds

TFDS = "tfds:"
COUNTS = "counts.json"

Text = str | list[str] | tuple[str, ...]


class Place(NamedTuple):
    """A shard of a split. For a dropped document, `split` is the reason."""

    split: str
    shard: int = 0


def _named(url: str | None, text: str) -> Document:
    """Return a document with a name that depends on its URL and text, not on its file."""
    if url:
        url = url.encode(errors="replace").decode()  # JSON may have half of a surrogate pair, which UTF-8 cannot encode
    return Document(f"{url}#{digest(text)}" if url else digest(text), text)


def file_documents(path: str) -> Iterator[Document]:
    """Yield the documents of a file."""
    for _, record in read_records(to_path(path)):
        url = record.get("url")
        yield _named(url if isinstance(url, str) else None, record["text"])


def _tfds_document(record: dict[str, Any]) -> Document:
    text, url = (value.numpy() if hasattr(value, "numpy") else value for value in (record["text"], record.get("url", b"")))
    return _named(url.decode() or None, text.decode())


def source(text: Text, tfds_data_dir: str) -> Callable[[Any], Any]:
    """Return a transform that reads the documents of files (see `text_files`) or of "tfds:c4/en:3.1.0/train"."""
    if isinstance(text, str) and text.startswith(TFDS):
        return _tfds_source(text, tfds_data_dir)
    files = [str(path.absolute()) for path in text_files(text)]
    return lambda p: p | "Files" >> beam.Create(files) | "Spread files" >> beam.Reshuffle() | "Read" >> beam.FlatMap(file_documents)


def _tfds_source(text: str, tfds_data_dir: str) -> Callable[[Any], Any]:
    name, _, split = text.removeprefix(TFDS).rpartition("/")
    folder = os.path.join(os.path.expanduser(tfds_data_dir), *name.replace(":", "/").split("/"))  # noqa: PTH111, PTH118 - may be gs://
    try:
        tf.config.set_visible_devices([], "GPU")  # otherwise TensorFlow takes the memory that JAX needs
        builder = tfds.builder_from_directory(folder)
    except ImportError as error:
        raise UserError(f"{text} needs TensorFlow Datasets ({error}): pip install 'resmem_lm[c4]', or give C4's JSON-lines files") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{text}: {folder} has no prepared dataset ({type(error).__name__}): prepare it with "
            f"`tfds build {name} --data_dir={tfds_data_dir}`, set sample_documents.tfds_data_dir, or give C4's JSON-lines files"
        ) from None
    if split not in builder.info.splits:
        raise UserError(f"{text}: {folder} has no split {split!r}: take one of {', '.join(builder.info.splits)}")
    if "text" not in builder.info.features:
        raise UserError(f"{text}: its records have no `text`, only {', '.join(builder.info.features)}: take another dataset")
    return lambda pipeline: pipeline | "Read" >> tfds.beam.ReadFromTFDS(builder, split=split) | "Decode" >> beam.Map(_tfds_document)


def place_held_out(document: Document, validation_fraction: float, shards: int) -> Place:
    """Place a held-out document by `position`: validation below `validation_fraction`, else test. Shards are equal ranges."""
    if not document.text.strip():
        return Place("empty")
    place = position(document.text)
    if place < validation_fraction:
        return Place("validation", min(int(place / validation_fraction * shards), shards - 1))
    return Place("test", min(int((place - validation_fraction) / (1 - validation_fraction) * shards), shards - 1))


@dataclasses.dataclass(frozen=True)
class PlaceTrain:
    """Place the train documents whose `position` is below `fraction`. Drop near-duplicates of held-out documents."""

    folder: str
    fraction: float
    shards: int
    threshold: float
    held_out: int

    def setup(self) -> Signatures:
        """Read the held-out documents."""
        held_out, found = Signatures(self.threshold), 0
        for split in ("validation", "test"):
            for path in to_path(self.folder).glob(f"{split}-*-of-*.jsonl"):
                for document in read_shard(path):
                    held_out.add(minhash(document.text))
                    found += 1
        if found != self.held_out:  # otherwise held-out text could enter the datastore
            raise UserError(
                f"a worker sees {found} of {self.held_out} held-out documents in {self.folder}: "
                "take a --workdir on a disk that all workers share"
            )
        return held_out

    def process(self, document: Document, held_out: Signatures) -> Iterator[tuple[Place, Document]]:
        """Yield at most one (place, document)."""
        place = position(document.text)
        if not document.text.strip():
            yield Place("empty"), document
        elif place < self.fraction:
            similar = held_out.similar(minhash(document.text))
            shard = min(int(place / self.fraction * self.shards), self.shards - 1)
            yield Place("near_duplicate") if similar else Place("train", shard), document


def write_shard(element: tuple[Place, Iterable[Document]], folder: str, shards: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Write the documents of a place, sorted by position, each text once. Yield counts by split or by reason for dropping."""
    place, documents = Place(*element[0]), [Document(*document) for document in element[1]]
    if place.split not in SPLITS:
        yield place.split, len(documents)
        return
    # The first id is kept, so the choice among equal texts does not depend on their order.
    by_text = {document.text: document for document in sorted(documents, reverse=True)}
    path = to_path(folder) / shard_name(place.split, place.shard, shards[place.split])
    with disk_errors(path):
        write_bytes(path, shard_content(sorted(by_text.values(), key=lambda document: digest(document.text))).encode())
    yield place.split, len(by_text)
    yield "duplicate", len(documents) - len(by_text)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Pipelines that write shards of documents into one folder."""

    folder: AnyPath
    shards: dict[str, int]  # of each split
    pipeline_options: str

    def write(self, read: Callable[[Any], Any], place: Any) -> Counter[str]:
        """Read documents, place them and write their shards; return the counts of `write_shard`."""
        folder = str(self.folder)
        with open_pipeline(self.pipeline_options) as pipeline:
            _ = (
                read(pipeline)
                | "Place" >> place
                | "By shard" >> beam.GroupByKey()
                | "Write shards" >> beam.FlatMap(write_shard, folder, self.shards)
                | "Count" >> beam.CombinePerKey(sum)
                | "Wait for all" >> beam.combiners.ToList()
                | "Write counts" >> beam.Map(lambda counts: write_json(to_path(folder) / COUNTS, dict(counts)))
            )
        counts: Counter[str] = Counter(read_json(self.folder / COUNTS))
        (self.folder / COUNTS).unlink()
        return counts

    def finish(self) -> Record:
        """Write the shards without documents, and the manifest; return the checksums of all shards."""
        written = {path.name for path in self.folder.glob("*.jsonl")}
        for name in (shard_name(split, shard, shards) for split, shards in self.shards.items() for shard in range(shards)):
            if name not in written:
                write_bytes(self.folder / name, b"")
        return write_manifest(self.folder)


def _check_not_empty(split: str, counts: Counter[str], text: Text, share: str) -> None:
    if not counts[split]:
        like = f" ({counts['near_duplicate']} repeat held-out ones)" if split == "train" and counts["near_duplicate"] else ""
        raise UserError(f"{text!r} leaves no {split} documents{like}: change sample_documents.{share}")


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise UserError(f"sample_documents.{name} = {value}: take a number above 0 and up to 1")


@stage(name="documents", free=("pipeline_options", "tfds_data_dir"))
def sample_documents(
    run: Run,
    *,
    train: Text | None = None,
    held_out: Text | None = None,
    fraction: float = 0.01,
    validation_fraction: float = 0.1,
    duplicate_threshold: float = 0.7,
    shards: int = 64,
    query_shards: int = 8,
    tfds_data_dir: str = "~/tensorflow_datasets",
    pipeline_options: str = "",
) -> Record:
    """Write WORKDIR/documents: `fraction` of the train text, and all of the held-out text, as validation and test.

    The stage drops train documents that are near-duplicates of held-out documents, and equal texts within a shard. Other near-duplicates
    stay, also between validation and test, because the makers of a corpus of this size deduplicate it. Beam's in-process runner keeps the
    sampled text in memory (8 GB of C4).

    Args:
        train: files, directories or globs as in `prepare_documents.text`, or "tfds:c4/en:3.1.0/train".
        held_out: text in the same form; none of its documents enters the datastore.
        fraction: share of the train documents. The first half of the shards of a 1% sample is the 0.5% sample.
        validation_fraction: share of the held-out documents in the validation split; the others are the test split.
        duplicate_threshold: Jaccard similarity of word 5-grams from which two documents are near-duplicates.
        shards: number of train shards; `build_datastore.shards` chooses how many of them enter the datastore.
        query_shards: number of shards of validation and of test.
        tfds_data_dir: folder in which TFDS keeps its datasets.
        pipeline_options: Beam's options, such as "--runner=..."; without a runner, Beam's in-process runner.

    Returns:
        The numbers of documents by split and of dropped documents by reason, and the checksum of every shard.

    Raises:
        UserError: no text, unreadable text, a dataset that is not prepared, a split without documents, or a setting out of its range.
    """
    if not train or not held_out:
        raise UserError("sample_documents.train and sample_documents.held_out: set both, or neither and prepare_documents.text")
    _check_shares(fraction=fraction, validation_fraction=validation_fraction, duplicate_threshold=duplicate_threshold)
    check_least("sample_documents", 1, shards=shards, query_shards=query_shards)
    # Both sources are checked before either is read.
    read_held_out, read_train = source(held_out, tfds_data_dir), source(train, tfds_data_dir)
    writer = _Writer(run.documents.absolute(), {"train": shards, "validation": query_shards, "test": query_shards}, pipeline_options)
    remove(writer.folder)
    try:
        with progress("documents", total=2, unit="texts") as bar:
            bar.update(0, "held-out text")
            counts = writer.write(read_held_out, beam.Map(lambda d: (place_held_out(d, validation_fraction, query_shards), d)))
            for split in ("validation", "test"):  # before the train text, which takes hours
                _check_not_empty(split, counts, held_out, "validation_fraction")
            bar.update(1, "train text")
            place_train = PlaceTrain(str(writer.folder), fraction, shards, duplicate_threshold, counts["validation"] + counts["test"])
            counts += writer.write(read_train, process_with(place_train))
            bar.update(2)
        _check_not_empty("train", counts, train, "fraction")
        checksums = writer.finish()
    except BaseException:
        remove(writer.folder)
        raise
    return {"documents": {name: counts[name] for name in (*SPLITS, "empty", "duplicate", "near_duplicate")}, "checksums": checksums}
