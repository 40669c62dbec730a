"""Checks a whole work directory: every byte against the records, and every row against what it must be."""

import contextlib
import re
from collections.abc import Iterator

import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore, open_datastore, rebuild_hint
from resmem_lm.memory.open_index import index_manifest
from resmem_lm.memory.projection import projection_path
from resmem_lm.memory.quantization import dequantize_probabilities
from resmem_lm.memory.schema import ARRAYS
from resmem_lm.memory.sharded import load_array
from resmem_lm.model.checkpoints import load_config, load_model
from resmem_lm.text.shards import QUERY_SPLITS, read_shard
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir.artifacts import damaged_files, name_of, record_path
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, children, drop_copy, files_below, inside, read_json, sha256

ROWS = 2**15  # at a time
RUN = {"documents": "train", "vocabulary": "train", "train": "train", "build": "build", "search": "evaluate"}
OUTPUTS = {
    "documents": {"documents"},
    "vocabulary": {"vocabulary"},
    "train": {"checkpoints", "metrics"},
    "build": {"datastore"},
    "index": {"index"},
    "search": {"neighbors"},
    "evaluate": {"results.json"},
    "report": {"report.html"},
}
UNFINISHED_DELETION = "run the same `resmem delete` again, or `resmem compact`"
PARTLY_WRITTEN = re.compile(r"\.tmp(/|$)|(^|/)\.lock$")  # in a path within the work directory


def verify(run: Run) -> list[str]:
    """A line for each problem, with what to do about it; none if all is well.

    Sizes and checksums of every file, finite numbers, ids within the vocabulary, residuals that are those of their token, and each
    document's tokens once, against the documents' text. Files that no record knows are told, except those of a run that was killed.
    """
    return list(_problems(run))


def _problems(run: Run) -> Iterator[str]:
    if not run.stages.exists():
        raise UserError(f"{run} is no work directory: it has no stages/")
    known = {".lock"}
    stages = children(run.stages, "*.json")
    with progress("verify", total=len(stages), unit="stages") as bar:
        for number, path in enumerate(stages):
            name = path.name.removesuffix(".json")
            known.add(f"stages/{path.name}")
            bar.update(number, name)
            try:
                record = read_json(path)
                known |= set(record.get("files", {}))
                damaged = list(_stage_files(run, name, record))
                yield from damaged
                if record.get("finished") and name in CHECKS and not damaged:
                    yield from CHECKS[name](run, known)
            except UserError as error:
                yield str(error)
            except (KeyError, TypeError, ValueError, OSError) as error:
                yield f"{run}: {name} cannot be checked ({type(error).__name__}: {error}): run `resmem {_command(name)}` again"
        bar.update(len(stages))
    unfinished: set[str] = set()  # folders of stages that go on when they are run again
    for name, outputs in OUTPUTS.items():
        path = run.record_path(name)
        with contextlib.suppress(UserError):
            if not path.exists() or not read_json(path).get("finished"):
                unfinished |= outputs
    for file in files_below(run.path):
        place = inside(file, run.path)
        if place.startswith("derived/"):  # work directories of their own, which studies made
            continue
        if place not in known and place.split("/")[0] not in unfinished and not PARTLY_WRITTEN.search(place):
            yield f"{file} is known to no record: it may be left from a run that was killed; delete it if it is not yours"


def _command(stage: str) -> str:
    """What runs a stage."""
    return RUN.get(stage, stage.replace("study-", "study "))


def _stage_files(run: Run, name: str, record: Record) -> Iterator[str]:
    command = _command(name)
    for place, expected in record.get("files", {}).items():
        path = run.path / place
        what = (
            "is missing"
            if not path.exists()
            else f"has {path.stat().st_size} bytes, its record says {expected['bytes']}"
            if path.stat().st_size != expected["bytes"]
            else "was altered: its checksum is not that of its record"
            if sha256(path) != expected["sha256"]
            else ""
        )
        if what:
            checkpoint = re.match(r"checkpoints/checkpoint_\d+", place)  # of which Orbax reads all or nothing
            gone = run.path / checkpoint[0] if checkpoint else "it"
            again = f"delete {gone} and {run.record_path(name)}, and run `resmem {command}` again"
            yield f"{path} {what}: {again if name != 'config' else 'any command writes it again'}"


