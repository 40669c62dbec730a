"""The same rows and neighbors whatever runs the pipelines, and in however many shards."""

import errno
import shutil

import numpy as np
import pytest
from apache_beam.metrics import MetricsFilter
from botocore.exceptions import ClientError

from beam_pipelines import runner
from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.runner import LOCAL_RUNNER, arguments_of, run_units
from beam_pipelines.search_neighbors import search
from resmem_lm.cli import main
from resmem_lm.errors import DamagedError, UserError
from resmem_lm.evaluation.neighbors import open_queries, recall
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.schema import ARRAYS, COUNTERS
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.shards import query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json
from tests.tiny import arguments

BUILD = {"window_length": 32, "window_context": 8, "entries": 16}
RUNNERS = {
    "one thread": f"--runner={LOCAL_RUNNER}",
    "threads": "--direct_running_mode=multi_threading --direct_num_workers=2",
    "two processes": "--direct_running_mode=multi_processing --direct_num_workers=2",
    "each bundle three times": f"--runner={LOCAL_RUNNER} --direct_runner_bundle_repeat=2",
    "a job service": "--runner=PortableRunner --job_endpoint=embed --environment_type=LOOPBACK",
    "Dask": "--runner=apache_beam.runners.dask.dask_runner.DaskRunner --dask_npartitions=3",
}


@pytest.fixture
def prepared(tiny_copy):
    """Everything up to training."""
    for name in ("build", "index", "search", "evaluate", "report"):
        (tiny_copy / "stages" / f"{name}.json").unlink()
    for name in ("datastore", "index", "neighbors"):
        shutil.rmtree(tiny_copy / name)
    return tiny_copy


def rows(workdir):
    datastore = open_datastore(workdir / "datastore", checksums=True)
    return {name: np.asarray(datastore.array(name)) for name in ARRAYS}


def neighbors(workdir):
    return {
        (split, name): np.asarray(array)
        for split in ("validation", "test")
        for name, array in open_queries(Run(workdir), split)._asdict().items()
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=str(name))


@pytest.mark.filterwarnings("ignore")  # the runners' own
@pytest.mark.parametrize("name", RUNNERS)
def test_every_runner_makes_the_same_rows_and_neighbors(tiny_run, prepared, name):
    if name == "Dask":
        pytest.importorskip("distributed", reason="Dask is not installed: pip install 'resmem_lm[dask]'")
    build_datastore(prepared, **BUILD, pipeline_options=RUNNERS[name])
    build_index(prepared, pipeline_options=RUNNERS[name])
    search(prepared, neighbors=12, pipeline_options=RUNNERS[name])
    assert_same(rows(prepared), rows(tiny_run))
    assert_same(neighbors(prepared), neighbors(tiny_run))
    assert sorted(path.name.partition(".")[0] for path in (prepared / "datastore").iterdir() if path.is_dir()) == [
        f"shard-0000{shard}-of-00003" for shard in range(3)
    ]


class Failing:
    """Work that always meets the same error."""

    def __init__(self, error):
        self.error = error

    def setup(self):
        return None

    def process(self, unit, kept):
        raise self.error
        yield


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "datastore/shard"), "Permission denied: 'datastore/shard': mend it and run"),
        (ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "GetObject"), "ExpiredToken.*: mend it and run"),
        (DamagedError("index.json was altered"), "^index.json was altered$"),
    ],
)
def test_what_a_worker_meets_that_the_user_can_mend_is_told_in_one_line(tmp_path, capfd, caplog, error, told):
    with pytest.raises(UserError, match=told) as caught:
        run_units("Fail", [1], Failing(error), "", published=tmp_path, names=["a"])
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]


def test_a_fault_of_ours_is_not_told_as_the_users(tmp_path):
    with pytest.raises(RuntimeError, match="ours"):
        run_units("Fail", [1], Failing(ValueError("ours")), "", published=tmp_path, names=["a"])


@pytest.fixture(scope="module")
def eight_shards(tiny_run, tmp_path_factory):
    """A datastore in 8 shards."""
    folder = tmp_path_factory.mktemp("eight")
    for command in ("train", "build"):
        assert main([command, *arguments(folder, folder / "run"), "--gin.prepare_documents.shards=8"]) == 0
    return folder / "run"


