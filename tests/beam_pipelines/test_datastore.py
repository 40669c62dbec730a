import errno
import json
import os
import shutil

import numpy as np
import pytest

from beam_pipelines import datastore as pipeline
from beam_pipelines.datastore import build_datastore
from beam_pipelines.runner import LOCAL_RUNNER
from resmem_lm.datastore import open_datastore
from resmem_lm.errors import UserError
from resmem_lm.main import main
from tests.tiny import arguments

SETTINGS = {"window_length": 32, "window_context": 8, "entries": 16}


def files(workdir):
    return {
        p.relative_to(workdir): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted((workdir / "datastore").rglob("*")) if p.is_file()
    }


def test_only_a_missing_shard_is_made_again_and_is_the_same(tiny_copy):
    before = files(tiny_copy)
    shutil.rmtree(tiny_copy / "datastore/shard-00001-of-00003")
    (tiny_copy / "datastore/manifest.json").unlink()
    (tiny_copy / "stages/build.json").unlink()
    (tiny_copy / "datastore/.tmp-orphan").mkdir()
    build_datastore(tiny_copy, **SETTINGS)
    after = files(tiny_copy)
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}
    remade = {str(k) for k in after if after[k][1] != before[k][1]}
    assert remade == {str(k) for k in after if "shard-00001" in str(k)} | {"datastore/manifest.json"}


def test_shards_of_other_settings_are_never_taken_over(tiny_copy):
    (tiny_copy / "stages/build.json").unlink()
    build_datastore(tiny_copy, **(SETTINGS | {"entries": 8}))
    assert open_datastore(tiny_copy / "datastore").take("residual_ids", np.arange(5)).shape == (5, 8)


def test_a_damaged_shard_is_made_again(tiny_copy):
    before = files(tiny_copy)
    os.truncate(tiny_copy / "datastore/shard-00000-of-00003/keys.npy", 500)
    (tiny_copy / "stages/build.json").unlink()
    build_datastore(tiny_copy, **SETTINGS)
    assert {k: v[0] for k, v in files(tiny_copy).items()} == {k: v[0] for k, v in before.items()}


def test_one_thread_and_every_bundle_twice_give_the_same_rows(tiny_copy):
    before = files(tiny_copy)
    shutil.rmtree(tiny_copy / "datastore")
    (tiny_copy / "stages/build.json").unlink()
    build_datastore(tiny_copy, **SETTINGS, pipeline_options=f"--runner={LOCAL_RUNNER} --direct_num_workers=1")
    for shard in range(3):
        list(_encode_again(tiny_copy, shard))
    assert {k: v[0] for k, v in files(tiny_copy).items()} == {k: v[0] for k, v in before.items()}
    assert not list((tiny_copy / "datastore").glob(".tmp-*"))


def _encode_again(workdir, shard):
    """A second attempt at a shard, as a runner that repeats a bundle makes it."""
    encode = pipeline.EncodeShard(str(workdir), open_datastore(workdir / "datastore").binding, 3, 3)
    encode.setup()
    return encode.process(shard)


def test_the_first_shards_are_a_smaller_datastore(tiny_copy):
    shutil.rmtree(tiny_copy / "datastore")
    (tiny_copy / "stages/build.json").unlink()
    found = build_datastore(tiny_copy, **SETTINGS, shards=1)
    manifest = json.loads((tiny_copy / "datastore/manifest.json").read_text())
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
    ("change", "says"),
    [({"shards": 4}, "take 1 to 3"), ({"temperatures": (0.5, 2.0)}, "1.0 among them"), ({"window_context": 32}, "context")],
)
def test_settings_that_cannot_work_are_refused(tiny_copy, change, says):
    (tiny_copy / "stages/build.json").unlink()
    with pytest.raises(UserError, match=says):
        build_datastore(tiny_copy, **(SETTINGS | change))


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tiny_copy, monkeypatch):
    before = files(tiny_copy)
    shutil.rmtree(tiny_copy / "datastore/shard-00002-of-00003")
    (tiny_copy / "stages/build.json").unlink()

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="no space left on the disk") as caught:
            build_datastore(tiny_copy, **SETTINGS)
    assert "\n" not in str(caught.value)
    assert not list((tiny_copy / "datastore").glob(".tmp-*"))
    build_datastore(tiny_copy, **SETTINGS)
    assert {k: v[0] for k, v in files(tiny_copy).items()} == {k: v[0] for k, v in before.items()}
