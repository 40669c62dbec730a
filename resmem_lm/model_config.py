"""The shape of the model, told without Flax, which only what computes with the model imports."""

import dataclasses

import gin


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
