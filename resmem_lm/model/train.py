"""Pretrain DeepNet on packed documents, from initial parameters or from the newest checkpoint."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from resmem_lm.errors import UserError, check_least
from resmem_lm.model import train_loop
from resmem_lm.model.checkpoints import checkpoint_manager, load_model, save_checkpoint, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.text.packing import batches, first_tokens, one_pass, pack, split_tokens
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import Record, download, remove, upload

_COPIED_LAST = "_CHECKPOINT_METADATA"  # a file that Orbax writes to every checkpoint


def check_vocabulary(vocabulary: Vocabulary, model: ModelConfig) -> None:
    """Raise UserError if the vocabulary has more pieces than the model has logits."""
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"the vocabulary has {vocabulary.size} pieces and the model only {model.vocab_size}: "
            f"set ModelConfig.vocab_size = {-(-vocabulary.size // 128) * 128} or train a smaller vocabulary"
        )


def _check_memory_loss(weight: float, memory_steps: int, steps: int) -> None:
    check_least("train", 0, memory_loss_weight=weight, memory_steps=memory_steps)
    if not math.isfinite(weight):
        raise UserError(f"train.memory_loss_weight = {weight}: take a finite number")
    if weight > 0 and not 1 <= memory_steps <= steps:
        raise UserError(f"train.memory_steps = {memory_steps}: with a train.memory_loss_weight, take 1 to train.steps = {steps}")


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
    memory_loss_weight: float = 0.0,
    memory_steps: int = 0,
    seed: int = 0,
) -> Record:
    """Train DeepNet on the train split, data parallel over the local devices, and write WORKDIR/checkpoints and WORKDIR/metrics.

    A resumed run ends with the same parameters as an uninterrupted run, because everything random depends only on the step.

    Args:
        model: shape of the model.
        steps: number of optimizer steps.
        batch_size: rows per step, summed over all devices.
        sequence_length: tokens per row.
        learning_rate: learning rate of Adafactor, relative to each parameter's root mean square.
        constant_steps: steps at `learning_rate` before the inverse square root decay.
        cooldown_steps: number of final steps in which the learning rate falls linearly to 0; 0 for none.
        checkpoint_steps: steps between checkpoints. Each checkpoint reports loss and accuracy on the validation tokens.
        validation_tokens: number of validation tokens, from the first documents of the validation split; 0 for none.
        memory_loss_weight: weight of the memory loss: the cross-entropy of the logits plus lambda times the mean residual of the nearest
            tokens of the batch (paper, section 6; Zhong et al. 2022). lambda is learned and is not part of the trained model. 0 for none.
        memory_steps: number of final steps with the memory loss.
        seed: seed of the initialization, the order of the rows, dropout and the memory loss.

    Returns:
        The fingerprint of the trained model.

    Raises:
        UserError: the vocabulary is larger than the model's, a number is out of range, or the devices cannot share a batch evenly.
    """
    vocabulary = load_vocabulary(run)
    check_vocabulary(vocabulary, model)
    check_least("train", 1, steps=steps, batch_size=batch_size, sequence_length=sequence_length)
    check_least("train", 1, constant_steps=constant_steps, checkpoint_steps=checkpoint_steps)
    check_least("train", 0, cooldown_steps=cooldown_steps, validation_tokens=validation_tokens, seed=seed)
    if batch_size % (devices := len(jax.local_devices())):
        raise UserError(f"train.batch_size = {batch_size} cannot be shared by {devices} devices: take a multiple of {devices}")
    _check_memory_loss(memory_loss_weight, memory_steps, steps)
    schedule = train_loop.learning_rate_schedule(
        learning_rate=learning_rate, constant_steps=constant_steps, steps=steps, cooldown_steps=cooldown_steps
    )
    adafactor = train_loop.optimizer(schedule)
    packed = pack(list(split_tokens(run, "train", vocabulary)), sequence_length)
    held_out = first_tokens(split_tokens(run, "validation", vocabulary), validation_tokens)
    validation = one_pass(pack(held_out, sequence_length), batch_size=batch_size) if held_out else []
    sums = train_loop.compiled_sums(model)
    with _local(run) as (here, saved):
        directory = here / "checkpoints"
        save_config(directory, model, vocabulary.sha256)
        with checkpoint_manager(directory) as manager:

            def save(state: train_loop.State) -> None:
                save_checkpoint(manager, state.step, train_loop.to_train_state(state.parameters, state.optimizer, state.step))
                saved()

            train_loop.loop(
                train_loop.restore_or_init(manager, model, adafactor, seed, joint=memory_loss_weight > 0),
                update=train_loop.joint_update(model, adafactor, seed, memory_loss_weight, steps - memory_steps),
                rows=batches(packed, batch_size=batch_size, seed=seed),
                steps=steps,
                schedule=schedule,
                checkpoint_steps=checkpoint_steps,
                validate=lambda parameters: train_loop.means([sums(parameters, batch) for batch in validation]) if validation else {},
                save=save,
                folder=here / "metrics",
            )
        return {"fingerprint": load_model(directory).fingerprint}


@contextlib.contextmanager
def _local(run: Run) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a local folder for Orbax, and a function to call after each saved checkpoint.

    For a run in object storage, download its checkpoints at the beginning, and upload each saved checkpoint.
    """
    if isinstance(run.path, Path):
        yield run.path, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="resmem-") as scratch:
        here = Path(scratch)
        for checkpoint in run.path.glob(f"checkpoints/checkpoint_*/{_COPIED_LAST}"):  # absent from an incomplete upload
            download(checkpoint.parent, here / "checkpoints" / checkpoint.parent.name)

        def saved() -> None:
            for name in ("checkpoints", "metrics"):
                upload(here / name, run.path / name, last=_COPIED_LAST)
            for old in run.checkpoints.glob("checkpoint_*"):
                if not (here / "checkpoints" / old.name).exists():
                    remove(old)

        yield here, saved
        saved()
