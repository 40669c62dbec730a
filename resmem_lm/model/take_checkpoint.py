"""Use a checkpoint of T5X or of another work directory instead of training."""

import re

from resmem_lm.errors import UserError
from resmem_lm.model.checkpoints import Model, checkpoint_manager, newest_checkpoint, read_parameters, save_checkpoint, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train import check_vocabulary
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import Record, local_path, new_directory, read_json, to_path


@stage(name="train", after=("documents", "vocabulary"))
def take_checkpoint(run: Run, *, model: ModelConfig, checkpoint: str | None = None) -> Record:
    """Copy the parameters of a checkpoint to WORKDIR/checkpoints instead of training.

    Args:
        model: shape of the model in the checkpoint.
        checkpoint: required. A directory such as `checkpoint_1000`, or a directory of checkpoints, such as T5X's MODEL_DIR or
            WORKDIR/checkpoints of another work directory; the newest one is copied. Both checkpoint formats of T5X are accepted.

    Returns:
        The fingerprint of the model.

    Raises:
        UserError: there is no checkpoint, or its shape, parameter names or vocabulary differ.
    """
    if not checkpoint:
        raise UserError("take_checkpoint.checkpoint is not set: set it with --gin.CHECKPOINT=\"'...'\"")
    vocabulary = load_vocabulary(run)
    check_vocabulary(vocabulary, model)
    source = newest_checkpoint(to_path(checkpoint))
    beside = source.parent / "model.json"
    if beside.exists() and read_json(beside)["vocabulary"] != vocabulary.sha256:
        raise UserError(
            f"{source} was trained with another vocabulary than {run.vocabulary}: "
            f"set make_vocabulary.model = '{source.parent.parent / 'vocabulary' / 'vocabulary.model'}'"
        )
    taken = Model(model, read_parameters(local_path(source), model))
    named = re.fullmatch(r"checkpoint_(\d+)", source.name)  # no match if the checkpoint was renamed
    with new_directory(run.checkpoints) as directory:
        save_config(directory, model, vocabulary.sha256)
        with checkpoint_manager(directory) as manager:
            save_checkpoint(manager, int(named[1]) if named else 0, {"target": taken.parameters})
    return {"fingerprint": taken.fingerprint}
