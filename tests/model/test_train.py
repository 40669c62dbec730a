import contextlib
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resmem_lm.errors import UserError
from resmem_lm.model import train_loop
from resmem_lm.model.checkpoints import load_model, read_parameters
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.decoder import init_parameters
from resmem_lm.model.train import train
from resmem_lm.model.train_loop import learning_rate_schedule, loss_and_metrics, optimizer
from resmem_lm.text.packing import batches, one_pass, pack, split_tokens
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.progress import Reporter
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json

MODEL = ModelConfig(vocab_size=256, emb_dim=16, num_heads=2, num_layers=1, head_dim=8, mlp_dim=32, dropout_rate=0.1)
SETTINGS = {"model": MODEL, "steps": 7, "batch_size": 4, "sequence_length": 32, "checkpoint_steps": 3, "learning_rate": 0.03}


loss = functools.partial(jax.jit(loss_and_metrics, static_argnums=0), MODEL)


def copy_text(tiny_run, workdir):
    """Copy documents and vocabulary to an untrained run."""
    for name in ("documents", "vocabulary"):
        shutil.copytree(tiny_run / name, workdir / name)
        (workdir / "stages").mkdir(exist_ok=True)
        shutil.copy(tiny_run / "stages" / f"{name}.json", workdir / "stages")
    return workdir


@pytest.fixture
def workdir(tiny_run, tmp_path):
    return copy_text(tiny_run, tmp_path)


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """Return a trained run. Tests must not change it."""
    workdir = copy_text(tiny_run, tmp_path_factory.mktemp("trained"))
    train(workdir, **SETTINGS)
    return workdir


JOINT = SETTINGS | {"memory_loss_weight": 0.5, "memory_steps": 5}


@pytest.mark.parametrize("settings", [SETTINGS, JOINT], ids=["plain", "joint"])
def test_an_interrupted_and_resumed_run_ends_with_the_same_parameters(workdir, tiny_run, trained, tmp_path_factory, monkeypatch, settings):
    """The checkpoint at step 3 is in the middle of the steps with the memory loss, if there are any."""
    whole = train(trained if settings is SETTINGS else copy_text(tiny_run, tmp_path_factory.mktemp("joint")), **settings)

    class KilledError(Exception):
        pass

    def killed(self, done, detail=""):
        if done >= 5:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "update", killed)
        with pytest.raises(KilledError):
            train(workdir, **settings)
    assert not read_json(workdir / "stages/train.json")["finished"]
    assert (workdir / "checkpoints/checkpoint_3").exists()
    assert train(workdir, **settings) == whole
    assert load_model(workdir / "checkpoints").fingerprint == whole["fingerprint"]


def test_the_memory_loss_changes_only_the_last_steps(workdir, trained):
    assert train(workdir, **SETTINGS, memory_loss_weight=0.5, memory_steps=1) != train(trained, **SETTINGS)
    first, plain = (read_parameters(run / "checkpoints/checkpoint_6", MODEL) for run in (workdir, trained))
    jax.tree.map(np.testing.assert_array_equal, first, plain)


def test_a_memory_loss_of_weight_0_gives_the_plain_model(workdir, trained):
    assert train(workdir, **SETTINGS, memory_loss_weight=0.0, memory_steps=5) == train(trained, **SETTINGS)


