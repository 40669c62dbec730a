"""Append documents to a finished datastore, in shards of their own."""

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
from resmem_lm.workdir.storage import AnyPath, Record, children, remove, write_bytes

Text = str | list[str] | tuple[str, ...]


def append(run: Run, text: Text, *, pipeline_options: str = "") -> Record:
    """Add documents to a finished datastore. The model is not trained on them.

    Two kinds of documents are left out: near-duplicates of a document of the work directory, in any split, and documents whose
    `prepare_documents.group` falls into validation or test. A second call therefore adds nothing, except documents that were deleted in
    between, and a call after a killed one completes it. Run `resmem index` and `resmem evaluate` afterwards; they do only what is new.

    Args:
        run: with a finished datastore.
        text: files, directories or globs, as `prepare_documents.text`.
        pipeline_options: of Apache Beam.

    Returns:
        The numbers of documents added and left out (by reason), and of the datastore's live rows.

    Raises:
        UserError: there is no finished datastore, the text cannot be read, or another command is writing into the work directory.
    """
    with locked(run.path), disk_errors(run.path):
        record = run.finished("build")
        documents = run.finished("documents")
        counts = {"added": 0, "empty": 0, "duplicate": 0, "held_out": 0}
        new = _new_documents(run, text, documents["settings"], counts)
        listed = {path.name for path in _all_shards(run)}
        for path in children(run.documents, "added-*.jsonl"):  # from an append that was killed before it wrote the manifest
            if path.name not in listed:
                remove(path)
        if new:
            counts["added"] = len(new)
            number = 1 + len({name.split("-")[1] for name in listed if name.startswith("added-")})
            # Shards as large as those of the train split.
            shards = max(1, round(len(new) * len(shard_paths(run, "train")) / documents["result"]["documents"]["train"]))
            names = [shard_name(f"added-{number:04d}", shard, shards) for shard in range(shards)]
            contents = {name: shard_content(new[shard::shards]).encode() for shard, name in enumerate(names)}
            for name, content in contents.items():
                write_bytes(run.documents / name, content)
            write_manifest(run.documents, contents)
        datastore = open_datastore(run.datastore)
        encode_units(run, datastore.binding, units_of(run, record["settings"]["shards"]), pipeline_options)
        summary = datastore_summary(run)
        run.update_result("build", summary)
        return counts | {"rows": summary["rows"]}


def _all_shards(run: Run) -> list[AnyPath]:
    return [path for split in (*SPLITS, "added") for path in shard_paths(run, split)]


def _new_documents(run: Run, text: Text, settings: Record, counts: Record) -> list[Document]:
    """Return the documents to add, and count the others by reason.

    Args:
        run: whose documents are compared.
        text: see `append`.
        settings: of the stage `documents`.
        counts: updated.
    """
    documents: Iterable[Document]
    threshold, held_out = settings["duplicate_threshold"], 0.0
    if "held_out" in settings:  # the work directory has sampled text, whose documents are named by their addresses
        documents = (document for path in text_files(text) for document in file_documents(str(path)))
    else:
        documents = read_documents(text, duplicate_threshold=threshold, group=settings.get("group"))
        held_out = settings["test_fraction"] + settings["validation_fraction"]
    signatures, new = Signatures(threshold), []
    with progress("append", total=None, unit="documents") as bar:
        for number, document in enumerate(documents):
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
                new.append(document)
    present: set[int] = set()  # numbers of new documents that the work directory has already
    paths = _all_shards(run)
    with progress("compare", total=len(paths), unit="shards of documents") as bar:
        for number, path in enumerate(paths):
            for document in read_shard(path):
                present.update(signatures.similar(minhash(document.text)))
            bar.update(number + 1)
    counts["duplicate"] += len(present)
    return [document for number, document in enumerate(new) if number not in present]
