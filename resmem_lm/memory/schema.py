"""What a row of the datastore is: its arrays, their dtypes, its files, and the binding to a model."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float16, Int8, UInt, UInt8

from resmem_lm.text.windows import WindowSpec


class DatastoreRows(NamedTuple):
    """What the datastore holds of some tokens, in its dtypes: keys and probabilities in the codes of `resmem_lm.codes`.

    The residual is 1 - p at the token and -p at the other ids; `dropped` is not below the largest p of an id that is not among them.
    `log_power_sums` are log sum_y p(y)^(1/T).
    """

    quantized_keys: Int8[Array, "rows emb"]
    key_scales: Float16[Array, " rows"]
    residual_ids: UInt[Array, "rows others"]
    quantized_residuals: UInt8[Array, "rows others"]
    tokens: UInt[Array, " rows"]
    target_log_probability: Float16[Array, " rows"]
    dropped: Float16[Array, " rows"]
    log_power_sums: Float16[Array, "rows temperatures"]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


FORMAT = "resmem-datastore-4"
KEY_POSITION = "last layer, after the pre-MLP LayerNorm, before the MLP"
ARRAYS = DatastoreRows._fields
KEY_FILES = ("quantized_keys.npy", "key_scales.npy")
FILES = (*(f"{name}.npy" for name in ARRAYS), "documents.jsonl")  # of a shard


@dataclasses.dataclass(frozen=True)
class Binding:
    """What made a datastore. One opened with anything else is refused."""

    model: str
    vocabulary: str
    window: WindowSpec
    temperatures: tuple[float, ...]
    entries: int
    key_dimensions: int | None = None
    projection: str | None = None  # checksum of that which makes keys of so many dimensions

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        value: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "key": KEY_POSITION, **dataclasses.asdict(self)}))
        return value


def shard_name(shard: int, shards: int) -> str:
    """shard-00003-of-00016."""
    return f"shard-{shard:05d}-of-{shards:05d}"


def document_line(name: str, first_row: int, rows: int) -> str:
    """A document's line in documents.jsonl."""
    return json.dumps({"id": name, "first_row": first_row, "rows": rows}) + "\n"


COUNTERS = ("documents", "tokens", "windows", "window_tokens", "computed_tokens")
