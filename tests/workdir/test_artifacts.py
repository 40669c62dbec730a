import pytest

from resmem_lm.errors import UserError
from resmem_lm.workdir.artifacts import damaged_files, find_record, folder_of, publish, remove_orphans, require_record
from resmem_lm.workdir.storage import children, files_below, inside, read_json, to_path, write_bytes, write_json

SOURCE = {"text": "one"}


@pytest.fixture(params=["here", "object storage"])
def parent(request, tmp_path):
    return tmp_path / "work" if request.param == "here" else to_path(f"memory://published{tmp_path}")


def make(parent, name="shard", provenance=SOURCE, content=b"things"):
    with publish(parent, name, provenance) as attempt:
        (attempt.folder / "things.bin").write_bytes(content)
        attempt.facts["rows"] = 3
    return read_json(parent / f"{name}.json")


def names(parent):
    return [path.name for path in children(parent)]


def test_an_artifact_is_found_by_its_provenance(parent):
    record = make(parent)
    assert find_record(parent, "shard", SOURCE) == record
    assert (record["provenance"], record["rows"], list(record["files"])) == (SOURCE, 3, ["things.bin"])
    assert (folder_of(parent, record) / "things.bin").read_bytes() == b"things"
    assert find_record(parent, "shard", {"text": "another"}) is None
    assert find_record(parent, "other", SOURCE) is None


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_attempt_that_raises_publishes_nothing_and_keeps_the_earlier_artifact(parent, existed, exception):
    before = make(parent) if existed else None
    with pytest.raises(exception), publish(parent, "shard", SOURCE) as attempt:  # noqa: PT012 - what the block leaves behind is the point
        (attempt.folder / "things.bin").write_bytes(b"half")
        raise exception
    assert find_record(parent, "shard", SOURCE) == before
    assert names(parent) == ([before["folder"], "shard.json"] if existed else [])


def test_the_later_of_two_attempts_counts_and_the_earlier_folder_is_an_orphan(parent):
    first, second = make(parent), make(parent)
    assert first["folder"] != second["folder"]
    assert find_record(parent, "shard", SOURCE) == second
    assert not list(damaged_files(parent, first, checksums=True))
    remove_orphans(parent, [second])
    assert names(parent) == [second["folder"], "shard.json"]
    assert find_record(parent, "shard", SOURCE) == second


def test_only_orphans_are_removed(parent):
    kept, gone = make(parent, "kept"), make(parent, "gone")
    write_bytes(parent / "killed.0123abcd" / "half.bin", b"half")
    for mine in ("notes.txt", "notes/deep.txt", "notes.0123/deep.txt"):
        write_bytes(parent / mine, b"mine")
    write_json(parent / "manifest.json", {"shards": [kept]})
    remove_orphans(parent, [kept])
    assert sorted(inside(path, parent) for path in files_below(parent)) == sorted(
        [f"{kept['folder']}/things.bin", "kept.json", "manifest.json", "notes.0123/deep.txt", "notes.txt", "notes/deep.txt"]
    )
    assert find_record(parent, "gone", SOURCE) is None
    assert gone["folder"] not in names(parent)


def test_a_changed_truncated_or_missing_file_is_named(parent):
    record = make(parent)
    path = folder_of(parent, record) / "things.bin"
    for content, problem, wanted in ((b"thinks", "was altered", record), (b"thing", "has 5 bytes, its manifest has 6", None)):
        path.write_bytes(content)
        (line,) = damaged_files(parent, record, checksums=True)
        assert problem in line
        assert find_record(parent, "shard", SOURCE) == wanted
    path.unlink()
    assert list(damaged_files(parent, record)) == [f"{path} is missing"]
    assert find_record(parent, "shard", SOURCE) is None


def test_a_damaged_record_is_none(parent):
    make(parent)
    path = parent / "shard.json"
    path.write_bytes(path.read_bytes()[:-5])
    assert find_record(parent, "shard", SOURCE) is None


@pytest.mark.parametrize("name", ["..", ".", "", "../elsewhere", "/etc", "a/b", "a\\b", "a\nb", "memory://a"])
def test_a_record_that_names_a_place_outside_is_refused(parent, name):
    record = make(parent)
    for outside in (record | {"folder": name}, record | {"files": {name: {"bytes": 1, "sha256": ""}}}):
        with pytest.raises(UserError, match="which is outside its folder") as caught:
            folder_of(parent, outside)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="which is outside its folder"):
            list(damaged_files(parent, outside))


def test_an_attempt_whose_folder_was_removed_publishes_nothing(tmp_path):
    with pytest.raises(UserError, match="was removed while it was written"), publish(tmp_path, "shard", SOURCE):
        remove_orphans(tmp_path, [])
    assert names(tmp_path) == []


def test_an_attempt_without_all_of_its_files_publishes_nothing(parent):
    with pytest.raises(UserError, match="was removed"), publish(parent, "shard", SOURCE, ["things.bin", "more.bin"]) as attempt:
        (attempt.folder / "things.bin").write_bytes(b"things")
    assert names(parent) == []


def test_a_record_that_cannot_be_read_now_is_an_error_and_not_a_missing_shard(tmp_path, monkeypatch):
    make(tmp_path)

    def refused(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "read_bytes", refused)
    with pytest.raises(UserError, match="cannot be read"):
        find_record(tmp_path, "shard", SOURCE)


def test_a_missing_required_artifact_is_reported(parent):
    make(parent)
    assert require_record(parent, "shard", SOURCE)["rows"] == 3
    for name, provenance in (("shard", {"text": "another"}), ("other", SOURCE)):
        with pytest.raises(UserError, match="run the same command again"):
            require_record(parent, name, provenance)
