"""Text that comes already split, and is too much for one process (C4) -> documents: a sample of the train split, all of the held-out one.

The output is that of `resmem_lm.documents.prepare_documents`. What is taken, and into which shard, depends on each text alone: not on
the number of workers, on the order of files, or on whether the text came from TFDS or from JSON lines.
"""

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

TFDS = "tfds:"
COUNTS = "counts.json"


class Place(NamedTuple):
    """Where a document goes: a split's shard. The reasons for which documents are dropped stand beside the splits."""

    split: str
    shard: int = 0


def _named(url: str | None, text: str) -> Document:
    """A document under a name that does not depend on where it was read."""
    if url:
        url = url.encode(errors="replace").decode()  # JSON can spell half of a surrogate pair, which no file can hold
    return Document(f"{url}#{digest(text)}" if url else digest(text), text)


def file_documents(path: str) -> Iterator[Document]:
    """The documents of a file, under names that do not depend on where they were read."""
    for _, record in read_records(to_path(path)):
        url = record.get("url")
        yield _named(url if isinstance(url, str) else None, record["text"])


def _tfds_document(record: dict[str, Any]) -> Document:
    text, url = (value.numpy() if hasattr(value, "numpy") else value for value in (record["text"], record.get("url", b"")))
    return _named(url.decode() or None, text.decode())


def source(text: str | list[str] | tuple[str, ...], tfds_data_dir: str) -> Callable[[Any], Any]:
    """What reads the documents of files (see `text_files`), or of "tfds:c4/en:3.1.0/train": dataset, version and split."""
    if not (isinstance(text, str) and text.startswith(TFDS)):
        files = [str(path.absolute()) for path in text_files(text)]
        return lambda p: p | "Files" >> beam.Create(files) | "Spread files" >> beam.Reshuffle() | "Read" >> beam.FlatMap(file_documents)
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{text} needs TensorFlow Datasets ({error}): pip install 'resmem_lm[c4]', or give C4's JSON-lines files") from None
    name, _, split = text.removeprefix(TFDS).rpartition("/")
    folder = os.path.join(os.path.expanduser(tfds_data_dir), *name.replace(":", "/").split("/"))  # noqa: PTH111, PTH118 - may be gs://
    try:
        builder = tfds.builder_from_directory(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{text}: {folder} has no prepared dataset ({type(error).__name__}): prepare it with "
            f"`tfds build {name} --data_dir={tfds_data_dir}`, set sample_documents.tfds_data_dir, or give C4's JSON-lines files"
        ) from None
    if split not in builder.info.splits:
        raise UserError(f"{text}: {folder} has no split {split!r}: take one of {', '.join(builder.info.splits)}")
    if "text" not in builder.info.features:
        raise UserError(f"{text}: its records have no `text`, only {', '.join(builder.info.features)}: take another dataset")
    tf.config.set_visible_devices([], "GPU")  # or TensorFlow would take the memory that JAX needs
    return lambda pipeline: pipeline | "Read" >> tfds.beam.ReadFromTFDS(builder, split=split) | "Decode" >> beam.Map(_tfds_document)


def place_held_out(document: Document, validation_fraction: float, shards: int) -> Place:
    """Validation below `validation_fraction` and test above it, by `position`; shards are equal ranges of positions."""
    if not document.text.strip():
        return Place("empty")
    place = position(document.text)
    if place < validation_fraction:
        return Place("validation", min(int(place / validation_fraction * shards), shards - 1))
    return Place("test", min(int((place - validation_fraction) / (1 - validation_fraction) * shards), shards - 1))


class PlaceTrain:
    """Documents whose `position` is below `fraction`, with their places; near-duplicates of held-out ones lose theirs."""

    def __init__(self, folder: str, fraction: float, shards: int, threshold: float, held_out: int) -> None:
        self.folder, self.fraction, self.shards, self.threshold, self.held_out = folder, fraction, shards, threshold, held_out

    def setup(self) -> Signatures:
        """Reads the held-out documents."""
        held_out, found = Signatures(self.threshold), 0
        for split in ("validation", "test"):
            for path in to_path(self.folder).glob(f"{split}-*-of-*.jsonl"):
                for document in read_shard(path):
                    held_out.add(minhash(document.text))
                    found += 1
        if found != self.held_out:  # or held-out text would enter the datastore, and nobody would know
            raise UserError(
                f"a worker sees {found} of {self.held_out} held-out documents in {self.folder}: "
                "take a --workdir on a disk that all workers share"
            )
        return held_out

    def process(self, document: Document, held_out: Signatures) -> Iterator[tuple[Place, Document]]:
        """At most one (place, document)."""
        place = position(document.text)
        if not document.text.strip():
            yield Place("empty"), document
        elif place < self.fraction:
            similar = held_out.has_similar(minhash(document.text))
            shard = min(int(place / self.fraction * self.shards), self.shards - 1)
            yield Place("near_duplicate") if similar else Place("train", shard), document


def write_shard(element: tuple[Place, Iterable[Document]], folder: str, shards: dict[str, int]) -> Iterator[tuple[str, int]]:
    """(place, its documents) -> numbers of documents by split or by reason for which they were dropped.

    Sorts by position and writes, each text once.
    """
    place, documents = Place(*element[0]), [Document(*document) for document in element[1]]
    if place.split not in SPLITS:
        yield place.split, len(documents)
        return
    # The first id stays, so the choice among equal texts does not depend on their order.
    by_text = {document.text: document for document in sorted(documents, reverse=True)}
    path = to_path(folder) / shard_name(place.split, place.shard, shards[place.split])
    with disk_errors(path):
        write_bytes(path, shard_content(sorted(by_text.values(), key=lambda document: digest(document.text))).encode())
    yield place.split, len(by_text)
    yield "duplicate", len(documents) - len(by_text)


