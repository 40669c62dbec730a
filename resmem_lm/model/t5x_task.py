"""Define the SeqIO Task for pretraining with T5X on a TFDS dataset, which gin/t5x/*.gin uses.

    python -m t5x.train --gin_file=gin/t5x/pretrain_t5_small_c4.gin --gin.MODEL_DIR="'/absolute/path'"

Only T5X imports this module, which needs the extra `resmem_lm[c4]`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import seqio
import tensorflow as tf


@seqio.map_over_dataset
def _targets(record: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {"targets": record["text"]}


def split_long(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Split each document into parts of at most `sequence_length["targets"]` tokens, because SeqIO itself keeps only the first part."""
    length = sequence_length["targets"]

    def parts(document: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        tokens = document["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(parts)


def language_model_task(tfds_name: str, vocabulary: seqio.Vocabulary) -> str:
    """Register a Task that predicts every next token in the field `text` of a TFDS dataset, and return the Task's name.

    `tfds_name` has the dataset, configuration and version, such as "c4/en:3.1.0". T5X checks that the model has the same vocabulary.
    """
    name = f"resmem_lm_{re.sub(r'[^A-Za-z0-9]+', '_', tfds_name)}"
    if name not in seqio.TaskRegistry.names():  # gin calls this function once for training and once for evaluation
        seqio.TaskRegistry.add(
            name,
            source=seqio.TfdsDataSource(tfds_name=tfds_name),
            preprocessors=[_targets, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos, split_long],
            output_features={"targets": seqio.Feature(vocabulary=vocabulary, add_eos=True)},
        )
    return name


def absolute(path: str) -> str:
    """Return MODEL_DIR as an absolute path, because Orbax rejects relative paths only after minutes of compilation."""
    return path if "://" in path else str(Path(path).absolute())
