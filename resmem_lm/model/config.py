"""Define the shape of the model without importing Flax, so that commands that do not run the model start fast."""

import dataclasses

import gin

from resmem_lm.errors import UserError, check_least

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("linear", "relu", "gelu", "silu", "swish", "sigmoid", "tanh", "elu", "selu", "softplus")  # Flax's names, and "linear"


@gin.register(module="resmem_lm.model.decoder")  # gin/t5x/*.gin configures it under this module name
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only T5, with the field names of T5X's `TransformerConfig`.

    Attributes:
        vocab_size: number of logits.
        emb_dim: width of the embedding and of the layers.
        num_heads: number of attention heads in each layer.
        num_layers: number of layers.
        head_dim: width of each attention head.
        mlp_dim: width of the feed-forward block.
        mlp_activations: ("relu",) for T5 1.0, ("gelu", "linear") for the gated block of T5 1.1.
        dropout_rate: probability of dropout in training.
        logits_via_embedding: whether the output matrix is the embedding matrix, as in T5 1.0.
        dtype: dtype of the activations. Parameters are float32.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...] | list[str] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = True
    dtype: str = "float32"

    def check(self) -> None:
        """Raise UserError for a number out of range, an unknown activation or an unknown dtype."""
        numbers = ("vocab_size", "emb_dim", "num_heads", "num_layers", "head_dim", "mlp_dim")
        check_least("ModelConfig", 1, **{name: getattr(self, name) for name in numbers})
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"ModelConfig.dropout_rate = {self.dropout_rate}: take 0 or more and less than 1")
        for name, given, choices in (("mlp_activations", self.mlp_activations, ACTIVATIONS), ("dtype", (self.dtype,), DTYPES)):
            if not given or not set(given) <= set(choices):
                raise UserError(f"ModelConfig.{name} = {getattr(self, name)!r}: choose from {', '.join(choices)}")
