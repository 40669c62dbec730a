"""What DeepNet and ResMem predict for each token of a text, and the neighbors that changed it."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.open_index import search_shards
from resmem_lm.model.checkpoints import load_model
from resmem_lm.resmem import merge_sparse, neighbor_weights, predict
from resmem_lm.text.shards import read_shard
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json

CONTEXT_TOKENS, SHOWN_NEIGHBORS = 12, 3


def inspect(run: Run, text: str) -> list[dict[str, Any]]:
    """Each token of the text: what it is, what DeepNet and ResMem say, and, where they differ, the neighbors that weigh most.

    ResMem has the hyperparameters that `evaluate` chose, over the whole vocabulary.

    Raises:
        UserError: an empty text, one that is not UTF-8, or a stage that has not finished.
    """
    if not text.strip():
        raise UserError('resmem inspect: give a text, such as "The quick brown fox"')
    try:
        text.encode()
    except UnicodeEncodeError:  # a shell's bytes that are not UTF-8 come as surrogates
        raise UserError("resmem inspect: the text is not UTF-8: convert it, such as with iconv") from None
    for stage in ("index", "evaluate"):
        run.finished(stage)
    model, vocabulary = load_model(run.checkpoints), load_vocabulary(run)
    datastore = open_datastore(run.datastore, model=model.fingerprint, vocabulary=vocabulary.sha256)
    chosen = read_json(run.results)["splits"]["test"]["methods"]["resmem"]["hyperparameters"]
    setting = Setting.of("resmem", chosen)
    tokens = vocabulary.encode(text)
    encoded = list(Encoder(model, datastore.binding.window, query_head, datastore.projection)([tokens]))
    order = np.argsort(np.concatenate([positions for positions, _ in encoded]))
    keys, hidden = (np.concatenate(arrays)[order] for arrays in zip(*(rows for _, rows in encoded), strict=True))
    rows, distances = search_shards(run, datastore, keys, setting.k)

    logits = model.logits(model.parameters, jnp.asarray(hidden)) / setting.temperature
    base = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    base = base / jnp.sum(base, axis=-1, keepdims=True)
    known = np.maximum(rows, 0)
    weights = neighbor_weights(jnp.asarray(distances), setting.sigma)
    ids, values = datastore.residuals(known, setting.temperature)
    neighbor_tokens = ids[..., 0]
    merged = merge_sparse(base, weights, jnp.asarray(ids), jnp.asarray(values), setting.lambda_)
    deepnet, resmem = np.asarray(predict(base)), np.asarray(predict(merged))

    def neighbor(row: int, weight: float, distance: float) -> dict[str, Any]:
        shard, name, position = datastore.locate(row)
        documents = read_shard(run.documents / datastore.shards[shard]["provenance"]["documents"])
        its = vocabulary.encode(next(document.text for document in documents if document.id == name))
        return {
            "document": name,
            "context": vocabulary.decode(its[max(0, position - CONTEXT_TOKENS) : position]),
            "token": vocabulary.pieces([int(its[position])])[0],
            "weight": weight,
            "distance": distance,
        }

    told: list[dict[str, Any]] = []
    for place, token in enumerate(tokens):
        pieces = vocabulary.pieces([int(token), int(deepnet[place]), int(resmem[place])])
        told.append({"token": pieces[0], "deepnet": pieces[1], "resmem": pieces[2], "neighbors": []})
        if deepnet[place] != resmem[place]:
            order = np.argsort(-np.asarray(weights[place]) * (neighbor_tokens[place] == resmem[place]), kind="stable")[:SHOWN_NEIGHBORS]
            told[-1]["neighbors"] = [
                neighbor(int(rows[place, i]), float(weights[place, i]), float(distances[place, i]))
                for i in order
                if rows[place, i] >= 0 and neighbor_tokens[place, i] == resmem[place]
            ]
    return told


def format_tokens(told: list[dict[str, Any]]) -> str:
    """As lines for a terminal: `+` where only ResMem is right, `-` where only DeepNet is."""

    def shown(piece: str) -> str:
        return piece.replace(" ", "␣").replace("\n", "⏎")

    lines = [f"  {'token':20} {'DeepNet':20} ResMem"]
    for t in told:
        right = t["deepnet"] == t["token"], t["resmem"] == t["token"]
        mark = {(False, True): "+", (True, False): "-"}.get(right, " ")
        lines.append(f"{mark} {shown(t['token']):20} {shown(t['deepnet']):20} {shown(t['resmem'])}")
        for n in t["neighbors"]:
            context = " ".join(n["context"].split())
            lines.append(f"      {n['weight']:.2f}  {n['distance']:.2f}  ...{context}[{shown(n['token'])}]  {n['document']}")
    return "\n".join(lines)
