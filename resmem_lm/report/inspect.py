"""Show the predictions of DeepNet, ResMem and Adaptive ResMem for each token of a text, and what changed them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.examples import SHOWN_NEIGHBORS, Contexts
from resmem_lm.evaluation.neighbors import Queries
from resmem_lm.evaluation.saved_gates import load_gate
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.sources import document_arrays, memory_arrays
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.open_index import index_manifest, search_shards
from resmem_lm.memory.suffix_index import open_suffixes
from resmem_lm.model.checkpoints import Model, load_model
from resmem_lm.resmem import neighbor_weights
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.arrays import ShardedArray
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json

CONTEXT_TOKENS = 12
ADAPTIVE = ("resmem_adaptive_document", "resmem_adaptive")  # the first that the run has
SOURCE_TITLES = {"neighbors": "neighbors", "matches": "their matches", "exact": "exact match", "document": "document"}
SHOWN_CHANGE = 0.01  # least change of a probability that is printed


class _Predicted(NamedTuple):
    """Predictions for the tokens of a text."""

    deepnet: Int[np.ndarray, " tokens"]
    resmem: Int[np.ndarray, " tokens"]
    adaptive: Int[np.ndarray, " tokens"]
    influence: list[dict[str, float]]  # Adaptive ResMem's probability of its prediction, and what each source adds to it


def inspect(run: Run, text: str) -> list[dict[str, Any]]:
    """Return each token of a text, and the predictions of DeepNet, ResMem and Adaptive ResMem.

    If DeepNet and ResMem differ, `neighbors` are those of largest weight with ResMem's token. `influence` is Adaptive ResMem's probability
    of its prediction, and what each source adds to it: the difference to the probability when the source has found nothing. Adaptive ResMem
    uses the text's earlier tokens if the run does.

    ResMem has the hyperparameters and Adaptive ResMem the gate that `evaluate` chose. Raise UserError if the text is empty or not UTF-8,
    or if a stage has not finished.
    """
    _check_text(text)
    for stage in ("index", "evaluate"):
        run.finished(stage)
    model, vocabulary = load_model(run.checkpoints), load_vocabulary(run)
    datastore = open_datastore(run.datastore, model=model.fingerprint, vocabulary=vocabulary.sha256)
    methods = read_json(run.results)["splits"]["test"]["methods"]
    setting = Setting.of("resmem", methods["resmem"]["hyperparameters"])
    tokens = vocabulary.encode(text)
    scorer = SplitScorer("text", _queries(run, model, datastore, tokens), datastore)
    found = _predict(scorer, setting, load_gate_of(run, methods))
    contexts = Contexts(run, datastore, vocabulary, CONTEXT_TOKENS)
    described = []
    for place, token in enumerate(tokens):
        ids = [int(token), *(int(predictions[place]) for predictions in found[:3])]
        named = dict(zip(("token", "deepnet", "resmem", "adaptive"), vocabulary.pieces(ids), strict=True))
        neighbors = _deciding(scorer, setting, place, ids[2], contexts) if ids[1] != ids[2] else []
        described.append(named | {"neighbors": neighbors, "influence": found.influence[place]})
    return described


def load_gate_of(run: Run, methods: dict[str, Any]) -> Any:
    """Return the gate of the run's Adaptive ResMem, with the document if the run uses it."""
    return load_gate(run, next(name for name in ADAPTIVE if name in methods))