def written(workdir, tag):
    """Return the values of a scalar in TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    events = next((workdir / "metrics").glob("events*")).read_bytes()
    values, place = [], 0
    while place < len(events):
        size = int.from_bytes(events[place : place + 8], "little")
        event = Event.FromString(events[place + 12 : place + 12 + size])
        values += [v.simple_value for v in event.summary.value if v.tag == tag]
        place += 12 + size + 4
    return values


def test_the_loss_falls_and_is_written_for_tensorboard(tiny_run):
    losses = written(tiny_run, "train/loss")
    assert len(losses) >= 10
    assert losses[-1] < losses[0] - 1
    held_out = written(tiny_run, "validation/loss")
    assert len(held_out) > 1
    assert held_out[-1] < losses[0] - 1


def test_the_validation_loss_is_the_saved_models_mean_over_every_token_once(trained):
    vocabulary, model = load_vocabulary(Run(trained)), load_model(trained / "checkpoints")
    rows = pack(list(split_tokens(Run(trained), "validation", vocabulary)), SETTINGS["sequence_length"])
    alone = [jax.tree.map(jnp.asarray, batch) for batch in one_pass(rows, batch_size=1)]
    sums = [loss(model.parameters, batch, None)[1] for batch in alone]
    mean = sum(float(some["cross_entropy"]) for some in sums) / sum(float(some["tokens"]) for some in sums)
    np.testing.assert_allclose(written(trained, "validation/loss")[-1], mean, rtol=1e-5)
    assert written(trained, "validation/tokens")[-1] == sum(map(len, split_tokens(Run(trained), "validation", vocabulary)))


def test_training_without_validation_tokens_gives_the_same_model(workdir, trained):
    assert train(trained, **SETTINGS) == train(workdir, **SETTINGS, validation_tokens=0)
    assert not written(workdir, "validation/loss")


def test_padding_and_other_rows_do_not_change_a_tokens_loss():
    parameters = init_parameters(MODEL, 0)
    documents = [np.arange(1, 40, dtype=np.int32), np.arange(50, 63, dtype=np.int32)]
    whole = pack(documents, 52)
    padded = np.pad(whole, ((0, 0), (0, 2), (0, 12)))

    def sums(packed):
        tokens, segments = packed
        inputs = np.where(np.roll(segments, 1, 1) == segments, np.roll(tokens, 1, 1), 0)
        inputs[:, 0] = 0
        batch = {"decoder_input_tokens": inputs, "decoder_target_tokens": tokens, "decoder_segment_ids": segments}
        batch = jax.tree.map(jnp.asarray, batch)
        return loss(parameters, batch, None)

    (total, metrics), (padded_loss, padded_metrics) = sums(whole), sums(padded)
    np.testing.assert_allclose(total, padded_loss, rtol=1e-5)
    assert metrics["tokens"] == padded_metrics["tokens"] == 52
    np.testing.assert_allclose(metrics["cross_entropy"], padded_metrics["cross_entropy"], rtol=1e-5)


def test_the_gradient_is_the_same_on_two_devices_as_on_one():
    assert len(jax.local_devices()) == 2
    parameters = init_parameters(MODEL, 0)
    rows = pack([np.random.default_rng(0).integers(1, 250, 400).astype(np.int32)], 32)
    batch = batches(rows, batch_size=4, seed=0)[0]
    gradient = jax.grad(lambda p, b: loss_and_metrics(MODEL, p, b, None)[0])
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
    sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    for one, two in zip(
        jax.tree.leaves(jax.jit(gradient)(parameters, batch)), jax.tree.leaves(jax.jit(gradient)(parameters, sharded)), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_the_schedule_is_constant_then_inverse_square_root_then_falls_to_zero():
    paper = learning_rate_schedule(learning_rate=0.01, constant_steps=10_000, steps=1_000_000)
    assert float(paper(0)) == float(paper(10_000)) == pytest.approx(0.01)
    assert float(paper(40_000)) == pytest.approx(0.005)
    short = learning_rate_schedule(learning_rate=0.04, constant_steps=10_000, steps=100, cooldown_steps=50)
    assert [float(short(s)) for s in (0, 50, 75, 100)] == pytest.approx([0.04, 0.04, 0.02, 0.0])


def test_adafactor_is_scaled_by_the_parameter():
    state = (adafactor := optimizer(optax.constant_schedule(0.01))).init({"w": np.full(4, 2.0, np.float32)})
    updates, _ = adafactor.update({"w": np.ones(4, np.float32)}, state, {"w": np.full(4, 2.0, np.float32)})
    np.testing.assert_allclose(updates["w"], -0.02, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": ModelConfig(vocab_size=100, emb_dim=16, num_heads=2, num_layers=1, head_dim=8, mlp_dim=32)},
            "set ModelConfig.vocab_size = 256",
        ),
        ({"batch_size": 3}, "cannot be shared by 2 devices"),
        ({"batch_size": 0}, "train.batch_size = 0: take 1 or more"),
        ({"sequence_length": 0}, "train.sequence_length = 0: take 1 or more"),
        ({"checkpoint_steps": 0}, "train.checkpoint_steps = 0: take 1 or more"),
        ({"constant_steps": 0}, "train.constant_steps = 0: take 1 or more"),
        ({"cooldown_steps": -1}, "train.cooldown_steps = -1: take 0 or more"),
        ({"validation_tokens": -1}, "train.validation_tokens = -1: take 0 or more"),
        ({"seed": -1}, "train.seed = -1: take 0 or more"),
        ({"memory_loss_weight": -0.1}, "train.memory_loss_weight = -0.1: take 0 or more"),
        ({"memory_loss_weight": float("nan")}, "train.memory_loss_weight = nan: take 0 or more"),
        ({"memory_loss_weight": float("inf")}, "train.memory_loss_weight = inf: take a finite number"),
        ({"memory_steps": -1}, "train.memory_steps = -1: take 0 or more"),
        ({"memory_loss_weight": 1.0}, r"train.memory_steps = 0: with a train.memory_loss_weight, take 1 to train.steps = 7"),
        ({"memory_loss_weight": 1.0, "memory_steps": 8}, "train.memory_steps = 8"),
    ],
)
def test_settings_out_of_their_range_are_refused(workdir, change, message):
    with pytest.raises(UserError, match=message):
        train(workdir, **(SETTINGS | change))


def test_losses_are_the_same_on_one_two_and_four_devices(workdir, tmp_path_factory, monkeypatch):
    """Start a process for each number of devices, because JAX reads the number of virtual devices at startup."""
    code = (
        "import contextlib, sys; from resmem_lm.model import train_loop; from resmem_lm.model.train import train\n"
        "from resmem_lm.model.config import ModelConfig\n"
        "def write(step, scalars): print(*(repr(v) for k, v in scalars.items() if k.endswith('/loss')))\n"
        "train_loop.metrics = lambda *a, **k: contextlib.nullcontext(write)\n"
        f"train(sys.argv[1], **{JOINT!r})"
    )
    processes = {}
    for devices in (1, 4):
        run = shutil.copytree(workdir, tmp_path_factory.mktemp("devices") / str(devices))
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        processes[devices] = subprocess.Popen([sys.executable, "-c", code, str(run)], env=environment, stdout=subprocess.PIPE, text=True)
    losses = {2: []}

    def write(step, scalars):
        losses[2] += [value for name, value in scalars.items() if name.endswith("/loss")]

    monkeypatch.setattr(train_loop, "metrics", lambda *_, **__: contextlib.nullcontext(write))
    train(workdir, **JOINT)
    for devices, process in processes.items():
        losses[devices] = [float(line) for line in process.communicate()[0].split()]
        assert process.returncode == 0
    assert len(losses[1]) == SETTINGS["steps"] + 3  # with three validation losses, one per checkpoint
    for devices in (2, 4):
        np.testing.assert_allclose(losses[devices], losses[1], rtol=1e-5)
