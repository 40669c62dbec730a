"""Read documents, drop near-duplicates, and split the rest into train, validation and test.

WORKDIR/documents contains a manifest and, for each split, one or more shards of JSON lines (`id`, `text`, and `group` if the document has
one). Each train shard becomes one shard of the datastore.
"""

import bisect
import contextlib
from collections.abc import Iterable, Iterator

from resmem_lm.errors import UserError, check_least
from resmem_lm.text.duplicates import Signatures
from resmem_lm.text.shards import SPLITS, position, shard_content, shard_name, write_manifest
from resmem_lm.text.sources import DOCSTRINGS, Document, Source, read_documents
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import AnyPath, Record, new_directory


def assign_splits(documents: Iterable[Document], *, validation_fraction: float, test_fraction: float) -> Iterator[tuple[str, Document]]:
    """Yield (split, document): test for a `position` below `test_fraction`, validation for the next `validation_fraction`, else train.

    So adding documents does not change the split of the others, with one exception. If a split would be empty, one document moves to it:
    the one with the lowest position to test, the next one to validation, the one with the highest position to train. Documents of a group
    share the position of the group and never move.
    """

    def split_at(place: float) -> str:
        return "test" if place < test_fraction else "validation" if place < test_fraction + validation_fraction else "train"

    held: list[tuple[float, int, Document]] = []  # the two lowest and the highest position so far
    filled = set()
    for number, document in enumerate(documents):
        if document.group is not None:
            place = position(document.group)
        else:
            bisect.insort(held, (position(document.text), number, document))
            if len(held) <= 3:
                continue
            place, _, document = held.pop(2)
        filled.add(split := split_at(place))
        yield split, document
    for wanted, (place, _, document) in reversed(list(zip(("test", "validation", "train"), held, strict=False))):
        filled.add(split := split_at(place) if wanted in filled else wanted)
        yield split, document


@stage(name="documents")
def prepare_documents(
    run: Run,
    *,
    text: Source = DOCSTRINGS,
    group: str | None = None,
    validation_fraction: float = 0.02,
    test_fraction: float = 0.02,
    duplicate_threshold: float = 0.7,
    shards: int = 16,
) -> Record:
    """Write the documents of a text, without near-duplicates, to the shards of each split in WORKDIR/documents.

    Args:
        text: files, directories or globs (.txt, .md, .jsonl, .json; also .gz, .xz, .zst, .bz2), or a text that every installation has:
            "docstrings" (of the installed modules) or "descriptions" (of the installed packages).
        group: a field of the JSON lines. Documents with the same value, such as the chapters of a book, go into one split.
        validation_fraction: share of the documents used to choose hyperparameters, 0 to 1.
        test_fraction: share of the documents used for the reported results, 0 to 1.
        duplicate_threshold: Jaccard similarity of word 5-grams, above 0 and up to 1, at which the later of two documents is dropped.
        shards: number of train shards. `build_datastore.shards` sets the number of them in the datastore.

    Raises:
        UserError: the text is missing or unreadable, it has fewer than three documents, or a setting is out of range.
    """
    check_least("prepare_documents", 1, shards=shards)
    if not 0 < duplicate_threshold <= 1:
        raise UserError(f"prepare_documents.duplicate_threshold = {duplicate_threshold}: take a number above 0 and up to 1")
    if not (0 <= validation_fraction <= 1 and 0 <= test_fraction <= 1):
        raise UserError(
            f"prepare_documents.validation_fraction = {validation_fraction}, test_fraction = {test_fraction}: take numbers from 0 to 1"
        )
    counts = dict.fromkeys((*SPLITS, "empty", "duplicate"), 0)
    documents = _distinct(read_documents(text, duplicate_threshold=duplicate_threshold, group=group), duplicate_threshold, counts)
    splits = assign_splits(documents, validation_fraction=validation_fraction, test_fraction=test_fraction)
    with new_directory(run.documents) as folder:
        _write_shards(folder, splits, shards, counts)
        if not all(counts[split] for split in SPLITS):
            total = sum(counts[split] for split in SPLITS)
            raise UserError(
                f"{text!r} has {total} different documents for {len(SPLITS)} splits "
                f"({counts['empty']} more are empty, {counts['duplicate']} are duplicates): give at least {len(SPLITS)}"
                f"{', or larger validation_fraction and test_fraction, because groups stay together' if group else ''}"
            )
        checksums = write_manifest(folder)
    return {"documents": counts, "checksums": checksums}


def _distinct(documents: Iterable[Document], threshold: float, counts: dict[str, int]) -> Iterator[Document]:
    """Yield the documents that are neither empty nor near-duplicates, and count the others in `counts`."""
    signatures = Signatures(threshold)
    for document in documents:
        if not document.text.strip():
            counts["empty"] += 1
        elif signatures.add_new(document.text):
            yield document
        else:
            counts["duplicate"] += 1


def _write_shards(folder: AnyPath, splits: Iterable[tuple[str, Document]], train_shards: int, counts: dict[str, int]) -> None:
    """Write each document to the next shard of its split, in turn, and count it in `counts`."""
    shards_of = {split: train_shards if split == "train" else 1 for split in SPLITS}
    with contextlib.ExitStack() as stack, progress("documents", total=None, unit="documents") as bar:
        files = {
            split: [stack.enter_context((folder / shard_name(split, i, shards)).open("w", encoding="utf-8")) for i in range(shards)]
            for split, shards in shards_of.items()
        }
        for split, document in splits:
            bar.update(sum(counts.values()))
            files[split][counts[split] % len(files[split])].write(shard_content([document]))
            counts[split] += 1
