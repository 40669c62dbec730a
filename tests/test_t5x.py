"""Test with T5X, or skip these tests if it is not installed. T5X is not on PyPI; docs/c4.md describes its installation."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beam_pipelines.sample_documents import sample_documents
from resmem_lm.cli import main
from resmem_lm.model.checkpoints import load_model, read_parameters
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.decoder import Decoder, init_parameters
from resmem_lm.model.train_loop import learning_rate_schedule, loss_and_metrics, optimizer
from resmem_lm.text.packing import batches, pack
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.vocabulary import Vocabulary
from resmem_lm.workdir.run import Run
from tests.c4 import build_tfds, write_json_lines

MISSING = [name for name in ("t5x", "seqio", "tensorflow_datasets") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: see docs/c4.md"),
    pytest.mark.filterwarnings("ignore"),  # of TensorFlow and T5X
]
REPOSITORY = Path(__file__).parent.parent
STEPS = 20
MODEL = ModelConfig(vocab_size=256, emb_dim=128, num_heads=2, num_layers=2, head_dim=64, mlp_dim=256, dropout_rate=0.0)
T5X_GIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
include 'gin/t5x/pretrain_c4.gin'
include 'tiny_model.gin'
VOCABULARY_FILE = '{vocabulary}'
TRAIN_STEPS = 20
BATCH_SIZE = 8
TASK_FEATURE_LENGTHS = {{'targets': 64}}
DTYPE = 'float32'
train_script.train.stats_period = 5
train_script.train.eval_steps = 2
"""
TINY = {"vocab_size": 256, "emb_dim": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "mlp_dim": 64, "dropout_rate": 0.1}
MODEL_GIN = "\n".join(f"ModelConfig.{name} = {value}" for name, value in TINY.items())
RESMEM_GIN = """
include "configs/c4_t5_small.gin"
include "tiny_model.gin"
sample_documents.fraction = 1.0
sample_documents.validation_fraction = 0.4
sample_documents.shards = 3
sample_documents.query_shards = 2
build_datastore.window_length = 32
build_datastore.window_context = 8
build_datastore.entries = 16
search.neighbors = 12
evaluate.ks = (1, 12)
evaluate.sigmas = (1.0,)
evaluate.temperatures = (1.0,)
evaluate.lambdas = (0.5, 1.0)
"""


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """Return a folder with a small C4 as JSON lines and as a TFDS dataset, and the configurations."""
    folder = tmp_path_factory.mktemp("t5x")
    write_json_lines(folder / "json")
    build_tfds(folder / "json", folder / "tfds")
    shutil.copy(tiny_run / "vocabulary/vocabulary.model", folder / "spm.model")
    (folder / "tiny_model.gin").write_text(MODEL_GIN)
    (folder / "t5x.gin").write_text(T5X_GIN.format(vocabulary=folder / "spm.model"))
    (folder / "resmem.gin").write_text(RESMEM_GIN)
    return folder


def t5x_train(folder, model_dir, *arguments, cwd=REPOSITORY):
    """Run T5X's command line and return its log."""
    command = [sys.executable, "-m", "t5x.train", "--gin_file=t5x.gin", f"--gin_search_paths={folder},{REPOSITORY}"]
    command += [f"--gin.MODEL_DIR='{model_dir}'", f"--tfds_data_dir={folder / 'tfds'}", *arguments]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def model_dir(folder):
    """Return a MODEL_DIR after 20 steps. T5X got it as a relative path, which Orbax alone refuses."""
    log = t5x_train(folder, "model", cwd=folder)
    losses = [float(x) for x in re.findall(r"collection=train .*?\bloss_per_nonpadding_target_token=([\d.]+)", log)]
    assert len(losses) >= 3
    assert losses[-1] < losses[0] - 0.1
    return folder / "model"


