"""The format of the datastore: arrays, dtypes, file names, and what a datastore is bound to. Nothing here imports the model."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float16, Int8, UInt, UInt8

from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.storage import Record


class DatastoreRows(NamedTuple):
    """Rows of the datastore in its dtypes. Keys and probabilities are quantized (`memory.quantization`).

    A row's residual is 1 - p at its own token and -p at the other ids. `residual_ids` are the other ids with the largest p at T = 1, in
    descending order, and `quantized_residuals` are these p. `dropped` is an upper bound of p at every id that is not stored.
    `target_log_probability` is log p at the token itself. `log_power_sums` are log sum_y p(y)^(1/T).
    """

    quantized_keys: Int8[Array, "rows emb"]
    key_scales: Float16[Array, " rows"]
    residual_ids: UInt[Array, "rows others"]
    quantized_residuals: UInt8[Array, "rows others"]
    tokens: UInt[Array, " rows"]
    target_log_probability: Float16[Array, " rows"]
    dropped: Float16[Array, " rows"]
    log_power_sums: Float16[Array, "rows temperatures"]


FORMAT = "resmem-datastore-4"
KEY_POSITION = "last layer, after the pre-MLP LayerNorm, before the MLP"
ARRAYS = DatastoreRows._fields
KEY_FILES = ("quantized_keys.npy", "key_scales.npy")
FILES = (*(f"{name}.npy" for name in ARRAYS), "documents.jsonl")  # of a shard
COUNTERS = ("documents", "tokens", "windows", "window_tokens", "computed_tokens")  # in a shard's record


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned dtype that holds every id below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclasses.dataclass(frozen=True)
class Binding:
    """The model, the vocabulary and the settings that a datastore was built with. It is refused with any others.

    `model` and `projection` are checksums; `key_dimensions` is the width of projected keys, None if keys are not projected.
    """

    model: str
    vocabulary: str
    window: WindowSpec
    temperatures: tuple[float, ...]
    entries: int
    key_dimensions: int | None = None
    projection: str | None = None

    def to_json(self) -> Record:
        """Return the manifest's entries for this binding."""
        value: Record = json.loads(json.dumps({"format": FORMAT, "key": KEY_POSITION, **dataclasses.asdict(self)}))
        return value

    @classmethod
    def from_json(cls, manifest: Record) -> "Binding":
        """Return the binding in a manifest."""
        fields: dict[str, Any] = {field.name: manifest[field.name] for field in dataclasses.fields(cls)}
        return cls(**fields | {"window": WindowSpec(**manifest["window"]), "temperatures": tuple(manifest["temperatures"])})


def shard_name(shard: int, shards: int) -> str:
    """Return the name of a shard, such as shard-00003-of-00016."""
    return f"shard-{shard:05d}-of-{shards:05d}"


def document_line(name: str, first_row: int, rows: int) -> str:
    """Return a document's line in documents.jsonl."""
    return json.dumps({"id": name, "first_row": first_row, "rows": rows}) + "\n"


def deleted_first_rows(record: Record) -> set[int]:
    """Return the first row of each deleted document whose rows are still in the shard of this record."""
    return {first for first, rows in record.get("deleted", []) if rows}
