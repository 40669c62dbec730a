"""Documents -> row-aligned .npy files, an array at a time."""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.memory.encoder import Encoder, Head, residual_head
from resmem_lm.memory.projection import projection_of
from resmem_lm.memory.schema import COUNTERS, Binding
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir.run import Run


class EncodingWorker:
    """What a worker process keeps for all of its shards."""

    def __init__(self, run: Run, binding: Binding, head: Head | None = None) -> None:
        self.vocabulary: Vocabulary = load_vocabulary(run)
        self.model = load_model(run.checkpoints)
        if (self.model.fingerprint, self.vocabulary.sha256) != (binding.model, binding.vocabulary):
            raise UserError(f"{run}: the checkpoint or the vocabulary changed while it was in use: build the datastore again")
        head = head or residual_head(self.model, binding.entries, binding.temperatures)
        self.encoder = Encoder(self.model, binding.window, head, projection_of(run.datastore, binding))


def write_arrays(folder: Path, tokens: list[np.ndarray], encoder: Encoder, source: str) -> dict[str, int]:
    """Writes what the encoder's head makes of some documents, an array a file, row by row; returns counts.

    Args:
        folder: to write into.
        tokens: of each document.
        encoder: whose head gives a named tuple of arrays.
        source: what the documents were read from, for messages.
    """
    arrays: dict[str, np.ndarray] = {}
    rows = sum(map(len, tokens))
    if not tokens:  # fewer documents than shards: files without rows, as wide as any
        _, encoded = next(encoder([np.zeros(1, np.int32)]))
        for name, value in encoded._asdict().items():
            np.save(folder / f"{name}.npy", value[:0])
    counts = Counter({"documents": len(tokens), "tokens": rows} | dict.fromkeys(COUNTERS[2:], 0))
    for positions, encoded in encoder(tokens, counts):
        for name, value in encoded._asdict().items():
            if name not in arrays:
                arrays[name] = create_array(folder / f"{name}.npy", (rows, *value.shape[1:]), value.dtype)
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise UserError(f"{name} of {source} has numbers that {value.dtype} cannot hold: the checkpoint may have diverged")
            arrays[name][positions] = value
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    return dict(counts)


def create_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A mapped .npy file whose blocks are all allocated, so that a full disk is an error here and not a crash later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
