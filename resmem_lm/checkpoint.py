"""The model seam: a directory of checkpoints -> parameters, and a fingerprint that binds a datastore to them."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from resmem_lm.errors import UserError
from resmem_lm.model import Decoder, ModelConfig, init_parameters
from resmem_lm.workdir import read_json, write_json


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
        outputs: Any = Decoder(self.config).apply({"params": parameters}, inputs, segment_ids, method="hidden")
        return outputs[0], outputs[1]

    def logits(self, parameters: dict[str, Any], hidden: Float[Array, "tokens emb"]) -> Float[Array, "tokens vocab"]:
        """`Decoder.logits`."""
        logits: Any = Decoder(self.config).apply({"params": parameters}, hidden, method="logits")
        return jax.numpy.asarray(logits)


def checkpoint_manager(directory: Path, *, keep: int = 2) -> Any:
    """Orbax's manager of the checkpoints in `directory`."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory.absolute(), options=options, item_names=("parameters", "optimizer"))


def save_config(directory: Path, config: ModelConfig) -> None:
    """Writes the model's shape beside its checkpoints."""
    write_json(directory / "model.json", dataclasses.asdict(config))


def load_model(directory: Path) -> Model:
    """The newest checkpoint of `directory`. Raises UserError if there is none or it does not fit its model.json."""
    import orbax.checkpoint as ocp

    config = ModelConfig(**read_json(directory / "model.json"))
    shapes = jax.eval_shape(lambda: init_parameters(config, 0))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with checkpoint_manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{directory} has no checkpoint: run `resmem train` first")
        try:
            restored = manager.restore(step, args=ocp.args.Composite(parameters=ocp.args.StandardRestore(target)))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{directory}/{step} does not fit its model.json or is damaged ({reason}): train again") from error
    return Model(config, restored["parameters"])
