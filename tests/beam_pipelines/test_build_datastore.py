import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from beam_pipelines import build_datastore as pipeline
from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.runner import LOCAL_RUNNER
from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json
from tests.tiny import arguments, shard_folder

SETTINGS = {"window_length": 32, "window_context": 8, "entries": 16}


def files(workdir):
    """Return content and time of every file of every shard, by name without the suffix of the attempt."""
    found = sorted((workdir / "datastore").glob("shard-*/*"))
    return {(path.parent.name.partition(".")[0], path.name): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def content(workdir):
    return {name: content for name, (content, _) in files(workdir).items()}


def folders(workdir):
    return sorted(path.name.partition(".")[0] for path in (workdir / "datastore").glob("shard-*/"))


SHARDS = [f"shard-0000{shard}-of-00003" for shard in range(3)]


def test_only_a_missing_shard_is_built_again_and_is_the_same(tiny_copy):
    before = files(tiny_copy)
    shutil.rmtree(shard_folder(tiny_copy, 1))
    (tiny_copy / "datastore/manifest.json").unlink()
    (tiny_copy / "stages/build.json").unlink()
    for orphan in ("shard-00000-of-00003.0123abcd", "shard-00001-of-00003.0123abcd"):
        (tiny_copy / "datastore" / orphan).mkdir()
    build_datastore(tiny_copy, **SETTINGS)
    after = files(tiny_copy)
    assert content(tiny_copy) == {name: content for name, (content, _) in before.items()}
    assert {name for name in after if after[name][1] != before[name][1]} == {name for name in after if name[0] == SHARDS[1]}
    assert folders(tiny_copy) == SHARDS


def test_shards_with_other_settings_are_never_reused(tiny_copy):
    (tiny_copy / "stages/build.json").unlink()
    build_datastore(tiny_copy, **(SETTINGS | {"entries": 8}))
    assert open_datastore(tiny_copy / "datastore").take("residual_ids", np.arange(5)).shape == (5, 7)
    assert folders(tiny_copy) == SHARDS


def test_a_truncated_shard_is_built_again(tiny_copy):
    before = content(tiny_copy)
    os.truncate(shard_folder(tiny_copy, 0) / "quantized_keys.npy", 500)
    (tiny_copy / "stages/build.json").unlink()
    build_datastore(tiny_copy, **SETTINGS)
    assert content(tiny_copy) == before


def test_the_suggested_fix_of_an_altered_shard_builds_it_again(tiny_copy):
    before, path = content(tiny_copy), shard_folder(tiny_copy, 0) / "quantized_keys.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="was altered") as caught:
        open_datastore(tiny_copy / "datastore", checksums=True)
    for name in re.search(r"delete (.*) and (.*), and run `resmem build`", str(caught.value)).groups():
        Path(name).unlink()
    build_datastore(tiny_copy, **SETTINGS)
    assert content(tiny_copy) == before


def test_one_thread_and_repeated_bundles_give_the_same_rows(tiny_copy):
    before = content(tiny_copy)
    shutil.rmtree(tiny_copy / "datastore")
    (tiny_copy / "stages/build.json").unlink()
    build_datastore(tiny_copy, **SETTINGS, pipeline_options=f"--runner={LOCAL_RUNNER} --direct_num_workers=1")
    first = files(tiny_copy)
    _encode_again(tiny_copy)
    assert files(tiny_copy) == first
    for name in SHARDS:  # as if the first attempt had not yet published
        (tiny_copy / "datastore" / f"{name}.json").unlink()
    _encode_again(tiny_copy)
    assert folders(tiny_copy) == sorted(2 * SHARDS)
    (tiny_copy / "stages/build.json").unlink()
    build_datastore(tiny_copy, **SETTINGS)
    assert folders(tiny_copy) == SHARDS
    assert content(tiny_copy) == before


def _encode_again(workdir):
    """Encode every shard again, like a runner that repeats a bundle."""
    encode = pipeline.EncodeShard(Run(str(workdir)), open_datastore(workdir / "datastore").binding)
    worker, units = encode.setup(), pipeline.units_of(Run(workdir), None)
    assert [name for unit in units for name in encode.process(unit, worker)] == SHARDS


def test_counters_equal_the_contents_of_the_datastore(tiny_run):
    built, datastore = read_json(tiny_run / "stages/build.json")["result"], open_datastore(tiny_run / "datastore")
    counts = built["counts"]
    assert (counts["tokens"], counts["documents"]) == (datastore.rows, sum(len(datastore.documents(shard)) for shard in range(3)))
    lengths = [document["rows"] for shard in range(3) for document in datastore.documents(shard)]
    windows = [max(1, -(-(length - 8) // 24)) for length in lengths]
    assert counts["windows"] == sum(windows)
    # Context is computed again in every window of a document but its first.
    assert counts["window_tokens"] == sum(length + 8 * (number - 1) for length, number in zip(lengths, windows, strict=True))
    assert counts["window_tokens"] <= counts["computed_tokens"]


def test_the_first_shards_make_a_smaller_datastore(tiny_copy):
    shutil.rmtree(tiny_copy / "datastore")
    (tiny_copy / "stages/build.json").unlink()
    found = build_datastore(tiny_copy, **SETTINGS, shards=1)
    manifest = read_json(tiny_copy / "datastore/manifest.json")
    assert found["rows"] == manifest["rows"] == manifest["shards"][0]["rows"]


def test_more_shards_than_documents_leave_some_without_rows(tmp_path):
    (tmp_path / "tiny").mkdir()
    command = [
        *arguments(tmp_path / "tiny", tmp_path / "run", documents=6),
        "--gin.prepare_documents.shards=9",
        "--gin.make_vocabulary.size=60",
    ]
    assert main(["run", *command, "--gin.STEPS=2"]) == 0
    datastore = open_datastore(tmp_path / "run/datastore", checksums=True)
    assert 0 < sum(shard["rows"] > 0 for shard in datastore.shards) < 9
    assert len(datastore.take("tokens", np.arange(datastore.rows))) == datastore.rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 4}, "take 1 to 3"),
        ({"temperatures": (0.5, 2.0)}, "include 1.0"),
        ({"entries": 0}, "entries = 0: take 1 or more"),
        ({"temperatures": (0.1, 1.0)}, "none below 0.2"),
        ({"window_context": 32}, "context"),
    ],
)
def test_impossible_settings_are_refused(tiny_copy, change, message):
    (tiny_copy / "stages/build.json").unlink()
    with pytest.raises(UserError, match=message):
        build_datastore(tiny_copy, **(SETTINGS | change))


def test_an_impossible_number_of_shards_is_refused_before_anything_is_written(tiny_copy):
    (tiny_copy / "stages/build.json").unlink()
    shutil.rmtree(tiny_copy / "datastore")
    with pytest.raises(UserError, match="take 1 to 3"):
        build_datastore(tiny_copy, **(SETTINGS | {"shards": 9, "key_dimensions": 8}))
    assert not (tiny_copy / "datastore").exists()
    build_datastore(tiny_copy, **(SETTINGS | {"key_dimensions": 8}))


def test_a_full_disk_is_reported_in_one_line_and_the_same_command_resumes(tiny_copy, monkeypatch):
    before = content(tiny_copy)
    shutil.rmtree(shard_folder(tiny_copy, 2))
    (tiny_copy / "stages/build.json").unlink()

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="no space left on the disk") as caught:
            build_datastore(tiny_copy, **SETTINGS)
    assert "\n" not in str(caught.value)
    assert folders(tiny_copy) == SHARDS[:2]
    build_datastore(tiny_copy, **SETTINGS)
    assert content(tiny_copy) == before
