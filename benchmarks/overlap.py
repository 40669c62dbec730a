"""Measure the share of the queries' runs of 13 words that occur verbatim in the train documents.

    python -m benchmarks.overlap WORKDIR

WORKDIR has documents (`resmem train`). `prepare_documents` drops near-duplicate documents; this measures the remaining overlap.
"""

import argparse
import re

from resmem_lm.text.shards import QUERY_SPLITS, query_documents, read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run

MEMORY_SPLITS = "train", "added"
WORDS = 13  # as Brown et al. 2020 (GPT-3), appendix C


def runs(document: Document) -> list[int]:
    """Return a hash of every run of `WORDS` words."""
    words = re.findall(r"\w+", document.text.lower())
    return [hash(tuple(words[start : start + WORDS])) for start in range(len(words) - WORDS + 1)]


def main() -> None:
    """Print a line for each split of the queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    workdir = Run(parser.parse_args().workdir)
    queries = {split: [runs(document) for document in query_documents(workdir, split)] for split in QUERY_SPLITS}
    wanted = {run for documents in queries.values() for some in documents for run in some}
    memory = (document for split in MEMORY_SPLITS for shard in shard_paths(workdir, split) for document in read_shard(shard))
    found = {run for document in memory for run in runs(document) if run in wanted}
    for split, documents in queries.items():
        shares = [sum(run in found for run in some) / len(some) for some in documents if some]
        total, there = sum(map(len, documents)), sum(run in found for some in documents for run in some)
        print(
            f"{split}: {there / max(1, total):.1%} of {total:,} runs of {WORDS} words are in the train documents; "
            f"{sum(share > 0.5 for share in shares)} of {len(documents)} documents have more than half of their runs there"
        )


if __name__ == "__main__":
    main()
