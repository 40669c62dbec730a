"""A model trained on one text with a memory of another (the paper's section 6), beside fine-tuning on that for as long."""

import hashlib
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Int

from resmem_lm.errors import UserError
from resmem_lm.evaluation.statistics import bootstrap_interval
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder
from resmem_lm.model.checkpoints import STATE, Model, checkpoint_manager, load_model, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train import train
from resmem_lm.model.train_loop import compiled_update, optimizer, shardings, to_train_state
from resmem_lm.report.tables import interval
from resmem_lm.studies.derived import build_and_evaluate, checkpoint_steps, derive, settings_of
from resmem_lm.studies.study import study, write_study
from resmem_lm.text.documents import prepare_documents
from resmem_lm.text.packing import batches, pack, split_tokens
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, new_directory, read_json, write_json

with epy.lazy_imports():
    import optax
    import orbax.checkpoint as ocp

    from resmem_lm.model import decoder

TITLES = {
    "deepnet": "DeepNet, trained on the first text",
    "knnlm": "kNN-LM",
    "resmem_paper": "ResMem (paper)",
    "resmem": "ResMem",
    "resmem_calibrated": "Calibrated ResMem",
    "resmem_adaptive": "Adaptive ResMem",
}
TIMED_STEPS = 20
TRAINED_ELSEWHERE = {"batch_size": 16, "sequence_length": 128, "seed": 0}  # for fine-tuning a model of which no more is known

Right = tuple[Bool[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]


def right_predictions(model: Model, run: Run, split: str, window: WindowSpec) -> Right:
    """Which tokens of a split DeepNet predicts, each once, in windows as the memory's; and the numbers of their documents."""

    def head(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> Bool[Array, " tokens"]:
        return jnp.argmax(model.logits(parameters, hidden), axis=-1) == targets

    documents = list(split_tokens(run, split, load_vocabulary(run)))
    numbers = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    right = np.zeros(len(numbers), bool)
    for positions, found in Encoder(model, window, head)(documents):
        right[positions] = found
    return right, numbers


def seconds_a_step(model: ModelConfig, run: Run, batch_size: int, sequence_length: int) -> float:
    """Of training on the train split of a work directory, without what it takes to begin."""
    adafactor = optimizer(optax.constant_schedule(0.01))
    update, (sharding, _) = compiled_update(model, adafactor, 0), shardings()
    parameters = jax.jit(lambda: decoder.init_parameters(model, 0), out_shardings=sharding)()
    state = jax.jit(adafactor.init, out_shardings=sharding)(parameters)
    rows = batches(pack(list(split_tokens(run, "train", load_vocabulary(run))), sequence_length), batch_size=batch_size, seed=0)
    start = 0.0
    for step in range(TIMED_STEPS + 1):
        parameters, state, _ = update(parameters, state, rows[step], np.int32(step))
        if step == 0:  # it compiled
            jax.block_until_ready(parameters)
            start = time.monotonic()
    jax.block_until_ready(parameters)
    return (time.monotonic() - start) / TIMED_STEPS


def begin_from(base: Model, target: Run) -> None:
    """Puts a model where `train` goes on from it as from its own step 0, with a fresh optimizer."""
    if (target.checkpoints / "model.json").exists():  # the last that is copied to object storage
        return
    state = optimizer(optax.constant_schedule(0.01)).init(base.parameters)
    with new_directory(target.checkpoints) as directory:
        save_config(directory, base.config, load_vocabulary(target).sha256)
        with checkpoint_manager(directory) as manager:
            manager.save(0, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(to_train_state(base.parameters, state, 0))}))


