import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from beam_pipelines import sample_documents as pipeline
from beam_pipelines.sample_documents import sample_documents
from resmem_lm.errors import UserError
from resmem_lm.text.duplicates import minhash
from resmem_lm.text.shards import position, read_shard, shard_paths
from resmem_lm.workdir.run import Run
from tests.c4 import build_tfds, write_json_lines

HAS_TFDS = importlib.util.find_spec("tensorflow_datasets") is not None
SETTINGS = {"fraction": 0.5, "validation_fraction": 0.3, "shards": 4, "query_shards": 2}


@pytest.fixture(scope="module")
def c4(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("c4")
    write_json_lines(folder)
    return folder


def sample(c4, workdir, **settings):
    text = {split: str(c4 / f"c4-{split}.*.json.gz") for split in ("train", "validation")}
    return sample_documents(workdir, **({"train": text["train"], "held_out": text["validation"]} | SETTINGS | settings))


def documents_of(workdir, split):
    return [document for path in shard_paths(Run(workdir), split) for document in read_shard(path)]


def texts(c4, split):
    paths = sorted(c4.glob(f"c4-{split}.*"))
    return [json.loads(line)["text"] for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_each_document_is_placed_once_and_by_its_text_alone(c4, tmp_path):
    counts = sample(c4, tmp_path)["documents"]
    train, validation, test = (documents_of(tmp_path, split) for split in ("train", "validation", "test"))
    held_out = set(texts(c4, "validation"))
    assert sorted(d.text for d in validation + test) == sorted(held_out)
    assert all(position(d.text) < 0.3 for d in validation)
    similar = {t for t in texts(c4, "train") if any(minhash(t).jaccard(minhash(other)) >= 0.7 for other in held_out)}
    chosen = {t for t in texts(c4, "train") if position(t) < 0.5 and t.strip()}
    assert sorted(d.text for d in train) == sorted(chosen - similar)
    assert counts["train"] == len(train)
    assert counts["empty"] == 1
    assert counts["near_duplicate"] == len(chosen & similar)
    for split in (train, validation, test):
        assert [position(d.text) for d in split] == sorted(position(d.text) for d in split)
    assert all(d.id.startswith("http://site/") for d in train)


def test_near_duplicates_of_held_out_documents_are_dropped_and_equal_texts_kept_once(c4, tmp_path):
    counts = sample(c4, tmp_path, fraction=1.0)["documents"]
    kept = [d.text for d in documents_of(tmp_path, "train")]
    assert counts["near_duplicate"] >= 1
    assert not any("Once more" in text for text in kept)
    assert counts["duplicate"] == 1
    assert len(kept) == len(set(kept)) == counts["train"] == 200 - 1 - 1 - counts["near_duplicate"]


def test_workers_and_the_order_and_number_of_files_do_not_change_a_byte(c4, tmp_path):
    first = sample(c4, tmp_path / "a")
    lines = [line for path in sorted(c4.glob("c4-train.*")) for line in gzip.decompress(path.read_bytes()).splitlines(keepends=True)]
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(3):
        (parts / f"{number}.jsonl").write_bytes(b"".join(reversed(lines[number::3])))
    others = [
        sample(c4, tmp_path / "b", train=[str(parts / f"{number}.jsonl") for number in (2, 0, 1)]),
        sample(c4, tmp_path / "c", pipeline_options="--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"),
    ]
    assert all(other == first for other in others)


def test_the_first_half_of_the_shards_is_a_sample_of_half_the_size(c4, tmp_path):
    whole, half = sample(c4, tmp_path / "whole"), sample(c4, tmp_path / "half", fraction=0.25, shards=2)
    for shard in range(2):
        assert whole["checksums"][f"train-0000{shard}-of-00004.jsonl"] == half["checksums"][f"train-0000{shard}-of-00002.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": None}, "set both"),
        ({"fraction": 0.0}, "fraction = 0.0: take a number above 0"),
        ({"shards": 0}, "take 1 or more"),
        ({"train": "/nowhere/*.json.gz"}, "no text found at '/nowhere"),
        ({"validation_fraction": 1.0}, "leaves no test documents: change sample_documents.validation_fraction"),
    ],
)
def test_impossible_settings_are_refused(c4, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        sample(c4, tmp_path, **change)
    assert not (tmp_path / "documents").exists()


def test_an_error_names_the_file_and_the_line(c4, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"test": "bad"}\n')
    with pytest.raises(UserError, match=r'bad.jsonl, line 2 has no field "text"'):
        sample(c4, tmp_path / "run", train=str(tmp_path / "bad.jsonl"))


def test_half_of_a_surrogate_pair_in_a_url_is_replaced(c4, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "A page.", "url": "http://site/\ud83d"}) + "\n")
    sample(c4, tmp_path / "run", train=str(tmp_path / "a.jsonl"), fraction=1.0)
    assert [d.id.partition("#")[0] for d in documents_of(tmp_path / "run", "train")] == ["http://site/?"]


def test_an_empty_held_out_split_is_refused_before_the_train_text_is_read(c4, tmp_path):
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    with pytest.raises(UserError, match="leaves no test documents"):
        sample(c4, tmp_path / "run", train=str(tmp_path / "bad.jsonl"), validation_fraction=1.0)


def test_a_worker_that_cannot_see_the_held_out_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match="a worker sees 0 of 40 held-out documents"):
        pipeline.PlaceTrain(str(tmp_path / "nowhere"), 1.0, 4, 0.7, held_out=40).setup()


@pytest.mark.skipif(HAS_TFDS, reason="TFDS is installed here")
def test_an_error_without_tfds_names_the_extra(c4, tmp_path):
    with pytest.raises(UserError, match=r"pip install 'resmem_lm\[c4\]'"):
        sample(c4, tmp_path, train="tfds:c4/en:3.1.0/train")


@pytest.mark.skipif(not HAS_TFDS, reason="TFDS is not installed: pip install 'resmem_lm[c4]'")
@pytest.mark.filterwarnings("ignore")  # of TensorFlow
class TestTfds:
    @pytest.fixture(scope="class")
    def data_dir(self, c4, tmp_path_factory):
        folder = tmp_path_factory.mktemp("tfds")
        build_tfds(c4, folder)
        return str(folder)

    def test_tfds_and_json_lines_give_the_same_bytes(self, c4, data_dir, tmp_path):
        prepared = sample(
            c4, tmp_path / "a", train="tfds:c4/en:3.1.0/train", held_out="tfds:c4/en:3.1.0/validation", tfds_data_dir=data_dir
        )
        assert prepared == sample(c4, tmp_path / "b")

    @pytest.mark.parametrize(
        ("text", "message"), [("tfds:c4/en:2.0.0/train", "tfds build c4/en:2.0.0"), ("tfds:c4/en:3.1.0/dev", "no split 'dev': take one of")]
    )
    def test_missing_datasets_and_splits_are_refused(self, c4, data_dir, tmp_path, text, message):
        with pytest.raises(UserError, match=message):
            sample(c4, tmp_path, held_out=text, tfds_data_dir=data_dir)
