"""Define a decoder-only T5 (Raffel et al. 2020, without encoder and cross-attention) that T5X's `DecoderOnlyModel` can train.

Parameter names, axis annotations and the call signature are T5X's, so T5X and this package can read each other's parameters.
`Decoder.hidden` returns ResMem's key phi(x): the activations of the last layer after the pre-MLP LayerNorm and before the MLP (paper,
section 4.1).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.partitioning import param_with_axes, with_sharding_constraint
from jaxtyping import Array, Float, Int

from resmem_lm.model.config import ModelConfig

RELATIVE_BUCKETS = 32
RELATIVE_MAX_DISTANCE = 128

Tokens = Int[Array, "batch length"]
Hidden = Float[Array, "batch length emb"]
Bias = Float[Array, "#batch #heads length length"]


def relative_buckets(length: int) -> Int[np.ndarray, "length length"]:
    """Return T5's bucket of each (query, key) distance in a causal decoder: exact below 16, then logarithmic up to 128."""
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
    exact = RELATIVE_BUCKETS // 2
    log_ratio = np.log(distance.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(RELATIVE_MAX_DISTANCE / exact)
    far = exact + (log_ratio * (RELATIVE_BUCKETS - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, RELATIVE_BUCKETS - 1)).astype(np.int32)


class Dense(nn.Module):
    """A linear map without bias from the last `inputs_axes` axes to `features`. Its kernel is a matrix."""

    features: tuple[int, ...]
    kernel_axes: tuple[str, str]
    dtype: Any
    kernel_init: Any = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    inputs_axes: int = 1

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        kept, contracted = inputs.shape[: -self.inputs_axes], inputs.shape[-self.inputs_axes :]
        shape = (int(np.prod(contracted)), int(np.prod(self.features)))
        kernel = param_with_axes("kernel", self.kernel_init, shape, jnp.float32, axes=self.kernel_axes)
        # Reshape to a product of two matrices, for which XLA uses the CPU's fast routine, also in the gradients.
        outputs = jnp.asarray(inputs, self.dtype).reshape(-1, shape[0]) @ jnp.asarray(kernel, self.dtype)
        return outputs.reshape(*kept, *self.features)


class LayerNorm(nn.Module):
    """T5's LayerNorm: root-mean-square normalization with a scale, without mean or bias."""

    dtype: Any

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        inputs = jnp.asarray(inputs, jnp.float32)
        mean_square = jnp.mean(jnp.square(inputs), axis=-1, keepdims=True)
        scale = param_with_axes("scale", nn.initializers.ones, (inputs.shape[-1],), jnp.float32, axes=("embed",))
        return jnp.asarray(inputs * jax.lax.rsqrt(mean_square + 1e-6), self.dtype) * jnp.asarray(scale, self.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention with T5's relative bias. The query's initializer contains the factor 1/sqrt(head_dim)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, inputs: Hidden, bias: Bias, deterministic: bool) -> Hidden:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def query_init(*args: Any) -> Array:
            return init(*args) / jnp.sqrt(cfg.head_dim)

        heads = functools.partial(Dense, (cfg.num_heads, cfg.head_dim), ("embed", "joined_kv"), dtype)
        query = heads(kernel_init=query_init, name="query")(inputs)
        key = heads(kernel_init=init, name="key")(inputs)
        value = heads(kernel_init=init, name="value")(inputs)
        query, key, value = (with_sharding_constraint(x, ("batch", "length", "heads", "kv")) for x in (query, key, value))

        # The head axis comes first, so that XLA uses the CPU's fast routine for both products. Normalizing after the sum over keys divides
        # head_dim numbers per query instead of `length`.
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        weights = jnp.einsum("bhqd,bhkd->bhqk", query, key) + bias.astype(dtype)
        weights = jnp.exp(weights - jax.lax.stop_gradient(jnp.max(weights, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1)
        if not deterministic and cfg.dropout_rate > 0:
            # As in T5X, all queries share one mask.
            shape = (*weights.shape[:2], 1, weights.shape[3])
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - cfg.dropout_rate, shape)
            weights = weights * keep.astype(dtype) / jnp.asarray(1 - cfg.dropout_rate, dtype)
        attended = (jnp.einsum("bhqk,bhkd->bhqd", weights, value) / total[..., None]).swapaxes(1, 2)
        return Dense((inputs.shape[-1],), ("joined_kv", "embed"), dtype, init, inputs_axes=2, name="out")(attended)


def dropout(config: ModelConfig, name: str | None = None) -> nn.Dropout:
    """Return T5's dropout, which drops a feature at all positions of a row."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,), name=name)


class Mlp(nn.Module):
    """T5's feed-forward block: `wi` (or gated `wi_0` and `wi_1`), then `wo`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, inputs: Hidden, deterministic: bool) -> Hidden:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        hidden: Any = 1
        for number, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{number}"
            gate = Dense((cfg.mlp_dim,), ("embed", "mlp"), dtype, name=name)(inputs)
            hidden *= gate if activation == "linear" else getattr(nn, activation)(gate)
        hidden = dropout(cfg)(hidden, deterministic=deterministic)
        hidden = with_sharding_constraint(hidden, ("batch", "length", "mlp"))
        return Dense((inputs.shape[-1],), ("mlp", "embed"), dtype, name="wo")(hidden)


class DecoderLayer(nn.Module):
    """Self-attention and MLP, each with a LayerNorm before it and a residual connection. Returns the output and ResMem's key."""

    config: ModelConfig

    @nn.compact
    def __call__(self, inputs: Hidden, bias: Bias, deterministic: bool) -> tuple[Hidden, Hidden]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        x = LayerNorm(dtype, name="pre_self_attention_layer_norm")(inputs)
        x = SelfAttention(cfg, name="self_attention")(x, bias, deterministic)
        x = inputs + dropout(cfg, "post_self_attention_dropout")(x, deterministic=deterministic)
        key = LayerNorm(dtype, name="pre_mlp_layer_norm")(x)
        update = Mlp(cfg, name="mlp")(key, deterministic)
        return x + dropout(cfg, "post_mlp_dropout")(update, deterministic=deterministic), key


class Table(nn.Module):
    """A matrix of float32 parameters in its own scope, as T5X's parameter names have it."""

    parameter: str
    shape: tuple[int, int]
    axes: tuple[str, str]
    initializer: Any

    @nn.compact
    def __call__(self) -> Float[Array, "rows columns"]:
        return param_with_axes(self.parameter, self.initializer, self.shape, jnp.float32, axes=self.axes)


class DecoderStack(nn.Module):
    """Embedding, layers, final LayerNorm and logits. Logits are float32 for every dtype of the activations.

    All layers share T5's bias per head and distance bucket. The output matrix is the embedding if `logits_via_embedding` is set.
    """

    config: ModelConfig

    def setup(self) -> None:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        self.token_embedder = Table("embedding", (cfg.vocab_size, cfg.emb_dim), ("vocab", "embed"), nn.initializers.normal(stddev=1.0))
        bias_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        self.relpos_bias = Table("rel_embedding", (cfg.num_heads, RELATIVE_BUCKETS), ("heads", "relpos_buckets"), bias_init)
        self.input_dropout = dropout(cfg)
        self.layers = [DecoderLayer(cfg) for _ in range(cfg.num_layers)]
        self.decoder_norm = LayerNorm(dtype)
        self.output_dropout = dropout(cfg)
        if not cfg.logits_via_embedding:
            self.logits_dense = Dense((cfg.vocab_size,), ("embed", "vocab"), jnp.float32)

    def hidden(self, inputs: Tokens, segment_ids: Tokens | None, prefix: Tokens | None, deterministic: bool) -> tuple[Hidden, Hidden]:
        """Return ResMem's keys and the input of `logits` at every position."""
        length = inputs.shape[1]
        allowed = jnp.tril(jnp.ones((1, 1, length, length), bool))
        if prefix is not None:
            allowed = allowed | (prefix[:, None, :, None] * prefix[:, None, None, :] > 0)
        if segment_ids is not None:
            allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        dtype = jnp.dtype(self.config.dtype)
        bias = jnp.asarray(self.relpos_bias(), dtype)[:, relative_buckets(length)][None] + jnp.where(allowed, 0.0, -1e10).astype(dtype)
        x = self.input_dropout(jnp.asarray(self.token_embedder(), dtype)[inputs], deterministic=deterministic)
        key = x
        for layer in self.layers:
            x, key = layer(x, bias, deterministic)
        return key, self.output_dropout(self.decoder_norm(x), deterministic=deterministic)

    def logits(self, hidden: Float[Array, "*batch emb"]) -> Float[Array, "*batch vocab"]:
        """Return the logits."""
        if self.config.logits_via_embedding:
            return jnp.asarray(hidden, jnp.float32) @ self.token_embedder().T / jnp.sqrt(self.config.emb_dim)
        return self.logits_dense(hidden)


class Decoder(nn.Module):
    """The module that T5X trains, with T5X's parameter scope `decoder/` and call signature."""

    config: ModelConfig

    def setup(self) -> None:
        self.decoder = DecoderStack(self.config)

    def __call__(
        self,
        decoder_input_tokens: Tokens,
        decoder_target_tokens: Tokens,
        decoder_segment_ids: Tokens | None = None,
        decoder_positions: Tokens | None = None,
        decoder_causal_attention: Tokens | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
    ) -> Float[Array, "batch length vocab"]:
        """Return the logits of the next token at every position. Targets and positions, which T5X passes, are not used."""
        if decode:
            raise NotImplementedError("autoregressive decoding is not implemented: ResMem only scores given text")
        _, hidden = self.decoder.hidden(decoder_input_tokens, decoder_segment_ids, decoder_causal_attention, not enable_dropout)
        return self.decoder.logits(hidden)

    def hidden(self, inputs: Tokens, segment_ids: Tokens) -> tuple[Hidden, Hidden]:
        """Return ResMem's keys phi(x) and the input of `logits`, without dropout."""
        return self.decoder.hidden(inputs, segment_ids, None, True)

    def keys_and_logits(
        self, inputs: Tokens, segment_ids: Tokens, *, enable_dropout: bool
    ) -> tuple[Hidden, Float[Array, "batch length vocab"]]:
        """Return ResMem's keys phi(x) and the logits f(x) at every position."""
        key, hidden = self.decoder.hidden(inputs, segment_ids, None, not enable_dropout)
        return key, self.decoder.logits(hidden)

    def logits(self, hidden: Float[Array, "*batch emb"]) -> Float[Array, "*batch vocab"]:
        """Return DeepNet's logits f(x)."""
        return self.decoder.logits(hidden)


def init_parameters(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Return initial float32 parameters."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    parameters: dict[str, Any] = Decoder(config).init(jax.random.key(seed), tokens, tokens, enable_dropout=False)["params"]
    return parameters
