"""Rewrite the shards of a datastore without their deleted rows."""

from collections.abc import Iterator

import numpy as np

from resmem_lm.maintenance.delete import check_removed, remove_derived, remove_text
from resmem_lm.memory.datastore import Datastore, datastore_summary, open_datastore
from resmem_lm.memory.schema import ARRAYS, FILES, deleted_first_rows, document_line
from resmem_lm.workdir.artifacts import folder_of, name_of, publish, record_path, remove_orphans
from resmem_lm.workdir.lock import assert_held, locked
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import Record, drop_copy, read_json, write_json

COPY_ROWS = 2**16  # rows of an array that are in memory at a time


def compact(run: Run) -> Record:
    """Rewrite every datastore shard with deleted rows, and return the number of such shards, and of rows before and after.

    `resmem index` then rebuilds the affected index shards. Raise UserError if the datastore is unfinished or damaged, or another command is
    writing to the work directory.
    """
    with locked(run.path), disk_errors(run.path):
        run.finished("build")
        folder = run.datastore
        datastore = open_datastore(folder)
        records, written = [], 0
        for shard, record in enumerate(datastore.shards):
            _finish_deletion(run, datastore, shard)
            on_disk = read_json(record_path(folder, record))
            if on_disk["folder"] != record["folder"] and on_disk.get("compacted_from") == record["folder"]:
                record = on_disk  # a compact that was killed has written it
            elif record.get("deleted"):
                record, written = _without_deleted(datastore, shard), written + 1
            records.append(record)
        if records != datastore.shards:
            remove_derived(run)
        rows = sum(record["rows"] for record in records)
        assert_held(run.path)
        write_json(folder / "manifest.json", datastore.manifest | {"rows": rows, "shards": records})
        remove_orphans(folder, records)
        for old in {folder_of(folder, record) for record in datastore.shards} - {folder_of(folder, record) for record in records}:
            check_removed(old)
        run.update_result("build", datastore_summary(run))
    return {"shards": written, "rows_before": datastore.rows, "rows": rows}


def _finish_deletion(run: Run, datastore: Datastore, shard: int) -> None:
    """Remove the text that a killed `delete` left: once the deleted rows are gone, nothing identifies their documents."""
    if ids := datastore.deleted_documents(shard):
        remove_text(run, {datastore.shards[shard]["provenance"]["documents"]}, ids.__contains__)


def _without_deleted(datastore: Datastore, shard: int) -> Record:
    """Publish a shard without its deleted rows and return its record."""
    part, record = datastore.part(shard, 1), datastore.shards[shard]
    kept = np.flatnonzero(~part.is_deleted(np.arange(part.rows)))
    name = name_of(record)
    part.check_files(*FILES)
    with publish(datastore.folder, name, record["provenance"], FILES) as attempt:
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
    """Yield the lines of a shard's documents.jsonl without deleted documents."""
    first_row, deleted = 0, deleted_first_rows(part.shards[0])
    for document in part.documents(0):
        if document["first_row"] not in deleted:
            yield document_line(document["id"], first_row, document["rows"])
            first_row += document["rows"]
