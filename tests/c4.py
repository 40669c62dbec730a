"""A corpus in C4's schema (text, timestamp, url), as JSON lines and as a TFDS dataset."""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from tests.tiny import sentences


def write_json_lines(folder: Path, train: int = 200, validation: int = 40) -> None:
    """Write two files `c4-train.*-of-00002.json.gz` and one file `c4-validation.00000-of-00001.json.gz`."""
    documents = [f"Page {number}. {text}" for number, text in enumerate(sentences(train + validation))]
    documents[3] = documents[train + 1] + " Once more."  # a near-duplicate of a held-out document
    documents[5] = documents[4]
    documents[6] = " \n"
    records = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"http://site/{i}"} for i, text in enumerate(documents)]
    half = train // 2
    files = {
        "c4-train.00000-of-00002": records[:half],
        "c4-train.00001-of-00002": records[half:train],
        "c4-validation.00000-of-00001": records[train:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in part)


@functools.cache
def builder() -> Any:
    """Return TFDS's class of the dataset. It is created once, because TFDS registers its name."""
    import tensorflow_datasets as tfds

    class C4(tfds.core.GeneratorBasedBuilder):
        name = "c4"
        VERSION = tfds.core.Version("3.1.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en", version="3.1.0")]  # noqa: RUF012 - TFDS needs a class attribute

        def _info(self):
            features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("text", "timestamp", "url")})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in ("train", "validation")}

        def _generate_examples(self, split):
            for path in sorted(self.json_lines.glob(f"c4-{split}.*.json.gz")):
                with gzip.open(path, "rt", encoding="utf-8") as file:
                    for number, line in enumerate(file):
                        yield f"{path.name}-{number}", json.loads(line)

    return C4


def build_tfds(json_lines: Path, data_dir: Path) -> None:
    """Write the TFDS dataset c4/en:3.1.0 in `data_dir` from the files of `write_json_lines`. It needs TFDS."""
    instance = builder()(data_dir=data_dir, config="en")
    instance.json_lines = json_lines
    instance.download_and_prepare()
