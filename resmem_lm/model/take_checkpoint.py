"""The stage `take_checkpoint`: use a checkpoint trained elsewhere, by T5X or by this package, in place of training."""

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
    """Copy the parameters of another checkpoint to WORKDIR/checkpoints; the work directory does not depend on it afterwards.

    Args:
        model: the shape of the model in the checkpoint.
        checkpoint: a directory `checkpoint_1000`, or a directory with several, of which the newest is copied: T5X's MODEL_DIR or
            WORKDIR/checkpoints of another work directory. Both forms of T5X's checkpoints are read. Required.

    Returns:
        The fingerprint of the model.

    Raises:
        UserError: there is no checkpoint, or it has another shape, other names or another vocabulary.
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
    named = re.fullmatch(r"checkpoint_(\d+)", source.name)  # a renamed checkpoint has another name
    with new_directory(run.checkpoints) as directory:
        save_config(directory, model, vocabulary.sha256)
        with checkpoint_manager(directory) as manager:
            save_checkpoint(manager, int(named[1]) if named else 0, {"target": taken.parameters})
    return {"fingerprint": taken.fingerprint}
