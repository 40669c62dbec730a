"""Read the inputs of several benchmarks from a finished work directory."""

import numpy as np
from jaxtyping import Float, Int

from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.index import Index
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.packing import first_tokens
from resmem_lm.text.shards import query_documents, read_shard, shard_paths
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record


def train_documents(run: Run, tokens: int) -> list[Int[np.ndarray, "_"]]:
    """Return train documents with a total number of tokens; the last document is truncated."""
    vocabulary = load_vocabulary(run)
    return first_tokens((vocabulary.encode(document.text) for document in read_shard(shard_paths(run, "train")[-1])), tokens)


def query_keys(run: Run, count: int) -> Float[np.ndarray, "queries emb"]:
    """Return the keys of evenly spaced test tokens."""
    datastore, model, vocabulary = open_datastore(run.datastore), load_model(run.checkpoints), load_vocabulary(run)
    documents = vocabulary.encode_documents(query_documents(run, "test"))[:200]
    keys = np.concatenate([rows.keys for _, rows in Encoder(model, datastore.binding.window, query_head, datastore.projection)(documents)])
    return keys[np.linspace(0, len(keys) - 1, count).astype(np.int64)]


def all_keys(datastore: Datastore) -> Float[np.ndarray, "rows emb"]:
    """Return all keys of a datastore."""
    return np.concatenate([datastore.shard_keys(shard) for shard in range(len(datastore.shards))])


def our_index(run: Run, datastore: Datastore) -> tuple[Index, Record]:
    """Return the index of the whole datastore, and its record."""
    manifest = index_manifest(run, datastore)
    assert len(manifest["shards"]) == 1, "the benchmark needs an index of one shard: raise build_index.memory_gib"
    return open_index(run, datastore, manifest, 0)[0], manifest["shards"][0]
