"""Shards of documents: their names, their content and their manifest."""

import hashlib
import json
from collections.abc import Iterable

from resmem_lm.errors import UserError
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, Record, children, read_json, sha256, write_json

SPLITS = ("train", "validation", "test")


def digest(text: str) -> str:
    """16 hexadecimal digits that depend on the text alone."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: where it falls decides the split."""
    return int(digest(text), 16) / 2**64


def shard_name(split: str, shard: int, shards: int) -> str:
    """The file of one shard, named as everywhere in this project: train-00003-of-00016.jsonl."""
    return f"{split}-{shard:05d}-of-{shards:05d}.jsonl"


def shard_paths(run: Run, split: str) -> list[AnyPath]:
    """The shards of a split in WORKDIR/documents, in order; of the split "added" those that were added later."""
    folder = run.documents
    return [folder / name for name in read_json(folder / "manifest.json")["files"] if name.startswith(f"{split}-")]


def read_shard(path: AnyPath) -> list[Document]:
    """The documents of one shard that `prepare_documents` wrote."""
    try:
        with path.open("r", encoding="utf-8") as file:
            return [Document(**json.loads(line)) for line in file]
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): `resmem verify` says what to do") from None


def shard_content(documents: Iterable[Document]) -> str:
    """The content of a shard."""
    parts = ({name: value for name, value in document._asdict().items() if value is not None} for document in documents)
    return "".join(json.dumps(part, ensure_ascii=False) + "\n" for part in parts)


def write_manifest(folder: AnyPath, changed: dict[str, bytes] | None = None) -> Record:
    """Writes manifest.json: size and checksum of every shard in `folder`, by name; returns the checksums.

    With `changed`, contents by name, what the manifest says of other shards stays.
    """
    if changed is None:
        paths = children(folder, "*-*-of-*.jsonl")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    else:
        files = read_json(folder / "manifest.json")["files"]
        files |= {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in changed.items()}
    write_json(folder / "manifest.json", {"files": dict(sorted(files.items()))})
    return {name: facts["sha256"] for name, facts in sorted(files.items())}


QUERY_SPLITS = ("validation", "test")


def query_documents(run: Run, split: str) -> list[Document]:
    """The documents whose tokens are a split's queries, in order."""
    return [document for shard in shard_paths(run, split) for document in read_shard(shard)]
