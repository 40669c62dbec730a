import dataclasses
import errno
from pathlib import Path

import gin
import pytest

from resmem_lm.errors import UserError
from resmem_lm.workdir.stages import Stage, disk_errors, stage
from resmem_lm.workdir.storage import read_json, sha256, write_bytes


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int = 2


class Work:
    """A stage whose function counts its calls, writes its output and does what it is told to."""

    def __init__(self, *, name="first", after=(), redo=False, extend=False, free=(), replaces=""):
        self.calls, self.result, self.before_output, self.after_output = 0, "same", None, None

        def make_things(workdir, *, size=1, names=("a", "b"), shape=None, where=None, runner=""):
            self.calls += 1
            if self.before_output:
                raise self.before_output
            write_bytes(workdir / name / "things.txt", b"things")
            if self.after_output:
                raise self.after_output
            return {"result": self.result}

        self.stage = Stage(make_things, name=name, after=after, output=name, redo=redo, extend=extend, free=free, replaces=replaces)


def message(call, *args, **kwargs):
    """The one line that a UserError says."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A stage and its settings


def test_a_finished_stage_is_skipped_and_gives_its_result_again(tmp_path):
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


def test_what_lies_at_the_output_and_is_not_of_a_run_is_not_replaced(tmp_path):
    work = Work(replaces="things.txt")
    (tmp_path / "first").mkdir()
    (tmp_path / "first/mine.txt").write_text("mine")
    told = message(work.stage, tmp_path)
    assert told == f"{tmp_path / 'first'} is not of a run, and first would replace it: move it, or take another --workdir"
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


def test_a_setting_with_which_a_stage_failed_before_it_wrote_anything_can_be_mended(tmp_path):
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


def test_following_the_mend_of_a_refusal_makes_the_stage_anew(tmp_path):
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
def test_settings_are_compared_as_json_has_them(tmp_path, first, second):
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


def test_a_missing_output_of_a_finished_stage_is_told_with_the_mend(tmp_path):
    work = Work()
    work.stage(tmp_path)
    (tmp_path / "first" / "things.txt").unlink()
    (tmp_path / "first").rmdir()
    assert message(work.stage, tmp_path).endswith(f": delete {tmp_path / 'stages' / 'first.json'} to make it again")
    (tmp_path / "stages" / "first.json").unlink()
    work.stage(tmp_path)
    assert work.calls == 2


def test_a_damaged_record_is_told_with_the_mend(tmp_path):
    work = Work()
    work.stage(tmp_path)
    record = tmp_path / "stages" / "first.json"
    record.write_text(record.read_text()[:20])
    assert message(work.stage, tmp_path).startswith(f"{record} is damaged (")


def test_a_record_tells_settings_inputs_seconds_and_result(tmp_path):
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
def test_a_stage_waits_for_those_it_needs(tmp_path, begun):
    if begun:
        first = Work()
        first.before_output = RuntimeError()
        with pytest.raises(RuntimeError):
            first.stage(tmp_path)
    second = Work(name="second", after=("first",))
    assert message(second.stage, tmp_path) == f"{tmp_path}: second needs the stage first, which has not finished: run it first"
    assert second.calls == 0


def remade(tmp_path, result):
    """The first stage made anew from other text, as a user does who deletes it."""
    first = Work()
    first.result = result
    (tmp_path / "stages" / "first.json").unlink(missing_ok=True)
    first.stage(tmp_path)


def test_changed_inputs_are_refused_with_their_name(tmp_path):
    second = Work(name="second", after=("first",))
    remade(tmp_path, "one text")
    second.stage(tmp_path)
    remade(tmp_path, "another text")
    assert message(second.stage, tmp_path) == (
        f"{tmp_path / 'second'} was made from another first than {tmp_path} has now: "
        f"take another --workdir, or delete {tmp_path / 'second'} and {tmp_path / 'stages' / 'second.json'}"
    )
    assert second.calls == 1


def test_changed_inputs_of_an_unfinished_stage_are_refused_because_it_would_go_on_with_both(tmp_path):
    second = Work(name="second", after=("first",))
    remade(tmp_path, "one text")
    second.after_output = RuntimeError()
    with pytest.raises(RuntimeError):
        second.stage(tmp_path)
    remade(tmp_path, "another text")
    assert "was made from another first" in message(second.stage, tmp_path)


def test_inputs_remade_with_the_same_result_are_the_same(tmp_path):
    second = Work(name="second", after=("first",))
    remade(tmp_path, "one text")
    second.stage(tmp_path)
    remade(tmp_path, "one text")
    assert second.stage(tmp_path) == {"result": "same"}
    assert second.calls == 1


def test_a_stage_to_redo_is_redone_for_other_settings_or_inputs_and_skipped_for_the_same(tmp_path):
    second = Work(name="second", after=("first",), redo=True)
    remade(tmp_path, "one text")
    second.stage(tmp_path, size=1)
    second.stage(tmp_path, size=1)
    assert second.calls == 1
    second.stage.check(tmp_path, size=2)
    second.stage(tmp_path, size=2)
    assert second.calls == 2
    remade(tmp_path, "another text")
    second.stage(tmp_path, size=2)
    second.stage(tmp_path, size=2)
    assert second.calls == 3


def test_a_stage_to_extend_is_called_again_for_other_inputs_and_refuses_other_settings(tmp_path):
    second = Work(name="second", after=("first",), extend=True)
    remade(tmp_path, "one text")
    second.stage(tmp_path, size=1)
    remade(tmp_path, "another text")
    second.stage(tmp_path, size=1)
    second.stage(tmp_path, size=1)
    assert second.calls == 2
    assert "make_things.size = 1, now it is 2" in message(second.stage, tmp_path, size=2)


def test_a_renewed_result_is_a_changed_input(tmp_path):
    first, second = Work(), Work(name="second", after=("first",))
    first.stage(tmp_path)
    second.stage(tmp_path)
    first.stage.renew(tmp_path, {"result": "another"})
    assert first.stage(tmp_path) == {"result": "another"}
    assert "was made from another first" in message(second.stage, tmp_path)


def test_a_stage_is_known_to_gin_by_the_name_of_its_function(tmp_path):
    @stage(name="first", output="first")
    def known_to_gin(workdir, *, size=1):
        """Says what it does."""
        write_bytes(workdir / "first", b"")
        return {"size": size}

    gin.parse_config("known_to_gin.size = 5")
    assert gin.get_bindings("known_to_gin") == {"size": 5}
    assert known_to_gin(tmp_path) == {"size": 1}  # gin does not call it: its settings are checked first
    assert known_to_gin.__doc__ == "Says what it does."
    with pytest.raises(ValueError, match="workdir"):
        gin.parse_config("known_to_gin.workdir = 'elsewhere'")


# Full disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("filename", [None, "some/file.npy"])
def test_a_full_disk_is_told_in_one_line_and_the_same_command_goes_on(tmp_path, number, filename):
    work = Work()
    work.before_output = OSError(number, "No space left on device", filename)
    place = filename or tmp_path
    assert message(work.stage, tmp_path) == (f"no space left on the disk of {place}: free some and run the same command again; it goes on")
    work.before_output = None
    assert work.stage(tmp_path) == {"result": "same"}
    assert work.calls == 2


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (PermissionError(errno.EACCES, "Permission denied"), ValueError("a defect"), OSError("without a number")):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
            raise error
        assert caught.value is error
