"""Project keys onto the principal components of a sample of keys, to search fewer dimensions.

He et al. (2021, "Efficient Nearest Neighbor Language Models", section 4.3) find that the projection does not hurt kNN-LM.
"""

import io

import numpy as np
from jaxtyping import Float

from resmem_lm.errors import UserError
from resmem_lm.memory.schema import Binding
from resmem_lm.workdir.storage import AnyPath, sha256, write_bytes


def principal_components(keys: Float[np.ndarray, "rows emb"], dimensions: int) -> Float[np.ndarray, "emb dimensions"]:
    """Return a random orthonormal basis (columns) of the subspace of the leading principal components.

    A random basis spreads the variance over all dimensions. Keys have a single scale (`quantize_keys`): in the basis of the components, the
    first ones have most of the variance, and the others would be quantized coarsely.
    """
    _, directions = np.linalg.eigh(np.cov(keys.astype(np.float64), rowvar=False))
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dimensions, dimensions)))
    return np.ascontiguousarray(directions[:, ::-1][:, :dimensions] @ rotation, np.float32)


def projection_path(datastore: AnyPath, model: str, dimensions: int) -> AnyPath:
    """Return the path of the projection for the model with the fingerprint `model`."""
    return datastore / f"projection-{model[:12]}-{dimensions}.npy"


def save_projection(path: AnyPath, projection: Float[np.ndarray, "emb dimensions"]) -> None:
    """Write a projection atomically."""
    content = io.BytesIO()
    np.save(content, projection)
    write_bytes(path, content.getvalue())


def projection_of(folder: AnyPath, binding: Binding) -> Float[np.ndarray, "emb dimensions"] | None:
    """Return the projection of a datastore's keys, or None without one. Raise UserError if its file is missing or was altered."""
    if binding.projection is None or binding.key_dimensions is None:
        return None
    path = projection_path(folder, binding.model, binding.key_dimensions)
    if not path.exists() or sha256(path) != binding.projection:
        raise UserError(f"{path} is missing or was altered: delete {path.parent} and run `resmem build` again")
    projection: np.ndarray = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return projection
