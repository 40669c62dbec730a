"""Show DeepNet's and ResMem's predictions for each token of a text, and the neighbors that changed them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.examples import SHOWN_NEIGHBORS, Contexts
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.open_index import search_shards
from resmem_lm.model.checkpoints import Model, load_model
from resmem_lm.resmem import merge_sparse, neighbor_weights, predict
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json

CONTEXT_TOKENS = 12


class _Predicted(NamedTuple):
    """Predictions for the tokens of a text, and their neighbors, nearest first."""

    deepnet: Int[np.ndarray, " tokens"]
    resmem: Int[np.ndarray, " tokens"]
    rows: Int[np.ndarray, "tokens k"]
    distances: Float[np.ndarray, "tokens k"]
    weights: Float[np.ndarray, "tokens k"]
    neighbor_tokens: Int[np.ndarray, "tokens k"]

    def deciding(self, place: int) -> Iterator[int]:
        """Yield the neighbors of largest weight that have ResMem's token, if DeepNet predicts another token."""
        deepnet, resmem, rows, _, weights, neighbor_tokens = (array[place] for array in self)
        agree = neighbor_tokens == resmem
        for i in np.argsort(-weights * agree, kind="stable")[:SHOWN_NEIGHBORS]:
            if deepnet != resmem and rows[i] >= 0 and agree[i]:
                yield int(i)


def inspect(run: Run, text: str) -> list[dict[str, Any]]:
    """Return each token of a text, DeepNet's and ResMem's predictions, and, if they differ, the neighbors of largest weight.

    ResMem has the hyperparameters that `evaluate` chose, and predicts over the whole vocabulary. Raise UserError if the text is empty or
    not UTF-8, or if a stage has not finished.
    """
    _check_text(text)
    for stage in ("index", "evaluate"):
        run.finished(stage)
    model, vocabulary = load_model(run.checkpoints), load_vocabulary(run)
    datastore = open_datastore(run.datastore, model=model.fingerprint, vocabulary=vocabulary.sha256)
    setting = Setting.of("resmem", read_json(run.results)["splits"]["test"]["methods"]["resmem"]["hyperparameters"])
    tokens = vocabulary.encode(text)
    found = _predict(run, model, datastore, tokens, setting)
    contexts = Contexts(run, datastore, vocabulary, CONTEXT_TOKENS)

    def neighbor(place: int, i: int) -> dict[str, Any]:
        measures = {"weight": float(found.weights[place, i]), "distance": float(found.distances[place, i])}
        return contexts.of_row(int(found.rows[place, i])) | measures

    described = []
    for place, token in enumerate(tokens):
        pieces = vocabulary.pieces([int(token), int(found.deepnet[place]), int(found.resmem[place])])
        neighbors = [neighbor(place, i) for i in found.deciding(place)]
        described.append(dict(zip(("token", "deepnet", "resmem"), pieces, strict=True)) | {"neighbors": neighbors})
    return described


def _check_text(text: str) -> None:
    if not text.strip():
        raise UserError('resmem inspect: the text is empty: give a text, such as "The quick brown fox"')
    try:
        text.encode()
    except UnicodeEncodeError:  # a shell passes bytes that are not UTF-8 as surrogates
        raise UserError("resmem inspect: the text is not UTF-8: convert it, for example with iconv") from None


def _predict(run: Run, model: Model, datastore: Datastore, tokens: Int[np.ndarray, " tokens"], setting: Setting) -> _Predicted:
    encoded = list(Encoder(model, datastore.binding.window, query_head, datastore.projection)([tokens]))
    order = np.argsort(np.concatenate([positions for positions, _ in encoded]))
    keys, hidden = (np.concatenate(arrays)[order] for arrays in zip(*(rows for _, rows in encoded), strict=True))
    rows, distances = search_shards(run, datastore, keys, setting.k)

    logits = model.logits(model.parameters, jnp.asarray(hidden)) / setting.temperature
    base = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    base = base / jnp.sum(base, axis=-1, keepdims=True)
    weights = neighbor_weights(jnp.asarray(distances), setting.sigma)
    ids, values = datastore.residuals(np.maximum(rows, 0), setting.temperature)
    merged = merge_sparse(base, weights, jnp.asarray(ids), jnp.asarray(values), setting.lambda_)
    return _Predicted(np.asarray(predict(base)), np.asarray(predict(merged)), rows, distances, np.asarray(weights), ids[..., 0])


def format_tokens(described: list[dict[str, Any]]) -> str:
    """Return lines for a terminal: `+` marks tokens that only ResMem predicts, `-` those that only DeepNet predicts."""

    def visible(piece: str) -> str:
        return piece.replace(" ", "␣").replace("\n", "⏎")

    lines = [f"  {'token':20} {'DeepNet':20} ResMem"]
    for t in described:
        right = t["deepnet"] == t["token"], t["resmem"] == t["token"]
        mark = {(False, True): "+", (True, False): "-"}.get(right, " ")
        lines.append(f"{mark} {visible(t['token']):20} {visible(t['deepnet']):20} {visible(t['resmem'])}")
        for n in t["neighbors"]:
            context = " ".join(n["context"].split())
            lines.append(f"      {n['weight']:.2f}  {n['distance']:.2f}  ...{context}[{visible(n['token'])}]  {n['document']}")
    return "\n".join(lines)
