"""Taking documents out of a datastore: `forget` at once for every reader, `compact` from the files.

Rows of forgotten documents stay in their arrays, named in their shard's record, until `compact` writes the shards without them.
The model keeps what it learned from the documents in training.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from resmem_lm.datastore import ARRAYS, FILES, Datastore, document_line, open_datastore
from resmem_lm.documents import read_shard, shard_content, shard_paths, write_manifest
from resmem_lm.errors import UserError
from resmem_lm.lock import assert_held, locked
from resmem_lm.published import Record, folder_of, name_of, publish, record_path, remove_orphans
from resmem_lm.storage import AnyPath, children, drop_copy, read_json, remove, write_bytes, write_json
from resmem_lm.workdir import disk_errors, finished

COPY_ROWS = 2**16
MADE_FROM_ROWS = ("neighbors", "results.json", "report.html", "studies", "derived")
STAGES_FROM_ROWS = ("search", "evaluate", "report", "study-*")


def forget(workdir: AnyPath, *, document: str | None = None, source: str | None = None) -> Record:
    """Forgets documents: none of their rows is a neighbour any more, and their text is gone from WORKDIR/documents.

    Cached neighbours, results, studies with what they derived, and the report are removed, because they may show the documents. Killed and
    run again, it ends the same.

    Args:
        workdir: of a finished datastore.
        document: a document's id.
        source: a file, folder or address: the documents whose id is it, or begins with it and "#" or "/".

    Returns:
        Numbers of documents and rows that were forgotten now.

    Raises:
        UserError: no such document in the datastore, or another command is writing into the work directory.
    """
    if bool(document) == bool(source):
        raise UserError("resmem forget: give either --document=ID or --source=...")

    def is_meant(name: str) -> bool:
        return name == document if not source else name == source or name.startswith((f"{source}#", f"{source.rstrip('/')}/"))

    with locked(workdir), disk_errors(workdir):
        finished(workdir, "build")
        datastore = open_datastore(workdir / "datastore")
        meant = [[d for d in datastore.documents(shard) if is_meant(d["id"])] for shard in range(len(datastore.shards))]
        known = {record["made_from"]["documents"] for record in datastore.shards}
        # Of an append that was killed before the manifest had its rows, and of train shards that are not remembered.
        others = {path.name for split in ("train", "added") for path in shard_paths(workdir, split)} - known
        elsewhere = any(is_meant(d.id) for name in others for d in read_shard(workdir / "documents" / name))
        if not any(meant) and not elsewhere:
            what = f"document {document!r}" if document else f"source {source!r}"
            raise UserError(
                f"{workdir / 'datastore'} has no {what}: its documents.jsonl files have the ids; validation and test are not in it"
            )
        _remove_what_shows_rows(workdir)  # first, so that a kill at any moment leaves nothing that returns them
        found = {"documents": 0, "rows": 0}
        for record, documents in zip(datastore.shards, meant, strict=True):
            before = [tuple(some) for some in record.get("forgotten", [])]
            new = [(d["first_row"], d["rows"]) for d in documents if (d["first_row"], d["rows"]) not in before]
            found = {"documents": found["documents"] + len(new), "rows": found["rows"] + sum(rows for _, rows in new)}
            if new:
                record["forgotten"] = sorted([*map(list, before), *map(list, new)])
            write_json(record_path(workdir / "datastore", record), record)  # of all: a killed compact may have left another
        remove_orphans(workdir / "datastore", datastore.shards)  # an append that is run again would take what it had published
        assert_held(workdir)
        write_json(workdir / "datastore" / "manifest.json", datastore.manifest)
        named = {r["made_from"]["documents"] for r, some in zip(datastore.shards, meant, strict=True) if some}
        _remove_text(workdir, named | others, is_meant)
        renew_build(workdir)
    return found


def _remove_what_shows_rows(workdir: AnyPath) -> None:
    records = [path for name in STAGES_FROM_ROWS for path in children(workdir / "stages", f"{name}.json")]
    for path in (*records, *(workdir / name for name in MADE_FROM_ROWS)):
        remove(path)
        _check_gone(path)


def _check_gone(path: AnyPath) -> None:
    if path.exists():
        raise UserError(f"{path} cannot be removed: make it and its folder writable, and run the same command again")


def _remove_text(workdir: AnyPath, names: set[str], is_meant: Any) -> None:
    for path in (path for split in ("train", "added") for path in shard_paths(workdir, split) if path.name in names):
        documents = read_shard(path)
        kept = [document for document in documents if not is_meant(document.id)]
        content = shard_content(kept).encode()
        # The manifest first: where a kill comes between, the text is still there, and is found and removed by the next run.
        if len(kept) < len(documents):
            write_manifest(workdir / "documents", {path.name: content})
            write_bytes(path, content)


def renew_build(workdir: AnyPath) -> None:
    """Tells the stages after it that the datastore is another now."""
    from beam_pipelines.datastore import build_datastore, describe

    build_datastore.renew(workdir, describe(workdir))


def compact(workdir: AnyPath) -> Record:
    """Writes every shard of the datastore that has forgotten rows anew without them. `resmem index` then makes what held them again.

    Returns:
        Numbers of shards written, and of rows before and after.

    Raises:
        UserError: the datastore is not finished or damaged, or another command is writing into the work directory.
    """
    with locked(workdir), disk_errors(workdir):
        finished(workdir, "build")
        folder = workdir / "datastore"
        datastore = open_datastore(folder)
        before, records, written = datastore.rows, [], 0
        for shard, record in enumerate(datastore.shards):
            _finish_forgetting(workdir, datastore, shard)
            on_disk = read_json(record_path(folder, record))
            if on_disk["folder"] != record["folder"] and on_disk.get("compacted_from") == record["folder"]:
                record = on_disk  # a compact that was killed had written it
            elif record.get("forgotten"):
                record, written = _without_forgotten(datastore, shard), written + 1
            records.append(record)
        if written or records != datastore.shards:
            _remove_what_shows_rows(workdir)
        rows = sum(record["rows"] for record in records)
        assert_held(workdir)
        write_json(folder / "manifest.json", datastore.manifest | {"rows": rows, "shards": records})
        remove_orphans(folder, records)
        for old in {folder_of(folder, record) for record in datastore.shards} - {folder_of(folder, record) for record in records}:
            _check_gone(old)
        renew_build(workdir)
    return {"shards": written, "rows_before": before, "rows": rows}


def _finish_forgetting(workdir: AnyPath, datastore: Datastore, shard: int) -> None:
    """Removes the text that a killed `forget` has left: without their rows the documents could not be found again."""
    if ids := datastore.forgotten_documents(shard):
        _remove_text(workdir, {datastore.shards[shard]["made_from"]["documents"]}, ids.__contains__)


def _without_forgotten(datastore: Datastore, shard: int) -> Record:
    part, record = datastore.part(shard, 1), datastore.shards[shard]
    kept = np.flatnonzero(~part.is_forgotten(np.arange(part.rows)))
    name = name_of(record)
    part.check_files(*FILES)
    with publish(datastore.folder, name, record["made_from"], FILES) as attempt:
        for array in ARRAYS:
            with (attempt.folder / f"{array}.npy").open("wb") as file:
                whole = part.array(array)
                header = {"descr": np.lib.format.dtype_to_descr(whole.parts[0].dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, header | {"shape": (len(kept), *whole.shape[1:])})
                for start in range(0, len(kept), COPY_ROWS):
                    file.write(np.ascontiguousarray(whole[kept[start : start + COPY_ROWS]]).tobytes())
        lines = list(_kept_lines(part))
        (attempt.folder / "documents.jsonl").write_text("".join(lines), "utf-8")
        counts = record["counts"] | {"documents": len(lines), "tokens": len(kept)}
        attempt.facts |= {"rows": len(kept), "counts": counts, "compacted_from": record["folder"]}
    for array in ARRAYS:
        drop_copy(folder_of(datastore.folder, record) / f"{array}.npy")
    return read_json(datastore.folder / f"{name}.json")


def _kept_lines(part: Datastore) -> Iterator[str]:
    first, forgotten = 0, {begin for begin, rows in part.shards[0]["forgotten"] if rows}
    for document in part.documents(0):
        if document["first_row"] not in forgotten:
            yield document_line(document["id"], first, document["rows"])
            first += document["rows"]
