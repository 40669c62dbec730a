"""The whole experiment on a little text, on this machine, so that a plan can be made from what the real code takes.

It runs twice, the second time on twice as much text: what grows is per row or per query, what does not is paid once.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beam_pipelines.datastore import build_datastore
from resmem_lm.datastore import open_datastore
from resmem_lm.documents import Document, prepare_documents
from resmem_lm.evaluate import evaluate
from resmem_lm.index import SMALL, ExactIndex, ScannIndex, build_index, open_index
from resmem_lm.progress import progress
from resmem_lm.search import search
from resmem_lm.train import train
from resmem_lm.vocabulary import make_vocabulary
from resmem_lm.workdir import read_json

TREE_ROWS = (int(1.15 * SMALL), int(2.3 * SMALL))
STEPS = (6, 18)
STEP_TOKENS = 2048  # a step of the paper's size would take minutes on a CPU
SHARDS = 4

Settings = dict[str, dict[str, Any]]


class Rehearsal(NamedTuple):
    """What one run on a little text took."""

    rows: int
    queries: int
    train_documents: int
    query_documents: int
    seconds: dict[str, float]  # by stage
    bytes: dict[str, int]  # by path in the work directory, shards and splits together
    step_tokens: int
    steps: int


class SearchCosts(NamedTuple):
    """Seconds, measured on the second rehearsal's index."""

    query: float  # of one search, whatever the number of rows
    compared_row: float  # of one query and one row in a leaf that is searched
    exact_rows: float  # of one row, compared with all queries of a split's recall sample
    index_leaf_row: float  # of one row and one leaf in building the tree
    index_time: float  # of the second rehearsal's index, measured again


def file_bytes(workdir: Path) -> dict[str, int]:
    """Bytes of each kind of file in a work directory; shards and checkpoints of one kind together."""
    found: dict[str, int] = {}
    for path in workdir.rglob("*"):
        parts = path.relative_to(workdir).parts
        if not path.is_file() or len(parts) == 1 or parts[0] in ("stages", "metrics"):
            continue
        kind = parts[0] if parts[0] in ("documents", "vocabulary", "checkpoints") else f"{parts[0]}/{parts[-1]}"
        found[kind] = found.get(kind, 0) + path.stat().st_size
    return found


def pieces(documents: Iterator[Document], characters: int) -> Iterator[Document]:
    """Documents of at most so many characters."""
    for document in documents:
        for number, start in enumerate(range(0, len(document.text), characters)):
            yield Document(f"{document.id}-{number}", document.text[start : start + characters])


