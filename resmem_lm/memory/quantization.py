"""Quantize keys and probabilities to one byte per number. All functions accept NumPy and JAX arrays.

The components of a key are rounded to multiples of the key's scale, which is 1/127 of its largest component. A probability p is stored as
round(255 p^(1/3)). The error is at most 0.006, near p = 1, and shrinks with p. This suits scores, which are sums of probabilities. A
probability below 7e-9 becomes 0.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int8, UInt8


def quantize_keys(keys: Float[Array, "rows emb"]) -> tuple[Int8[Array, "rows emb"], Float16[Array, " rows"]]:
    """Return quantized keys and their scales."""
    scales = (jnp.max(jnp.abs(keys), axis=-1) / 127).astype(jnp.float16)
    quantized = jnp.round(keys / jnp.maximum(scales.astype(jnp.float32), 1e-7)[:, None])
    return jnp.clip(quantized, -127, 127).astype(jnp.int8), scales


def dequantize_keys(quantized: Int8[Any, "*rows emb"], scales: Float16[Any, "*rows"]) -> Float[Any, "*rows emb"]:
    """Return keys in float32."""
    return quantized.astype(np.float32) * scales.astype(np.float32)[..., None]


def quantize_probabilities(p: Float[Array, "rows entries"]) -> UInt8[Array, "rows entries"]:
    """Return quantized probabilities."""
    return jnp.round(255 * jnp.cbrt(p)).astype(jnp.uint8)


def dequantize_probabilities(quantized: UInt8[Any, "*some"]) -> Float[Any, "*some"]:
    """Return probabilities in float32."""
    root = quantized.astype(np.float32) / 255
    return root * root * root


def dequantize_powers(quantized: UInt8[Any, "*some"], temperature: float | Float[Array, ""]) -> Float[Array, "*some"]:
    """Return p^(1/T) from a table of all 256 values, which costs less than a power per element."""
    return jnp.power(dequantize_probabilities(jnp.arange(256, dtype=jnp.uint8)), 1 / temperature)[quantized]


def upper_probabilities(quantized: UInt8[Any, "*some"]) -> Float[Any, "*some"]:
    """Return the largest probability that is quantized to each value."""
    root = np.minimum(quantized.astype(np.float32) + 0.5, 255) / 255
    return root * root * root
