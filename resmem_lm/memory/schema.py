"""Define the format of a datastore: arrays, dtypes, file names and the binding to a model. This module does not import the model."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float16, Int8, UInt, UInt8

from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.storage import Record


class DatastoreRows(NamedTuple):
    """Rows of the datastore. Keys and probabilities are quantized (`memory.quantization`).

    The residual of a row is 1 - p at the row's own token and -p at every other id. `residual_ids` are the other ids with the largest p at
    T = 1, in descending order of p, and `quantized_residuals` are the values of p. `dropped` is an upper bound on p at the ids that are not
    stored. `target_log_probability` is log p of the own token. `log_power_sums` are log sum_y p(y)^(1/T) for each temperature.
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
    """The model, the vocabulary and the settings that a datastore was built with, and the only ones that it can be used with.

    `model`, `vocabulary` and `projection` are checksums. `key_dimensions` is the width of projected keys, or None without a projection.
    """

    model: str
    vocabulary: str
    window: WindowSpec
    temperatures: tuple[float, ...]
    entries: int
    key_dimensions: int | None = None
    projection: str | None = None

    def to_json(self) -> Record:
        """Return this binding as entries of a manifest."""
        return {"format": FORMAT, "key": KEY_POSITION, **dataclasses.asdict(self), "temperatures": list(self.temperatures)}

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
    """Return the first row of each deleted document that still has rows in the shard."""
    return {first for first, rows in record.get("deleted", []) if rows}
