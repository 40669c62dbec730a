"""Pretraining of DeepNet on packed documents, from fresh parameters or from where it stopped."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from resmem_lm.errors import UserError, check_least
from resmem_lm.model import train_loop
from resmem_lm.model.checkpoints import checkpoint_manager, load_model, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.text.packing import batches, first_tokens, one_pass, pack, split_tokens
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import Record, download, remove, upload


def check_vocabulary(vocabulary: Vocabulary, model: ModelConfig) -> None:
    """Raises UserError if the vocabulary has more pieces than the model."""
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"the vocabulary has {vocabulary.size} pieces and the model only {model.vocab_size}: "
            f"set ModelConfig.vocab_size = {-(-vocabulary.size // 128) * 128} or train a smaller vocabulary"
        )


COPIED_LAST = "_CHECKPOINT_METADATA"  # of Orbax, in every checkpoint


@stage(name="train", after=("documents", "vocabulary"), free=("checkpoint_steps", "validation_tokens"))
def train(
    run: Run,
    *,
    model: ModelConfig,
    steps: int,
    batch_size: int,
    sequence_length: int,
    learning_rate: float = 0.01,
    constant_steps: int = 10_000,
    cooldown_steps: int = 0,
    checkpoint_steps: int = 1000,
    validation_tokens: int = 30_000,
    seed: int = 0,
) -> Record:
    """Trains `model` on the train split, data parallel over the local devices; writes WORKDIR/checkpoints and metrics.

    Killed and run again, it ends with the same parameters as if never killed: batch and dropout depend on the step
    alone.

    Args:
        model: the shape of the model.
        steps: optimizer steps.
        batch_size: rows a step, over all devices.
        sequence_length: tokens a row.
        learning_rate: of Adafactor, relative to each parameter's root mean square.
        constant_steps: steps at `learning_rate` before the inverse square root decay.
        cooldown_steps: the last steps, in which the rate falls linearly to 0.
        checkpoint_steps: steps between checkpoints, at each of which loss and accuracy on validation tokens are told.
        validation_tokens: how many, from the first documents of the validation split; 0 for none.
        seed: of initialization, order and dropout.

    Returns:
        The fingerprint of the trained model.

    Raises:
        UserError: a vocabulary larger than the model's, a number out of its range, or a batch that the devices cannot share evenly.
    """
    vocabulary = load_vocabulary(run)
    check_vocabulary(vocabulary, model)
    check_least("train", 1, steps=steps, batch_size=batch_size, sequence_length=sequence_length)
    check_least("train", 1, constant_steps=constant_steps, checkpoint_steps=checkpoint_steps)
    check_least("train", 0, cooldown_steps=cooldown_steps, validation_tokens=validation_tokens, seed=seed)
    devices = len(jax.local_devices())
    if batch_size % devices:
        raise UserError(f"train.batch_size = {batch_size} cannot be shared by {devices} devices: take a multiple of {devices}")

    schedule = train_loop.learning_rate_schedule(
        learning_rate=learning_rate, constant_steps=constant_steps, steps=steps, cooldown_steps=cooldown_steps
    )
    adafactor = train_loop.optimizer(schedule)
    update, sums = train_loop.compiled_update(model, adafactor, seed), train_loop.compiled_sums(model)
    rows = batches(pack(list(split_tokens(run, "train", vocabulary)), sequence_length), batch_size=batch_size, seed=seed)
    held_out = first_tokens(split_tokens(run, "validation", vocabulary), validation_tokens)
    validation = one_pass(pack(held_out, sequence_length), batch_size=batch_size) if held_out else []

    def validate(parameters: Any) -> dict[str, float]:
        return train_loop.means([sums(parameters, batch) for batch in validation]) if validation else {}

    with _local(run) as (here, saved):
        directory = here / "checkpoints"
        save_config(directory, model, vocabulary.sha256)
        with checkpoint_manager(directory) as manager:
            begin, parameters, state = train_loop.restore_or_init(manager, model, adafactor, seed)
            train_loop.loop(here, manager, saved, update, parameters, state, rows, validate, schedule, begin, steps, checkpoint_steps)
        return {"fingerprint": load_model(directory).fingerprint}


@contextlib.contextmanager
def _local(run: Run) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The work directory on this machine, and what to call when a checkpoint has been saved in it.

    Orbax needs a folder here: in object storage, checkpoints are copied from there at the beginning and to there when saved.
    """
    if isinstance(run.path, Path):
        yield run.path, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="resmem-") as scratch:
        here = Path(scratch)
        for checkpoint in run.path.glob(f"checkpoints/checkpoint_*/{COPIED_LAST}"):  # without it, of a copy that was cut short
            download(checkpoint.parent, here / "checkpoints" / checkpoint.parent.name)

        def saved() -> None:
            for name in ("checkpoints", "metrics"):
                upload(here / name, run.path / name, last=COPIED_LAST)
            for old in run.checkpoints.glob("checkpoint_*"):
                if not (here / "checkpoints" / old.name).exists():
                    remove(old)

        yield here, saved
        saved()