def _documents(run: Run, known: set[str]) -> Iterator[str]:
    folder = run.documents
    known.add("documents/manifest.json")
    for name, expected in read_json(folder / "manifest.json")["files"].items():
        known.add(f"documents/{name}")
        path = folder / name
        if not path.exists() or path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            yield f"{path} is missing or was altered: copy it from where this directory came from, or make the whole anew (resmem train)"


def _vocabulary(run: Run, known: set[str]) -> Iterator[str]:
    wanted = run.record("vocabulary")["result"]["sha256"]
    if load_vocabulary(run).sha256 != wanted:
        yield f"{run.vocabulary} is another than its record says: make the whole anew (resmem train)"


def _train(run: Run, known: set[str]) -> Iterator[str]:
    if load_model(run.checkpoints).fingerprint != run.record("train")["result"]["fingerprint"]:
        yield f"{run.checkpoints} holds another model than its record says: copy it again, or make the whole anew (resmem train)"


def _know(run: Run, known: set[str], folder: str, records: list[Record]) -> None:
    for record in records:
        known.add(f"{folder}/{name_of(record)}.json")
        known |= {f"{folder}/{record['folder']}/{name}" for name in record["files"]}


def _datastore(run: Run, known: set[str]) -> Iterator[str]:
    known.add("datastore/manifest.json")
    vocabulary = load_vocabulary(run)
    folder = run.datastore
    manifest = read_json(folder / "manifest.json")
    _know(run, known, "datastore", manifest["shards"])
    datastore = Datastore(folder, manifest)
    if datastore.binding.key_dimensions is not None:
        known.add(inside(projection_path(folder, datastore.binding.model, datastore.binding.key_dimensions), run.path))
    damaged = list(datastore.damaged(checksums=True))
    yield from damaged
    for record in manifest["shards"]:
        beside = record_path(folder, record)
        try:
            if read_json(beside) != record:
                yield f"{beside} says something else than the manifest: {rebuild_hint(folder, record)}"
        except UserError as error:
            yield f"{error}; {rebuild_hint(folder, record)}"
    if damaged:
        return
    datastore = open_datastore(folder)
    if sum(shard["rows"] for shard in datastore.shards) != manifest["rows"]:
        yield f"{folder / 'manifest.json'} does not add up: its shards have {datastore.rows} rows, it says {manifest['rows']}"
    if run.record("build")["result"]["manifest"] != sha256(folder / "manifest.json"):
        yield f"{folder / 'manifest.json'} is another than its stage's record says: run the command again that was writing it"
    vocab_size = load_config(run.checkpoints).vocab_size
    for shard, record in enumerate(datastore.shards):
        part = datastore.part(shard, 1)
        if left := _text_of_deleted(run, part):
            text = run.documents / record["provenance"]["documents"]
            yield f"{text} still has the text of {left}, which is deleted: {UNFINISHED_DELETION}"
            continue
        for problem in (*_rows(part, vocab_size), *_tokens(run, part, vocabulary)):
            yield f"{folder / record['folder']}: {problem}; {rebuild_hint(folder, record)}"
        for name in ARRAYS:
            drop_copy(folder / record["folder"] / f"{name}.npy")


def _rows(part: Datastore, vocab_size: int) -> Iterator[str]:
    """Whether each row of a shard can be what it says."""
    widths = {name: part.array(name).shape for name in ARRAYS}
    if {shape[0] for shape in widths.values()} != {part.rows}:
        yield f"its arrays have {sorted({shape[0] for shape in widths.values()})} rows, its record says {part.rows}"
        return
    for start in range(0, part.rows, ROWS):
        some = np.arange(start, min(start + ROWS, part.rows))
        rows = {name: part.take(name, some) for name in ARRAYS}
        for name, values in rows.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                yield f"{name}, row {start + int(np.argwhere(~np.isfinite(values))[0][0])}: not a finite number"
                return
        for name in ("tokens", "residual_ids"):
            if rows[name].size and rows[name].max() >= vocab_size:
                yield f"{name}, row {start + int(np.argwhere(rows[name] >= vocab_size)[0][0])}: an id above the vocabulary of {vocab_size}"
                return
        p = dequantize_probabilities(rows["quantized_residuals"])
        wrong = (rows["residual_ids"] == rows["tokens"][:, None]).any(axis=1)  # the token's own is a column of its own
        wrong |= (np.diff(p, axis=1) > 0).any(axis=1) | (rows["target_log_probability"] > 1e-3)
        # A code is wrong by up to 0.006, or 2% of what all of them add up to.
        wrong |= p.sum(axis=1) + np.exp(rows["target_log_probability"].astype(np.float32)) > 1.05
        if wrong.any():
            yield f"row {start + int(np.flatnonzero(wrong)[0])}: its residual is not that of its token"
            return