@study(name="shift")
def study_shift(
    run: Run,
    *,
    text: str | list[str] | tuple[str, ...] = "descriptions",
    shards: int = 4,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    steps: int | None = None,
    learning_rates: tuple[float, ...] | list[float] = (0.003, 0.01, 0.03),
) -> Record:
    """Test accuracy on a second text: of the run's model alone, with a memory of that text, and fine-tuned on it.

    Fine-tuning gets as many steps as fit into the seconds that the memory took to build and index; they are counted once and written
    down, so that a study that is resumed uses them again. Time to compile is the memory's but not the fine-tuning's, and neither is
    charged for choosing on validation (hyperparameters, learning rate). Of a build that was interrupted only the seconds of its last run
    are known: then give `steps`, or delete WORKDIR/derived/shift first. Another text has a memory of its own there.

    Args:
        text: the second text, as prepare_documents.text. It should be another than the run's, of which the model knows much already;
            what of it is held out for test is not in the memory, nor is anything nearly equal to it.
        shards: of its train split.
        validation_fraction: share of its documents on which hyperparameters and the learning rate are chosen.
        test_fraction: share of its documents on which results are told.
        steps: of fine-tuning; None takes as long as the memory.
        learning_rates: of fine-tuning, constant, one of which is chosen.

    Raises:
        UserError: the run's own text, one too small, or a setting out of its range.
    """
    if settings_of(run, "documents").get("text") == (text if isinstance(text, str) else list(text)):
        raise UserError(f"study_shift.text = {text!r} is the text that {run} was trained on: name another")
    if steps is not None and steps < 1:
        raise UserError(f"study_shift.steps = {steps}: take 1 or more, or None for as long as the memory took")
    if not learning_rates or min(learning_rates) <= 0:
        raise UserError(f"study_shift.learning_rates = {learning_rates}: take one or more, above 0")

    documents: Record = {"text": text, "shards": shards, "validation_fraction": validation_fraction, "test_fraction": test_fraction}
    of_text = hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:8]
    memory = derive(run, f"shift/memory-{of_text}", ("vocabulary", "train"))
    print("shift: a memory of the second text", file=sys.stderr, flush=True)
    prepare_documents(memory, **documents)
    methods = build_and_evaluate(run, memory, shards=None)["splits"]["test"]["methods"]
    memory_seconds = sum(memory.finished(stage)["seconds"] for stage in ("build", "index"))

    base = load_model(run.checkpoints)
    tuned, rate = _fine_tuned(base, memory, TRAINED_ELSEWHERE | settings_of(run, "train"), memory_seconds, steps, learning_rates)
    window = open_datastore(memory.datastore).binding.window
    fine_tuned = load_model(tuned.checkpoints)
    before, numbers = right_predictions(base, memory, "test", window)
    after, _ = right_predictions(fine_tuned, memory, "test", window)
    after_on_first, _ = right_predictions(fine_tuned, run, "test", window)
    base_on_first = read_json(run.results)["splits"]["test"]["methods"]["deepnet"]["accuracy"]

    rows: list[Record] = [
        {
            "method": title,
            "second text, %": 100 * methods[name]["accuracy"],
            "95%": interval(methods[name]["accuracy_ci95"]),
            "gain, %": 100 * methods[name]["gain"],
            "gain, 95%": interval(methods[name]["gain_ci95"]),
            "first text, %": None,
            "seconds": memory_seconds,
        }
        for name, title in TITLES.items()
    ]
    rows[0] |= {"gain, %": None, "gain, 95%": None, "first text, %": 100 * base_on_first, "seconds": None}
    trained = tuned.finished("train")
    rows.append(
        {
            "method": f"DeepNet, fine-tuned on the second text ({trained['settings']['steps']} steps at {rate:g})",
            "second text, %": 100 * after.mean(),
            "95%": interval(bootstrap_interval(after.astype(np.float64), numbers)),
            "gain, %": 100 * (after.mean() - before.mean()),
            "gain, 95%": interval(bootstrap_interval(after.astype(np.float64) - before, numbers)),
            "first text, %": 100 * after_on_first.mean(),
            "seconds": trained["seconds"],
        }
    )
    explanation = (
        "Accuracy on held-out documents of a second text, and of the first, on which the model was trained. The memory holds the train "
        "documents of the second text, and the model stays as it is; fine-tuning changes the model, and what it knew of the first text. "
        "Seconds: to build and index the memory, or to fine-tune."
    )
    return write_study(run, "shift", title="A memory of another text (section 6)", text=explanation, rows=rows, draw=None)


def _fine_tuned(
    base: Model,
    memory: Run,
    settings: Record,
    seconds: float,
    steps: int | None,
    learning_rates: tuple[float, ...] | list[float],
) -> tuple[Run, float]:
    """The work directory of the model that is best on validation among those fine-tuned with each rate, and its rate."""
    shape: Record = {name: settings[name] for name in ("batch_size", "sequence_length")}
    if steps is None:
        record = memory.derived / "fine-tuned" / "steps.json"
        if not record.exists():
            each = seconds_a_step(base.config, memory, **shape)
            write_json(record, {"seconds": seconds, "seconds_a_step": each, "steps": max(1, round(seconds / each))})
        steps = int(read_json(record)["steps"])
    window = open_datastore(memory.datastore).binding.window
    found: dict[float, tuple[float, Run]] = {}
    for rate in learning_rates:
        print(f"shift: fine-tuning, {steps} steps at {rate:g}", file=sys.stderr, flush=True)
        target = derive(memory, f"fine-tuned/{steps}-steps-at-{rate:g}", ("documents", "vocabulary"))
        begin_from(base, target)
        train(
            target,
            model=base.config,
            steps=steps,
            learning_rate=rate,
            constant_steps=steps,
            checkpoint_steps=checkpoint_steps(steps),
            seed=settings["seed"],
            **shape,
        )
        right, _ = right_predictions(load_model(target.checkpoints), memory, "validation", window)
        found[rate] = (float(right.mean()), target)
    best = max(found, key=lambda rate: found[rate][0])
    return found[best][1], best
