"""Fit the projection of a datastore's keys to the keys of a sample of train documents."""

import dataclasses

import numpy as np
from jaxtyping import Float

from resmem_lm.errors import UserError
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.projection import principal_components, projection_path, save_projection
from resmem_lm.memory.schema import Binding
from resmem_lm.model.checkpoints import Model
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.vocabulary import Vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import sha256

SAMPLED_TOKENS = 20_000


def project_keys(run: Run, model: Model, vocabulary: Vocabulary, binding: Binding, dimensions: int) -> Binding:
    """Return the binding of a datastore with projected keys. Fit and save the projection if it is missing.

    Raise UserError if the keys of the model have fewer than `dimensions` dimensions.
    """
    if not 1 <= dimensions <= model.config.emb_dim:
        raise UserError(f"build_datastore.key_dimensions = {dimensions}: take 1 to {model.config.emb_dim}, or None for all")
    path = projection_path(run.datastore, model.fingerprint, dimensions)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path.parent):
            save_projection(path, principal_components(_sample_keys(run, model, vocabulary, binding.window), dimensions))
    return dataclasses.replace(binding, key_dimensions=dimensions, projection=sha256(path))


def _sample_keys(run: Run, model: Model, vocabulary: Vocabulary, window: WindowSpec) -> Float[np.ndarray, "rows emb"]:
    """Return the keys of about SAMPLED_TOKENS tokens: whole documents from every train shard."""
    paths, tokens, count = shard_paths(run, "train"), [], 0
    for number, path in enumerate(paths, start=1):
        for document in read_shard(path):
            if count * len(paths) >= SAMPLED_TOKENS * number:
                break
            tokens.append(vocabulary.encode(document.text))
            count += len(tokens[-1])
    return np.concatenate([encoded.keys for _, encoded in Encoder(model, window, query_head)(tokens)])
