"""Read and write the shards of documents in WORKDIR/documents (JSON lines) and their manifest."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from resmem_lm.errors import UserError
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, Record, children, read_json, sha256, write_json

SPLITS = ("train", "validation", "test")
QUERY_SPLITS = ("validation", "test")


def digest(text: str) -> str:
    """Return a hash of the text as 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def position(text: str) -> float:
    """Return a hash of the text as a number in [0, 1), which determines the split of a document."""
    return int(digest(text), 16) / 2**64


def shard_name(split: str, shard: int, shards: int) -> str:
    """Return the file name of one shard, such as train-00003-of-00016.jsonl."""
    return f"{split}-{shard:05d}-of-{shards:05d}.jsonl"


def shard_paths(run: Run, split: str) -> list[AnyPath]:
    """Return the shards of a split in order. The split "added" contains the documents that `resmem append` added."""
    names = read_json(run.documents / "manifest.json")["files"]
    return [run.documents / name for name in names if name.startswith(f"{split}-")]


def read_shard(path: AnyPath) -> list[Document]:
    """Return the documents of one shard. Raise UserError if it is missing or damaged."""
    try:
        with path.open("r", encoding="utf-8") as file:
            return [Document(**json.loads(line)) for line in file]
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): run `resmem verify` for the repair") from None


def query_documents(run: Run, split: str) -> list[Document]:
    """Return the documents of a query split in order."""
    return [document for shard in shard_paths(run, split) for document in read_shard(shard)]


def shard_content(documents: Iterable[Document]) -> str:
    """Return the content of a shard."""
    records = ({name: value for name, value in document._asdict().items() if value is not None} for document in documents)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_manifest(folder: AnyPath, changed: dict[str, bytes] | None = None) -> Record:
    """Write manifest.json with the size and the checksum of every shard, and return the checksums by name.

    `changed` maps the name of each changed shard to its content. If it is None, every shard in `folder` is read.
    """
    if changed is None:
        paths = children(folder, "*-*-of-*.jsonl")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    else:
        files = read_json(folder / "manifest.json")["files"]
        files |= {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in changed.items()}
    files = dict(sorted(files.items()))
    write_json(folder / "manifest.json", {"files": files})
    return {name: facts["sha256"] for name, facts in files.items()}


def checksum_of_queries(run: Run) -> str:
    """Return a checksum of the validation and test documents, which `append` and `delete` do not change."""
    files = read_json(run.documents / "manifest.json")["files"]
    checksums = [files[name]["sha256"] for split in QUERY_SPLITS for name in files if name.startswith(f"{split}-")]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def group_numbers(documents: list[Document]) -> Int[np.ndarray, " documents"]:
    """Return one number for each document. Documents of one group have the same number in all shards."""
    names = (f"document {document.id}" if document.group is None else f"group {document.group}" for document in documents)
    return np.array([int(digest(name), 16) >> 1 for name in names], np.int64)