def evaluated(folder, workdir, checkpoint):
    settings = {
        "TRAIN_TEXT": folder / "json/c4-train.*.json.gz",
        "HELD_OUT_TEXT": folder / "json/c4-validation.*.json.gz",
        "VOCABULARY_FILE": folder / "spm.model",
        "CHECKPOINT": checkpoint,
    }
    cwd = Path.cwd()
    os.chdir(folder)  # the configuration includes a file of this folder
    try:
        for command in ("build", "index", "evaluate"):
            assert main([command, "--gin_file=resmem.gin", f"--workdir={workdir}", *(f"--gin.{k}='{v}'" for k, v in settings.items())]) == 0
    finally:
        os.chdir(cwd)
    return json.loads((workdir / "results.json").read_text())


def test_build_index_and_evaluate_accept_a_checkpoint_of_t5x(folder, model_dir, tmp_path):
    results = evaluated(folder, tmp_path, model_dir)
    assert results["splits"]["test"]["methods"]["deepnet"]["accuracy"] > 0.1
    assert (tmp_path / f"checkpoints/checkpoint_{STEPS}").exists()


def test_t5x_resumes_from_a_checkpoint_of_the_built_in_trainer(folder, tiny_run, tmp_path):
    shutil.copytree(tiny_run / "checkpoints", tmp_path / "model")
    t5x_train(folder, tmp_path / "model", "--gin.TRAIN_STEPS=31")
    before, after = load_model(tmp_path / "model"), tmp_path / "model/checkpoint_31"
    assert after.exists()
    built_in = load_model(tiny_run / "checkpoints").parameters
    change = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), before.parameters, built_in)
    assert 0 < max(jax.tree.leaves(change)) < 0.2  # the change of one step


def test_checkpoints_in_t5xs_older_form_are_read_as_t5x_reads_them(folder, tmp_path):
    from t5x import checkpoints

    (folder / "older.gin").write_text(
        "from __gin__ import dynamic_registration\nimport __main__ as train_script\ntrain_script.train.use_orbax = False\n"
    )
    t5x_train(folder, tmp_path / "old", "--gin_file=older.gin", "--gin.TRAIN_STEPS=2")
    checkpoint = tmp_path / "old/checkpoint_2"
    assert (checkpoint / "checkpoint").is_file()
    config = ModelConfig(**TINY)
    theirs = checkpoints.load_t5x_checkpoint(str(checkpoint))["target"]
    jax.tree.map(np.testing.assert_array_equal, read_parameters(checkpoint, config), jax.tree.map(np.asarray, theirs))
    assert evaluated(folder, tmp_path / "run", checkpoint)["model"]["emb_dim"] == config.emb_dim


def test_the_seqio_task_and_the_beam_job_have_the_same_tokens(folder, tmp_path):
    import seqio

    from resmem_lm.model.t5x_task import language_model_task

    seqio.set_tfds_data_dir_override(str(folder / "tfds"))
    task = seqio.get_mixture_or_task(language_model_task("c4/en:3.1.0", seqio.SentencePieceVocabulary(str(folder / "spm.model"))))
    pieces = task.get_dataset({"targets": 16}, "validation", shuffle=False).as_numpy_iterator()
    by_task, document = [], []
    for piece in pieces:
        assert len(piece["targets"]) <= 16
        document += piece["targets"].tolist()
        if document[-1] == 1:
            by_task.append(tuple(document))
            document = []
    assert not document
    sources = {
        "tfds": ("tfds:c4/en:3.1.0/train", "tfds:c4/en:3.1.0/validation"),
        "json": (str(folder / "json/c4-train.*.gz"), str(folder / "json/c4-validation.*.gz")),
    }
    vocabulary = Vocabulary(folder / "spm.model")
    for name, (train, held_out) in sources.items():
        run = tmp_path / name
        sample_documents(run, train=train, held_out=held_out, fraction=1.0, validation_fraction=0.5, tfds_data_dir=str(folder / "tfds"))
        documents = [d for split in ("validation", "test") for path in shard_paths(Run(run), split) for d in read_shard(path)]
        assert sorted(tuple(tokens.tolist()) for tokens in vocabulary.encode_documents(documents)) == sorted(by_task)


