"""Delete documents from a datastore.

Deleted rows stay in the arrays until `compact` rewrites the shards. The record of a shard lists them, and no search returns them. The model
keeps what it learned from the documents in training.
"""

from collections.abc import Callable

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore, datastore_summary, open_datastore
from resmem_lm.text.shards import read_shard, shard_content, shard_paths, write_manifest
from resmem_lm.workdir.artifacts import record_path, remove_orphans
from resmem_lm.workdir.lock import assert_held, locked
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import AnyPath, Record, children, remove, write_bytes, write_json

DERIVED_PATHS = ("neighbors", "gates.npz", "results.json", "report.html", "studies", "derived")
DERIVED_STAGES = ("search", "evaluate", "report", "study-*")
DELETABLE_SPLITS = ("train", "added")

Selects = Callable[[str], bool]  # returns whether a document id is selected


def delete(run: Run, *, document: str | None = None, source: str | None = None) -> Record:
    """Delete documents: exclude their rows from all searches, and remove their text from WORKDIR/documents.

    Cached neighbors, results, studies and the report are removed, because they may show the documents. If the command is killed, run it
    again. Return the number of newly deleted documents and rows. Raise UserError if no document matches or another command is writing to
    the work directory.

    Args:
        run: a run with a finished datastore.
        document: the id of a document.
        source: a file, folder or address. It selects the ids that are equal to it, or begin with it followed by "#" or "/".
    """
    if bool(document) == bool(source):
        raise UserError("resmem delete: give either --document=ID or --source=...")

    def selects(name: str) -> bool:
        return name == document if not source else name == source or name.startswith((f"{source}#", f"{source.rstrip('/')}/"))

    with locked(run.path), disk_errors(run.path):
        run.finished("build")
        datastore = open_datastore(run.datastore)
        selected = [[d for d in datastore.documents(shard) if selects(d["id"])] for shard in range(len(datastore.shards))]
        # Document shards without rows come from a killed append, or are train shards beyond `build_datastore.shards`.
        others = {path.name for split in DELETABLE_SPLITS for path in shard_paths(run, split)} - _sources(datastore.shards)
        if not any(selected) and not any(selects(d.id) for name in others for d in read_shard(run.documents / name)):
            what = f"document {document!r}" if document else f"source {source!r}"
            raise UserError(f"{run.datastore} has no {what}: documents.jsonl lists its ids; validation and test documents are not in it")
        remove_derived(run)  # first, so that no output shows the rows if the command is killed
        counts = _mark_deleted(run, datastore, selected)
        remove_text(run, _sources([record for record, some in zip(datastore.shards, selected, strict=True) if some]) | others, selects)
        run.update_result("build", datastore_summary(run))
    return counts


def _sources(records: list[Record]) -> set[str]:
    """Return the names of the document shards from which datastore shards were built."""
    return {record["provenance"]["documents"] for record in records}


def _mark_deleted(run: Run, datastore: Datastore, selected: list[list[Record]]) -> Record:
    """List the documents' rows as deleted in the shard records, then in the manifest. Return the number of new ones."""
    counts = {"documents": 0, "rows": 0}
    for record, documents in zip(datastore.shards, selected, strict=True):
        before = record.get("deleted", [])
        new = [rows for d in documents if (rows := [d["first_row"], d["rows"]]) not in before]
        counts = {"documents": counts["documents"] + len(new), "rows": counts["rows"] + sum(rows for _, rows in new)}
        if new:
            record["deleted"] = sorted([*before, *new])
        write_json(record_path(run.datastore, record), record)  # for every shard, because a killed compact may have replaced a record
    remove_orphans(run.datastore, datastore.shards)  # otherwise the next append would reuse artifacts of a killed one
    assert_held(run.path)
    write_json(run.datastore / "manifest.json", datastore.manifest)
    return counts


def remove_derived(run: Run) -> None:
    """Remove the outputs that may show rows of the datastore, and the records of their stages."""
    records = [path for name in DERIVED_STAGES for path in children(run.stages, f"{name}.json")]
    for path in (*records, *(run.path / name for name in DERIVED_PATHS)):
        remove(path)
        check_removed(path)


def check_removed(path: AnyPath) -> None:
    """Raise UserError if a removed path still exists."""
    if path.exists():
        raise UserError(f"{path} cannot be removed: make it and its folder writable, and run the same command again")


def remove_text(run: Run, names: set[str], selects: Selects) -> None:
    """Remove the selected documents from the named document shards."""
    for path in (path for split in DELETABLE_SPLITS for path in shard_paths(run, split) if path.name in names):
        documents = read_shard(path)
        kept = [document for document in documents if not selects(document.id)]
        content = shard_content(kept).encode()
        # Write the manifest first. If the command is killed before it writes the shard, the next delete still finds and removes the text.
        if len(kept) < len(documents):
            write_manifest(run.documents, {path.name: content})
            write_bytes(path, content)
