"""Train with T5X's numerics: cross-entropy with z-loss, Adafactor, a data-parallel step, and the loop over steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Float

from resmem_lm.model.checkpoints import STATE
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.memory_loss import memory_loss
from resmem_lm.model.metrics import metrics
from resmem_lm.text.packing import Batch
from resmem_lm.workdir.progress import progress

with epy.lazy_imports():
    import optax
    import orbax.checkpoint as ocp

    from resmem_lm.model import decoder

Z_LOSS = 1e-4
MOMENTS = ("v", "v_row", "v_col")  # Adafactor's second moments, with the same names in Optax and T5X
MEMORY = "memory"  # the name of the parameters of the memory loss, which are not DeepNet's


class State(NamedTuple):
    """The state of training after `step` steps."""

    step: int
    parameters: Any
    optimizer: Any


def learning_rate_schedule(*, learning_rate: float, constant_steps: int, steps: int, cooldown_steps: int = 0) -> "optax.Schedule":
    """Return a schedule: constant, then inverse square root decay (paper, appendix C), then linear decay to 0 in `cooldown_steps`."""

    def schedule(step: Any) -> Any:
        decayed = learning_rate * jnp.sqrt(constant_steps / jnp.maximum(step, constant_steps))
        return decayed * jnp.clip((steps - step) / max(cooldown_steps, 1), 0.0, 1.0) if cooldown_steps else decayed

    return schedule


def optimizer(schedule: "optax.Schedule") -> "optax.GradientTransformation":
    """Return Adafactor (Shazeer and Stern 2018) with T5X's constants."""
    return optax.adafactor(schedule, min_dim_size_to_factor=128, decay_rate=0.8, clipping_threshold=1.0, eps=1e-30)


