"""The SeqIO Task over TFDS with which T5X pretrains this repository's model; gin/t5x/*.gin uses it.

    python -m t5x.train --gin_file=gin/t5x/pretrain_t5_small_c4.gin --gin.MODEL_DIR="'/absolute/path'"

Only T5X imports this module: it needs the extra `resmem_lm[c4]`.
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
    """Cut the tokens of each document into parts of at most `sequence_length["targets"]`; SeqIO alone keeps only the first part."""
    length = sequence_length["targets"]

    def parts(document: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        tokens = document["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(parts)


def language_model_task(tfds_name: str, vocabulary: seqio.Vocabulary) -> str:
    """Register next-token prediction on a TFDS dataset's `text`: every token of every document, followed by T5's end id.

    Args:
        tfds_name: dataset, configuration and version, such as "c4/en:3.1.0"; its splits keep their names.
        vocabulary: the vocabulary of the model; T5X compares both.

    Returns:
        The name of the Task, which T5X takes.
    """
    name = f"resmem_lm_{re.sub(r'[^A-Za-z0-9]+', '_', tfds_name)}"
    if name not in seqio.TaskRegistry.names():  # gin calls this function for training and again for evaluation
        seqio.TaskRegistry.add(
            name,
            source=seqio.TfdsDataSource(tfds_name=tfds_name),
            preprocessors=[_targets, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos, split_long],
            output_features={"targets": seqio.Feature(vocabulary=vocabulary, add_eos=True)},
        )
    return name


def absolute(path: str) -> str:
    """Return MODEL_DIR as an absolute path: Orbax refuses relative paths, after minutes of compilation."""
    return path if "://" in path else str(Path(path).absolute())
