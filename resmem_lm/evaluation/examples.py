"""Tokens that ResMem mends, in the form of the paper's Figure 2, with the neighbors that decided them."""

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


class _Texts:
    """Contexts of tokens, from the documents themselves."""

    def __init__(self, run: Run, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._documents = functools.lru_cache(maxsize=4)(lambda name: {d.id: d for d in read_shard(run.documents / name)})

    def context(self, tokens: Int[np.ndarray, " tokens"], position: int) -> str:
        return self.vocabulary.decode(tokens[max(0, position - CONTEXT_TOKENS) : position])

    def neighbor(self, datastore: Datastore, row: int) -> Record:
        shard, name, position = datastore.locate(row)
        document = self._documents(datastore.shards[shard]["provenance"]["documents"])[name]
        tokens = self.vocabulary.encode(document.text)
        return {
            "document": document.id,
            "context": self.context(tokens, position),
            "token": self.vocabulary.pieces(tokens[position : position + 1])[0],
        }


def draw_tokens(pool: Int[np.ndarray, " pool"], count: int) -> Int[np.ndarray, " chosen"]:
    """So many of the pool's tokens, or all where there are fewer, drawn at random and the same each time; in order."""
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
    """Test tokens that DeepNet gets wrong and ResMem right, with the neighbors that add most to the right one.

    There may be none: what the residuals take from DeepNet's own prediction can be enough.

    Args:
        run: of the run.
        q: the test split's queries.
        datastore: of their neighbors.
        setting: ResMem's.
        deepnet: DeepNet's predictions.
        corrected: ResMem's.
        chosen: which tokens; None draws EXAMPLES of all.
    """
    vocabulary = load_vocabulary(run)
    texts = _Texts(run, vocabulary)
    if chosen is None:
        chosen = draw_tokens(np.flatnonzero((deepnet != q.tokens) & (corrected == q.tokens)), EXAMPLES)
    documents = query_documents(run, "test")
    first = np.concatenate([[0], np.cumsum(q.document_lengths)])
    examples = []
    for query in chosen:
        number = int(np.searchsorted(first, query, side="right") - 1)
        tokens = vocabulary.encode(documents[number].text)
        target = int(q.tokens[query])
        rows, distances, neighbor_tokens = (array[query[None]][0] for array in (q.rows, q.distances, q.neighbor_tokens))
        weights = np.asarray(neighbor_weights(jnp.asarray(distances[None, : setting.k]), setting.sigma))[0]
        # A neighbor adds its weight times its residual at its own token, the first of its entries.
        added = weights * datastore.residuals(np.maximum(rows[: setting.k], 0), setting.temperature)[1][:, 0]
        helps = (rows[: setting.k] >= 0) & (neighbor_tokens[: setting.k] == target)
        order = np.argsort(np.where(helps, -added, np.inf), kind="stable")[: min(SHOWN_NEIGHBORS, int(helps.sum()))]
        neighbors = [
            {
                **texts.neighbor(datastore, int(rows[i])),
                "distance": float(distances[i]),
                "weight": float(weights[i]),
            }
            for i in order
        ]
        target_piece, deepnet_piece, mended_piece = vocabulary.pieces([target, int(deepnet[query]), int(corrected[query])])
        examples.append(
            {
                "document": documents[number].id,
                "context": texts.context(tokens, int(query - first[number])),
                "target": target_piece,
                "deepnet": deepnet_piece,
                "resmem": mended_piece,
                "neighbors": neighbors,
            }
        )
    return examples
