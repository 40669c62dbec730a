"""T5X's numerics of pretraining: next-token cross-entropy with z-loss, Adafactor, a step over all devices, the loop over steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Float

from resmem_lm.model.checkpoints import STATE
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.metrics import metrics
from resmem_lm.text.packing import Batch
from resmem_lm.workdir.progress import progress

with epy.lazy_imports():
    import optax
    import orbax.checkpoint as ocp

    from resmem_lm.model import decoder

Z_LOSS = 1e-4


def learning_rate_schedule(*, learning_rate: float, constant_steps: int, steps: int, cooldown_steps: int = 0) -> "optax.Schedule":
    """Constant for `constant_steps`, then inverse square root decay (paper, appendix C), and to 0 in the last `cooldown_steps`."""

    def schedule(step: Any) -> Any:
        decayed = learning_rate * jnp.sqrt(constant_steps / jnp.maximum(step, constant_steps))
        return decayed * jnp.clip((steps - step) / max(cooldown_steps, 1), 0.0, 1.0) if cooldown_steps else decayed

    return schedule


def optimizer(schedule: "optax.Schedule") -> "optax.GradientTransformation":
    """Adafactor (Shazeer and Stern 2018) with T5X's constants."""
    return optax.adafactor(
        schedule,
        min_dim_size_to_factor=128,
        decay_rate=0.8,
        multiply_by_parameter_scale=True,
        clipping_threshold=1.0,
        momentum=None,
        eps=1e-30,
    )


