import math
import re
import shutil

import pytest

from benchmarks.plan_against_run import file_bytes
from resmem_lm import config
from resmem_lm.cli import main
from resmem_lm.commands import stages_of
from resmem_lm.errors import UserError
from resmem_lm.memory.index_kinds import PROCESS_BYTES, group_shards, largest_index
from resmem_lm.planning import rates
from resmem_lm.planning.plan import duration, plan, size_text
from resmem_lm.planning.rates import Cost, Rates, build_work, query_work
from resmem_lm.planning.sizes import Amounts, assume, checkpoint_bytes, count, planned_bytes
from resmem_lm.workdir.run import Run
from tests.tiny import arguments

RATES = {
    "train_tokens_per_second": 1000.0,
    "tokens_per_second": 100.0,
    "index_rows_per_second": 50.0,
    "query_tokens_per_second": 20.0,
    "queries_per_second": 10.0,
    "evaluated_queries_per_second": 5.0,
}
GIVEN = [f"--{name}={value}" for name, value in RATES.items()]
AMOUNTS = {"rows": 1000, "queries": 300, "documents": 20}


@pytest.fixture
def settings(tmp_path):
    """The settings of the tiny configuration, by stage."""
    gin_file, _, text = arguments(tmp_path, tmp_path / "run")
    config.parse([gin_file.removeprefix("--gin_file=")], [text.removeprefix("--gin.")])
    return {stage.__name__: config.parameters(stage) for stage in stages_of("run")}


@pytest.fixture
def unmeasured(monkeypatch):
    def measure(*_):
        raise AssertionError("something was measured although every rate was given")

    monkeypatch.setattr("resmem_lm.planning.plan.measure", measure)
    monkeypatch.setattr("resmem_lm.planning.sizes.checkpoint_bytes", lambda _: 12345)  # it takes seconds


def planned(settings, *, workers=1, memory_gib=None, **amounts):
    return plan(None, settings, amounts=Amounts(**(AMOUNTS | amounts)), rates=Rates(**RATES), workers=workers, memory_gib=memory_gib)


def test_planned_bytes_equal_those_of_a_finished_run(tiny_run, settings):
    counts = count(Run(tiny_run), settings)
    found = planned_bytes(settings, counts, index_rows=[counts.rows], checkpoint=checkpoint_bytes(settings))
    run = file_bytes(Run(tiny_run))
    # Orbax writes a different number of files each time: 0.05% of T5-small's checkpoint, a few percent of this one.
    within = {name: 0.1 if name == "checkpoints" else 0.01 for name in found}
    assert {name: size for name, size in found.items() if abs(size - run.get(name, 0)) > within[name] * size} == {}
    records = {f"{name}/*.json" for name in ("datastore", "index", "neighbors")}
    unplanned = {"config.gin", "stages", "metrics", "gates.npz", "results.json", "report.html", ".lock"} | records
    assert found["index"] == counts.rows * (4 + 2) + 2 * 128  # so few rows have the suffix index only
    assert set(run) - set(found) == unplanned
    assert sum(run[name] for name in unplanned) < 300_000


def test_a_work_directory_is_counted_and_its_stages_do_not_run_again(tiny_run, tiny_copy, unmeasured, capsys):
    record = (tiny_copy / "stages" / "documents.json").read_bytes()
    assert main(["plan", *arguments(tiny_run.parent, tiny_copy), *GIVEN]) == 0
    documents = sum(len(path.read_text().splitlines()) for path in tiny_copy.glob("documents/*.jsonl"))
    printed = capsys.readouterr().out
    assert re.match(rf"[\d,]+ rows and [\d,]+ queries of {documents} documents \(counted\)\n", printed)
    assert f"{file_bytes(Run(tiny_copy))['datastore/quantized_keys.npy']:,}" in printed
    assert (tiny_copy / "stages" / "documents.json").read_bytes() == record


def test_documents_and_vocabulary_are_made_where_they_are_missing(tiny_copy, unmeasured, capsys):
    shutil.rmtree(tiny_copy)
    assert main(["plan", *arguments(tiny_copy.parent, tiny_copy), *GIVEN]) == 0
    assert {path.name for path in tiny_copy.iterdir()} == {"documents", "stages", "vocabulary", ".lock"}
    assert "(counted)" in capsys.readouterr().out


