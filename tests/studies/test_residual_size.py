import itertools

import numpy as np
import pytest

from resmem_lm.errors import UserError
from resmem_lm.maintenance.append import append
from resmem_lm.maintenance.delete import delete
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.studies.residual_size import study_residual_size, with_entries
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, remove, write_json


def rows_of(workdir):
    return read_json(workdir / "studies/residual-size/results.json")["rows"]


def stamps(workdir):
    return {path: path.stat().st_mtime_ns for path in (workdir / "derived/residual-size/datastore").rglob("*.npy")}


def test_sizes_beyond_the_stored_entries_reach_the_whole_vocabulary(tiny_copy):
    study_residual_size(tiny_copy, sizes=(1, 4, 16))
    before = rows_of(tiny_copy)
    assert not (tiny_copy / "derived").exists()
    study_residual_size(tiny_copy, sizes=(1, 4, 16, 100, 256, 257))
    rows = rows_of(tiny_copy)
    assert [row["entries"] for row in rows] == [1, 4, 16, 100, 256]
    assert rows[:2] == before[:2]
    # At the stored size, `dropped` is a tighter bound than a quantized entry.
    assert rows[2] | {"certified, %": 0} == before[2] | {"certified, %": 0}
    assert 0 <= before[2]["certified, %"] - rows[2]["certified, %"] < 2
    shares = [row["certified, %"] for row in rows]
    assert shares == sorted(shares)
    assert shares[-1] > 99
    per_entry = {(b["bytes per row"] - a["bytes per row"]) / (b["entries"] - a["entries"]) for a, b in itertools.pairwise(rows)}
    assert per_entry == {3.0}
    assert verify(Run(tiny_copy)) == []
    built = stamps(tiny_copy)
    study_residual_size(tiny_copy, sizes=(2, 200))  # fewer than are built
    assert stamps(tiny_copy) == built


def test_rebuilt_rows_equal_the_datastore_and_an_interrupted_build_resumes(tiny_copy):
    datastore = open_datastore(tiny_copy / "datastore")
    made = with_entries(Run(tiny_copy), datastore, 40)
    for name in ("quantized_keys", "tokens", "log_power_sums"):
        np.testing.assert_array_equal(np.asarray(made.array(name)), np.asarray(datastore.array(name)))
    np.testing.assert_array_equal(np.asarray(made.array("quantized_residuals"))[:, :15], np.asarray(datastore.array("quantized_residuals")))
    before = stamps(tiny_copy)
    derived = tiny_copy / "derived/residual-size"
    remove(derived / "stages/build.json")  # as if killed after the first two shards
    remove(derived / "datastore/manifest.json")
    lost = made.shards[2]["folder"]
    remove(derived / "datastore" / lost)
    remove(derived / "datastore" / f"{lost.rpartition('.')[0]}.json")
    interrupted = read_json(tiny_copy / "stages/build.json")
    write_json(derived / "stages/build.json", interrupted | {"finished": False, "settings": interrupted["settings"] | {"entries": 40}})
    with_entries(Run(tiny_copy), datastore, 40)
    after = stamps(tiny_copy)
    kept = {path: stamp for path, stamp in before.items() if lost not in str(path)}
    assert kept.items() <= after.items()
    assert len(after) == len(before)
    assert with_entries(Run(tiny_copy), datastore, 60).binding.entries == 60


def test_rows_follow_an_append_and_deleted_rows_cannot_be_rebuilt(tiny_copy):
    datastore = open_datastore(tiny_copy / "datastore")
    with_entries(Run(tiny_copy), datastore, 20)
    (tiny_copy / "more.txt").write_text("Another document, with other words than those before it: nothing of it was there.")
    append(Run(tiny_copy), [str(tiny_copy / "more.txt")])
    grown = open_datastore(tiny_copy / "datastore")
    made = with_entries(Run(tiny_copy), grown, 20)
    assert datastore.rows < made.rows == grown.rows
    delete(Run(tiny_copy), document=datastore.documents(0)[0]["id"])
    with pytest.raises(UserError, match=r"run `resmem compact` first, or take study_residual_size.sizes up to 16"):
        with_entries(Run(tiny_copy), open_datastore(tiny_copy / "datastore"), 20)


def test_unusable_sizes_are_refused(tiny_run):
    with pytest.raises(UserError, match=r"sizes = \(0, 1000\): take one or more numbers from 1 to 256"):
        study_residual_size.function(Run(tiny_run), sizes=(0, 1000))
