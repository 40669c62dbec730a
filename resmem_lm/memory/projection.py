"""Keys of fewer dimensions: what they have in the space of the principal components of a sample of them.

He et al. (2021, "Efficient Nearest Neighbor Language Models", section 4.3) find kNN-LM's keys to lose nothing so.
"""

import io

import numpy as np
from jaxtyping import Float

from resmem_lm.errors import UserError
from resmem_lm.memory.schema import Binding
from resmem_lm.workdir.storage import AnyPath, sha256, write_bytes


def principal_components(keys: Float[np.ndarray, "rows emb"], dimensions: int) -> Float[np.ndarray, "emb dimensions"]:
    """An orthonormal basis of the directions in which keys vary most, as columns.

    It is a random one: along the components themselves the first would have most of the variance, and a code of one scale for a whole key
    (`resmem_lm.codes`) would round the others coarsely.
    """
    _, directions = np.linalg.eigh(np.cov(keys.astype(np.float64), rowvar=False))
    rotated, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dimensions, dimensions)))
    return np.ascontiguousarray(directions[:, ::-1][:, :dimensions] @ rotated, np.float32)


def projection_path(datastore: AnyPath, model: str, dimensions: int) -> AnyPath:
    """Where the projection of a model's keys lies; `model` is its fingerprint."""
    return datastore / f"projection-{model[:12]}-{dimensions}.npy"


def save_projection(path: AnyPath, projection: Float[np.ndarray, "emb dimensions"]) -> None:
    """Writes it atomically."""
    content = io.BytesIO()
    np.save(content, projection)
    write_bytes(path, content.getvalue())


def load_projection(path: AnyPath, checksum: str) -> Float[np.ndarray, "emb dimensions"]:
    """UserError if it is not the one that the datastore's keys were made with."""
    if not path.exists() or sha256(path) != checksum:
        raise UserError(f"{path} is missing or was altered: delete {path.parent} and run `resmem build` again")
    with path.open("rb") as file:
        projection: np.ndarray = np.load(io.BytesIO(file.read()), allow_pickle=False)
    return projection


def projection_of(folder: AnyPath, binding: Binding) -> Float[np.ndarray, "emb dimensions"] | None:
    """See `Datastore.projection`."""
    if binding.projection is None or binding.key_dimensions is None:
        return None
    return load_projection(projection_path(folder, binding.model, binding.key_dimensions), binding.projection)
