"""A checkpoint trained elsewhere, by T5X or by this package, in place of training here."""

import re

from etils import epy

from resmem_lm.errors import UserError
from resmem_lm.model.checkpoints import STATE, Model, checkpoint_manager, newest_checkpoint, read_parameters, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train import check_vocabulary
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import Record, local_path, new_directory, read_json, to_path

with epy.lazy_imports():
    import orbax.checkpoint as ocp


@stage(name="train", after=("documents", "vocabulary"))
def take_checkpoint(run: Run, *, model: ModelConfig, checkpoint: str | None = None) -> Record:
    """Writes WORKDIR/checkpoints from the parameters of another checkpoint; WORKDIR then needs it no more.

    Args:
        model: the shape that the checkpoint was trained with.
        checkpoint: a directory `checkpoint_1000`, or one above it, of which the newest is taken: T5X's MODEL_DIR,
            or WORKDIR/checkpoints of another work directory. T5X's Orbax form and its older one are read.

    Returns:
        The fingerprint of the model.

    Raises:
        UserError: no checkpoint there, one of another shape, with other names or trained with another vocabulary.
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
    named = re.fullmatch(r"checkpoint_(\d+)", source.name)  # or whatever it was renamed to
    step = int(named[1]) if named else 0
    with new_directory(run.checkpoints) as directory:
        save_config(directory, model, vocabulary.sha256)
        with checkpoint_manager(directory) as manager:
            manager.save(step, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave({"target": taken.parameters})}))
    return {"fingerprint": taken.fingerprint}
