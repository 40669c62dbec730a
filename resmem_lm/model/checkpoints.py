"""Read and write checkpoints, and compute the fingerprint of a model, which binds a datastore to it.

Checkpoints have T5X's format: `checkpoint_1000/state`, written by Orbax, with the tree {"target": parameters, "state": {"step",
"param_states"}}. T5X can resume from them, and this module reads T5X's checkpoints without T5X. It also reads, but does not write, T5X's
older format: `checkpoint_1000/checkpoint` (msgpack) beside one zarr array per parameter.
"""

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epy
from jaxtyping import Array, Float, Int

from resmem_lm.errors import UserError
from resmem_lm.model.config import ModelConfig
from resmem_lm.workdir.storage import AnyPath, local_path, read_json, write_json

with epy.lazy_imports():
    import orbax.checkpoint as ocp
    import tensorstore
    from flax import serialization, traverse_util

    from resmem_lm.model import decoder

STATE = "state"

Hidden = Float[Array, "batch length emb"]


@dataclasses.dataclass(frozen=True)
class Model:
    """DeepNet, which maps token windows to keys and logits. `parameters` may be on any device."""

    config: ModelConfig
    parameters: dict[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the configuration and all parameters."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.parameters):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def hidden(
        self, parameters: dict[str, Any], inputs: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"]
    ) -> tuple[Hidden, Hidden]:
        """Return the result of `Decoder.hidden`. Parameters are an argument, because jit would copy `self.parameters` into its programs."""
        outputs: Any = decoder.Decoder(self.config).apply({"params": parameters}, inputs, segment_ids, method="hidden")
        return outputs[0], outputs[1]

    def logits(self, parameters: dict[str, Any], hidden: Float[Array, "tokens emb"]) -> Float[Array, "tokens vocab"]:
        """Return the result of `Decoder.logits`."""
        logits: Any = decoder.Decoder(self.config).apply({"params": parameters}, hidden, method="logits")
        return jax.numpy.asarray(logits)


def checkpoint_manager(directory: Path) -> Any:
    """Return an Orbax CheckpointManager for `directory` that uses T5X's names."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False, step_prefix="checkpoint")
    return ocp.CheckpointManager(directory.absolute(), options=options, item_names=(STATE,))


def save_checkpoint(manager: Any, step: int, tree: dict[str, Any]) -> None:
    """Save a checkpoint in T5X's tree."""
    manager.save(step, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree)}))


def save_config(directory: AnyPath, config: ModelConfig, vocabulary: str) -> None:
    """Write the shape of the model and the checksum of its vocabulary to model.json in `directory`."""
    write_json(directory / "model.json", {"config": dataclasses.asdict(config), "vocabulary": vocabulary})


def load_config(directory: AnyPath) -> ModelConfig:
    """Return the shape of the model in `directory`."""
    return ModelConfig(**read_json(directory / "model.json")["config"])


def load_model(directory: AnyPath) -> Model:
    """Return the model of the newest checkpoint. Raise UserError if there is none or its shape differs from model.json."""
    config = load_config(directory)
    return Model(config, read_parameters(local_path(newest_checkpoint(directory)), config))


def newest_checkpoint(path: AnyPath) -> AnyPath:
    """Return `path` if it is a checkpoint, else the checkpoint with the highest step in it. Raise UserError if there is none."""

    def is_checkpoint(folder: AnyPath) -> bool:
        return (folder / STATE).is_dir() or (folder / "checkpoint").is_file()

    if is_checkpoint(path):
        return path
    steps = {folder: re.fullmatch(r"checkpoint_(\d+)", folder.name) for folder in path.glob("checkpoint_*")}
    found = {int(step[1]): folder for folder, step in steps.items() if step and is_checkpoint(folder)}
    if not found:
        raise UserError(f"{path} has no checkpoint: give a directory with checkpoint_1000 or similar, or run `resmem train`")
    return found[max(found)]


def read_parameters(checkpoint: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the parameters of a checkpoint in float32 on one device.

    Raise UserError if the checkpoint is damaged, or the names or shapes of its parameters differ from `config`.
    """
    try:
        stored = (_read_msgpack if (checkpoint / "checkpoint").is_file() else _read_orbax)(checkpoint)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint} is damaged or is not a T5X checkpoint ({reason}): copy or train it again") from error
    wanted = traverse_util.flatten_dict(jax.eval_shape(lambda: decoder.init_parameters(config, 0)), sep="/")
    _check_shapes(checkpoint, stored, wanted)
    device = jax.local_devices()[0]
    parameters = {name: jax.device_put(np.asarray(stored[name], np.float32), device) for name in wanted}
    nested: dict[str, Any] = traverse_util.unflatten_dict(parameters, sep="/")
    return nested


def _check_shapes(checkpoint: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = {"lacks": sorted(wanted.keys() - stored.keys()), "also has": sorted(stored.keys() - wanted.keys())}
    if parts := [f"{what} {len(names)} such as {names[0]}" for what, names in differences.items() if names]:
        raise UserError(
            f"{checkpoint} has other parameters than ModelConfig: it {' and '.join(parts)}: "
            "set ModelConfig's num_layers, mlp_activations and logits_via_embedding as in training (gin/models/*.gin), "
            "and train under T5X with gin/t5x/*.gin or T5X's decoder_only network"
        )
    for name, leaf in wanted.items():
        if stored[name].shape != leaf.shape:
            found, expected = (" x ".join(map(str, shape)) for shape in (stored[name].shape, leaf.shape))
            raise UserError(
                f"{checkpoint}: {name} is {found}, ModelConfig makes it {expected}: set ModelConfig as in training (gin/models/*.gin)"
            )


def _read_orbax(checkpoint: Path) -> dict[str, Any]:
    folder = (checkpoint / STATE).absolute()
    handler = ocp.PyTreeCheckpointHandler()
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = {"target": handler.metadata(folder).tree["target"]}
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored)
    arguments = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
    flat: dict[str, Any] = traverse_util.flatten_dict(handler.restore(folder, args=arguments)["target"], sep="/")
    return flat


def _read_msgpack(checkpoint: Path) -> dict[str, Any]:
    """Return the parameters in T5X's older format. The msgpack file contains small arrays and the names of the others' zarr folders."""

    def load(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("path") or value["kvstore"]["path"]
        if Path(name.rstrip("/")).name != name.rstrip("/"):
            raise ValueError(f"an array is outside the checkpoint, at {name}")
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str((checkpoint / name).absolute())}}
        return tensorstore.open(spec, open=True, read=True).result().read().result()

    content = serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())
    stored = traverse_util.flatten_dict(content["optimizer"]["target"], is_leaf=lambda _, value: "kvstore" in value, sep="/")
    return {name: load(value) for name, value in stored.items()}
