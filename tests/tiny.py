"""Provide a corpus and a configuration that are small enough to run the whole pipeline in seconds."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

CONFIG = """
include "configs/demo.gin"
make_vocabulary.size = 150
ModelConfig.vocab_size = 256
ModelConfig.emb_dim = 32
ModelConfig.num_layers = 2
ModelConfig.num_heads = 2
ModelConfig.head_dim = 16
ModelConfig.mlp_dim = 64
prepare_documents.shards = 3
prepare_documents.validation_fraction = 0.1
prepare_documents.test_fraction = 0.1
train.batch_size = 4
train.sequence_length = 64
train.cooldown_steps = 10
train.checkpoint_steps = 10
STEPS = 30
build_datastore.shards = None
build_datastore.window_length = 32
build_datastore.window_context = 8
build_datastore.entries = 16
search.neighbors = 12
evaluate.ks = (1, 4, 12, 50)
evaluate.sigmas = (0.5, 1.0, 4.0)
evaluate.temperatures = (1.0, 1.4)
evaluate.lambdas = (0.5, 1.0)
"""


def sentences(documents: int) -> Iterator[str]:
    """Yield texts of sentences with a few patterns, which a model and a memory can learn."""
    rng = random.Random(0)
    nouns = ["array", "shard", "query", "token", "window", "index", "model", "row"]
    verbs = ["returns", "reads", "writes", "finds", "merges"]
    for _ in range(documents):
        yield " ".join(
            f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} of {rng.choice(nouns)} {rng.randrange(100)}."
            for _ in range(rng.randrange(3, 20))
        )


def write_corpus(path: Path, documents: int = 60) -> None:
    """Write `sentences` as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(sentences(documents)):
            file.write(json.dumps({"text": f"Document {number}. {text}"}) + "\n")


def shard_folder(workdir: Path, shard: int) -> Path:
    """Return the folder of a datastore shard."""
    return sorted((workdir / "datastore").glob("shard-*/"))[shard]


def index_memory_gib(workdir: Path, shards: int, kind: str = "faiss") -> float:
    """Return the memory in GiB that suffices for an index of any `shards` consecutive datastore shards, but not of more."""
    from resmem_lm.memory.datastore import open_datastore
    from resmem_lm.memory.index_kinds import PROCESS_BYTES, index_memory

    offsets = open_datastore(workdir / "datastore").offsets
    return (PROCESS_BYTES + index_memory(kind, int((offsets[shards:] - offsets[:-shards]).max()), 32, 100_000)) / 2**30


def arguments(folder: Path, workdir: Path, documents: int = 60) -> list[str]:
    """Write the corpus and the configuration to `folder`, and return the arguments of `resmem COMMAND` that select them."""
    if not (folder / "tiny.gin").exists():
        write_corpus(folder / "corpus.jsonl", documents)
        (folder / "tiny.gin").write_text(CONFIG)
    return [f"--gin_file={folder / 'tiny.gin'}", f"--workdir={workdir}", f"--gin.TEXT='{folder / 'corpus.jsonl'}'"]
