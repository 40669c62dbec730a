"""What some settings of `train` are worth: validation loss, accuracy and tokens/s after training with them.

    python -m benchmarks.train_settings WORKDIR --gin_file=configs/demo.gin [--gin.train.learning_rate=0.03 ...]

WORKDIR is one whose documents and vocabulary are made (`resmem train`); nothing is written to it.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
import optax

from resmem_lm import config, training
from resmem_lm.machine import processor
from resmem_lm.main import import_stages
from resmem_lm.model import init_parameters
from resmem_lm.packing import batches, pack, split_tokens
from resmem_lm.train import train
from resmem_lm.vocabulary import load_vocabulary

VALIDATION_ROWS = 16


def main() -> None:
    """Trains once and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--gin_file", action="append", required=True)
    arguments, rest = parser.parse_known_args()
    bindings = [argument.removeprefix("--gin.") for argument in rest]
    import_stages()
    config.parse(arguments.gin_file, bindings)
    settings = config.parameters(train)
    model, steps = settings["model"], settings["steps"]

    vocabulary = load_vocabulary(arguments.workdir)
    packed = {
        split: pack(list(split_tokens(arguments.workdir, split, vocabulary)), settings["sequence_length"])
        for split in ("train", "validation")
    }
    rows = batches(packed["train"], batch_size=settings["batch_size"], seed=settings["seed"])
    names = ("learning_rate", "constant_steps", "steps", "cooldown_steps")
    adafactor = training.optimizer(training.learning_rate_schedule(**{name: settings[name] for name in names}))
    parameters = init_parameters(model, settings["seed"])
    state = adafactor.init(parameters)
    dropout_key = jax.random.key(1) if model.dropout_rate > 0 else None

    @jax.jit
    def update(parameters, state, batch, step):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, step)
        gradients, _ = jax.grad(lambda p: training.loss_and_metrics(model, p, batch, key), has_aux=True)(parameters)
        updates, state = adafactor.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    parameters, state = update(parameters, state, rows[0], np.int32(0))
    jax.block_until_ready(parameters)
    start = time.monotonic()
    for step in range(1, steps):
        parameters, state = update(parameters, state, rows[step], np.int32(step))
        if step % 20 == 0:
            jax.block_until_ready(parameters)
    jax.block_until_ready(parameters)
    rate = (steps - 1) * settings["batch_size"] * settings["sequence_length"] / (time.monotonic() - start)

    measure = jax.jit(lambda batch: training.loss_and_metrics(model, parameters, batch, None)[1])
    validation = batches(packed["validation"], batch_size=VALIDATION_ROWS, seed=0)
    sums = [jax.device_get(measure(validation[i])) for i in range(packed["validation"].shape[1] // VALIDATION_ROWS)]
    tokens, loss, correct = (sum(float(s[name]) for s in sums) for name in ("tokens", "cross_entropy", "correct"))
    print(
        f"{' '.join(bindings) or 'as configured'}: validation loss {loss / tokens:.3f}, accuracy {correct / tokens:.2%} "
        f"of {tokens:,.0f} tokens; {rate:,.0f} tokens/s on {processor()}"
    )


if __name__ == "__main__":
    main()