def _text_of_deleted(run: Run, part: Datastore) -> str:
    """The id of a document that was deleted and whose text is there."""
    ids = part.deleted_documents(0)
    documents = read_shard(run.documents / part.shards[0]["provenance"]["documents"]) if ids else []
    return next((repr(document.id) for document in documents if document.id in ids), "")


def _tokens(run: Run, part: Datastore, vocabulary: Vocabulary) -> Iterator[str]:
    """Whether a shard has each document's tokens once, as the text has them."""
    entries, next_row = part.documents(0), 0
    documents = {d.id: d for d in read_shard(run.documents / part.shards[0]["provenance"]["documents"])}
    tokens = part.shard_arrays("tokens")[0]
    deleted = {first for first, rows in part.shards[0].get("deleted", []) if rows}
    if len({entry["id"] for entry in entries}) < len(entries):
        yield "a document stands in it twice"
    live = {entry["id"] for entry in entries if entry["first_row"] not in deleted}
    if live != set(documents):
        yield f"its documents are not those of {part.shards[0]['provenance']['documents']}: {len(live ^ set(documents))} differ"
        return
    kept = [documents[entry["id"]] for entry in entries if entry["first_row"] not in deleted]
    encoded = dict(zip((d.id for d in kept), vocabulary.encode_documents(kept), strict=True))
    for entry in entries:
        if entry["first_row"] != next_row:
            yield f"document {entry['id']!r} begins at row {entry['first_row']}, not at {next_row}"
            return
        next_row += entry["rows"]
        if entry["first_row"] not in deleted and not np.array_equal(tokens[entry["first_row"] : next_row], encoded[entry["id"]]):
            yield f"document {entry['id']!r} has not the tokens of its text"
            return
    if next_row != part.rows:
        yield f"its documents have {next_row} rows together, the arrays {part.rows}"


def _index(run: Run, known: set[str]) -> Iterator[str]:
    known.add("index/index.json")
    records = read_json(run.index / "index.json")["shards"]
    _know(run, known, "index", records)
    mend_it = f"delete {run.index} and {run.record_path('index')}, and run `resmem index`"
    for record in records:
        for problem in damaged_files(run.index, record, checksums=True):
            yield f"{problem}: {mend_it}"
        read_json(record_path(run.index, record))
    index_manifest(run, open_datastore(run.datastore))


def _neighbors(run: Run, known: set[str]) -> Iterator[str]:
    known.add("neighbors/neighbors.json")
    facts = read_json(run.neighbors / "neighbors.json")
    mend_it = f"delete {run.neighbors} and {run.record_path('search')}, and run `resmem evaluate`"
    records = [record for split in QUERY_SPLITS for record in facts[split]["shards"]]
    _know(run, known, "neighbors", records)
    if facts["datastore"] != sha256(run.datastore / "manifest.json"):
        yield f"{run.neighbors} was made from another datastore: run `resmem evaluate`"
    rows = read_json(run.datastore / "manifest.json")["rows"]
    for record in records:
        damaged = list(damaged_files(run.neighbors, record, checksums=True))
        yield from (f"{problem}: {mend_it}" for problem in damaged)
        read_json(record_path(run.neighbors, record))
        found = np.zeros(0) if damaged else load_array(run.neighbors / record["folder"] / "rows.npy")
        if found.size and not -1 <= found.min() <= found.max() < rows:
            yield f"{run.neighbors / record['folder']}/rows.npy names rows that the datastore has not: {mend_it}"


CHECKS = {
    "documents": _documents,
    "vocabulary": _vocabulary,
    "train": _train,
    "build": _datastore,
    "index": _index,
    "search": _neighbors,
}
