"""The model seam: a directory of checkpoints -> parameters, and a fingerprint that binds a datastore to them.

A checkpoint is T5X's: `checkpoint_1000/state`, in Orbax's form, with the tree {"target": parameters, "state": {"step", "param_states"}}.
So T5X goes on from what the built-in trainer wrote, the built-in trainer's reader reads what T5X wrote, and T5X is not needed
for either. T5X's older form, `checkpoint_1000/checkpoint` (msgpack) with one zarr array beside it per parameter, is read only.

Flax and Orbax are imported where they are used: every command imports this module, and a finished work directory needs neither.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable
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


@dataclasses.dataclass(frozen=True)
class Model:
    """DeepNet: token windows -> keys and logits. `parameters` may live on any device."""

    config: ModelConfig
    parameters: dict[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and every parameter."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.parameters):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def hidden(
        self, parameters: dict[str, Any], inputs: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"]
    ) -> tuple[Float[Array, "batch length emb"], Float[Array, "batch length emb"]]:
        """`Decoder.hidden`; the parameters are an argument so that jit does not copy them into its programs."""
        outputs: Any = decoder.Decoder(self.config).apply({"params": parameters}, inputs, segment_ids, method="hidden")
        return outputs[0], outputs[1]

    def logits(self, parameters: dict[str, Any], hidden: Float[Array, "tokens emb"]) -> Float[Array, "tokens vocab"]:
        """`Decoder.logits`."""
        logits: Any = decoder.Decoder(self.config).apply({"params": parameters}, hidden, method="logits")
        return jax.numpy.asarray(logits)


def checkpoint_manager(directory: Path, *, keep: int = 2) -> Any:
    """Orbax's manager of the checkpoints in `directory`, under T5X's names."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, step_prefix="checkpoint")
    return ocp.CheckpointManager(directory.absolute(), options=options, item_names=(STATE,))


def save_config(directory: AnyPath, config: ModelConfig, vocabulary: str) -> None:
    """Writes the model's shape and the checksum of its vocabulary beside its checkpoints."""
    write_json(directory / "model.json", {"config": dataclasses.asdict(config), "vocabulary": vocabulary})


def load_model(directory: AnyPath) -> Model:
    """The newest checkpoint of `directory`. Raises UserError if there is none or it does not fit its model.json."""
    config = load_config(directory)
    return Model(config, read_parameters(local_path(newest_checkpoint(directory)), config))


def load_config(directory: AnyPath) -> ModelConfig:
    """The shape of the model of `directory`."""
    return ModelConfig(**read_json(directory / "model.json")["config"])


def newest_checkpoint(path: AnyPath) -> AnyPath:
    """`path`, if it is a checkpoint, or the one of the highest step in it. Raises UserError if there is none."""

    def is_checkpoint(folder: AnyPath) -> bool:
        return (folder / STATE).is_dir() or (folder / "checkpoint").is_file()

    found = {int(name[1]): folder for folder in path.glob("checkpoint_*") if (name := re.fullmatch(r"checkpoint_(\d+)", folder.name))}
    whole = [step for step, folder in found.items() if is_checkpoint(folder)]
    if is_checkpoint(path) or not whole:
        if not is_checkpoint(path):
            raise UserError(f"{path} has no checkpoint: give a directory with checkpoint_1000 or the like, or run `resmem train`")
        return path
    return found[max(whole)]


def read_parameters(checkpoint: Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of one checkpoint, in float32 on one device; the optimizer's state is not read.

    Raises:
        UserError: it is damaged, or has not the names and shapes of `config`.
    """
    try:
        shapes, load = (_older_form if (checkpoint / "checkpoint").is_file() else _orbax_form)(checkpoint)
        wanted = traverse_util.flatten_dict(jax.eval_shape(lambda: decoder.init_parameters(config, 0)), sep="/")
        _check_names(checkpoint, shapes, {name: leaf.shape for name, leaf in wanted.items()})
        loaded = load()
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint} is damaged or no checkpoint of T5X ({reason}): copy or train it again") from error
    device = jax.local_devices()[0]
    parameters = {name: jax.device_put(np.asarray(loaded[name], np.float32), device) for name in wanted}
    nested: dict[str, Any] = traverse_util.unflatten_dict(parameters, sep="/")
    return nested


def _check_names(checkpoint: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        parts = [f"{what} {len(names)} such as {names[0]}" for what, names in (("lacks", missing), ("has besides", unknown)) if names]
        raise UserError(
            f"{checkpoint} has other parameters than ModelConfig: it {' and '.join(parts)}: "
            "set ModelConfig's num_layers, mlp_activations and logits_via_embedding as it was trained (gin/models/*.gin), "
            "and train under T5X with gin/t5x/*.gin or T5X's decoder_only network"
        )
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise UserError(
                f"{checkpoint}: {name} is {_times(stored[name])}, ModelConfig makes it {_times(shape)}: "
                "set ModelConfig as it was trained (gin/models/*.gin)"
            )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


Shapes = dict[str, tuple[int, ...]]
Load = Callable[[], dict[str, Any]]


def _orbax_form(checkpoint: Path) -> tuple[Shapes, Load]:
    folder = (checkpoint / STATE).absolute()
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree["target"]
    shapes = {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}

    def load() -> dict[str, Any]:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        restored = handler.restore(
            folder, args=ocp.args.PyTreeRestore({"target": target}, restore_args={"target": arguments}, partial_restore=True)
        )
        flat: dict[str, Any] = traverse_util.flatten_dict(restored["target"], sep="/")
        return flat

    return shapes, load


def _older_form(checkpoint: Path) -> tuple[Shapes, Load]:
    """Small arrays stand in the msgpack file; for the others it says which zarr folder beside it holds them."""
    content = serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())
    tree = content["optimizer"]["target"]
    stored = traverse_util.flatten_dict(tree, is_leaf=lambda _, value: "kvstore" in value, sep="/")
    shapes = {name: tuple(value["metadata"]["shape"] if isinstance(value, dict) else value.shape) for name, value in stored.items()}

    def load_one(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("path") or value["kvstore"]["path"]
        if Path(name.rstrip("/")).name != name.rstrip("/"):
            raise ValueError(f"an array lies outside, at {name}")
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str((checkpoint / name).absolute())}}
        return tensorstore.open(spec, open=True, read=True).result().read().result()

    return shapes, lambda: {name: load_one(value) for name, value in stored.items()}