def loss_and_metrics(
    config: ModelConfig, parameters: dict[str, Any], batch: Batch, dropout_key: Array | None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """T5X's loss, a sum over tokens of cross-entropy + 1e-4 log(Z)^2, and sums for the metrics."""
    logits: Any = decoder.Decoder(config).apply(
        {"params": parameters},
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        decoder_segment_ids=batch["decoder_segment_ids"],
        enable_dropout=dropout_key is not None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    targets, weights = batch["decoder_target_tokens"], batch["decoder_segment_ids"] > 0
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum((log_z - target_logits) * weights)
    loss = cross_entropy + Z_LOSS * jnp.sum(jnp.square(log_z) * weights)
    # The target is right if no logit is above its own: no second pass for an argmax.
    correct = jnp.sum((target_logits >= jnp.max(logits, axis=-1)) * weights)
    return loss, {"cross_entropy": cross_entropy, "correct": correct, "tokens": jnp.sum(weights)}


def to_train_state(parameters: dict[str, Any], optimizer_state: Any, step: int | Array) -> dict[str, Any]:
    """T5X's tree of a checkpoint: parameters and Adafactor's second moments, which both name alike, by parameter."""
    moments = {name: optax.tree_utils.tree_get(optimizer_state, name) for name in ("v", "v_row", "v_col")}

    def param_state(v: Array, v_row: Array, v_col: Array) -> dict[str, Any]:
        return {"v": v, "v_row": v_row, "v_col": v_col, "m": jnp.zeros(1)}  # no momentum

    param_states = jax.tree.map(param_state, moments["v"], moments["v_row"], moments["v_col"])
    return {"target": parameters, "state": {"step": jnp.asarray(step, jnp.int32), "param_states": param_states}}


def from_train_state(train_state: dict[str, Any], optimizer_state: Any) -> tuple[dict[str, Any], Any]:
    """Parameters and optimizer state of T5X's tree; `optimizer_state` gives the structure."""
    parameters, state = train_state["target"], train_state["state"]
    moments = {name: jax.tree.map(lambda _, s, name=name: s[name], parameters, state["param_states"]) for name in ("v", "v_row", "v_col")}
    optimizer_state = optax.tree_utils.tree_set(optimizer_state, count=state["step"], **moments)
    # The one step has become several counts: an array that is donated twice would crash the process.
    return parameters, jax.tree.map(jnp.copy, optimizer_state)


def shardings() -> tuple[jax.sharding.Sharding, jax.sharding.Sharding]:
    """How parameters lie on the local devices, whole on each, and how a batch does, a part of its rows on each."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
    replicated, by_row = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",)))
    return replicated, by_row


def compiled_update(model: ModelConfig, adafactor: "optax.GradientTransformation", seed: int) -> Any:
    """One step of training, data parallel over the local devices.

    It takes parameters, state, batch and number of the step, and returns the first two and the metrics.
    """
    replicated, by_row = shardings()
    dropout_key = jax.random.fold_in(jax.random.key(seed), 1) if model.dropout_rate > 0 else None

    def update(parameters: Any, state: Any, batch: Batch, step: Array) -> Any:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, step)
        gradients, metrics = jax.grad(lambda p: loss_and_metrics(model, p, batch, key), has_aux=True)(parameters)
        updates, state = adafactor.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, metrics

    return jax.jit(update, donate_argnums=(0, 1), in_shardings=(replicated, replicated, by_row, replicated))


def compiled_sums(model: ModelConfig) -> Any:
    """The metrics of some parameters on a batch, without dropout."""
    return jax.jit(lambda parameters, batch: loss_and_metrics(model, parameters, batch, None)[1], in_shardings=shardings())


def means(sums: list[dict[str, Array]]) -> dict[str, float]:
    """Loss and accuracy of a token over some batches, and the number of tokens."""
    total = {name: float(np.sum([some[name] for some in jax.device_get(sums)])) for name in ("cross_entropy", "correct", "tokens")}
    return {"loss": total["cross_entropy"] / total["tokens"], "accuracy": total["correct"] / total["tokens"], "tokens": total["tokens"]}


def restore_or_init(manager: Any, model: ModelConfig, adafactor: Any, seed: int) -> tuple[int, Any, Any]:
    """The step of the newest checkpoint, or 0, with parameters and optimizer state of then."""

    def init() -> tuple[Any, Any]:
        parameters = decoder.init_parameters(model, seed)
        return parameters, adafactor.init(parameters)

    sharding, _ = shardings()
    parameters, state = jax.jit(init, out_shardings=sharding)()
    begin = manager.latest_step()
    if begin is None:
        return 0, parameters, state
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(to_train_state, parameters, state, begin)
    )
    arguments = ocp.args.PyTreeRestore(shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes))
    train_state = manager.restore(begin, args=ocp.args.Composite(**{STATE: arguments}))[STATE]
    return begin, *from_train_state(train_state, state)


def loop(
    folder: Path,
    manager: Any,
    saved: Callable[[], None],
    update: Any,
    parameters: Any,
    state: Any,
    rows: Any,
    validate: Callable[[Any], dict[str, float]],
    schedule: "optax.Schedule",
    begin: int,
    steps: int,
    checkpoint_steps: int,
) -> None:
    """Trains from step `begin` on.

    `validate` gives scalars of some parameters, told at every checkpoint; `saved` is called when one has been written.
    """
    log_steps = max(1, min(50, steps // 10))
    with (
        metrics(folder / "metrics", begin=begin) as writer,
        progress("train", total=steps, done=begin, unit="steps") as bar,
    ):
        recent: list[Any] = []
        validation = ""
        start = time.monotonic()
        for step in range(begin, steps):
            parameters, state, sums = update(parameters, state, rows[step], np.int32(step))
            recent.append(sums)
            finished = step + 1
            checkpoint = finished % checkpoint_steps == 0 or finished == steps
            if checkpoint:
                jax.block_until_ready(parameters)
                began = time.monotonic()
                if scalars := validate(parameters):
                    writer.write(finished, {f"validation/{name}": value for name, value in scalars.items()})
                    validation = f"; validation loss {scalars['loss']:.3f} at step {finished:,}"
                start += time.monotonic() - began  # the speed told is that of training
            if finished % log_steps == 0 or finished == steps:
                scalars = means(recent)
                scalars["tokens_per_second"] = scalars.pop("tokens") / (time.monotonic() - start)
                scalars["learning_rate"] = float(schedule(step))
                writer.write(finished, {f"train/{name}": value for name, value in scalars.items()})
                told = f"loss {scalars['loss']:.3f}, accuracy {scalars['accuracy']:.1%}, {scalars['tokens_per_second']:,.0f} tokens/s"
                bar.update(finished, told + validation)
                recent, start = [], time.monotonic()
            if checkpoint:
                began = time.monotonic()
                train_state = to_train_state(parameters, state, finished)
                manager.save(finished, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(train_state)}))
                saved()
                start += time.monotonic() - began
