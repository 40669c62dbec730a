import shutil
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import pytest
import tensorstore

from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.model.checkpoints import load_model, newest_checkpoint
from resmem_lm.model.take_checkpoint import take_checkpoint
from resmem_lm.workdir.storage import read_json, to_path, upload, write_json
from tests.tiny import arguments


@pytest.fixture
def workdir(tiny_run, tmp_path):
    """Return a run with documents and a vocabulary, before training."""
    for name in ("documents", "vocabulary"):
        shutil.copytree(tiny_run / name, tmp_path / "run" / name)
        (tmp_path / "run/stages").mkdir(exist_ok=True)
        shutil.copy(tiny_run / "stages" / f"{name}.json", tmp_path / "run/stages")
    return tmp_path / "run"


def write_older_form(checkpoint: Path, parameters) -> None:
    """Write T5X's older format: vectors in the msgpack file, matrices in zarr folders."""
    checkpoint.mkdir(parents=True)
    target = {}
    for name, value in flax.traverse_util.flatten_dict(parameters, sep=".").items():
        value = np.asarray(value)
        if value.ndim == 1:
            target[name] = value
            continue
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(checkpoint / f"target.{name}")}}
        spec["metadata"] = {"shape": list(value.shape), "chunks": [8, 8], "dtype": "<f4", "compressor": {"id": "gzip", "level": 1}}
        tensorstore.open(spec, create=True).result().write(value).result()
        target[name] = spec | {"kvstore": {"driver": "gfile", "path": f"target.{name}"}}
    tree = {"target": flax.traverse_util.unflatten_dict(target, sep="."), "state": {"step": np.int32(7)}}
    (checkpoint / "checkpoint").write_bytes(flax.serialization.msgpack_serialize({"version": 3, "optimizer": tree}))


def test_a_checkpoint_of_this_trainer_keeps_all_parameters(tiny_run, workdir):
    model = load_model(tiny_run / "checkpoints")
    assert take_checkpoint(workdir, model=model.config, checkpoint=str(tiny_run / "checkpoints")) == {"fingerprint": model.fingerprint}
    assert load_model(workdir / "checkpoints").fingerprint == model.fingerprint


def test_a_checkpoint_in_object_storage_is_copied(tiny_run, workdir):
    model, place = load_model(tiny_run / "checkpoints"), "memory://taken/checkpoints"
    upload(tiny_run / "checkpoints", to_path(place))
    assert take_checkpoint(workdir, model=model.config, checkpoint=place) == {"fingerprint": model.fingerprint}


def test_t5x_older_form_has_the_same_parameters(tiny_run, workdir, tmp_path):
    model = load_model(tiny_run / "checkpoints")
    write_older_form(tmp_path / "model_dir/checkpoint_7", model.parameters)
    taken = take_checkpoint(workdir, model=model.config, checkpoint=str(tmp_path / "model_dir"))
    assert taken == {"fingerprint": model.fingerprint}
    jax.tree.map(np.testing.assert_array_equal, load_model(workdir / "checkpoints").parameters, model.parameters)


def test_build_with_a_checkpoint_needs_no_training_and_makes_the_same_rows(tiny_run, tmp_path):
    setting = f"--gin.CHECKPOINT='{tiny_run / 'checkpoints'}'"
    assert main(["build", *arguments(tiny_run.parent, tmp_path / "run"), setting]) == 0
    one, two = (read_json(w / "datastore/manifest.json") for w in (tiny_run, tmp_path / "run"))
    assert (one["model"], one["rows"]) == (two["model"], two["rows"])
    assert "steps" not in read_json(tmp_path / "run/stages/train.json")["settings"]


def test_the_newest_finished_checkpoint_is_used(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint_{step}" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint_200.orbax-checkpoint-tmp-1/state").mkdir(parents=True)
    (tmp_path / "checkpoint_300").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint_100"
    assert newest_checkpoint(tmp_path / "checkpoint_9").name == "checkpoint_9"


def test_a_checkpoint_may_have_been_renamed(tiny_run, workdir, tmp_path):
    newest = max((tiny_run / "checkpoints").glob("checkpoint_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    shutil.copytree(newest, tmp_path / "t5_small")
    config = load_model(tiny_run / "checkpoints").config
    assert take_checkpoint(workdir, model=config, checkpoint=str(tmp_path / "t5_small")) == {
        "fingerprint": load_model(tiny_run / "checkpoints").fingerprint
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mlp_dim", 128, r"mlp/wi/kernel is 32 x 64, ModelConfig makes it 32 x 128: set ModelConfig as in training"),
        ("vocab_size", 384, r"token_embedder/embedding is 256 x 32, ModelConfig makes it 384 x 32"),
        ("num_layers", 3, r"it lacks 8 such as decoder/layers_2/mlp/wi/kernel"),
        ("num_layers", 1, r"it also has 8 such as decoder/layers_1/mlp/wi/kernel"),
        ("mlp_activations", ("gelu", "linear"), r"lacks 4 such as decoder/layers_0/mlp/wi_0/kernel and also has 2"),
        ("vocab_size", 128, "the vocabulary has 150 pieces and the model only 128"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(tiny_run, workdir, field, value, message):
    config = load_model(tiny_run / "checkpoints").config
    config = type(config)(**{**config.__dict__, field: value})
    with pytest.raises(UserError, match=message):
        take_checkpoint(workdir, model=config, checkpoint=str(tiny_run / "checkpoints"))


def test_checkpoints_that_cannot_be_used_are_refused(tiny_run, workdir, tmp_path):
    config = load_model(tiny_run / "checkpoints").config
    other = tmp_path / "other"
    shutil.copytree(tiny_run / "checkpoints", other)
    write_json(other / "model.json", read_json(other / "model.json") | {"vocabulary": "another"})
    damaged = tmp_path / "damaged"
    write_older_form(damaged / "checkpoint_7", load_model(tiny_run / "checkpoints").parameters)
    (damaged / "checkpoint_7/checkpoint").write_bytes(b"\x93nothing")
    outside = tmp_path / "outside/checkpoint_1"
    outside.mkdir(parents=True)
    parameters = flax.traverse_util.flatten_dict(load_model(tiny_run / "checkpoints").parameters, sep="/")
    target = {k: {"metadata": {"shape": list(v.shape)}, "kvstore": {"path": "../../x"}} for k, v in parameters.items()}
    content = {"version": 3, "optimizer": {"target": flax.traverse_util.unflatten_dict(target, sep="/")}}
    (outside / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    for place, message in [
        (None, "take_checkpoint.checkpoint is not set"),
        ("nowhere://bucket/model", "install the package of that storage"),
        (str(tmp_path / "nowhere"), "has no checkpoint: give a directory with checkpoint_1000"),
        (str(other), "was trained with another vocabulary than .*: set make_vocabulary.model"),
        (str(damaged), "checkpoint_7 is damaged or is not a T5X checkpoint"),
        (str(outside), "an array is outside the checkpoint, at ../../x"),
    ]:
        with pytest.raises(UserError, match=message):
            take_checkpoint(workdir, model=config, checkpoint=place)
