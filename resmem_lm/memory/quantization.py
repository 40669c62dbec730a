"""One byte for a number: how the datastore holds keys and probabilities. NumPy and JAX alike.

A key is divided by a scale of its own, 1/127 of its largest component. A probability p is held as 255 p^(1/3), rounded: the error is
at most 0.006 near 1 and falls with p, as scores add probabilities up; the smallest that is not 0 is 1e-8.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int8, UInt8


def quantize_keys(keys: Float[Array, "rows emb"]) -> tuple[Int8[Array, "rows emb"], Float16[Array, " rows"]]:
    """Codes and scales."""
    scales = (jnp.max(jnp.abs(keys), axis=-1) / 127).astype(jnp.float16)
    codes = jnp.round(keys / jnp.maximum(scales.astype(jnp.float32), 1e-7)[:, None])
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scales


def dequantize_keys(codes: Int8[Any, "*rows emb"], scales: Float16[Any, "*rows"]) -> Float[Any, "*rows emb"]:
    """Keys in float32."""
    return codes.astype(np.float32) * scales.astype(np.float32)[..., None]


def quantize_probabilities(p: Float[Array, "rows entries"]) -> UInt8[Array, "rows entries"]:
    """Codes."""
    return jnp.round(255 * jnp.cbrt(p)).astype(jnp.uint8)


def dequantize_probabilities(codes: UInt8[Any, "*some"]) -> Float[Any, "*some"]:
    """Probabilities in float32."""
    root = codes.astype(np.float32) / 255
    return root * root * root


def dequantize_powers(codes: UInt8[Any, "*some"], temperature: float | Float[Array, ""]) -> Float[Array, "*some"]:
    """p^(1/T) of the probabilities: looked up, which is cheaper than taken."""
    return jnp.power(dequantize_probabilities(jnp.arange(256, dtype=jnp.uint8)), 1 / temperature)[codes]


def upper_probabilities(codes: UInt8[Any, "*some"]) -> Float[Any, "*some"]:
    """The largest probabilities that have these codes."""
    root = np.minimum(codes.astype(np.float32) + 0.5, 255) / 255
    return root * root * root