@pytest.mark.parametrize("kind", ["exact", "faiss", "scann"])
def test_eight_shards_of_the_index_find_the_same_50_as_one_exact_index(eight_shards, tmp_path, kind, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(eight_shards, workdir)
    datastore = open_datastore(workdir / "datastore")
    monkeypatch.setattr("resmem_lm.memory.faiss_index.SMALL", 16)
    monkeypatch.setattr("beam_pipelines.build_index.largest_index", lambda *_: max(shard["rows"] for shard in datastore.shards))
    monkeypatch.setattr("beam_pipelines.build_index.group_shards", lambda rows, most: [(shard, 1) for shard in range(len(rows))])
    assert len(build_index(workdir, kind=kind)["shards"]) == 8
    facts = search(workdir, neighbors=50)
    for split in ("validation", "test"):
        queries = open_queries(Run(workdir), split)
        model, vocabulary = load_model(workdir / "checkpoints"), load_vocabulary(Run(workdir))
        keys = np.empty((len(queries.tokens), model.config.emb_dim), np.float32)
        tokens = vocabulary.encode_documents(query_documents(Run(workdir), split))
        for positions, encoded in Encoder(model, datastore.binding.window, query_head)(tokens):
            keys[positions] = encoded.keys
        wanted_rows, wanted_distances = ExactIndex(datastore).search(keys, 50)
        rows, distances = np.asarray(queries.rows), np.asarray(queries.distances)
        if kind == "exact":
            np.testing.assert_allclose(distances, wanted_distances, rtol=1e-4, atol=1e-4)
            # First tokens of documents have one key: of more than 50 equals, any may be the last ones.
            nearer = wanted_distances < wanted_distances[:, -1:] - 1e-3
            assert nearer.mean() > 0.5
            for query, some in enumerate(nearer):
                assert set(wanted_rows[query, some]) <= set(rows[query])
        else:
            assert recall(rows, wanted_rows) >= 0.97
            assert facts[split]["recall_at_k"] >= 0.97


def test_a_shard_of_the_datastore_that_the_memory_does_not_hold_is_told_with_what_would_do(eight_shards):
    with pytest.raises(
        UserError, match=r"build_index.memory_gib = 1 is too small for the largest shard .* take 1\.\d \(--index_memory_gib\)"
    ):
        build_index.function(eight_shards, memory_gib=1.0)


def test_beams_counters_are_those_of_the_records(prepared, monkeypatch):
    results = []

    class Pipeline(runner.beam.Pipeline):
        def run(self, *args, **kwargs):
            results.append(super().run(*args, **kwargs))
            return results[-1]

    monkeypatch.setattr("beam_pipelines.runner.beam.Pipeline", Pipeline)
    counts = build_datastore(prepared, **BUILD)["counts"]
    counters = results[0].metrics().query(MetricsFilter().with_namespace("resmem"))["counters"]
    assert {counter.key.metric.name: counter.committed for counter in counters} == counts
    assert set(counts) == set(COUNTERS)
    assert counts["tokens"] == read_json(prepared / "datastore/manifest.json")["rows"]
    assert counts["tokens"] <= counts["window_tokens"] <= counts["computed_tokens"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--bogus=3", "Beam has no option --bogus=3"),
        ("--runner=Foo", "the runner Foo is unknown: take one of "),
        ("--runner=nowhere.Runner", "the runner nowhere.Runner cannot be imported"),
        ("--direct_num_workers=two", "argument --direct_num_workers: invalid int value: 'two'"),
        ("--temp_location='gs://", "No closing quotation"),
    ],
)
def test_what_beam_would_pass_over_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        arguments_of(options)


@pytest.mark.parametrize("options", ["--runner=PortableRunner", "--runner=DataflowRunner --region=r --temp_location=gs://bucket/t"])
def test_what_a_runner_lacks_is_told_in_one_line(tmp_path, options):
    with pytest.raises(UserError, match=f"^--pipeline_options={options}: the runner says: .*: mend them") as caught:
        run_units("Fail", [1], Failing(ValueError("never begun")), options, published=tmp_path, names=["a"])
    assert "\n" not in str(caught.value)


def test_known_options_are_taken():
    assert arguments_of("--runner=DataflowRunner --project=p --region=r --temp_location=gs://b/t --max_num_workers=9")
    assert arguments_of("--runner=FlinkRunner --flink_master=host:8081 --parallelism=4")
