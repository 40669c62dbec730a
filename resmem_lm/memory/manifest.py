"""Read and write the manifest of a datastore, which lists the published shards that belong to it."""

import contextlib

from resmem_lm.errors import DamagedError
from resmem_lm.memory.schema import Binding
from resmem_lm.workdir.artifacts import damaged_files, find_record, name_of, record_path, remove_orphans
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import AnyPath, Record, read_json, write_json


def listed_shards(folder: AnyPath) -> list[Record]:
    """Return the shard records in the manifest, or [] if there is no manifest."""
    path = folder / "manifest.json"
    shards: list[Record] = read_json(path)["shards"] if path.exists() else []
    return shards


def finished_shards(folder: AnyPath, listed: list[Record], provenances: dict[str, Record]) -> dict[str, Record]:
    """Return the records, by name, of the shards that are finished. `listed` are the records in the manifest.

    The record in the manifest takes precedence over the shard's record file, because a worker that Beam abandoned may still replace the
    file. A shard without a record file is not finished: users delete the file to rebuild a damaged shard.
    """
    in_manifest = {name_of(record): record for record in listed}
    finished = {}
    for name, provenance in provenances.items():
        record = in_manifest.get(name)
        if record and (folder / f"{name}.json").exists() and record["provenance"] == provenance and not any(damaged_files(folder, record)):
            finished[name] = record
        elif found := find_record(folder, name, provenance):
            finished[name] = found
    return finished


def write_manifest(folder: AnyPath, binding: Binding, records: list[Record]) -> None:
    """Write the manifest of published shards, and remove other artifacts from the folder."""
    with disk_errors(folder):
        write_json(folder / "manifest.json", binding.to_json() | {"rows": sum(r["rows"] for r in records), "shards": records})
        remove_orphans(folder, records)
        for record in records:
            path = record_path(folder, record)
            with contextlib.suppress(DamagedError):
                if read_json(path) == record:
                    continue
            write_json(path, record)
