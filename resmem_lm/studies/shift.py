"""Compare a memory of a second text (the paper's section 6) with fine-tuning on that text for the same time."""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Int

from resmem_lm.errors import UserError, check_least
from resmem_lm.evaluation.statistics import bootstrap_interval
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder
from resmem_lm.model.checkpoints import Model, checkpoint_manager, load_model, save_checkpoint, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train import train
from resmem_lm.model.train_loop import compiled_update, optimizer, shardings, to_train_state
from resmem_lm.report.tables import interval
from resmem_lm.studies.derived import build_and_evaluate, checkpoint_steps, derive
from resmem_lm.studies.study import check_values, study, write_study
from resmem_lm.text.documents import prepare_documents
from resmem_lm.text.packing import batches, pack, split_tokens
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, new_directory, read_json, write_json

with epy.lazy_imports():
    import optax

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
DEFAULTS = {"batch_size": 16, "sequence_length": 128, "seed": 0}  # for fine-tuning a model that the run did not train

Right = tuple[Bool[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]


class Setup(NamedTuple):
    """The model to fine-tune, the derived work directory with the second text, and the settings of training."""

    base: Model
    memory: Run
    settings: Record

    @property
    def shape(self) -> Record:
        """Return batch size and sequence length."""
        return {name: self.settings[name] for name in ("batch_size", "sequence_length")}

    @property
    def window(self) -> WindowSpec:
        """Return the windows of the memory."""
        return open_datastore(self.memory.datastore).binding.window


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
    """Measure test accuracy on a second text for the run's model: alone, with a memory of that text, and fine-tuned on it.

    Fine-tuning takes as many steps as fit into the time of building and indexing the memory. A resumed study takes the same number. The
    time of the memory includes compilation; the time of fine-tuning does not. Neither includes the choice of hyperparameters or learning
    rate on validation. If the build was interrupted, only the time of its last run counts: set `steps`, or delete WORKDIR/derived/shift
    first. That folder has a memory for each second text.

    Args:
        text: the second text, as prepare_documents.text. It should differ from the run's text, which the model has learned. Documents
            held out for test, and their near-duplicates, are not in the memory.
        shards: number of shards of the train split.
        validation_fraction: share of the documents on which hyperparameters and the learning rate are chosen.
        test_fraction: share of the documents on which results are reported.
        steps: number of fine-tuning steps; None takes as many as the time of the memory allows.
        learning_rates: constant learning rates to choose from.

    Raises:
        UserError: the run's own text, a text that is too small, or a setting out of its range.
    """
    if run.finished("documents")["settings"].get("text") == (text if isinstance(text, str) else list(text)):
        raise UserError(f"study_shift.text = {text!r} is the text that {run} was trained on: name another")
    if steps is not None:
        check_least("study_shift", 1, steps=steps)
    check_values("study_shift.learning_rates", learning_rates, lambda rate: rate > 0, "above 0")
    documents: Record = {"text": text, "shards": shards, "validation_fraction": validation_fraction, "test_fraction": test_fraction}
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:8]
    memory = derive(run, f"shift/memory-{digest}", ("vocabulary", "train"))
    print("shift: a memory of the second text", file=sys.stderr, flush=True)
    prepare_documents(memory, **documents)
    methods = build_and_evaluate(run, memory, shards=None)["splits"]["test"]["methods"]
    seconds = sum(memory.finished(stage)["seconds"] for stage in ("build", "index"))
    setup = Setup(load_model(run.checkpoints), memory, DEFAULTS | run.finished("train")["settings"])
    best = _fine_tune(setup, steps or _steps_within(setup, seconds), learning_rates)
    explanation = (
        "Accuracy on held-out documents of a second text, and of the first text, which the model was trained on. The memory has the train "
        "documents of the second text and leaves the model unchanged. Fine-tuning changes the model, so it can lose accuracy on the first "
        "text. Seconds are those of building and indexing the memory, or of fine-tuning."
    )
    rows = [*_memory_rows(run, methods, seconds), _fine_tuned_row(run, setup, best)]
    return write_study(run, "shift", title="A memory of another text (section 6)", text=explanation, rows=rows)


def right_predictions(model: Model, run: Run, split: str, window: WindowSpec) -> Right:
    """Return whether DeepNet predicts each token of a split correctly, with the memory's windows, and each token's document."""

    def head(parameters: dict[str, Any], keys: Array, hidden: Array, targets: Array) -> Bool[Array, " tokens"]:
        return jnp.argmax(model.logits(parameters, hidden), axis=-1) == targets

    documents = list(split_tokens(run, split, load_vocabulary(run)))
    numbers = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    right = np.zeros(len(numbers), bool)
    for positions, found in Encoder(model, window, head)(documents):
        right[positions] = found
    return right, numbers


