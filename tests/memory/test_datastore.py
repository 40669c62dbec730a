import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.schema import ARRAYS, Binding, token_dtype
from resmem_lm.model.checkpoints import load_model
from resmem_lm.model.decoder import Decoder
from resmem_lm.text.packing import shift_right
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, write_json
from tests.tiny import shard_folder


def test_every_train_token_is_a_row_once_and_in_order(tiny_run):
    datastore, vocabulary = open_datastore(tiny_run / "datastore"), load_vocabulary(Run(tiny_run))
    for shard, path in enumerate(shard_paths(Run(tiny_run), "train")):
        documents = read_shard(path)
        tokens = vocabulary.encode_documents(documents)
        np.testing.assert_array_equal(datastore.shard_arrays("tokens")[shard], np.concatenate(tokens))
        table = datastore.documents(shard)
        assert [d["id"] for d in table] == [d.id for d in documents]
        assert [d["rows"] for d in table] == [len(t) for t in tokens]
        row = int(datastore.offsets[shard]) + table[2]["first_row"] + 3
        assert datastore.locate(row) == (shard, documents[2].id, 3)


def test_rows_have_the_residuals_of_the_model_at_the_windows_of_the_paper(tiny_run):
    """Compare the stored rows with each window of one document, encoded separately."""
    datastore, vocabulary = open_datastore(tiny_run / "datastore"), load_vocabulary(Run(tiny_run))
    model, spec = load_model(tiny_run / "checkpoints"), datastore.binding.window
    hidden_of, logits_of = (jax.jit(functools.partial(Decoder(model.config).apply, method=name)) for name in ("hidden", "logits"))
    number, document = max(enumerate(read_shard(shard_paths(Run(tiny_run), "train")[1])), key=lambda d: len(d[1].text))
    tokens = vocabulary.encode(document.text)
    first = int(datastore.offsets[1]) + datastore.documents(1)[number]["first_row"]
    assert len(tokens) > 3 * spec.length
    for begin in range(0, len(tokens) - spec.context, spec.stride):
        window = tokens[None, begin : begin + spec.length]
        ones = np.ones_like(window)
        keys, hidden = hidden_of({"params": model.parameters}, jnp.asarray(shift_right(window, ones)), jnp.asarray(ones))
        logits = np.asarray(logits_of({"params": model.parameters}, hidden))[0].astype(np.float64)
        emit = slice(0 if begin == 0 else spec.context, window.shape[1])
        rows = np.arange(first + begin + emit.start, first + begin + emit.stop)
        p = np.exp(logits[emit]) / np.exp(logits[emit]).sum(-1, keepdims=True)
        r = np.eye(p.shape[1])[window[0, emit]] - p
        wanted = np.asarray(keys)[0, emit]
        np.testing.assert_allclose(datastore.keys(rows), wanted, atol=np.abs(wanted).max() / 250)
        for t in datastore.binding.temperatures:
            p_t = p ** (1 / t) / (p ** (1 / t)).sum(-1, keepdims=True)
            ids, values = datastore.residuals(rows, t)
            np.testing.assert_array_equal(ids[:, 0], window[0, emit])
            expected = np.take_along_axis(np.eye(p.shape[1])[window[0, emit]] - p_t, ids, 1)
            np.testing.assert_allclose(values, expected, atol=0.007 if t >= 1 else 0.02)
        np.put_along_axis(r, ids, 0, 1)
        dropped, largest = datastore.take("dropped", rows).astype(np.float64), np.abs(r).max(-1)
        assert (dropped >= largest - 1e-7).all()
        np.testing.assert_allclose(dropped, largest, rtol=3e-3, atol=1e-6)


def test_take_reads_across_shards(tiny_run):
    datastore = open_datastore(tiny_run / "datastore")
    rows = np.random.default_rng(0).integers(0, datastore.rows, (7, 5))
    for name in ARRAYS:
        np.testing.assert_array_equal(datastore.take(name, rows), np.concatenate(datastore.shard_arrays(name))[rows])


def test_the_manifest_has_the_binding_and_the_shards(tiny_run):
    manifest = read_json(tiny_run / "datastore/manifest.json")
    assert manifest["window"] == {"length": 32, "context": 8}
    assert manifest["model"] == load_model(tiny_run / "checkpoints").fingerprint
    assert manifest["rows"] == sum(shard["rows"] for shard in manifest["shards"])
    for shard in manifest["shards"]:
        assert read_json(tiny_run / "datastore" / f"{shard['folder'].partition('.')[0]}.json") == shard


def test_another_model_or_vocabulary_is_refused(tiny_run):
    for binding in ({"model": "0" * 64}, {"vocabulary": "0" * 64}):
        with pytest.raises(UserError, match="was built with another"):
            open_datastore(tiny_run / "datastore", **binding)


@pytest.mark.parametrize("name", ["quantized_keys.npy", "documents.jsonl", "tokens.npy"])
def test_an_altered_truncated_or_missing_file_is_named(tiny_copy, name):
    path = shard_folder(tiny_copy, 2) / name
    content = path.read_bytes()
    for damaged, message in (
        (content[:-1] + bytes([content[-1] ^ 1]), "was altered"),
        (content[:-1], r"has \d+ bytes, its manifest has"),
        (None, "is missing"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} {message}"):
            open_datastore(tiny_copy / "datastore", checksums=True)


def test_an_unfinished_datastore_or_one_of_another_format_is_refused(tiny_copy):
    path = tiny_copy / "datastore/manifest.json"
    write_json(path, read_json(path) | {"format": "resmem-datastore-1"})
    with pytest.raises(UserError, match="this version reads 'resmem-datastore-4'"):
        open_datastore(path.parent)
    path.unlink()
    with pytest.raises(UserError, match="run `resmem build`"):
        open_datastore(path.parent)


def test_a_manifest_that_was_altered_by_hand_is_refused(tiny_copy):
    path = tiny_copy / "datastore/manifest.json"
    path.write_text(path.read_text().replace('"context": 8', '"context": 9'))
    with pytest.raises(UserError, match=r"manifest.json is damaged \("):
        open_datastore(path.parent)


BINDING = Binding("model", "vocabulary", WindowSpec(32, 8), (1.0,), 16).to_json()
# for each shard, the length of each document and whether it is deleted
SHARDS = st.lists(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=5), min_size=1, max_size=4)


def manifest_of(shards):
    records = []
    for documents in shards:
        ends = np.cumsum([length for length, _ in documents], dtype=int).tolist()
        deleted = [[end - length, length] for end, (length, gone) in zip(ends, documents, strict=True) if gone]
        records.append({"rows": ends[-1] if ends else 0, "deleted": deleted})
    return BINDING | {"shards": records}


@given(SHARDS, st.data())
def test_deleted_rows_are_those_of_deleted_documents(shards, data):
    mask = np.array([gone for documents in shards for length, gone in documents for _ in range(length)], bool)
    datastore = Datastore(Path(), manifest_of(shards))
    np.testing.assert_array_equal(datastore.is_deleted(np.arange(datastore.rows)), mask)
    assert datastore.live_rows == (~mask).sum()
    first = data.draw(st.integers(0, len(shards) - 1))
    part = datastore.part(first, data.draw(st.integers(1, len(shards) - first)))
    begin = int(datastore.offsets[first])
    np.testing.assert_array_equal(part.is_deleted(np.arange(part.rows)), mask[begin : begin + part.rows])
    backwards = np.arange(datastore.rows)[::-1, None]
    np.testing.assert_array_equal(datastore.is_deleted(backwards), mask[::-1, None])


def test_token_ids_fit_their_dtype():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32
