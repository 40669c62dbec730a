"""Verify a work directory: compare every file with its record, and check that every datastore row is possible."""

import contextlib
import re
from collections.abc import Callable, Iterator

import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore, open_datastore, rebuild_hint
from resmem_lm.memory.open_index import index_manifest, rebuild_index_hint
from resmem_lm.memory.projection import projection_path
from resmem_lm.memory.quantization import dequantize_probabilities
from resmem_lm.memory.schema import ARRAYS, deleted_first_rows
from resmem_lm.model.checkpoints import load_config, load_model
from resmem_lm.text.shards import QUERY_SPLITS, read_shard
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir.arrays import load_array
from resmem_lm.workdir.artifacts import damaged_files, name_of, record_path
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import OUTPUTS, Run, output_of
from resmem_lm.workdir.storage import Record, children, drop_copy, files_below, inside, read_json, sha256

ROWS = 2**15  # rows checked at a time
COMMANDS = {"documents": "train", "vocabulary": "train", "train": "train", "build": "build", "search": "evaluate"}  # by stage
START_OVER = "copy it again from the original work directory, or start over in a new one (`resmem train`)"
PARTLY_WRITTEN = re.compile(r"\.tmp(/|$)|(^|/)\.lock$")  # matches a path within the work directory


def verify(run: Run) -> list[str]:
    """Return a message with the repair for each problem of a work directory.

    The sizes and checksums of all files must match, numbers must be finite, ids within the vocabulary, residuals consistent with their
    token, and each document's tokens stored once and equal to those of its text. Files that no record lists are reported too, unless an
    unfinished stage or a killed command may have left them.
    """
    return list(_problems(run))


def _problems(run: Run) -> Iterator[str]:
    if not run.stages.exists():
        raise UserError(f"{run} is not a work directory, because it has no stages/: name the directory of a run")
    listed: set[str] = {".lock"}  # all files that a record lists; the checks add to this set
    paths = children(run.stages, "*.json")
    with progress("verify", total=len(paths), unit="stages") as bar:
        for number, path in enumerate(paths):
            name = path.name.removesuffix(".json")
            listed.add(f"stages/{path.name}")
            bar.update(number, name)
            yield from _stage_problems(run, name, listed)
        bar.update(len(paths))
    yield from _stray_files(run, listed)


def _stage_problems(run: Run, name: str, listed: set[str]) -> Iterator[str]:
    try:
        record, output = read_json(run.record_path(name)), output_of(name)
        listed.update(record.get("files", {}))
        damaged = list(_damaged_outputs(run, name, record))
        yield from damaged
        if record.get("finished") and name in CHECKS and not damaged:
            if output.manifest:
                listed.add(f"{output.paths[0]}/{output.manifest}")
            yield from CHECKS[name](run, listed)
    except UserError as error:
        yield str(error)
    except (KeyError, TypeError, ValueError, OSError) as error:
        yield f"{run}: {name} cannot be checked ({type(error).__name__}: {error}): run `resmem {_command(name)}` again"


def _command(stage: str) -> str:
    """Return the command that runs a stage."""
    return COMMANDS.get(stage, stage.replace("study-", "study "))


def _damaged_outputs(run: Run, name: str, record: Record) -> Iterator[str]:
    """Yield a message for each damaged file in the record of a stage."""
    for place, expected in record.get("files", {}).items():
        path = run.path / place
        if not path.exists():
            problem = "is missing"
        elif (size := path.stat().st_size) != expected["bytes"]:
            problem = f"has {size} bytes, not {expected['bytes']} as in its record"
        elif sha256(path) != expected["sha256"]:
            problem = "was altered: its checksum differs from its record"
        else:
            continue
        checkpoint = re.match(r"checkpoints/checkpoint_\d+", place)  # Orbax cannot read a checkpoint in part
        repair = f"delete {run.path / checkpoint[0] if checkpoint else 'it'} and {run.record_path(name)}, and run `resmem {_command(name)}`"
        yield f"{path} {problem}: {repair if name != 'config' else 'run any command, which writes it again'}"