def _queries(run: Run, model: Model, datastore: Datastore, tokens: Int[np.ndarray, " tokens"]) -> Queries:
    """Return the tokens of one document as queries, with what the memory knows about each."""
    settings = run.record("search")["settings"]
    encoded = list(Encoder(model, datastore.binding.window, query_head, datastore.projection)([tokens]))
    order = np.argsort(np.concatenate([positions for positions, _ in encoded]))
    keys, hidden = (np.concatenate(arrays)[order] for arrays in zip(*(rows for _, rows in encoded), strict=True))
    arrays = {"keys": keys, "hidden": hidden, "tokens": tokens, "document_lengths": np.array([len(tokens)])}
    arrays |= document_arrays(arrays, settings["document_neighbors"])
    nearest = search_shards(run, datastore, arrays["keys"], settings["neighbors"])
    suffixes = open_suffixes(run, datastore, index_manifest(run, datastore))
    arrays |= memory_arrays(model, datastore, suffixes, nearest, arrays) | {"document_groups": np.zeros(1, np.int64)}
    mapped: dict[str, Any] = {name: ShardedArray([arrays[name]]) for name in Queries._fields}
    return Queries(**mapped | {name: arrays[name] for name in ("tokens", "document_lengths", "document_groups")})


def _predict(scorer: SplitScorer, setting: Setting, gate: Any) -> _Predicted:
    found, adaptive = scorer.predict([DEEPNET, setting]), scorer.adaptive(gate).predictions
    influence = scorer.influence(gate, np.arange(len(adaptive)), adaptive)
    return _Predicted(found[DEEPNET][0], found[setting][0], adaptive, influence)


def _deciding(scorer: SplitScorer, setting: Setting, place: int, token: int, contexts: Contexts) -> list[dict[str, Any]]:
    """Return the neighbors of largest weight that have a token."""
    q, query = scorer.queries, np.array([place])
    rows, distances, tokens = (array[query][0, : setting.k] for array in (q.rows, q.distances, q.neighbor_tokens))
    weights = np.asarray(neighbor_weights(jnp.asarray(distances[None]), setting.sigma))[0]
    agree = (tokens == token) & (rows >= 0)
    order = np.argsort(-weights * agree, kind="stable")[: min(SHOWN_NEIGHBORS, int(agree.sum()))]
    return [contexts.of_row(int(rows[i])) | {"weight": float(weights[i]), "distance": float(distances[i])} for i in order]


def _check_text(text: str) -> None:
    if not text.strip():
        raise UserError('resmem inspect: the text is empty: give a text, such as "The quick brown fox"')
    try:
        text.encode()
    except UnicodeEncodeError:  # a shell passes bytes that are not UTF-8 as surrogates
        raise UserError("resmem inspect: the text is not UTF-8: convert it, for example with iconv") from None


def format_tokens(described: list[dict[str, Any]]) -> str:
    """Return lines for a terminal.

    `+` marks tokens that Adaptive ResMem predicts and DeepNet does not, `-` the reverse. A line ends with what each source adds to the
    probability of Adaptive ResMem's prediction, in points.
    """

    def visible(piece: str) -> str:
        return piece.replace(" ", "␣").replace("\n", "⏎")

    lines = [f"  {'token':20} {'DeepNet':20} {'ResMem':20} Adaptive ResMem"]
    for t in described:
        right = t["deepnet"] == t["token"], t["adaptive"] == t["token"]
        mark = {(False, True): "+", (True, False): "-"}.get(right, " ")
        pieces = " ".join(f"{visible(t[name]):20}" for name in ("token", "deepnet", "resmem", "adaptive"))
        lines.append(f"{mark} {pieces} {format_influence(t['influence'])}".rstrip())
        for n in t["neighbors"]:
            context = " ".join(n["context"].split())
            lines.append(f"      {n['weight']:.2f}  {n['distance']:.2f}  ...{context}[{visible(n['token'])}]  {n['document']}")
    return "\n".join(lines)


def format_influence(influence: dict[str, float]) -> str:
    """Return a probability and the changes by each source in points, such as "82 (exact match +31, document +4)"."""
    changes = [
        f"{SOURCE_TITLES[name]} {100 * value:+.0f}"
        for name, value in influence.items()
        if name in SOURCE_TITLES and abs(value) >= SHOWN_CHANGE
    ]
    return f"{100 * influence['probability']:.0f}" + (f" ({', '.join(changes)})" if changes else "")