def packed_batches():
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 250, rng.integers(5, 90)).astype(np.int32) for _ in range(60)]
    return batches(pack(documents, 64), batch_size=8, seed=0)


def test_ten_steps_of_t5x_and_of_the_built_in_trainer_agree():
    import optax
    from t5x import adafactor, models, train_state, trainer

    rows, schedule = packed_batches(), learning_rate_schedule(learning_rate=0.01, constant_steps=10_000, steps=100)
    definition = adafactor.Adafactor(decay_rate=0.8, step_offset=0, logical_factor_rules=adafactor.standard_logical_factor_rules())
    model = models.DecoderOnlyModel(module=Decoder(MODEL), vocabulary=None, optimizer_def=definition, z_loss=1e-4)
    tokens = jnp.zeros((8, 64), jnp.int32)
    variables = Decoder(MODEL).init(jax.random.key(0), tokens, tokens, enable_dropout=False)
    state = train_state.FlaxOptimTrainState.create(definition, variables)
    parameters = start = variables["params"]
    ours = (built_in := optimizer(schedule)).init(parameters)

    @jax.jit
    def built_in_step(parameters, ours, batch):
        (loss, _), gradients = jax.value_and_grad(lambda p: loss_and_metrics(MODEL, p, batch, None), has_aux=True)(parameters)
        updates, ours = built_in.update(gradients, ours, parameters)
        return optax.apply_updates(parameters, updates), ours, loss

    @jax.jit
    def t5x_step(state, batch):
        loss, _ = model.loss_fn(state.params, batch, None)
        state, _ = trainer.train_with_lr(state, batch, schedule(state.step), None, model, num_microbatches=None)
        return state, loss

    for number in range(10):
        batch = jax.tree.map(jnp.asarray, dict(rows[number]))
        extra = {"decoder_loss_weights": (batch["decoder_segment_ids"] > 0).astype(jnp.int32), "decoder_positions": tokens}
        state, theirs = t5x_step(state, batch | extra)
        parameters, ours, loss = built_in_step(parameters, ours, batch)
        np.testing.assert_allclose(loss, theirs, rtol=1e-5)

    def norm(a, b):
        return float(optax.global_norm(jax.tree.map(jnp.subtract, a, b)))

    moved, apart = norm(parameters, start), norm(parameters, jax.tree.map(jnp.asarray, dict(state.params)))
    print(f"moved {moved:.4g}, apart {apart:.4g}, ratio {apart / moved:.3g}")
    assert apart < 1e-5 * moved


@pytest.mark.parametrize("gated", [False, True])
def test_the_logits_equal_those_of_t5xs_network(gated):
    from t5x.examples.decoder_only import network

    activations = ("gelu", "linear") if gated else ("relu",)
    fields = {**MODEL.__dict__, "mlp_activations": activations, "logits_via_embedding": not gated}
    config = ModelConfig(**fields)
    theirs = network.DecoderWrapper(network.TransformerConfig(**(fields | {"dtype": jnp.float32})))
    parameters = init_parameters(config, 0)
    batch = jax.tree.map(jnp.asarray, dict(packed_batches()[0]))
    positional = (batch["decoder_input_tokens"], batch["decoder_target_tokens"])
    named = {"decoder_segment_ids": batch["decoder_segment_ids"], "enable_dropout": False}
    one = Decoder(config).apply({"params": parameters}, *positional, **named)
    two = theirs.apply({"params": parameters}, *positional, **named)
    real = np.asarray(batch["decoder_target_tokens"] > 0)
    assert np.abs(np.asarray(one - two))[real].max() < 1e-5 * np.abs(np.asarray(two))[real].max()