def _stray_files(run: Run, listed: set[str]) -> Iterator[str]:
    """Report files that no record lists, except those of unfinished stages and partly written files."""
    unfinished: set[str] = set()
    for name, output in OUTPUTS.items():
        path = run.record_path(name)
        with contextlib.suppress(UserError):
            if not path.exists() or not read_json(path).get("finished"):
                unfinished.update(output.paths)
    for file in files_below(run.path):
        place = inside(file, run.path)
        if place.startswith("derived/"):  # work directories of studies
            continue
        if place not in listed and place.split("/")[0] not in unfinished and not PARTLY_WRITTEN.search(place):
            yield f"{file} is not in any record, perhaps because a run was killed: delete it unless it is yours"


def _check_documents(run: Run, listed: set[str]) -> Iterator[str]:
    for name, expected in read_json(run.documents / "manifest.json")["files"].items():
        listed.add(f"documents/{name}")
        path = run.documents / name
        if not path.exists() or path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            yield f"{path} is missing or was altered: {START_OVER}"


def _check_vocabulary(run: Run, listed: set[str]) -> Iterator[str]:
    if load_vocabulary(run).sha256 != run.record("vocabulary")["result"]["sha256"]:
        yield f"{run.vocabulary} has another vocabulary than its record: {START_OVER}"


def _check_model(run: Run, listed: set[str]) -> Iterator[str]:
    if load_model(run.checkpoints).fingerprint != run.record("train")["result"]["fingerprint"]:
        yield f"{run.checkpoints} has another model than its record: {START_OVER}"


def _list_published(listed: set[str], folder: str, records: list[Record]) -> None:
    for record in records:
        listed.add(f"{folder}/{name_of(record)}.json")
        listed.update(f"{folder}/{record['folder']}/{name}" for name in record["files"])


def _check_datastore(run: Run, listed: set[str]) -> Iterator[str]:
    folder, path = run.datastore, run.datastore / "manifest.json"
    manifest = read_json(path)
    _list_published(listed, "datastore", manifest["shards"])
    datastore = Datastore(folder, manifest)
    if datastore.binding.key_dimensions is not None:
        listed.add(inside(projection_path(folder, datastore.binding.model, datastore.binding.key_dimensions), run.path))
    damaged = list(datastore.damaged(checksums=True))
    yield from damaged
    for record in manifest["shards"]:
        beside = record_path(folder, record)
        try:
            if read_json(beside) != record:
                yield f"{beside} differs from the manifest: {rebuild_hint(folder, record)}"
        except UserError as error:
            yield f"{error}; {rebuild_hint(folder, record)}"
    if damaged:
        return
    datastore = open_datastore(folder)
    if datastore.rows != manifest["rows"]:
        repair = f"delete {run.record_path('build')} and run `resmem build`, which writes it again"
        yield f"{path} has {manifest['rows']} rows, but its shards have {datastore.rows}: {repair}"
    if run.record("build")["result"]["manifest"] != sha256(path):
        yield f"{path} differs from the record of its stage: repeat the command that wrote it last"
    vocabulary, vocab_size = load_vocabulary(run), load_config(run.checkpoints).vocab_size
    for shard, record in enumerate(datastore.shards):
        yield from _check_shard(run, datastore.part(shard, 1), vocabulary, vocab_size)
        for name in ARRAYS:
            drop_copy(folder / record["folder"] / f"{name}.npy")


def _check_shard(run: Run, part: Datastore, vocabulary: Vocabulary, vocab_size: int) -> Iterator[str]:
    (record,) = part.shards
    text = run.documents / record["provenance"]["documents"]
    if ids := part.deleted_documents(0):
        left = next((document.id for document in read_shard(text) if document.id in ids), None)
        if left is not None:
            yield f"{text} still has the text of {left!r}, which is deleted: run the same `resmem delete` again, or `resmem compact`"
            return
    for problem in (*_row_problems(part, vocab_size), *_token_problems(run, part, vocabulary)):
        yield f"{part.folder / record['folder']}: {problem}; {rebuild_hint(part.folder, record)}"


