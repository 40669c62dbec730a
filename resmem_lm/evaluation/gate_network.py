"""Define the network of Adaptive ResMem's gate. It has its own module because Flax is slow to import."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

HIDDEN = 32


class GateNetwork(nn.Module):
    """Map the features of a proposed token and of its query to a change of the token's logit, with two hidden layers."""

    @nn.compact
    def __call__(
        self, of_column: Float[Array, "queries columns features"], of_query: Float[Array, "queries others"]
    ) -> Float[Array, "queries columns"]:
        """Return the change for each column."""
        x = nn.Dense(HIDDEN, name="column")(of_column) + nn.Dense(HIDDEN, use_bias=False, name="query")(of_query)[:, None]
        x = nn.gelu(nn.Dense(HIDDEN, name="second")(nn.gelu(x)))
        return x @ self.param("out", nn.initializers.zeros, (HIDDEN,))


def initial_weights(of_column: int, of_query: int, seed: int) -> dict[str, Any]:
    """Draw the initial weights for numbers of features. The last layer is 0, so the initial gate equals DeepNet."""
    keys, scale = jax.random.split(jax.random.key(seed), 3), 1 / np.sqrt(of_column + of_query)
    return {
        "column": {"kernel": jax.random.normal(keys[0], (of_column, HIDDEN)) * scale, "bias": jnp.zeros(HIDDEN)},
        "query": {"kernel": jax.random.normal(keys[1], (of_query, HIDDEN)) * scale},
        "second": {"kernel": jax.random.normal(keys[2], (HIDDEN, HIDDEN)) / np.sqrt(HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "out": jnp.zeros(HIDDEN),
    }