def seconds_per_step(model: ModelConfig, run: Run, batch_size: int, sequence_length: int) -> float:
    """Measure the seconds of a training step on the train split of a work directory, without compilation."""
    adafactor = optimizer(optax.constant_schedule(0.01))
    update, (sharding, _) = compiled_update(model, adafactor, 0), shardings()
    parameters = jax.jit(lambda: decoder.init_parameters(model, 0), out_shardings=sharding)()
    state = jax.jit(adafactor.init, out_shardings=sharding)(parameters)
    rows = batches(pack(list(split_tokens(run, "train", load_vocabulary(run))), sequence_length), batch_size=batch_size, seed=0)
    start = 0.0
    for step in range(TIMED_STEPS + 1):
        parameters, state, _ = update(parameters, state, rows[step], np.int32(step))
        if step == 0:  # includes compilation
            jax.block_until_ready(parameters)
            start = time.monotonic()
    jax.block_until_ready(parameters)
    return (time.monotonic() - start) / TIMED_STEPS


def begin_from(base: Model, target: Run) -> None:
    """Write a model as the checkpoint of step 0, with a new optimizer state, so that `train` continues from it."""
    if (target.checkpoints / "model.json").exists():  # written last in object storage
        return
    state = optimizer(optax.constant_schedule(0.01)).init(base.parameters)
    with new_directory(target.checkpoints) as directory:
        save_config(directory, base.config, load_vocabulary(target).sha256)
        with checkpoint_manager(directory) as manager:
            save_checkpoint(manager, 0, to_train_state(base.parameters, state, 0))


def _steps_within(setup: Setup, seconds: float) -> int:
    """Return the steps that fit into the given seconds. The first run measures them; later runs read the record."""
    record = setup.memory.derived / "fine-tuned" / "steps.json"
    if not record.exists():
        each = seconds_per_step(setup.base.config, setup.memory, **setup.shape)
        write_json(record, {"seconds": seconds, "seconds_per_step": each, "steps": max(1, round(seconds / each))})
    return int(read_json(record)["steps"])


def _fine_tune(setup: Setup, steps: int, learning_rates: Sequence[int | float]) -> Run:
    """Fine-tune with each learning rate; return the work directory of the best model on validation."""
    found: dict[float, tuple[float, Run]] = {}
    for rate in learning_rates:
        print(f"shift: fine-tuning, {steps} steps at {rate:g}", file=sys.stderr, flush=True)
        target = derive(setup.memory, f"fine-tuned/{steps}-steps-at-{rate:g}", ("documents", "vocabulary"))
        begin_from(setup.base, target)
        train(
            target,
            model=setup.base.config,
            steps=steps,
            learning_rate=rate,
            constant_steps=steps,
            checkpoint_steps=checkpoint_steps(steps),
            seed=setup.settings["seed"],
            **setup.shape,
        )
        right, _ = right_predictions(load_model(target.checkpoints), setup.memory, "validation", setup.window)
        found[rate] = (float(right.mean()), target)
    return max(found.values(), key=lambda pair: pair[0])[1]


def _memory_rows(run: Run, methods: Record, seconds: float) -> list[Record]:
    """Return the rows of DeepNet and of the methods with the memory."""
    rows: list[Record] = [
        {
            "method": title,
            "second text, %": 100 * methods[name]["accuracy"],
            "95%": interval(methods[name]["accuracy_ci95"]),
            "gain, %": 100 * methods[name]["gain"],
            "gain, 95%": interval(methods[name]["gain_ci95"]),
            "first text, %": None,
            "seconds": seconds,
        }
        for name, title in TITLES.items()
    ]
    on_first = read_json(run.results)["splits"]["test"]["methods"]["deepnet"]["accuracy"]
    rows[0] |= {"gain, %": None, "gain, 95%": None, "first text, %": 100 * on_first, "seconds": None}
    return rows


def _fine_tuned_row(run: Run, setup: Setup, best: Run) -> Record:
    """Return the row of the fine-tuned model."""
    model, trained = load_model(best.checkpoints), best.finished("train")
    before, numbers = right_predictions(setup.base, setup.memory, "test", setup.window)
    after, _ = right_predictions(model, setup.memory, "test", setup.window)
    on_first, _ = right_predictions(model, run, "test", setup.window)
    settings = trained["settings"]
    return {
        "method": f"DeepNet, fine-tuned on the second text ({settings['steps']} steps at {settings['learning_rate']:g})",
        "second text, %": 100 * after.mean(),
        "95%": interval(bootstrap_interval(after.astype(np.float64), numbers)),
        "gain, %": 100 * (after.mean() - before.mean()),
        "gain, 95%": interval(bootstrap_interval(after.astype(np.float64) - before, numbers)),
        "first text, %": 100 * on_first.mean(),
        "seconds": trained["seconds"],
    }
