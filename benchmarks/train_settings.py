"""Measure the effect of settings of `train`: validation loss, accuracy and tokens/s after training with them.

    python -m benchmarks.train_settings WORKDIR --gin_file=configs/demo.gin [--gin.train.learning_rate=0.03 ...]

WORKDIR has documents and a vocabulary (`resmem train`); nothing is written to it.
"""

import argparse
import time

import jax
import numpy as np

import resmem_lm.commands  # noqa: F401 - registers every stage with gin
from resmem_lm import config
from resmem_lm.model import train_loop as training
from resmem_lm.model.decoder import init_parameters
from resmem_lm.model.train import train
from resmem_lm.planning.machine import processor
from resmem_lm.text.packing import batches, one_pass, pack, split_tokens
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run


def main() -> None:
    """Train once and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir")
    parser.add_argument("--gin_file", action="append", required=True)
    arguments, rest = parser.parse_known_args()
    bindings = [argument.removeprefix("--gin.") for argument in rest]
    config.parse(arguments.gin_file, bindings)
    settings = config.parameters(train)
    model, steps = settings["model"], settings["steps"]

    run = Run(arguments.workdir)
    vocabulary = load_vocabulary(run)
    packed = {split: pack(list(split_tokens(run, split, vocabulary)), settings["sequence_length"]) for split in ("train", "validation")}
    rows = batches(packed["train"], batch_size=settings["batch_size"], seed=settings["seed"])
    names = ("learning_rate", "constant_steps", "steps", "cooldown_steps")
    adafactor = training.optimizer(training.learning_rate_schedule(**{name: settings[name] for name in names}))
    parameters = init_parameters(model, settings["seed"])
    state = adafactor.init(parameters)
    update, sums = training.compiled_update(model, adafactor, settings["seed"]), training.compiled_sums(model)

    warm = 2  # the second step is compiled again, for the layout of the first step's parameters
    for step in range(warm):
        parameters, state, _ = update(parameters, state, rows[step], np.int32(step))
    jax.block_until_ready(parameters)
    start = time.monotonic()
    for step in range(warm, steps):
        parameters, state, _ = update(parameters, state, rows[step], np.int32(step))
        if step % 20 == 0:
            jax.block_until_ready(parameters)
    jax.block_until_ready(parameters)
    rate = (steps - warm) * settings["batch_size"] * settings["sequence_length"] / (time.monotonic() - start)

    validation = training.means([sums(parameters, batch) for batch in one_pass(packed["validation"], batch_size=settings["batch_size"])])
    print(
        f"{' '.join(bindings) or 'as configured'}: validation loss {validation['loss']:.3f}, accuracy {validation['accuracy']:.2%} "
        f"of {validation['tokens']:,.0f} tokens; {rate:,.0f} tokens/s on {processor()}"
    )


if __name__ == "__main__":
    main()