def rehearse(
    folder: Path,
    documents: Callable[[], Iterator[Document]],
    settings: Settings,
    rows: int,
    characters_per_token: float,
    vocabulary: Path | None,
) -> tuple[list[Rehearsal], SearchCosts]:
    """Runs all stages twice in `folder`, with the experiment's settings and about 1/4 and 1/2 of `rows`, or 23 and 46 thousand.

    Args:
        folder: an empty folder.
        documents: text to take from.
        settings: of every stage of the experiment, by function.
        rows: of the experiment: small ones are indexed in another way than large ones.
        characters_per_token: about, to know how much text is so many rows.
        vocabulary: a SentencePiece model, or None to train one.
    """
    sizes = TREE_ROWS if rows >= SMALL else (rows // 4, rows // 2)
    done = []
    with progress("rehearsal", total=2, unit="runs") as bar:
        for number, (size, steps) in enumerate(zip(sizes, STEPS, strict=True)):
            bar.update(number)
            done.append(_run(folder / str(number), documents(), settings, size, steps, characters_per_token, vocabulary))
        costs = _search_costs(folder / "1", settings)
        bar.update(2)
    return done, costs


def _run(
    workdir: Path,
    documents: Iterator[Document],
    settings: Settings,
    rows: int,
    steps: int,
    characters_per_token: float,
    vocabulary: Path | None,
) -> Rehearsal:
    workdir.mkdir(parents=True)
    wanted = rows * characters_per_token / 0.8  # a fifth of the text are queries
    text = workdir / "text.jsonl"
    with text.open("w", encoding="utf-8") as file:
        for document in itertools.takewhile(lambda _: file.tell() < wanted, documents):
            file.write(json.dumps({"text": document.text}) + "\n")
    model = settings.get("train", settings.get("take_checkpoint", {}))["model"]
    training = settings.get("train", {})
    length = training.get("sequence_length", 512)
    batch = min(training.get("batch_size", 128), max(1, STEP_TOKENS // length))
    with _silent():
        prepare_documents(workdir, text=str(text), validation_fraction=0.1, test_fraction=0.1, duplicate_threshold=1.0, shards=SHARDS)
        if vocabulary:
            make_vocabulary(workdir, model=str(vocabulary))
        else:
            make_vocabulary(workdir, size=min(2000, model.vocab_size))
        train(workdir, model=model, steps=steps, batch_size=batch, sequence_length=length, checkpoint_steps=steps)
        build_datastore(workdir, **(settings["build_datastore"] | {"shards": None, "pipeline_options": ""}))
        build_index(workdir, **settings["build_index"])
        search(workdir, **settings["search"])
        begin = time.monotonic()
        evaluate(workdir, **settings["evaluate"])
        evaluate_seconds = time.monotonic() - begin
    records = {name: read_json(workdir / "stages" / f"{name}.json") for name in ("documents", "train", "build", "index", "search")}
    facts = records["search"]["result"]
    return Rehearsal(
        rows=records["build"]["result"]["rows"],
        queries=sum(split["tokens"] for split in facts.values()),
        train_documents=records["documents"]["result"]["documents"]["train"],
        query_documents=sum(split["documents"] for split in facts.values()),
        seconds={name: record["seconds"] for name, record in records.items()} | {"evaluate": evaluate_seconds},
        bytes=file_bytes(workdir),
        step_tokens=batch * length,
        steps=steps,
    )


def _search_costs(workdir: Path, settings: Settings) -> SearchCosts:
    datastore = open_datastore(workdir / "datastore")
    queries = np.asarray(datastore.shard_arrays("keys")[0][:1024], np.float32)
    k = settings["search"]["neighbors"]
    recall_queries = settings["search"]["recall_queries"]
    exact = ExactIndex(datastore)
    exact_rows = _fastest(lambda: exact.search(queries[:recall_queries], k)) / datastore.rows
    index = open_index(workdir, datastore)
    facts = read_json(workdir / "index" / "index.json")
    if not isinstance(index, ScannIndex) or "leaves" not in facts:
        per_query = _fastest(lambda: index.search(queries, k)) / len(queries)
        return SearchCosts(0.0, per_query / datastore.rows, exact_rows, 0.0, 0.0)
    few = _fastest(lambda: index.search(queries, k)) / len(queries)
    all_leaves = _fastest(lambda: index.search(queries, k, leaves_to_search=facts["leaves"])) / len(queries)
    share = facts["leaves_to_search"] / facts["leaves"]
    compared_row = max(0.0, (all_leaves - few) / (datastore.rows * (1 - share)))
    rows, few_rows = min(settings["build_index"]["training_rows"], datastore.rows), datastore.rows // 8
    seconds = {
        count: _fastest(lambda count=count: build_index.function(workdir, **(settings["build_index"] | {"training_rows": count})), times=2)
        for count in (rows, few_rows)
    }
    leaf_row = max(0.0, (seconds[rows] - seconds[few_rows]) / ((rows - few_rows) * facts["leaves"]))
    return SearchCosts(few - compared_row * datastore.rows * share, compared_row, exact_rows, leaf_row, seconds[rows])


def _fastest(function: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    seconds = []
    with _silent():
        for _ in range(times + 1):
            begin = time.monotonic()
            function()
            seconds.append(time.monotonic() - begin)
    return min(seconds[1:])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The stages' own progress is not that of the plan."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stderr(nothing):  # noqa: PTH123
        yield
