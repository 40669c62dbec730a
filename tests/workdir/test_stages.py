import dataclasses
import errno
from pathlib import Path

import gin
import pytest

from resmem_lm.errors import UserError
from resmem_lm.workdir.run import OUTPUTS, Output, Run
from resmem_lm.workdir.stages import Stage, disk_errors, stage
from resmem_lm.workdir.storage import read_json, sha256, write_bytes


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int = 2


@pytest.fixture(autouse=True)
def _outputs(monkeypatch):
    for name in ("first", "second"):
        monkeypatch.setitem(OUTPUTS, name, Output((name,), marker="things.txt"))


class Work:
    """A stage whose function counts its calls, writes its output, and raises on request."""

    def __init__(self, *, name="first", after=(), policy="refuse", free=()):
        self.calls, self.result, self.before_output, self.after_output = 0, "same", None, None

        def make_things(run, *, size=1, names=("a", "b"), shape=None, where=None, runner=""):
            self.calls += 1
            if self.before_output:
                raise self.before_output
            write_bytes(run.path / name / "things.txt", b"things")
            if self.after_output:
                raise self.after_output
            return {"result": self.result}

        self.stage = Stage(make_things, name, after, policy, free)


def message(call, *args, **kwargs):
    """Return the one-line message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A stage and its settings


def test_a_finished_stage_is_skipped_and_returns_its_result(tmp_path):
    work = Work()
    assert work.stage(tmp_path, size=3) == {"result": "same"}
    work.result = "another"
    assert work.stage(tmp_path, size=3) == {"result": "same"}
    assert work.calls == 1


def test_a_finished_stage_is_skipped_by_another_process_too(tmp_path):
    Work().stage(tmp_path, size=3)
    later = Work()
    assert later.stage(tmp_path, size=3) == {"result": "same"}
    assert later.calls == 0


def test_a_folder_that_is_not_of_a_run_is_not_replaced(tmp_path):
    work = Work()
    (tmp_path / "first").mkdir()
    (tmp_path / "first/mine.txt").write_text("mine")
    refusal = message(work.stage, tmp_path)
    assert refusal == f"{tmp_path / 'first'} was not written by resmem, and first would replace it: move it, or take another --workdir"
    assert work.calls == 0
    (tmp_path / "first/things.txt").write_text("of a run whose record was deleted")
    assert work.stage(tmp_path) == {"result": "same"}


@pytest.mark.parametrize("moment", ["before_output", "after_output"])
@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_unfinished_stage_is_called_again(tmp_path, moment, interruption):
    work = Work()
    setattr(work, moment, interruption())
    with pytest.raises(interruption):
        work.stage(tmp_path)
    setattr(work, moment, None)
    assert work.stage(tmp_path) == {"result": "same"}
    assert work.stage(tmp_path) == {"result": "same"}
    assert work.calls == 2


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_setting_is_refused_with_its_old_and_new_value(tmp_path, finished):
    work = Work()
    if finished:
        work.stage(tmp_path, size=3)
    else:
        work.after_output = RuntimeError()
        with pytest.raises(RuntimeError):
            work.stage(tmp_path, size=3)
    calls = work.calls
    for refused in (work.stage, work.stage.check):
        assert message(refused, tmp_path, size=4) == (
            f"{tmp_path} was made with make_things.size = 3, now it is 4: "
            f"take another --workdir, or delete {tmp_path / 'first'} and {tmp_path / 'stages' / 'first.json'}"
        )
    assert work.calls == calls


def test_a_setting_may_change_if_the_stage_failed_before_it_wrote_anything(tmp_path):
    work = Work()
    work.before_output = RuntimeError()
    with pytest.raises(RuntimeError):
        work.stage(tmp_path, size=3)
    work.before_output = None
    assert work.stage(tmp_path, size=4) == {"result": "same"}
    assert "make_things.size = 4, now it is 3" in message(work.stage, tmp_path, size=3)


def test_a_setting_changed_from_or_to_its_default_is_refused(tmp_path):
    work = Work()
    work.stage(tmp_path)
    assert "make_things.size = 1, now it is 2" in message(work.stage, tmp_path, size=2)
    assert work.stage(tmp_path, size=1) == {"result": "same"}


def test_the_stage_runs_again_after_the_advice_of_a_refusal(tmp_path):
    work = Work()
    work.stage(tmp_path, size=3)
    (tmp_path / "stages" / "first.json").unlink()
    work.stage(tmp_path, size=4)
    assert work.calls == 2
    assert read_json(tmp_path / "stages" / "first.json")["settings"]["size"] == 4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"names": ("a", "b")}, {"names": ["a", "b"]}),
        ({"size": 1}, {"size": 1.0}),
        ({"shape": Shape(3)}, {"shape": Shape(3)}),
        ({"shape": Shape()}, {"shape": {"width": 2}}),
        ({"where": Path("/a")}, {"where": "/a"}),
    ],
)
def test_settings_are_compared_as_json(tmp_path, first, second):
    work = Work()
    work.stage(tmp_path, **first)
    assert work.stage(tmp_path, **second) == {"result": "same"}
    assert work.calls == 1


def test_a_changed_field_of_a_dataclass_is_refused(tmp_path):
    work = Work()
    work.stage(tmp_path, shape=Shape(3))
    assert "make_things.shape = {'width': 3}, now it is {'width': 4}" in message(work.stage, tmp_path, shape=Shape(4))


@pytest.mark.parametrize("finished", [True, False])
def test_free_settings_may_change(tmp_path, finished):
    work = Work(free=("runner",))
    if not finished:
        work.before_output = RuntimeError()
        with pytest.raises(RuntimeError):
            work.stage(tmp_path, runner="here")
        work.before_output = None
    work.stage(tmp_path, runner="here")
    calls = work.calls
    assert work.stage(tmp_path, runner="there") == {"result": "same"}
    assert work.calls == calls


def test_a_missing_output_of_a_finished_stage_is_reported_with_the_fix(tmp_path):
    work = Work()
    work.stage(tmp_path)
    (tmp_path / "first" / "things.txt").unlink()
    (tmp_path / "first").rmdir()
    assert message(work.stage, tmp_path).endswith(f": delete {tmp_path / 'stages' / 'first.json'} and run the stage again")
    (tmp_path / "stages" / "first.json").unlink()
    work.stage(tmp_path)
    assert work.calls == 2


def test_a_damaged_record_is_reported_with_the_fix(tmp_path):
    work = Work()
    work.stage(tmp_path)
    record = tmp_path / "stages" / "first.json"
    record.write_text(record.read_text()[:20])
    assert message(work.stage, tmp_path).startswith(f"{record} is damaged (")


def test_a_record_has_settings_inputs_seconds_and_result(tmp_path):
    Work().stage(tmp_path, size=3)
    record = read_json(tmp_path / "stages" / "first.json")
    assert record.pop("seconds") >= 0
    assert record == {
        "settings": {"size": 3, "names": ["a", "b"], "shape": None, "where": None, "runner": ""},
        "inputs": {},
        "finished": True,
        "result": {"result": "same"},
        "files": {"first/things.txt": {"bytes": 6, "sha256": sha256(tmp_path / "first" / "things.txt")}},
    }


# Stages one after another


@pytest.mark.parametrize("begun", [True, False])
def test_a_stage_is_refused_until_the_stages_it_needs_have_finished(tmp_path, begun):
    if begun:
        first = Work()
        first.before_output = RuntimeError()
        with pytest.raises(RuntimeError):
            first.stage(tmp_path)
    second = Work(name="second", after=("first",))
    assert message(second.stage, tmp_path) == f"{tmp_path}: second needs the stage first, which has not finished: run it first"
    assert second.calls == 0


def run_first(tmp_path, result):
    """Delete the record of the first stage and run it again with another result."""
    first = Work()
    first.result = result
    (tmp_path / "stages" / "first.json").unlink(missing_ok=True)
    first.stage(tmp_path)


def test_changed_inputs_are_refused_with_their_name(tmp_path):
    second = Work(name="second", after=("first",))
    run_first(tmp_path, "one text")
    second.stage(tmp_path)
    run_first(tmp_path, "another text")
    assert message(second.stage, tmp_path) == (
        f"{tmp_path / 'second'} was made from another first than {tmp_path} has now: "
        f"take another --workdir, or delete {tmp_path / 'second'} and {tmp_path / 'stages' / 'second.json'}"
    )
    assert second.calls == 1


def test_changed_inputs_of_an_unfinished_stage_are_refused(tmp_path):
    second = Work(name="second", after=("first",))
    run_first(tmp_path, "one text")
    second.after_output = RuntimeError()
    with pytest.raises(RuntimeError):
        second.stage(tmp_path)
    run_first(tmp_path, "another text")
    assert "was made from another first" in message(second.stage, tmp_path)


def test_inputs_with_the_same_result_are_the_same(tmp_path):
    second = Work(name="second", after=("first",))
    run_first(tmp_path, "one text")
    second.stage(tmp_path)
    run_first(tmp_path, "one text")
    assert second.stage(tmp_path) == {"result": "same"}
    assert second.calls == 1


def test_policy_redo_runs_again_for_other_settings_or_inputs(tmp_path):
    second = Work(name="second", after=("first",), policy="redo")
    run_first(tmp_path, "one text")
    second.stage(tmp_path, size=1)
    second.stage(tmp_path, size=1)
    assert second.calls == 1
    second.stage.check(tmp_path, size=2)
    second.stage(tmp_path, size=2)
    assert second.calls == 2
    run_first(tmp_path, "another text")
    second.stage(tmp_path, size=2)
    second.stage(tmp_path, size=2)
    assert second.calls == 3


def test_policy_extend_runs_again_for_other_inputs_and_refuses_other_settings(tmp_path):
    second = Work(name="second", after=("first",), policy="extend")
    run_first(tmp_path, "one text")
    second.stage(tmp_path, size=1)
    run_first(tmp_path, "another text")
    second.stage(tmp_path, size=1)
    second.stage(tmp_path, size=1)
    assert second.calls == 2
    assert "make_things.size = 1, now it is 2" in message(second.stage, tmp_path, size=2)


def test_an_updated_result_is_a_changed_input(tmp_path):
    first, second = Work(), Work(name="second", after=("first",))
    first.stage(tmp_path)
    second.stage(tmp_path)
    Run(tmp_path).update_result("first", {"result": "another"})
    assert first.stage(tmp_path) == {"result": "another"}
    assert "was made from another first" in message(second.stage, tmp_path)


def test_gin_has_a_stage_under_the_name_of_its_function(tmp_path):
    @stage(name="first")
    def known_to_gin(run, *, size=1):
        """Write one file."""
        write_bytes(run.path / "first", b"")
        return {"size": size}

    gin.parse_config("known_to_gin.size = 5")
    assert gin.get_bindings("known_to_gin") == {"size": 5}
    assert known_to_gin(tmp_path) == {"size": 1}  # gin does not call the stage itself: the settings are checked first
    assert known_to_gin.__doc__ == "Write one file."
    with pytest.raises(ValueError, match="run"):
        gin.parse_config("known_to_gin.run = 'elsewhere'")


# Full disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("filename", [None, "some/file.npy"])
def test_a_full_disk_is_reported_in_one_line_and_the_same_command_resumes(tmp_path, number, filename):
    work = Work()
    work.before_output = OSError(number, "No space left on device", filename)
    place = filename or tmp_path
    assert message(work.stage, tmp_path) == (f"no space left on the disk of {place}: free some space and run the same command again")
    work.before_output = None
    assert work.stage(tmp_path) == {"result": "same"}
    assert work.calls == 2


def test_other_errors_are_unchanged(tmp_path):
    for error in (PermissionError(errno.EACCES, "Permission denied"), ValueError("a defect"), OSError("without a number")):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
            raise error
        assert caught.value is error
