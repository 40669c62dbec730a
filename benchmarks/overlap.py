"""How much of the queries' text stands word for word in the train documents: runs of 13 words of each query document, sought there.

    python -m benchmarks.overlap WORKDIR

WORKDIR is one whose documents are made. `prepare_documents` drops near-duplicates as a whole; this tells what is left in parts.
"""

import argparse
import re
from pathlib import Path

from resmem_lm.text.shards import QUERY_SPLITS, query_documents, read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run

MEMORY_SPLITS = "train", "added"
WORDS = 13  # as Brown et al. 2020 (GPT-3), appendix C


def runs(document: Document) -> list[int]:
    """A hash of every run of so many words."""
    words = re.findall(r"\w+", document.text.lower())
    return [hash(tuple(words[start : start + WORDS])) for start in range(len(words) - WORDS + 1)]


def main() -> None:
    """Prints a line for each split of the queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args().workdir
    queries = {split: [runs(document) for document in query_documents(Run(workdir), split)] for split in QUERY_SPLITS}
    sought = {run for documents in queries.values() for some in documents for run in some}
    memory = (document for split in MEMORY_SPLITS for shard in shard_paths(Run(workdir), split) for document in read_shard(shard))
    found = {run for document in memory for run in runs(document) if run in sought}
    for split, documents in queries.items():
        shares = [sum(run in found for run in some) / len(some) for some in documents if some]
        total, there = sum(map(len, documents)), sum(run in found for some in documents for run in some)
        print(
            f"{split}: {there / max(1, total):.1%} of {total:,} runs of {WORDS} words are in the train documents; "
            f"{sum(share > 0.5 for share in shares)} of {len(documents)} documents have more than half of theirs there"
        )


if __name__ == "__main__":
    main()