def test_given_rates_are_used_and_nothing_is_measured(settings, unmeasured, capsys):
    made = planned(settings)
    assert {name: rate.per_second for name, rate in made.rates.items()} == pytest.approx(RATES)
    assert all(rate.given for rate in made.rates.values())
    assert made.stages["train"].seconds == pytest.approx(30 * 4 * 64 / 1000)
    assert made.stages["build"].seconds == pytest.approx(sum(shard.window_tokens for shard in made.counts.shards) / 100)
    assert made.stages["index"].seconds == pytest.approx(1000 / 50)
    assert made.stages["evaluate"].seconds == pytest.approx(300 / 5)
    assert "measured" not in capsys.readouterr().out


def test_workers_share_the_build(settings, unmeasured):
    alone, shared = planned(settings), planned(settings, workers=2)
    assert shared.stages["build"].seconds == alone.stages["build"].seconds
    # One worker builds two of the three shards.
    assert shared.stages["build"].shared_seconds == pytest.approx(alone.stages["build"].seconds * 2 / 3)
    # Workers beyond the number of shards have nothing to do.
    assert planned(settings, workers=1000).stages["build"].shared_seconds == pytest.approx(alone.stages["build"].seconds / 3)
    assert shared.stages["train"].shared_seconds is None


def test_options_replace_the_settings_of_the_gin_file(tmp_path, unmeasured, capsys):
    gin_file, _, text = arguments(tmp_path, tmp_path / "run")
    with (tmp_path / "tiny.gin").open("a") as file:
        file.write("Amounts.rows = 5000\nAmounts.queries = 700\nAmounts.documents = 30\n")
    assert main(["plan", gin_file, text, *GIVEN]) == 0
    assert capsys.readouterr().out.startswith("5,000 rows and 700 queries of 30 documents (given or assumed)\n")
    assert main(["plan", gin_file, text, *GIVEN, "--rows=6_000"]) == 0
    assert capsys.readouterr().out.startswith("6,000 rows and 700 queries")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "Amounts.rows is not set: give --rows=..., or --workdir=... whose text is counted"),
        (["--rows=1e6"], "Amounts.queries is not set: give --queries=..., or --workdir=... whose text is counted"),
        (["--rows=0"], "Amounts.rows = 0: take a number of 1 or more"),
        (["--rows=inf"], "Amounts.rows = inf: take a number of 1 or more"),
        (["--rows=1e6", "--queries=1e5", "--documents=0.5"], "Amounts.documents = 0.5: take a number of 1 or more"),
        (["--gin.build_datastore.shards=0"], "build_datastore.shards = 0: take 1 or more, or None for all"),
        (["--rows=1e6", "--queries=1e5", "--tokens_per_second=0"], "Rates.tokens_per_second = 0: take a number above 0"),
        (["--rows=1e6", "--queries=1e5", "--workers=-1"], "plan.workers = -1: take a number of 1 or more"),
        (["--rows=1e6", "--queries=1e5", "--memory_gib=0.5"], "plan.memory_gib = 0.5 holds an index of 0 rows"),
        (["--gin.plan.workers='many'"], "plan.workers = 'many' has the wrong type"),
        (["--gin.Amounts.row=3"], "--gin.Amounts.row=3: "),
    ],
)
def test_a_wrong_input_is_one_line(tmp_path, capsys, wrong, message):
    gin_file, _, text = arguments(tmp_path, tmp_path / "run")
    assert main(["plan", gin_file, text, *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"resmem: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["faiss", "exact"])
@pytest.mark.parametrize("memory_gib", [1.01, 1.02, 1.1, 2, 64])
def test_shards_of_the_index_are_whole_shards_of_the_datastore_and_fit_the_memory(settings, unmeasured, memory_gib, kind):
    settings["build_datastore"]["shards"] = 20
    settings["build_index"]["kind"] = kind
    made = planned(settings, rows=200_010, memory_gib=memory_gib)
    shards = [shard.tokens for shard in made.counts.shards]
    most = largest_index(kind, int(memory_gib * 2**30) - PROCESS_BYTES, 32, settings["build_index"]["training_rows"])
    assert made.index_rows == [sum(shards[first : first + number]) for first, number in group_shards(shards, most)]
    assert sum(made.index_rows) == 200_010
    assert max(made.index_rows) <= most
    assert made.stages["search"].seconds >= planned(settings, rows=200_010, memory_gib=128).stages["search"].seconds


def test_the_memory_that_an_error_names_is_enough(settings, unmeasured):
    amounts = {"rows": 200_000_000, "queries": 300, "documents": 20_000}
    with pytest.raises(UserError, match=r"the largest shard of the datastore has 66666667: take [\d.]+, or more") as caught:
        planned(settings, **amounts, memory_gib=2)
    enough = float(re.search(r"take ([\d.]+)", str(caught.value))[1])
    assert len(planned(settings, **amounts, memory_gib=enough).index_rows) == 3


def test_the_default_memory_is_the_memory_of_the_index(settings, unmeasured):
    settings["build_datastore"]["shards"] = 20
    settings["build_index"]["memory_gib"] = 1.02
    assert planned(settings, rows=200_010).index_rows == planned(settings, rows=200_010, memory_gib=1.02).index_rows


def test_all_bytes_grow_with_rows_and_queries(settings):
    def of(rows, queries):
        counts = assume(settings, Amounts(rows, queries, (rows + queries) // 100, bytes_per_token=4.0))
        assert (counts.rows, counts.all_queries) == (rows, queries)
        return planned_bytes(settings, counts, index_rows=[rows], checkpoint=1)

    small, more_rows, more_queries = of(30_000, 3_000), of(60_000, 3_000), of(30_000, 6_000)
    for name in small:
        split = {"datastore": more_rows, "neighbors": more_queries}.get(name.partition("/")[0])
        if split and small[name] > 50_000:  # in smaller files headers matter
            assert split[name] == pytest.approx(2 * small[name], rel=0.01), name
    assert sum(more_rows.values()) > sum(small.values()) < sum(more_queries.values())


@pytest.mark.parametrize(("rows", "documents"), [(100_000, 1000), (100_000, 30_000), (100_000, 10)])
def test_windows_compute_more_tokens_than_rows_and_at_most_their_context_more(settings, rows, documents):
    counts = assume(settings, Amounts(rows, 10, documents, bytes_per_token=4.0))
    computed = sum(shard.window_tokens for shard in counts.shards)
    padding = 16 * 32 * len(counts.shards)
    assert rows <= computed <= rows * 32 / 24 + padding


def test_small_runs_measure_every_rate(tiny_run, settings, monkeypatch, capsys):
    for name, value in {"SIZES": (1, 2, 3), "SMALL": 100, "QUERIES": 1, "TRAIN_TOKENS": 256}.items():
        monkeypatch.setattr(rates, name, value)
    made = plan(Run(tiny_run), settings=settings | {"build_index": settings["build_index"] | {"candidates": 20, "training_rows": 1000}})
    assert set(made.rates) == set(RATES)
    assert not any(rate.given for rate in made.rates.values())
    assert all(math.isfinite(rate.per_second) and rate.per_second > 0 for rate in made.rates.values())
    assert set(made.stages) == {"documents", "vocabulary", "train", "build", "index", "search", "evaluate"}
    assert all(stage.seconds > 0 for stage in made.stages.values())
    assert all(stage.memory > 2**25 for name, stage in made.stages.items() if name not in ("documents", "vocabulary"))
    assert "measured here" in capsys.readouterr().out


def test_the_cost_of_a_stage_is_recovered_from_three_runs():
    def small_run(units, warm_up=0.0):
        seconds = {"build": 2.0 + 0.5 * units + warm_up, "index": 1.0}
        return rates._SmallRun(Run("unused"), units, 0.0, {"build": units}, seconds, {})

    costs = rates._stage_costs(small_run(1, warm_up=3.0), small_run(6), small_run(24))
    assert costs == {"build": Cost(pytest.approx(5.0), pytest.approx(0.5))}


@pytest.mark.parametrize("kind", ["faiss", "scann"])
def test_the_work_of_an_index_grows_with_its_rows(kind):
    build = [build_work(kind, rows, 64, 100_000) for rows in (1000, 20_000, 10**6, 10**9)]
    search = [query_work(kind, rows, 64) for rows in (20_000, 10**6, 10**9)]
    assert build == sorted(build)
    assert build[0] == 0  # so few rows have no tree
    assert search == sorted(search)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (size_text(999), "999 Bytes"),
        (size_text(1_678_336_131_072), "1.678 TB"),
        (duration(0.25), "0.25 seconds"),
        (duration(90.0), "1 minute and 30 seconds"),
        (duration(86400.0 * 1234), "1234 days"),
    ],
)
def test_units(text, wanted):
    assert text == wanted