def deepnet(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of DeepNet, without those of the memory loss."""
    return {name: value for name, value in parameters.items() if name != MEMORY}


def loss_and_metrics(
    config: ModelConfig, parameters: dict[str, Any], batch: Batch, dropout_key: Array | None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return T5X's loss (the sum over tokens of cross-entropy + 1e-4 log(Z)^2) and the sums from which `means` computes metrics."""
    logits: Any = decoder.Decoder(config).apply(
        {"params": deepnet(parameters)},
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        decoder_segment_ids=batch["decoder_segment_ids"],
        enable_dropout=dropout_key is not None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return _loss_of_logits(logits, batch)


def joint_loss_and_metrics(
    config: ModelConfig, parameters: dict[str, Any], batch: Batch, dropout_key: Array | None, memory_key: Array, weight: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the loss of `loss_and_metrics` + weight * `memory_loss`, and the sums of `loss_and_metrics`."""
    targets, segment_ids = jnp.asarray(batch["decoder_target_tokens"]), jnp.asarray(batch["decoder_segment_ids"])
    outputs: Any = decoder.Decoder(config).apply(
        {"params": deepnet(parameters)},
        batch["decoder_input_tokens"],
        segment_ids,
        enable_dropout=dropout_key is not None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="keys_and_logits",
    )
    keys, logits = outputs
    loss, sums = _loss_of_logits(logits, batch)
    return loss + weight * memory_loss(logits, keys, targets, segment_ids, parameters[MEMORY]["lambda"], memory_key), sums


def _loss_of_logits(logits: Float[Array, "batch length vocab"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
    targets, weights = batch["decoder_target_tokens"], batch["decoder_segment_ids"] > 0
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum((log_z - target_logits) * weights)
    loss = cross_entropy + Z_LOSS * jnp.sum(jnp.square(log_z) * weights)
    # A prediction is correct if no logit exceeds the target's. An argmax would need a second pass.
    correct = jnp.sum((target_logits >= jnp.max(logits, axis=-1)) * weights)
    return loss, {"cross_entropy": cross_entropy, "correct": correct, "tokens": jnp.sum(weights)}


def to_train_state(parameters: dict[str, Any], optimizer_state: Any, step: int | Array) -> dict[str, Any]:
    """Return T5X's checkpoint tree: the parameters, and Adafactor's second moments with the same names.

    The parameters of the memory loss are beside this tree, under `MEMORY`, so that the checkpoint is read as DeepNet alone.
    """
    moments = [optax.tree_utils.tree_get(optimizer_state, name) for name in MOMENTS]
    param_states = jax.tree.map(lambda *values: {**dict(zip(MOMENTS, values, strict=True)), "m": jnp.zeros(1)}, *moments)  # no momentum
    tree = {"target": deepnet(parameters), "state": {"step": jnp.asarray(step, jnp.int32), "param_states": deepnet(param_states)}}
    if MEMORY in parameters:
        tree[MEMORY] = {"target": parameters[MEMORY], "param_states": param_states[MEMORY]}
    return tree


def from_train_state(train_state: dict[str, Any], optimizer_state: Any) -> tuple[dict[str, Any], Any]:
    """Return the parameters and the optimizer state in T5X's checkpoint tree, in the structure of `optimizer_state`."""
    parameters, param_states = train_state["target"], train_state["state"]["param_states"]
    if MEMORY in train_state:
        parameters = parameters | {MEMORY: train_state[MEMORY]["target"]}
        param_states = param_states | {MEMORY: train_state[MEMORY]["param_states"]}
    moments = {name: jax.tree.map(lambda _, s, name=name: s[name], parameters, param_states) for name in MOMENTS}
    optimizer_state = optax.tree_utils.tree_set(optimizer_state, count=train_state["state"]["step"], **moments)
    # `tree_set` gives several counts the same array. Copy it, because donating an array twice crashes the process.
    return parameters, jax.tree.map(jnp.copy, optimizer_state)


def shardings() -> tuple[jax.sharding.Sharding, jax.sharding.Sharding]:
    """Return the sharding of the parameters (replicated over the local devices) and of a batch (rows divided among them)."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
    replicated, by_row = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",)))
    return replicated, by_row


def compiled_update(model: ModelConfig, adafactor: "optax.GradientTransformation", seed: int, memory_weight: float = 0.0) -> Any:
    """Return the compiled, data-parallel training step: (parameters, optimizer state, batch, step) to (parameters, state, sums).

    With a `memory_weight` the step minimizes the joint loss.
    """
    replicated, by_row = shardings()
    dropout_key = jax.random.fold_in(jax.random.key(seed), 1) if model.dropout_rate > 0 else None
    memory_key = jax.random.fold_in(jax.random.key(seed), 2)

    def update(parameters: Any, state: Any, batch: Batch, step: Array) -> Any:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, step)

        def loss(p: Any) -> Any:
            if not memory_weight:
                return loss_and_metrics(model, p, batch, key)
            return joint_loss_and_metrics(model, p, batch, key, jax.random.fold_in(memory_key, step), memory_weight)

        gradients, metrics = jax.grad(loss, has_aux=True)(parameters)
        updates, state = adafactor.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, metrics

    return jax.jit(update, donate_argnums=(0, 1), in_shardings=(replicated, replicated, by_row, replicated))


def joint_update(model: ModelConfig, adafactor: "optax.GradientTransformation", seed: int, memory_weight: float, begin: int) -> Any:
    """Return a training step that minimizes the plain loss before step `begin`, and the joint loss from then on."""
    plain, joint = compiled_update(model, adafactor, seed), compiled_update(model, adafactor, seed, memory_weight)

    def update(parameters: Any, state: Any, batch: Batch, step: Any) -> Any:
        return (plain if step < begin else joint)(parameters, state, batch, step)

    return update


def compiled_sums(model: ModelConfig) -> Any:
    """Return the compiled function from (parameters, batch) to the sums of `loss_and_metrics`, without dropout."""
    return jax.jit(lambda parameters, batch: loss_and_metrics(model, parameters, batch, None)[1], in_shardings=shardings())


def means(sums: list[dict[str, Array]]) -> dict[str, float]:
    """Return the mean loss and accuracy per token over batches, and the number of tokens."""
    total = {name: float(np.sum([batch[name] for batch in jax.device_get(sums)])) for name in ("cross_entropy", "correct", "tokens")}
    return {"loss": total["cross_entropy"] / total["tokens"], "accuracy": total["correct"] / total["tokens"], "tokens": total["tokens"]}


def restore_or_init(manager: Any, model: ModelConfig, adafactor: Any, seed: int, *, joint: bool = False) -> State:
    """Return the state of the newest checkpoint, or the initial state if there is none. `joint` adds the parameter of the memory loss."""

    def init() -> tuple[Any, Any]:
        parameters = decoder.init_parameters(model, seed) | ({MEMORY: {"lambda": jnp.ones(())}} if joint else {})
        return parameters, adafactor.init(parameters)

    sharding, _ = shardings()
    parameters, state = jax.jit(init, out_shardings=sharding)()
    begin = manager.latest_step()
    if begin is None:
        return State(0, parameters, state)
    shapes = jax.eval_shape(to_train_state, parameters, state, begin)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    arguments = ocp.args.PyTreeRestore(shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes))
    train_state = manager.restore(begin, args=ocp.args.Composite(**{STATE: arguments}))[STATE]
    return State(begin, *from_train_state(train_state, state))


def loop(
    state: State,
    *,
    update: Any,
    rows: Any,
    steps: int,
    schedule: "optax.Schedule",
    checkpoint_steps: int,
    validate: Callable[[Any], dict[str, float]],
    save: Callable[[State], None],
    folder: Path,
) -> None:
    """Train from `state`, whose arrays are donated, to the last step; write metrics to `folder` and call `save` at each checkpoint.

    `update` is the result of `compiled_update`, and `rows[step]` is the batch of a step. `validate` returns scalars for parameters.
    """
    log_steps = max(1, min(50, steps // 10))
    recent: list[Any] = []
    validation = ""
    with metrics(folder, begin=state.step) as write, progress("train", total=steps, done=state.step, unit="steps") as bar:
        start = time.monotonic()  # moved forward by the seconds of validation and saving
        while state.step < steps:
            parameters, moments, sums = update(state.parameters, state.optimizer, rows[state.step], np.int32(state.step))
            state = State(state.step + 1, parameters, moments)
            recent.append(sums)
            checkpoint = state.step == steps or state.step % checkpoint_steps == 0
            if checkpoint:
                jax.block_until_ready(state.parameters)
                pause = time.monotonic()
                scalars = validate(state.parameters)
                start += time.monotonic() - pause
                if scalars:
                    write(state.step, {f"validation/{name}": value for name, value in scalars.items()})
                    validation = f"; validation loss {scalars['loss']:.3f} at step {state.step:,}"
            if state.step == steps or state.step % log_steps == 0:
                scalars = means(recent)
                now = time.monotonic()
                scalars["tokens_per_second"] = scalars.pop("tokens") / (now - start)
                scalars["learning_rate"] = float(schedule(state.step - 1))
                write(state.step, {f"train/{name}": value for name, value in scalars.items()})
                detail = f"loss {scalars['loss']:.3f}, accuracy {scalars['accuracy']:.1%}, {scalars['tokens_per_second']:,.0f} tokens/s"
                bar.update(state.step, detail + validation)
                recent.clear()
                start = now
            if checkpoint:
                pause = time.monotonic()
                save(state)
                start += time.monotonic() - pause