def _write(placed: Any, folder: str, shards: dict[str, int]) -> None:
    _ = (
        placed
        | "By shard" >> beam.GroupByKey()
        | "Write shards" >> beam.FlatMap(write_shard, folder, shards)
        | "Count" >> beam.CombinePerKey(sum)
        | "Wait for all" >> beam.combiners.ToList()
        | "Write counts" >> beam.Map(lambda counts: write_json(to_path(folder) / COUNTS, dict(counts)))
    )


def _counts(folder: AnyPath) -> Counter[str]:
    counts: Counter[str] = Counter(read_json(folder / COUNTS))
    (folder / COUNTS).unlink()
    return counts


def _check_not_empty(split: str, counts: Counter[str], text: str | list[str] | tuple[str, ...], share: str) -> None:
    if not counts[split]:
        like = f" ({counts['near_duplicate']} are like held-out ones)" if split == "train" and counts["near_duplicate"] else ""
        raise UserError(f"{text!r} leaves no {split} documents{like}: change sample_documents.{share}")


@stage(name="documents", free=("pipeline_options", "tfds_data_dir"))
def sample_documents(
    run: Run,
    *,
    train: str | list[str] | tuple[str, ...] | None = None,
    held_out: str | list[str] | tuple[str, ...] | None = None,
    fraction: float = 0.01,
    validation_fraction: float = 0.1,
    duplicate_threshold: float = 0.7,
    shards: int = 64,
    query_shards: int = 8,
    tfds_data_dir: str = "~/tensorflow_datasets",
    pipeline_options: str = "",
) -> Record:
    """Writes WORKDIR/documents: `fraction` of the train text, and all of the held-out text, as validation and test.

    A train document that is a near-duplicate of a held-out one is dropped. Train documents are otherwise only compared for equal
    texts within a shard, and so are held-out ones: a corpus of this size is taken as its makers deduplicated it,
    and validation and test may hold near-duplicates of each other. Beam's in-process runner keeps the sampled text in memory (8 GB of C4).

    Args:
        train: files, directories or globs as `prepare_documents.text`, or "tfds:c4/en:3.1.0/train".
        held_out: likewise; no document of it enters the datastore.
        fraction: share of the train documents. The first half of the shards of 1% is the sample of 0.5%.
        validation_fraction: share of the held-out documents on which hyperparameters are chosen; the others are the test.
        duplicate_threshold: Jaccard similarity of word 5-grams from which a train document repeats a held-out one.
        shards: number of train shards, of which `build_datastore.shards` says how many are live.
        query_shards: number of shards of validation and of test.
        tfds_data_dir: where TFDS keeps its datasets.
        pipeline_options: Beam's own, such as "--runner=..."; without a runner, Beam's in-process one.

    Returns:
        Counts of documents per split, of dropped ones by reason, and the checksum of every shard.

    Raises:
        UserError: no text, unreadable text, a dataset that is not prepared, a split without documents, or a setting out of its range.
    """
    if not train or not held_out:
        raise UserError("sample_documents.train and sample_documents.held_out: set both, or neither and prepare_documents.text")
    for name, value in (("fraction", fraction), ("validation_fraction", validation_fraction), ("duplicate_threshold", duplicate_threshold)):
        if not 0 < value <= 1:
            raise UserError(f"sample_documents.{name} = {value}: take a number above 0 and up to 1")
    check_least("sample_documents", 1, shards=shards, query_shards=query_shards)
    shards_of = {"train": shards, "validation": query_shards, "test": query_shards}
    # Both, before either is read.
    read_held_out, read_train = source(held_out, tfds_data_dir), source(train, tfds_data_dir)
    folder = run.documents.absolute()
    remove(folder)
    try:
        with progress("documents", total=2, unit="texts") as bar:
            bar.update(0, "held-out text")
            with open_pipeline(pipeline_options) as pipeline:
                placed = read_held_out(pipeline) | beam.Map(lambda d: (place_held_out(d, validation_fraction, query_shards), d))
                _write(placed, str(folder), shards_of)
            counts = _counts(folder)
            for split in ("validation", "test"):  # before the train text, which takes hours
                _check_not_empty(split, counts, held_out, "validation_fraction")
            place_train = PlaceTrain(str(folder), fraction, shards, duplicate_threshold, counts["validation"] + counts["test"])
            bar.update(1, "train text")
            with open_pipeline(pipeline_options) as pipeline:
                placed = read_train(pipeline) | process_with(place_train)
                _write(placed, str(folder), shards_of)
            counts += _counts(folder)
            bar.update(2)
        _check_not_empty("train", counts, train, "fraction")
        written = {path.name for path in folder.glob("*.jsonl")}
        for name in (shard_name(split, shard, shards_of[split]) for split in SPLITS for shard in range(shards_of[split])):
            if name not in written:
                write_bytes(folder / name, b"")
        checksums = write_manifest(folder)
    except BaseException:
        remove(folder)
        raise
    names = (*SPLITS, "empty", "duplicate", "near_duplicate")
    return {"documents": {name: counts[name] for name in names}, "checksums": checksums}
