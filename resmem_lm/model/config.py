"""The shape of the model, told without Flax, which only what computes with the model imports."""

import dataclasses

import gin

from resmem_lm.errors import UserError, check_least

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("linear", "relu", "gelu", "silu", "swish", "sigmoid", "tanh", "elu", "selu", "softplus")  # "linear", and some of Flax's


@gin.register(module="resmem_lm.model")  # the name that gin files for T5X give it
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only T5; the names are T5X's `TransformerConfig`.

    `mlp_activations` is ("relu",) for T5 1.0 and ("gelu", "linear") for T5 1.1; `logits_via_embedding` ties the
    output to the embedding (T5 1.0). `dtype` is that of the activations; parameters are float32.
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
        """Raises UserError for a number out of its range, or an unknown activation or dtype; all are of the right kind."""
        numbers = ("vocab_size", "emb_dim", "num_heads", "num_layers", "head_dim", "mlp_dim")
        check_least("ModelConfig", 1, **{name: getattr(self, name) for name in numbers})
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"ModelConfig.dropout_rate = {self.dropout_rate}: take 0 or more and less than 1")
        for name, given, known in (("mlp_activations", self.mlp_activations, ACTIVATIONS), ("dtype", (self.dtype,), DTYPES)):
            if not given or not set(given) <= set(known):
                raise UserError(f"ModelConfig.{name} = {getattr(self, name)!r}: known are {', '.join(known)}")
