"""What DeepNet predicts for queries, as the arrays of a folder of neighbors."""

import numpy as np
from jaxtyping import Float, Int, Integer

from resmem_lm.evaluation.neighbors import deepnet_outputs
from resmem_lm.memory.datastore import Datastore
from resmem_lm.model.checkpoints import Model

DEEPNET_ARRAYS = ("target_logits", "candidate_ids", "candidate_logits", "bound", "log_partition")


def deepnet_arrays(
    model: Model,
    datastore: Datastore,
    hidden: Float[np.ndarray, "queries emb"],
    targets: Int[np.ndarray, " queries"],
    neighbor_tokens: Integer[np.ndarray, "queries k"],
) -> dict[str, np.ndarray]:
    """Return the arrays `DEEPNET_ARRAYS` of all queries; see `deepnet_outputs`."""
    blocks = list(deepnet_outputs(model, datastore, hidden, targets, neighbor_tokens))
    if not blocks:  # a shard without documents has arrays without rows, as wide as those of the others
        one = (np.zeros((1, hidden.shape[1]), np.float32), np.zeros(1, np.int32), np.zeros((1, neighbor_tokens.shape[1]), np.int32))
        blocks = [tuple(array[:0] for array in block) for block in deepnet_outputs(model, datastore, *one)]
    return {name: np.concatenate(parts) for name, parts in zip(DEEPNET_ARRAYS, zip(*blocks, strict=True), strict=True)}
