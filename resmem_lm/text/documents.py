"""Text -> documents: read, drop duplicates, split by document into train, validation and test.

`WORKDIR/documents/` holds JSON lines (`id`, `text`), one or more shards per split, and a manifest with their checksums. A train shard
becomes a shard of the datastore; so do shards that were added later (`beam_pipelines.append`), in which the model was not trained.
"""

import bisect
import contextlib
from collections.abc import Iterable, Iterator

from resmem_lm.errors import UserError, check_least
from resmem_lm.text.duplicates import mark_duplicates
from resmem_lm.text.shards import SPLITS, position, shard_content, shard_name, write_manifest
from resmem_lm.text.sources import EMBEDDED, Document, read_documents
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import Record, new_directory


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


@stage(name="documents")
def prepare_documents(
    run: Run,
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
        shards: number of train shards, of which `build_datastore.shards` says how many are live.

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

    with new_directory(run.documents) as folder:
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
