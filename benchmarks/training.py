"""Compare the operations per second of a training step with those of a large matrix product on the same machine."""

from collections.abc import Callable
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm import config
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.decoder import init_parameters
from resmem_lm.model.train_loop import MEMORY, compiled_update, learning_rate_schedule, optimizer
from resmem_lm.text.packing import shift_right
from resmem_lm.workdir.run import Run

SHAPES = {"t5_small": (8, 128), "mini": (16, 128)}  # rows of a step and tokens of a row, as in the configurations
PRODUCT = 3000  # rows and columns of the matrices: 54 GFLOP


def operations_per_token(model: ModelConfig, length: int) -> int:
    """Return the multiplications and additions in the matrix products of a forward and a backward pass, per token.

    A weight takes 2 operations in the forward pass and 4 in the backward pass. Attention is counted over the whole length. Norms, softmax
    and the optimizer are not counted, so the share is a lower bound.
    """
    joined = model.num_heads * model.head_dim
    attention = 4 * model.emb_dim * joined + 2 * length * joined
    mlp = (len(model.mlp_activations) + 1) * model.emb_dim * model.mlp_dim
    return 3 * 2 * (model.num_layers * (attention + mlp) + model.emb_dim * model.vocab_size)


def _model(name: str) -> ModelConfig:
    config.parse([f"gin/models/{name}.gin"], [])
    model: ModelConfig = gin.get_configurable(ModelConfig)()
    return model


def _step(model: ModelConfig, rows: int, length: int, memory_weight: float = 0.0) -> Callable[[], Any]:
    """Return a function that trains one more step on random tokens, with the memory loss if it has a weight."""
    schedule = learning_rate_schedule(learning_rate=0.01, constant_steps=1000, steps=1000, cooldown_steps=0)
    adafactor = optimizer(schedule)
    update = compiled_update(model, adafactor, seed=0, memory_weight=memory_weight)
    parameters = init_parameters(model, 0) | ({MEMORY: {"lambda": jnp.ones(())}} if memory_weight else {})
    state = [parameters, adafactor.init(parameters)]
    tokens = np.random.default_rng(0).integers(3, model.vocab_size, (rows, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    batch = {
        "decoder_input_tokens": shift_right(tokens, segments),
        "decoder_target_tokens": tokens,
        "decoder_segment_ids": segments,
    }

    def step() -> None:
        *state[:], metrics = update(*state, batch, np.int32(0))
        jax.block_until_ready((state, metrics))

    step()  # the second step is compiled again, for the layout of the first step's parameters
    step()
    return step


def run(_: Run) -> None:
    """Print the table. The work directory is not used."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(PRODUCT, PRODUCT)), jnp.float32)
    product = jax.jit(jnp.matmul)
    models = {name: _model(name) for name in SHAPES}
    steps = {name: _step(models[name], *SHAPES[name]) for name in SHAPES}
    with_memory = {f"{name} with the memory loss": _step(models[name], *SHAPES[name], memory_weight=1.0) for name in SHAPES}
    times = interleaved({"product": lambda: product(a, a).block_until_ready()} | steps | with_memory, rounds=5)
    done = {"product": 2 * PRODUCT**3}
    done |= {name: operations_per_token(models[name], length) * rows * length for name, (rows, length) in SHAPES.items()}
    # Operations per second are compared by the seconds per operation.
    even = {name: [seconds / done[name] for seconds in times[name]] for name in done}
    table(
        f"Training (steps of {', '.join(f'{name}: {rows} x {length}' for name, (rows, length) in SHAPES.items())} tokens, float32)",
        ("what", "share of the product's operations/s", "GFLOP/s", "tokens/s"),
        (
            (
                name if name != "product" else f"product of two {PRODUCT} x {PRODUCT} matrices",
                ratio(even, "product", name),
                f"{done[name] / median(times, name) / 1e9:,.0f}",
                f"{SHAPES[name][0] * SHAPES[name][1] / median(times, name):,.0f}" if name in SHAPES else "",
            )
            for name in done
        ),
    )
    rows = [(name, ratio(times, f"{name} with the memory loss", name)) for name in SHAPES]
    table("A step with the memory loss", ("model", "times a plain step"), rows)
