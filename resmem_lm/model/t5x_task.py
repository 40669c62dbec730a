"""What T5X needs to pretrain this repository's model: a SeqIO Task over TFDS, used by gin/t5x/*.gin.

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
    """Cuts each document's tokens into pieces of at most `sequence_length["targets"]`; SeqIO alone would keep only the first."""
    length = sequence_length["targets"]

    def pieces(document: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        tokens = document["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(pieces)


def language_model_task(tfds_name: str, vocabulary: seqio.Vocabulary) -> str:
    """Registers next-token prediction on a TFDS dataset's `text`: every token of every document, with T5's end id behind each.

    Args:
        tfds_name: dataset, configuration and version, such as "c4/en:3.1.0"; its splits keep their names.
        vocabulary: of the model too; T5X compares both.

    Returns:
        The Task's name, which is how T5X takes it.
    """
    name = f"resmem_lm_{re.sub(r'[^A-Za-z0-9]+', '_', tfds_name)}"
    if name not in seqio.TaskRegistry.names():  # gin calls this for training and again for its evaluation
        seqio.TaskRegistry.add(
            name,
            source=seqio.TfdsDataSource(tfds_name=tfds_name),
            preprocessors=[_targets, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos, split_long],
            output_features={"targets": seqio.Feature(vocabulary=vocabulary, add_eos=True)},
        )
    return name


def absolute(path: str) -> str:
    """MODEL_DIR as T5X needs it: Orbax refuses relative paths, after minutes of compiling."""
    return path if "://" in path else str(Path(path).absolute())
