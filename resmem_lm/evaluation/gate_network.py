"""Define the network of Adaptive ResMem's gate. It has its own module because Flax is slow to import."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

HIDDEN = 32


class GateNetwork(nn.Module):
    """Map a neighbor's features to a change of its token's logit, with two hidden layers."""

    @nn.compact
    def __call__(self, x: Float[Array, "*some features"]) -> Float[Array, "*some"]:
        """Return the change for each neighbor."""
        x = nn.gelu(nn.Dense(HIDDEN, name="first")(x))
        x = nn.gelu(nn.Dense(HIDDEN, name="second")(x))
        return x @ self.param("out", nn.initializers.zeros, (HIDDEN,))


def initial_weights(features: int, seed: int) -> dict[str, Any]:
    """Draw the initial weights. The last layer is 0, so the initial gate equals DeepNet."""
    first, second = jax.random.split(jax.random.key(seed), 2)
    return {
        "first": {"kernel": jax.random.normal(first, (features, HIDDEN)) / np.sqrt(features), "bias": jnp.zeros(HIDDEN)},
        "second": {"kernel": jax.random.normal(second, (HIDDEN, HIDDEN)) / np.sqrt(HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "out": jnp.zeros(HIDDEN),
    }