def _row_problems(part: Datastore, vocab_size: int) -> Iterator[str]:
    """Yield the first impossible row of a shard, if any."""
    lengths = {len(part.array(name)) for name in ARRAYS}
    if lengths != {part.rows}:
        yield f"its arrays have {sorted(lengths)} rows, not {part.rows} as in its record"
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
                yield f"{name}, row {start + int(np.argwhere(rows[name] >= vocab_size)[0][0])}: an id beyond the vocabulary of {vocab_size}"
                return
        p = dequantize_probabilities(rows["quantized_residuals"])
        wrong = (rows["residual_ids"] == rows["tokens"][:, None]).any(axis=1)  # the entry of the own token is stored separately
        wrong |= (np.diff(p, axis=1) > 0).any(axis=1) | (rows["target_log_probability"] > 1e-3)
        # Quantization changes a probability by up to 0.006, and the sum by up to 2%.
        wrong |= p.sum(axis=1) + np.exp(rows["target_log_probability"].astype(np.float32)) > 1.05
        if wrong.any():
            yield f"row {start + int(np.flatnonzero(wrong)[0])}: its residual does not belong to its token"
            return


def _token_problems(run: Run, part: Datastore, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield the first problem if a shard does not store the tokens of each document's text once."""
    entries, next_row = part.documents(0), 0
    source = part.shards[0]["provenance"]["documents"]
    documents = {document.id: document for document in read_shard(run.documents / source)}
    tokens = part.shard_arrays("tokens")[0]
    deleted = deleted_first_rows(part.shards[0])
    if len({entry["id"] for entry in entries}) < len(entries):
        yield "a document is listed twice"
    live = [entry["id"] for entry in entries if entry["first_row"] not in deleted]
    if different := set(live) ^ set(documents):
        yield f"{len(different)} documents are only in it or only in {source}"
        return
    encoded = dict(zip(live, vocabulary.encode_documents([documents[name] for name in live]), strict=True))
    for entry in entries:
        if entry["first_row"] != next_row:
            yield f"document {entry['id']!r} begins at row {entry['first_row']}, not at {next_row}"
            return
        next_row += entry["rows"]
        if entry["first_row"] not in deleted and not np.array_equal(tokens[entry["first_row"] : next_row], encoded[entry["id"]]):
            yield f"the tokens of document {entry['id']!r} differ from its text"
            return
    if next_row != part.rows:
        yield f"its documents have {next_row} rows, its arrays {part.rows}"


def _check_index(run: Run, listed: set[str]) -> Iterator[str]:
    manifest = read_json(run.index / "index.json")
    records = manifest["shards"] + manifest.get("suffixes", [])
    _list_published(listed, "index", records)
    for record in records:
        for problem in damaged_files(run.index, record, checksums=True):
            yield f"{problem}: {rebuild_index_hint(run)}"
        read_json(record_path(run.index, record))
    index_manifest(run, open_datastore(run.datastore))


def _check_neighbors(run: Run, listed: set[str]) -> Iterator[str]:
    facts = read_json(run.neighbors / "neighbors.json")
    repair = f"delete {run.neighbors} and {run.record_path('search')}, and run `resmem evaluate`"
    records = [record for split in QUERY_SPLITS for record in facts[split]["shards"]]
    _list_published(listed, "neighbors", records)
    if facts["datastore"] != sha256(run.datastore / "manifest.json"):
        yield f"{run.neighbors} was made from another datastore: run `resmem evaluate`"
    rows = read_json(run.datastore / "manifest.json")["rows"]
    for record in records:
        damaged = list(damaged_files(run.neighbors, record, checksums=True))
        yield from (f"{problem}: {repair}" for problem in damaged)
        read_json(record_path(run.neighbors, record))
        found = np.zeros(0) if damaged else load_array(run.neighbors / record["folder"] / "rows.npy")
        if found.size and not -1 <= found.min() <= found.max() < rows:
            yield f"{run.neighbors / record['folder']}/rows.npy has rows beyond the datastore's {rows}: {repair}"


CHECKS: dict[str, Callable[[Run, set[str]], Iterator[str]]] = {
    "documents": _check_documents,
    "vocabulary": _check_vocabulary,
    "train": _check_model,
    "build": _check_datastore,
    "index": _check_index,
    "search": _check_neighbors,
}
