"""Taking documents out of a datastore: `delete` at once for every reader, `compact` from the files.

Rows of deleted documents stay in their arrays, named in their shard's record, until `compact` writes the shards without them.
The model keeps what it learned from the documents in training.
"""

from typing import Any

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import datastore_summary, open_datastore
from resmem_lm.text.shards import read_shard, shard_content, shard_paths, write_manifest
from resmem_lm.workdir.artifacts import record_path, remove_orphans
from resmem_lm.workdir.lock import assert_held, locked
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import AnyPath, Record, children, remove, write_bytes, write_json

DERIVED_PATHS = ("neighbors", "results.json", "report.html", "studies", "derived")
DERIVED_STAGES = ("search", "evaluate", "report", "study-*")


def delete(run: Run, *, document: str | None = None, source: str | None = None) -> Record:
    """Deletes documents: none of their rows is a neighbor any more, and their text is gone from WORKDIR/documents.

    Cached neighbors, results, studies with what they derived, and the report are removed, because they may show the documents. Killed and
    run again, it ends the same.

    Args:
        run: of a finished datastore.
        document: a document's id.
        source: a file, folder or address: the documents whose id is it, or begins with it and "#" or "/".

    Returns:
        Numbers of documents and rows that were deleted now.

    Raises:
        UserError: no such document in the datastore, or another command is writing into the work directory.
    """
    if bool(document) == bool(source):
        raise UserError("resmem delete: give either --document=ID or --source=...")

    def is_meant(name: str) -> bool:
        return name == document if not source else name == source or name.startswith((f"{source}#", f"{source.rstrip('/')}/"))

    with locked(run.path), disk_errors(run.path):
        run.finished("build")
        datastore = open_datastore(run.datastore)
        meant = [[d for d in datastore.documents(shard) if is_meant(d["id"])] for shard in range(len(datastore.shards))]
        known = {record["provenance"]["documents"] for record in datastore.shards}
        # Of an append that was killed before the manifest had its rows, and of train shards that are not live.
        others = {path.name for split in ("train", "added") for path in shard_paths(run, split)} - known
        elsewhere = any(is_meant(d.id) for name in others for d in read_shard(run.documents / name))
        if not any(meant) and not elsewhere:
            what = f"document {document!r}" if document else f"source {source!r}"
            raise UserError(f"{run.datastore} has no {what}: its documents.jsonl files have the ids; validation and test are not in it")
        _remove_what_shows_rows(run)  # first, so that a kill at any moment leaves nothing that returns them
        found = {"documents": 0, "rows": 0}
        for record, documents in zip(datastore.shards, meant, strict=True):
            before = [tuple(some) for some in record.get("deleted", [])]
            new = [(d["first_row"], d["rows"]) for d in documents if (d["first_row"], d["rows"]) not in before]
            found = {"documents": found["documents"] + len(new), "rows": found["rows"] + sum(rows for _, rows in new)}
            if new:
                record["deleted"] = sorted([*map(list, before), *map(list, new)])
            write_json(record_path(run.datastore, record), record)  # of all: a killed compact may have left another
        remove_orphans(run.datastore, datastore.shards)  # an append that is run again would take what it had published
        assert_held(run.path)
        write_json(run.datastore / "manifest.json", datastore.manifest)
        named = {r["provenance"]["documents"] for r, some in zip(datastore.shards, meant, strict=True) if some}
        _remove_text(run, named | others, is_meant)
        run.update_result("build", datastore_summary(run))
    return found


def _remove_what_shows_rows(run: Run) -> None:
    records = [path for name in DERIVED_STAGES for path in children(run.stages, f"{name}.json")]
    for path in (*records, *(run.path / name for name in DERIVED_PATHS)):
        remove(path)
        _check_gone(path)


def _check_gone(path: AnyPath) -> None:
    if path.exists():
        raise UserError(f"{path} cannot be removed: make it and its folder writable, and run the same command again")


def _remove_text(run: Run, names: set[str], is_meant: Any) -> None:
    for path in (path for split in ("train", "added") for path in shard_paths(run, split) if path.name in names):
        documents = read_shard(path)
        kept = [document for document in documents if not is_meant(document.id)]
        content = shard_content(kept).encode()
        # The manifest first: where a kill comes between, the text is still there, and is found and removed by the next run.
        if len(kept) < len(documents):
            write_manifest(run.documents, {path.name: content})
            write_bytes(path, content)
