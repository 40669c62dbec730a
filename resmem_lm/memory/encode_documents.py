"""Encode documents to row-aligned .npy files, one for each array of the encoder's head."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.memory.encoder import Encoder, Head, residual_head
from resmem_lm.memory.projection import projection_of
from resmem_lm.memory.schema import COUNTERS, Binding
from resmem_lm.model.checkpoints import Model, load_model
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir.run import Run


class EncodingWorker:
    """The model, the vocabulary and the encoder, which a worker process loads once for all of its shards."""

    def __init__(self, run: Run, binding: Binding, head_of: Callable[[Model], Head] | None = None) -> None:
        self.vocabulary: Vocabulary = load_vocabulary(run)
        self.model = load_model(run.checkpoints)
        if (self.model.fingerprint, self.vocabulary.sha256) != (binding.model, binding.vocabulary):
            raise UserError(f"{run}: the checkpoint or the vocabulary changed during the command: run `resmem build` again")
        head = head_of(self.model) if head_of else residual_head(self.model, binding.entries, binding.temperatures)
        self.encoder = Encoder(self.model, binding.window, head, projection_of(run.datastore, binding))


def write_arrays(folder: Path, tokens: list[np.ndarray], encoder: Encoder, source: str) -> dict[str, int]:
    """Write the arrays of the encoder's head to `folder`, one row per token, and return the counts of `schema.COUNTERS`.

    Raise UserError if a number is not finite in the dtype of its array; the message names `source`, the origin of the documents.
    """
    arrays: dict[str, np.ndarray] = {}
    rows = sum(map(len, tokens))
    if not tokens:  # write arrays of the usual width without rows
        _, encoded = next(encoder([np.zeros(1, np.int32)]))
        for name, value in encoded._asdict().items():
            np.save(folder / f"{name}.npy", value[:0])
    counts = Counter({"documents": len(tokens), "tokens": rows} | dict.fromkeys(COUNTERS[2:], 0))
    for positions, encoded in encoder(tokens, counts):
        for name, value in encoded._asdict().items():
            if name not in arrays:
                arrays[name] = create_array(folder / f"{name}.npy", (rows, *value.shape[1:]), value.dtype)
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise UserError(
                    f"{name} of {source} has numbers that {value.dtype} cannot hold, perhaps because training diverged: "
                    "train again with a smaller learning rate"
                )
            arrays[name][positions] = value
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    return dict(counts)


def create_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Create a memory-mapped .npy file with all blocks allocated, so that a full disk raises an error here and no later write crashes."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
