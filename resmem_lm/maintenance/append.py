"""Append documents to a finished datastore as new shards."""

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
    """Add the documents of a text to a finished datastore. The model is not trained on them.

    Near-duplicates of any document in the work directory are skipped, and so are documents whose group belongs to validation or test. A
    second call therefore adds nothing, except documents that were deleted in the meantime. A call completes an earlier call that was
    killed. Run `resmem index` and `resmem evaluate` afterwards; they process only what is new.

    Return the number of added documents, of skipped documents by reason, and of the datastore's live rows. Raise UserError if there is no
    finished datastore, the text cannot be read, or another command is writing to the work directory.
    """
    with locked(run.path), disk_errors(run.path):
        record = run.finished("build")
        documents = run.finished("documents")
        counts = {"added": 0, "empty": 0, "duplicate": 0, "held_out": 0}
        new = _new_documents(run, text, documents["settings"], counts)
        listed = {path.name for path in _all_shards(run)}
        for path in children(run.documents, "added-*.jsonl"):  # left by an append that was killed before it wrote the manifest
            if path.name not in listed:
                remove(path)
        if new:
            counts["added"] = len(new)
            number = 1 + len({name.split("-")[1] for name in listed if name.startswith("added-")})
            # New shards are as large as train shards.
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
    """Return the documents to add, and count the others by reason in `counts`; `settings` are those of the stage `documents`."""
    documents: Iterable[Document]
    threshold, held_out = settings["duplicate_threshold"], 0.0
    if "held_out" in settings:  # sampled text: the ids of its documents are their addresses
        documents = (document for path in text_files(text) for document in file_documents(str(path)))
    else:
        documents = read_documents(text, duplicate_threshold=threshold, group=settings.get("group"))
        held_out = settings["test_fraction"] + settings["validation_fraction"]
    signatures, new = Signatures(threshold), []
    with progress("append", total=None, unit="documents") as bar:
        for number, document in enumerate(documents):
            bar.update(number)
            if not document.text.strip():
                counts["empty"] += 1
            elif document.group is not None and position(document.group) < held_out:
                counts["held_out"] += 1
            elif signatures.add_new(document.text):
                new.append(document)
            else:
                counts["duplicate"] += 1
    present: set[int] = set()  # indexes of the new documents that the work directory already has
    paths = _all_shards(run)
    with progress("compare", total=len(paths), unit="shards of documents") as bar:
        for number, path in enumerate(paths):
            for document in read_shard(path):
                present.update(signatures.similar(minhash(document.text)))
            bar.update(number + 1)
    counts["duplicate"] += len(present)
    return [document for number, document in enumerate(new) if number not in present]
