import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.workdir.storage import CHECKSUM, is_local, new_directory, read_json, sha256, to_path, with_checksum, write_bytes, write_json


def message(call, *args, **kwargs):
    """Return the one-line message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_names_are_paths_of_this_machine_or_addresses(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_path("~/runs/x") == tmp_path / "runs/x"
    assert to_path("~") == tmp_path
    assert to_path("runs/~x") == Path("runs/~x")
    assert to_path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert is_local(to_path(f"file://{tmp_path}/x"))
    assert str(to_path("memory://bucket/x")) == "memory://bucket/x"
    assert message(to_path, "gs:/bucket/x") == "gs:/bucket/x: an address of gs needs two slashes: write gs://bucket/x"


def test_a_new_directory_replaces_the_old(tmp_path):
    path = tmp_path / "things"
    write_bytes(path / "old.txt", b"old")
    with new_directory(path) as folder:
        write_bytes(folder / "new.txt", b"new")
        assert names_below(path) == ["old.txt"]
    assert names_below(tmp_path) == ["things", "things/new.txt"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_removes_the_new_directory_and_keeps_the_old(tmp_path, existed, exception):
    path = tmp_path / "things"
    if existed:
        write_bytes(path / "old.txt", b"old")
    with pytest.raises(exception), new_directory(path) as folder:  # noqa: PT012 - what the block leaves behind is the point
        write_bytes(folder / "new.txt", b"new")
        raise exception
    assert names_below(tmp_path) == (["things", "things/old.txt"] if existed else [])


def test_leftovers_of_a_killed_run_are_not_in_a_new_directory(tmp_path):
    killed = new_directory(tmp_path / "things")
    write_bytes(killed.__enter__() / "half.txt", b"half")
    with new_directory(tmp_path / "things") as folder:
        write_bytes(folder / "whole.txt", b"whole")
    assert names_below(tmp_path) == ["things", "things/whole.txt"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=10,
)
RECORDS = st.dictionaries(st.text().filter(lambda name: name != CHECKSUM), JSON, max_size=3)


@given(RECORDS, RECORDS)
def test_json_is_read_as_it_was_written_last_and_no_other_file_is_left(first, second):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made" / "on the way" / "value.json"
        for value in (first, second):
            write_json(path, value)
            assert read_json(path) == value
        assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_a_value_that_is_no_json_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    assert read_json(tmp_path / "value.json") == {"a": 1}
    assert names_below(tmp_path) == ["value.json"]


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "value.json").mkdir()
    with pytest.raises(OSError, match=r"value\.json"):
        write_json(tmp_path / "value.json", {"a": 1})
    assert names_below(tmp_path) == ["value.json"]


@given(RECORDS, st.data())
def test_a_record_with_any_changed_added_or_lost_byte_is_refused(value, data):
    whole = with_checksum(value)
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.binary(min_size=1, max_size=1).filter(lambda byte: byte != whole[place : place + 1]))
    end = data.draw(st.sampled_from([place, place + 1]))
    for changed in (whole[:place] + byte + whole[end:], whole[:place] + whole[place + 1 :]):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "value.json"
            path.write_bytes(changed)
            assert message(read_json, path).startswith(f"{path} is damaged (")


@given(RECORDS)
def test_a_record_without_its_checksum_is_refused(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.json"
        path.write_text(json.dumps(value, indent=2) + "\n")
        assert message(read_json, path) == f"{path} is damaged (its checksum does not match its content): delete it and run its stage again"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff", b"{'a': 1}"])
def test_damaged_json_is_reported_with_the_fix(tmp_path, content):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    error = message(read_json, path)
    assert error.startswith(f"{path} is damaged (")
    assert error.endswith("): delete it and run its stage again")


def test_missing_json_is_reported_with_the_fix(tmp_path):
    assert message(read_json, tmp_path / "value.json") == f"{tmp_path / 'value.json'} is missing: run the stage that writes it again"


def test_written_json_ends_its_last_line_and_any_reader_of_json_can_read_it(tmp_path):
    write_json(tmp_path / "value.json", {"a": [1]})
    text = (tmp_path / "value.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text).items() > {"a": [1]}.items()


def test_checksums_are_sha_256(tmp_path):
    write_bytes(tmp_path / "abc", b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
