import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.maintenance.delete import delete
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.studies.datastore_size import METHODS, fraction_of, study_datastore_size
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, remove, write_json

GRID = {"ks": (1, 4, 12, 50), "sigmas": (0.5, 1.0, 4.0), "temperatures": (1.0, 1.4), "lambdas": (0.5, 1.0)}  # as the run's evaluation


def rows_of(workdir):
    return read_json(workdir / "studies/datastore-size/results.json")["rows"]


def kept(datastore):
    return ~datastore.is_deleted(np.arange(datastore.rows))


@pytest.fixture(scope="module")
def studied(tiny_run, tmp_path_factory):
    """A run with a finished study of three fractions."""
    workdir = tmp_path_factory.mktemp("datastore-size") / "run"
    shutil.copytree(tiny_run, workdir, symlinks=True)
    study_datastore_size(workdir, fractions=(1.0, 0.02, 0.5), **GRID)
    return workdir


def test_the_whole_datastore_equals_the_evaluation_and_every_fraction_has_its_recall(studied):
    rows = rows_of(studied)
    assert [row["fraction"] for row in rows] == [0.02, 0.5, 1.0]
    assert rows[0]["rows"] < rows[1]["rows"] < rows[2]["rows"] == open_datastore(studied / "datastore").rows
    methods = read_json(studied / "results.json")["splits"]["test"]["methods"]
    keys = ("resmem_paper", "resmem", "knnlm", "resmem_calibrated", "resmem_adaptive")  # the methods of results.json come first
    for name, key in zip(METHODS, keys, strict=False):
        assert rows[2][f"{name}, gain, %"] == 100 * methods[key]["gain"]
        assert rows[2][f"{name}, 95%"] == "[{:.2f}, {:.2f}]".format(*(100 * value for value in methods[key]["gain_ci95"]))
    assert rows[2]["Calibrated ResMem, form"] == methods["resmem_calibrated"]["form"]
    assert all(0.9 < row["recall@k"] <= 1 for row in rows)
    assert verify(Run(studied)) == []


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=2))
def test_a_fraction_has_whole_documents_and_includes_smaller_fractions(tiny_run, pair):
    datastore = open_datastore(tiny_run / "datastore")
    small, large = sorted(pair)
    longest = max(document["rows"] for shard in range(3) for document in datastore.documents(shard))
    for fraction in (small, large):
        part = kept(fraction_of(datastore, fraction))
        assert fraction * datastore.rows <= part.sum() < fraction * datastore.rows + longest
        for shard, offset in enumerate(datastore.offsets[:-1]):
            for document in datastore.documents(shard):
                assert len(set(part[offset + document["first_row"] :][: document["rows"]])) == 1
    assert not (kept(fraction_of(datastore, small)) & ~kept(fraction_of(datastore, large))).any()
    assert kept(fraction_of(datastore, 1.0)).all()


def test_deleted_documents_are_in_no_fraction(tiny_copy):
    deleted = open_datastore(tiny_copy / "datastore").documents(0)[0]
    delete(Run(tiny_copy), document=deleted["id"])
    datastore = open_datastore(tiny_copy / "datastore")
    assert fraction_of(datastore, 1.0).live_rows == datastore.live_rows
    for fraction in (0.1, 0.6, 1.0):
        assert not kept(fraction_of(datastore, fraction))[deleted["first_row"] :][: deleted["rows"]].any()


def test_an_interrupted_study_resumes_and_recomputes_fractions_with_other_inputs(studied, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(studied, workdir, symlinks=True)
    small, large = (workdir / f"derived/datastore-size/fraction-{fraction}.json" for fraction in (0.02, 0.5))
    stamp, before = large.stat().st_mtime_ns, rows_of(workdir)
    study_datastore_size(workdir, fractions=(0.02, 0.5), **GRID)
    assert rows_of(workdir) == before[:2]
    for spoil in (lambda: write_json(small, read_json(small) | {"provenance": {}, "row": {}}), lambda: small.write_text("damaged")):
        spoil()
        remove(workdir / "stages/study-datastore-size.json")
        study_datastore_size(workdir, fractions=(0.02, 0.5), **GRID)
        assert rows_of(workdir) == before[:2]
    assert large.stat().st_mtime_ns == stamp
    study_datastore_size(workdir, fractions=(0.02,), **GRID | {"lambdas": (0.25, 1.0)})
    assert read_json(small)["settings"]["lambdas"] == [0.25, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": (0.0, 1.0)}, "fractions = .*take one or more numbers above 0 and up to 1"),
        ({"fractions": ()}, "fractions"),
        ({"ks": (100,)}, "ks = .*from 1 to 12"),
        ({"lambdas": (0.5,)}, "lambdas = .*add 1.0"),
        ({"lambdas": (1.0,)}, "lambdas = .*below 1"),
        ({"lambdas": (-1.0, 1.0)}, "lambdas = .*of 0 or more"),
        ({"sigmas": (0.0,)}, "sigmas = .*above 0"),
        ({"temperatures": (3.0,)}, "temperatures = .*out of"),
        ({"recall_queries": 0}, "recall_queries = 0"),
    ],
)
def test_unusable_settings_are_refused(tiny_run, settings, message):
    with pytest.raises(UserError, match=message):
        study_datastore_size.function(Run(tiny_run), **settings)
