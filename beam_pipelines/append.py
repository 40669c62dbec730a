"""More text -> more shards of a finished datastore."""

import contextlib
from collections.abc import Iterator

from beam_pipelines.datastore import build_datastore, describe, encode_units, units_of
from resmem_lm.datastore import open_datastore
from resmem_lm.documents import SPLITS, Document, read_documents, read_shard, shard_content, shard_name, shard_paths, write_manifest
from resmem_lm.duplicates import Signatures, minhash
from resmem_lm.lock import locked
from resmem_lm.progress import progress
from resmem_lm.published import Record
from resmem_lm.storage import AnyPath, children, remove, write_bytes
from resmem_lm.workdir import disk_errors, finished

SPLITS_AND_ADDED = (*SPLITS, "added")


def append(workdir: AnyPath, text: str | list[str] | tuple[str, ...], *, pipeline_options: str = "") -> Record:
    """Adds documents to a finished datastore, in shards of their own. The model is not trained on them.

    Documents that nearly repeat one of the work directory, of whatever split, are left out; so running it again adds nothing,
    and an append that was killed goes on. `resmem index` and `resmem evaluate` then do what is new.

    Args:
        workdir: of a finished datastore.
        text: files, directories or globs, as `prepare_documents.text`.
        pipeline_options: Beam's own.

    Returns:
        Numbers of documents added and left out (by reason), and of the datastore's rows.

    Raises:
        UserError: no finished datastore, unreadable text, or another command is writing into the work directory.
    """
    with locked(workdir), disk_errors(workdir):
        record = finished(workdir, "build")
        threshold = finished(workdir, "documents")["settings"].get("duplicate_threshold", 0.7)
        counts = {"added": 0, "empty": 0, "duplicate": 0}
        fresh = list(_new_documents(workdir, text, threshold, counts))
        folder = workdir / "documents"
        listed = {path.name for split in SPLITS_AND_ADDED for path in shard_paths(workdir, split)}
        for path in children(folder, "added-*.jsonl"):  # of an append that was killed before the manifest
            if path.name not in listed:
                remove(path)
        if fresh:
            counts["added"] = len(fresh)
            number = 1 + len({name.split("-")[1] for name in listed if name.startswith("added-")})
            train = sum(len(read_shard(path)) for path in shard_paths(workdir, "train"))
            shards = max(1, round(len(fresh) * len(shard_paths(workdir, "train")) / max(1, train)))
            for shard in range(shards):
                write_bytes(folder / shard_name(f"added-{number:04d}", shard, shards), shard_content(fresh[shard::shards]).encode())
            write_manifest(folder)
        datastore = open_datastore(workdir / "datastore")
        encode_units(workdir, datastore.binding, units_of(workdir, record["settings"]["shards"]), pipeline_options)
        build_datastore.renew(workdir, describe(workdir))
        return counts | {"rows": open_datastore(workdir / "datastore").remembered_rows}


def _new_documents(workdir: AnyPath, text: str | list[str] | tuple[str, ...], threshold: float, counts: Record) -> Iterator[Document]:
    known = Signatures(threshold)
    paths = [path for split in SPLITS_AND_ADDED for path in shard_paths(workdir, split)]
    with contextlib.ExitStack() as opened:
        bar = opened.enter_context(progress("compare", total=len(paths), unit="shards of documents"))
        for number, path in enumerate(paths):
            for document in read_shard(path):
                known.add(minhash(document.text))
            bar.update(number + 1)
    with progress("append", total=None, unit="documents") as bar:
        for number, document in enumerate(read_documents(text, duplicate_threshold=threshold)):
            bar.update(number)
            signature = minhash(document.text)
            if not document.text.strip():
                counts["empty"] += 1
            elif known.has_similar(signature):
                counts["duplicate"] += 1
            else:
                known.add(signature)
                yield document
