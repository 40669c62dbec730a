"""More text -> more shards of a finished datastore."""

from collections.abc import Iterable

from beam_pipelines.build_datastore import encode_units, units_of
from beam_pipelines.sample_documents import file_documents
from resmem_lm.memory.datastore import datastore_summary, open_datastore
from resmem_lm.text.duplicates import Signatures, minhash
from resmem_lm.text.shards import SPLITS, position, read_shard, shard_content, shard_name, shard_paths, write_manifest
from resmem_lm.text.sources import Document, read_documents, text_files
from resmem_lm.workdir.lock import locked
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import Record, children, remove, write_bytes

SPLITS_AND_ADDED = (*SPLITS, "added")


def append(run: Run, text: str | list[str] | tuple[str, ...], *, pipeline_options: str = "") -> Record:
    """Adds documents to a finished datastore, in shards of their own. The model is not trained on them.

    Documents that nearly repeat one of the work directory, of whatever split, are left out, and those of a `prepare_documents.group`
    that falls into validation or test. So running it again adds nothing (but what was deleted in between comes back), and an append that
    was killed goes on. `resmem index` and `resmem evaluate` then do what is new.

    Args:
        run: of a finished datastore.
        text: files, directories or globs, as `prepare_documents.text`.
        pipeline_options: Beam's own.

    Returns:
        Numbers of documents added and left out (by reason), and of the datastore's rows.

    Raises:
        UserError: no finished datastore, unreadable text, or another command is writing into the work directory.
    """
    with locked(run.path), disk_errors(run.path):
        record = run.finished("build")
        documents = run.finished("documents")
        threshold = documents["settings"]["duplicate_threshold"]
        counts = {"added": 0, "empty": 0, "duplicate": 0, "held_out": 0}
        fresh = _new_documents(run, text, documents, threshold, counts)
        folder = run.documents
        listed = {path.name for split in SPLITS_AND_ADDED for path in shard_paths(run, split)}
        for path in children(folder, "added-*.jsonl"):  # of an append that was killed before the manifest
            if path.name not in listed:
                remove(path)
        if fresh:
            counts["added"] = len(fresh)
            number = 1 + len({name.split("-")[1] for name in listed if name.startswith("added-")})
            # Shards as large as those of the train split.
            shards = max(1, round(len(fresh) * len(shard_paths(run, "train")) / documents["result"]["documents"]["train"]))
            names = [shard_name(f"added-{number:04d}", shard, shards) for shard in range(shards)]
            contents = {name: shard_content(fresh[shard::shards]).encode() for shard, name in enumerate(names)}
            for name, content in contents.items():
                write_bytes(folder / name, content)
            write_manifest(folder, contents)
        datastore = open_datastore(run.datastore)
        encode_units(run, datastore.binding, units_of(run, record["settings"]["shards"]), pipeline_options)
        described = datastore_summary(run)
        run.update_result("build", described)
        return counts | {"rows": described["rows"]}


def _new_documents(
    run: Run, text: str | list[str] | tuple[str, ...], documents: Record, threshold: float, counts: Record
) -> list[Document]:
    """Of the text, what repeats neither another part of it nor a document of the work directory."""
    read: Iterable[Document]
    settings, held_out = documents["settings"], 0.0
    if "held_out" in settings:  # sampled: documents are named by their addresses
        read = (document for path in text_files(text) for document in file_documents(str(path)))
    else:
        read = read_documents(text, duplicate_threshold=threshold, group=settings.get("group"))
        held_out = settings["test_fraction"] + settings["validation_fraction"]
    signatures, fresh = Signatures(threshold), []
    with progress("append", total=None, unit="documents") as bar:
        for number, document in enumerate(read):
            bar.update(number)
            signature = minhash(document.text)
            if not document.text.strip():
                counts["empty"] += 1
            elif document.group is not None and position(document.group) < held_out:
                counts["held_out"] += 1
            elif signatures.has_similar(signature):
                counts["duplicate"] += 1
            else:
                signatures.add(signature)
                fresh.append(document)
    known: set[int] = set()
    paths = [path for split in SPLITS_AND_ADDED for path in shard_paths(run, split)]
    with progress("compare", total=len(paths), unit="shards of documents") as bar:
        for number, path in enumerate(paths):
            for document in read_shard(path):
                known.update(signatures.similar(minhash(document.text)))
            bar.update(number + 1)
    counts["duplicate"] += len(known)
    return [document for number, document in enumerate(fresh) if number not in known]
