"""Describe tokens that ResMem corrects (the paper's Figure 2), with the neighbors that decide them."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.neighbors import Queries
from resmem_lm.memory.datastore import Datastore
from resmem_lm.resmem import neighbor_weights
from resmem_lm.text.shards import query_documents, read_shard
from resmem_lm.text.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record

CONTEXT_TOKENS = 32
EXAMPLES, SHOWN_NEIGHBORS = 10, 3


class Contexts:
    """The text before a token, and the token itself, from the documents of a run."""

    def __init__(self, run: Run, datastore: Datastore, vocabulary: Vocabulary, length: int) -> None:
        self.datastore, self.vocabulary, self.length = datastore, vocabulary, length
        self._documents = functools.lru_cache(maxsize=4)(lambda name: {d.id: d for d in read_shard(run.documents / name)})

    def before(self, tokens: Int[np.ndarray, " tokens"], position: int) -> str:
        """Return the text of the last `length` tokens before a position."""
        return self.vocabulary.decode(tokens[max(0, position - self.length) : position])

    def of_row(self, row: int) -> Record:
        """Return the document of a row of the datastore, the row's token and the text before it."""
        shard, name, position = self.datastore.locate(row)
        document = self._documents(self.datastore.shards[shard]["provenance"]["documents"])[name]
        tokens = self.vocabulary.encode(document.text)
        token = self.vocabulary.pieces(tokens[position : position + 1])[0]
        return {"document": document.id, "context": self.before(tokens, position), "token": token}


def draw_tokens(pool: Int[np.ndarray, " pool"], count: int) -> Int[np.ndarray, " chosen"]:
    """Draw `count` of the pool's tokens with a fixed seed, or all if there are fewer. Return them in order."""
    return np.sort(np.random.default_rng(0).choice(pool, size=min(count, len(pool)), replace=False))


def corrected_tokens(
    run: Run,
    q: Queries,
    datastore: Datastore,
    setting: Setting,
    deepnet: Int[np.ndarray, " tokens"],
    corrected: Int[np.ndarray, " tokens"],
    chosen: Int[np.ndarray, " chosen"] | None = None,
) -> list[Record]:
    """Describe test tokens that DeepNet gets wrong and ResMem right, with the neighbors that add most to the right token.

    `deepnet` and `corrected` are the predictions of DeepNet and ResMem. `chosen` names the tokens to describe; None draws EXAMPLES of them.
    An example has no neighbors if the residuals only lower the score of DeepNet's token.
    """
    vocabulary = load_vocabulary(run)
    contexts = Contexts(run, datastore, vocabulary, CONTEXT_TOKENS)
    if chosen is None:
        chosen = draw_tokens(np.flatnonzero((deepnet != q.tokens) & (corrected == q.tokens)), EXAMPLES)
    documents = query_documents(run, "test")
    first = np.concatenate([[0], np.cumsum(q.document_lengths)])
    examples = []
    for query in chosen.tolist():
        number = int(np.searchsorted(first, query, side="right") - 1)
        tokens = vocabulary.encode(documents[number].text)
        target, wrong, right = vocabulary.pieces([int(ids[query]) for ids in (q.tokens, deepnet, corrected)])
        examples.append(
            {
                "document": documents[number].id,
                "context": contexts.before(tokens, query - int(first[number])),
                "target": target,
                "deepnet": wrong,
                "resmem": right,
                "neighbors": _helpful_neighbors(q, query, setting, contexts),
            }
        )
    return examples


def _helpful_neighbors(q: Queries, query: int, setting: Setting, contexts: Contexts) -> list[Record]:
    """Describe the neighbors that add most to the query's token, most helpful first."""
    rows, distances, neighbor_tokens = (array[np.array([query])][0, : setting.k] for array in (q.rows, q.distances, q.neighbor_tokens))
    weights = np.asarray(neighbor_weights(jnp.asarray(distances[None]), setting.sigma))[0]
    # A neighbor adds its weight times its residual at its own token, its first entry.
    added = weights * contexts.datastore.residuals(np.maximum(rows, 0), setting.temperature)[1][:, 0]
    helps = (rows >= 0) & (neighbor_tokens == q.tokens[query])
    order = np.argsort(np.where(helps, -added, np.inf), kind="stable")[: min(SHOWN_NEIGHBORS, int(helps.sum()))]
    return [contexts.of_row(int(rows[i])) | {"distance": float(distances[i]), "weight": float(weights[i])} for i in order]
