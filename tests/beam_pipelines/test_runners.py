"""Every runner, and every number of shards, gives the same rows and neighbors."""

import errno
import shutil

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.metrics import MetricsFilter
from botocore.exceptions import ClientError

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
from resmem_lm.text.shards import QUERY_SPLITS, query_documents
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
    "Dask": "--runner=apache_beam.runners.dask.dask_runner.DaskRunner --dask_npartitions=3 --dask_client_address={dask}",
}


@pytest.fixture
def prepared(tiny_copy):
    """A run that is finished up to training."""
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
        (split, name): np.asarray(array) for split in QUERY_SPLITS for name, array in open_queries(Run(workdir), split)._asdict().items()
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=str(name))


@pytest.fixture(scope="module")
def dask():
    """Start a Dask cluster and return its address. All pipelines share it, because its workers take seconds to start."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'resmem_lm[dask]'")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.mark.filterwarnings("ignore")  # of the runners
@pytest.mark.parametrize("name", RUNNERS)
def test_every_runner_gives_the_same_rows_and_neighbors(tiny_run, prepared, name, request):
    options = RUNNERS[name].replace("{dask}", request.getfixturevalue("dask") if name == "Dask" else "")
    build_datastore(prepared, **BUILD, pipeline_options=options)
    build_index(prepared, pipeline_options=options)
    search(prepared, neighbors=12, pipeline_options=options)
    assert_same(rows(prepared), rows(tiny_run))
    assert_same(neighbors(prepared), neighbors(tiny_run))
    assert sorted(path.name.partition(".")[0] for path in (prepared / "datastore").iterdir() if path.is_dir()) == [
        f"shard-0000{shard}-of-00003" for shard in range(3)
    ]


class Failing:
    """Work that always raises the same error."""

    def __init__(self, error):
        self.error = error

    def setup(self):
        return None

    def process(self, unit, kept):
        raise self.error
        yield


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "datastore/shard"), "Permission denied: 'datastore/shard': correct it and run"),
        (ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "GetObject"), "ExpiredToken.*: correct it and run"),
        (DamagedError("index.json was altered"), "^index.json was altered$"),
    ],
)
def test_an_error_of_a_worker_that_the_user_can_fix_is_reported_in_one_line(tmp_path, capfd, caplog, error, message):
    with pytest.raises(UserError, match=message) as caught:
        run_units("Fail", [1], Failing(error), "", published=tmp_path, names=["a"])
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]


def test_an_error_of_the_program_is_not_a_user_error(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        run_units("Fail", [1], Failing(ValueError("a bug")), "", published=tmp_path, names=["a"])


@pytest.fixture(scope="module")
def eight_shards(tiny_run, tmp_path_factory):
    """A datastore in 8 shards."""
    folder = tmp_path_factory.mktemp("eight")
    for command in ("train", "build"):
        assert main([command, *arguments(folder, folder / "run"), "--gin.prepare_documents.shards=8"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def nearest_50(eight_shards):
    """Rows and distances of the 50 nearest neighbors of every query, by one exact index."""
    run, datastore = Run(eight_shards), open_datastore(eight_shards / "datastore")
    model, vocabulary = load_model(run.checkpoints), load_vocabulary(run)
    encoder, found = Encoder(model, datastore.binding.window, query_head), {}
    for split in QUERY_SPLITS:
        tokens = vocabulary.encode_documents(query_documents(run, split))
        keys = np.empty((sum(map(len, tokens)), model.config.emb_dim), np.float32)
        for positions, encoded in encoder(tokens):
            keys[positions] = encoded.keys
        found[split] = ExactIndex(datastore).search(keys, 50)
    return found


@pytest.mark.parametrize("kind", ["exact", "faiss", "scann"])
def test_eight_index_shards_find_the_same_50_neighbors_as_one_exact_index(eight_shards, nearest_50, tmp_path, kind, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(eight_shards, workdir)
    datastore = open_datastore(workdir / "datastore")
    monkeypatch.setattr("resmem_lm.memory.faiss_index.SMALL", 16)
    monkeypatch.setattr("beam_pipelines.build_index.largest_index", lambda *_: max(shard["rows"] for shard in datastore.shards))
    monkeypatch.setattr("beam_pipelines.build_index.group_shards", lambda rows, most: [(shard, 1) for shard in range(len(rows))])
    assert len(build_index(workdir, kind=kind)["shards"]) == 8
    facts = search(workdir, neighbors=50)
    for split, (wanted_rows, wanted_distances) in nearest_50.items():
        queries = open_queries(Run(workdir), split)
        rows, distances = np.asarray(queries.rows), np.asarray(queries.distances)
        assert len(rows) == len(queries.tokens) == len(wanted_rows)
        if kind == "exact":
            np.testing.assert_allclose(distances, wanted_distances, rtol=1e-4, atol=1e-4)
            # First tokens of documents have the same key, so more than 50 rows may have the same distance.
            nearer = wanted_distances < wanted_distances[:, -1:] - 1e-3
            assert nearer.mean() > 0.5
            for query, some in enumerate(nearer):
                assert set(wanted_rows[query, some]) <= set(rows[query])
        else:
            assert recall(rows, wanted_rows) >= 0.97
            assert facts[split]["recall_at_k"] >= 0.97


def test_a_memory_too_small_for_a_shard_is_refused_with_one_that_is_large_enough(eight_shards):
    with pytest.raises(
        UserError, match=r"build_index.memory_gib = 1 is too small for the largest shard .* take 1\.\d \(--index_memory_gib\)"
    ):
        build_index.function(Run(eight_shards), memory_gib=1.0)


def test_counters_of_beam_equal_those_of_the_records(prepared, monkeypatch):
    results = []

    class Pipeline(beam.Pipeline):
        def run(self, *args, **kwargs):
            results.append(super().run(*args, **kwargs))
            return results[-1]

    monkeypatch.setattr(beam, "Pipeline", Pipeline)
    counts = build_datastore(prepared, **BUILD)["counts"]
    counters = results[0].metrics().query(MetricsFilter().with_namespace("resmem"))["counters"]
    assert {counter.key.metric.name: counter.committed for counter in counters} == counts
    assert set(counts) == set(COUNTERS)
    assert counts["tokens"] == read_json(prepared / "datastore/manifest.json")["rows"]
    assert counts["tokens"] <= counts["window_tokens"] <= counts["computed_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bogus=3", "Beam has no option --bogus=3"),
        ("--runner=Foo", "Beam has no runner Foo: take one of "),
        ("--runner=nowhere.Runner", "the runner nowhere.Runner cannot be imported"),
        ("--direct_num_workers=two", "argument --direct_num_workers: invalid int value: 'two'"),
        ("--temp_location='gs://", "No closing quotation"),
    ],
)
def test_options_that_beam_would_ignore_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        arguments_of(options)


@pytest.mark.parametrize("options", ["--runner=PortableRunner", "--runner=DataflowRunner --region=r --temp_location=gs://bucket/t"])
def test_an_error_of_a_runner_is_reported_in_one_line(tmp_path, options):
    with pytest.raises(UserError, match=f"^--pipeline_options={options}: the runner reports: .*: correct the options") as caught:
        run_units("Fail", [1], Failing(ValueError("not started")), options, published=tmp_path, names=["a"])
    assert "\n" not in str(caught.value)


def test_options_of_other_runners_are_accepted():
    assert arguments_of("--runner=DataflowRunner --project=p --region=r --temp_location=gs://b/t --max_num_workers=9")
    assert arguments_of("--runner=FlinkRunner --flink_master=host:8081 --parallelism=4")
