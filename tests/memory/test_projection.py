import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.search_neighbors import search
from resmem_lm.errors import UserError
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.projection import principal_components, projection_of, projection_path, save_projection
from resmem_lm.memory.schema import Binding
from resmem_lm.report.inspect import inspect
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, remove, sha256
from tests.tiny import shard_folder

DERIVED_FROM_ROWS = ("datastore", "index", "neighbors", "results.json")


@given(st.integers(0, 2**32 - 1))
def test_components_are_orthonormal_and_keep_the_variance(seed):
    rng = np.random.default_rng(seed)
    plane = rng.normal(size=(2, 6))
    keys = (rng.normal(size=(300, 2)) @ plane + 0.001 * rng.normal(size=(300, 6)) + 5).astype(np.float32)
    components = principal_components(keys, 2)
    np.testing.assert_allclose(components.T @ components, np.eye(2), atol=1e-5)
    apart, kept = keys[:100] - keys[100:200], (keys[:100] - keys[100:200]) @ components
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), np.linalg.norm(apart, axis=1), atol=0.02)


@given(st.integers(0, 2**32 - 1))
def test_no_direction_has_most_of_the_variance(seed):
    keys = np.random.default_rng(seed).normal(size=(400, 48)) * 0.8 ** np.arange(48)
    deviations = (keys @ principal_components(keys.astype(np.float32), 16)).std(axis=0)
    assert deviations.max() < 3 * deviations.mean()


def test_a_saved_projection_is_loaded_and_an_altered_one_is_refused(tmp_path):
    projection, path = np.arange(6, dtype=np.float32).reshape(3, 2), projection_path(tmp_path, "model", 2)
    save_projection(path, projection)
    binding = Binding("model", "vocabulary", WindowSpec(32, 8), (1.0,), 16, key_dimensions=2, projection=sha256(path))
    np.testing.assert_array_equal(projection_of(tmp_path, binding), projection)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"was altered: delete .* and run `resmem build` again"):
        projection_of(tmp_path, binding)


def settings(workdir, name):
    return read_json(workdir / "stages" / f"{name}.json")["settings"]


def test_a_run_on_projected_keys(tiny_copy):
    tried = {name: settings(tiny_copy, name) for name in ("build", "index", "search", "evaluate")}
    before = read_json(tiny_copy / "results.json")
    for name in DERIVED_FROM_ROWS:
        remove(tiny_copy / name)
    for name in tried:
        remove(tiny_copy / "stages" / f"{name}.json")
    build_datastore(tiny_copy, **tried["build"] | {"key_dimensions": 24})
    datastore = open_datastore(tiny_copy / "datastore")
    assert datastore.array("quantized_keys").shape[1] == 24
    build_index(tiny_copy, **tried["index"])
    search(tiny_copy, **tried["search"])
    evaluate(tiny_copy, **tried["evaluate"])
    after = read_json(tiny_copy / "results.json")
    assert after["splits"]["test"]["methods"]["deepnet"] == before["splits"]["test"]["methods"]["deepnet"]
    assert abs(after["splits"]["test"]["methods"]["knn"]["accuracy"] - before["splits"]["test"]["methods"]["knn"]["accuracy"]) < 0.03
    assert len(inspect(Run(tiny_copy), "The array returns")) > 2
    assert verify(Run(tiny_copy)) == []

    projection = next((tiny_copy / "datastore").glob("projection-*.npy"))
    stamp, made = projection.stat().st_mtime_ns, sha256(shard_folder(tiny_copy, 0) / "quantized_keys.npy")
    remove(shard_folder(tiny_copy, 0))  # the shard is rebuilt with the same projection
    remove(tiny_copy / "stages" / "build.json")
    build_datastore(tiny_copy, **tried["build"] | {"key_dimensions": 24})
    assert projection.stat().st_mtime_ns == stamp
    assert sha256(shard_folder(tiny_copy, 0) / "quantized_keys.npy") == made
    projection.write_bytes(b"")
    assert any("was altered: delete" in problem for problem in verify(Run(tiny_copy)))


def test_more_dimensions_than_the_model_has_are_refused(tiny_copy):
    tried = settings(tiny_copy, "build")
    for name in ("datastore", "stages/build.json"):
        remove(tiny_copy / name)
    with pytest.raises(UserError, match=r"key_dimensions = 33: take 1 to 32, or None for all"):
        build_datastore(tiny_copy, **tried | {"key_dimensions": 33})
