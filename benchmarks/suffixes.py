"""Compare the suffix index with infini-gram's on the same tokens: build, bytes, and the lookup of a query's longest match."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.evaluation.sources import positions_of
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.suffix_index import build_suffixes, find_matches, live_tokens, save_suffixes
from resmem_lm.studies import infinigram
from resmem_lm.text.packing import first_tokens
from resmem_lm.text.shards import query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run

QUERIES = 5000
PARTS = (64, 16, 4, 1)  # of the rows


def run(run: Run) -> None:
    """Print the tables."""
    datastore, vocabulary = open_datastore(run.datastore), load_vocabulary(run)
    tokens = live_tokens(datastore)
    ends = np.flatnonzero(tokens == vocabulary.eos_id) + 1
    documents = [part for part in np.split(tokens.astype(np.int64), ends) if len(part)]
    queries = first_tokens(vocabulary.encode_documents(query_documents(run, "test")), QUERIES)
    context, positions = np.concatenate(queries), positions_of(np.array([len(query) for query in queries]))
    with tempfile.TemporaryDirectory(prefix="resmem-bench-", dir=str(run)) as name:
        folders = {way: Path(name) / way for way in ("ours", "infini-gram")}
        for folder in folders.values():
            folder.mkdir()

        def build_theirs() -> None:
            infinigram.build(folders["infini-gram"], documents)

        times = interleaved({"ours": lambda: save_suffixes(folders["ours"], build_suffixes(tokens)), "infini-gram": build_theirs}, rounds=3)
        suffixes = build_suffixes(tokens)

        def look_up() -> None:
            find_matches([suffixes], context, positions, vocabulary.size).continuations()

        lookups = interleaved(
            {"ours": look_up, "infini-gram": lambda: infinigram.continuations(folders["infini-gram"], vocabulary.eos_id, queries)}, rounds=3
        )
        sizes = {way: sum(path.stat().st_size for path in folder.iterdir()) for way, folder in folders.items()}
    table(
        f"Suffix index ({len(tokens):,} rows, {len(context):,} queries)",
        ("index", "build, s", "build / ours", "bytes per row", "longest match and its continuations, us per query", "lookup / ours"),
        (
            (
                way,
                f"{median(times, way):.2f}",
                ratio(times, way, "ours"),
                f"{sizes[way] / len(tokens):.1f}",
                f"{1e6 * median(lookups, way) / len(context):.1f}",
                ratio(lookups, way, "ours"),
            )
            for way in times
        ),
    )
    parts = {f"{len(tokens) // part:,}": tokens[: len(tokens) // part] for part in PARTS}
    indexes = {rows: build_suffixes(some) for rows, some in parts.items()}
    builds = interleaved({rows: lambda some=some: build_suffixes(some) for rows, some in parts.items()}, rounds=3)
    finds = interleaved(
        {rows: lambda index=index: find_matches([index], context, positions, vocabulary.size) for rows, index in indexes.items()}, rounds=3
    )
    table(
        "Growth of the suffix index",
        ("rows", "build, ns per row", "longest match, us per query"),
        (
            (rows, f"{1e9 * median(builds, rows) / len(parts[rows]):.0f}", f"{1e6 * median(finds, rows) / len(context):.2f}")
            for rows in parts
        ),
    )
