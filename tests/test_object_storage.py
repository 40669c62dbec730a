"""Run the whole pipeline in object storage, which has no rename, on a local S3 server."""

import json
import os
import subprocess
import sys
import time

import pytest

from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.maintenance.verify import verify
from resmem_lm.text.sources import read_documents
from resmem_lm.workdir import lock
from resmem_lm.workdir.lock import locked
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import files_below, local_path, read_json, to_path, write_json
from tests.tiny import arguments

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'resmem_lm[s3]'")
moto_server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'resmem_lm[test]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of botocore and of the server


@pytest.fixture(scope="module")
def bucket():
    """The address of an empty bucket; child processes can open it too."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        to_path("s3://bucket").fs.mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def test_a_run_in_object_storage_equals_a_run_on_a_disk(bucket, tiny_run):
    workdir = to_path(f"{bucket}/run")
    command = arguments(tiny_run.parent, workdir)
    assert main(["run", *command]) == 0
    stored, local = (read_json(w / "results.json") for w in (workdir, tiny_run))
    for name in ("splits", "curves", "examples", "datastore"):
        assert stored[name] == local[name]
    assert verify(Run(workdir)) == []
    before = {str(f): f.stat().st_mtime for f in files_below(workdir) if f.name not in ("config.gin", "config.json")}
    assert main(["run", *command]) == 0  # every stage is skipped
    assert {str(f): f.stat().st_mtime for f in files_below(workdir) if f.name not in ("config.gin", "config.json")} == before

    more = [{"text": f"Something new, number {n}, about a {word} that nobody had written."} for n, word in enumerate(("fox", "hen", "owl"))]
    (tiny_run.parent / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    rows = read_json(workdir / "datastore/manifest.json")["rows"]
    assert main(["build", *command, f"--append={tiny_run.parent / 'more.jsonl'}"]) == 0
    assert read_json(workdir / "datastore/manifest.json")["rows"] > rows
    assert main(["delete", f"--workdir={workdir}", f"--source={tiny_run.parent / 'more.jsonl'}"]) == 0
    assert main(["compact", f"--workdir={workdir}"]) == 0
    assert read_json(workdir / "datastore/manifest.json")["rows"] == rows
    for stage in ("index", "evaluate", "report"):
        assert main([stage, *command]) == 0
    assert read_json(workdir / "results.json")["splits"] == local["splits"]
    assert verify(Run(workdir)) == []


def test_a_killed_command_resumes_in_object_storage(bucket, tiny_run):
    workdir = to_path(f"{bucket}/killed")
    command = arguments(tiny_run.parent, workdir)
    process = subprocess.Popen([sys.executable, "-m", "resmem_lm", "run", *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (workdir / "stages/build.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert (workdir / ".lock").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "HEARTBEAT", 0.2)  # no process renews it
        assert main(["run", *command]) == 0
    assert read_json(workdir / "results.json")["splits"] == read_json(tiny_run / "results.json")["splits"]
    assert verify(Run(workdir)) == []


def test_a_renewed_lock_refuses_other_commands(bucket, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)
    workdir = to_path(f"{bucket}/leased")
    code = f"""
import time
from resmem_lm.workdir import lock
from resmem_lm.workdir.storage import to_path
lock.HEARTBEAT = 0.1
with lock.locked(to_path("{workdir}")):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being written by another command"), locked(workdir):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with locked(workdir):
        assert (workdir / ".lock").exists()
    assert not (workdir / ".lock").exists()


def test_a_local_copy_is_replaced_only_after_the_object_changed(bucket):
    path = to_path(f"{bucket}/copy/value.json")
    write_json(path, {"a": 1})
    first = local_path(path)
    stamp = first.stat().st_mtime_ns
    assert local_path(path) == first
    assert first.stat().st_mtime_ns == stamp
    write_json(path, {"a": 2})
    assert read_json(local_path(path)) == {"a": 2}


def test_an_unknown_storage_is_refused():
    with pytest.raises(UserError, match="nowhere://bucket"):
        to_path("nowhere://bucket/run")


def test_text_is_read_from_object_storage(bucket, tmp_path):
    folder = to_path(f"{bucket}/texts")
    for number in range(4):
        (folder / f"{number}.txt").write_bytes(f"Text number {number} of the bucket, unlike any other.".encode())
    found = list(read_documents(f"{bucket}/texts/*.txt", duplicate_threshold=0.7))
    assert [document.id for document in found] == [f"{bucket}/texts/{number}.txt" for number in range(4)]
    assert list(read_documents(f"{bucket}/texts", duplicate_threshold=0.7)) == found
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1")


def test_addresses_of_s3_and_s3a_are_equal(bucket):
    assert str(to_path(f"{bucket.replace('s3:', 's3a:')}/run/x")) == str(to_path(f"{bucket}/run/x"))


def test_training_does_not_resume_from_a_checkpoint_that_was_half_copied(bucket, tiny_run):
    workdir = to_path(f"{bucket}/cut")
    command = arguments(tiny_run.parent, workdir)
    assert main(["train", *command]) == 0
    fingerprint = read_json(workdir / "stages/train.json")["result"]
    (newest,) = workdir.glob("checkpoints/checkpoint_30")
    for file in [*files_below(newest)[::2], newest / "_CHECKPOINT_METADATA"]:
        if file.exists():
            file.unlink()
    (workdir / "stages/train.json").unlink()
    assert main(["train", *command]) == 0
    assert read_json(workdir / "stages/train.json")["result"] == fingerprint
    names = [file.name for file in files_below(workdir / "checkpoints")]
    assert not [name for name in names if name.startswith(".")]
