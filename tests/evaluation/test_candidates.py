import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm import resmem
from resmem_lm.evaluation import candidates as c
from resmem_lm.evaluation.block_scores import totals
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.memory.quantization import dequantize_probabilities, quantize_probabilities

TEMPERATURES = (0.5, 1.0, 2.0)
SCORE, TOTALS, BEST = jax.jit(c.score), jax.jit(totals), jax.jit(c.best)
CHOOSE_CANDIDATES = jax.jit(c.choose_candidates, static_argnums=2)
SPARSE_RESIDUAL = jax.jit(resmem.sparse_residual, static_argnums=3)
QUANTIZE = jax.jit(quantize_probabilities)


def log_z(logits):
    return np.stack([np.log(np.exp(logits / t).sum(-1)) for t in TEMPERATURES], -1).astype(np.float32)


SETTINGS = st.builds(
    Setting,
    st.sampled_from(["resmem", "knnlm"]),
    st.sampled_from([1, 6]),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from(TEMPERATURES),
    st.sampled_from([0.0, 0.3, 1.0]),
)


def problem(seed, shape, spread, entries, base):
    """Return queries and neighbors as the datastore stores them, and their dense logits."""
    rng = np.random.default_rng(seed)
    queries, k, vocab = shape
    logits = (spread * rng.normal(size=(queries, k, vocab))).astype(np.float32)
    query_logits = (2 * rng.normal(size=(queries, vocab))).astype(np.float32)
    tokens = rng.integers(0, vocab, (queries, k))
    flat, flat_tokens = jnp.asarray(logits.reshape(-1, vocab)), jnp.asarray(tokens.reshape(-1))
    ids, values, _ = SPARSE_RESIDUAL(flat, flat_tokens, jax.nn.logsumexp(flat, axis=-1), min(entries, vocab))
    ids, stored = (np.asarray(x).reshape(queries, k, min(entries, vocab) - 1) for x in (ids, QUANTIZE(values)))
    found = CHOOSE_CANDIDATES(jnp.asarray(query_logits), jnp.asarray(tokens), base)
    neighbors = c.Neighbors(
        jnp.asarray(np.sort(rng.gamma(2.0, size=(queries, k)), axis=1).astype(np.float32)),
        jnp.asarray(tokens),
        jnp.zeros(tokens.shape, jnp.uint8),
        jnp.asarray(c.quantized_at(np.asarray(found[0]), ids, stored)),
        jnp.asarray(np.take_along_axis(logits, tokens[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))),
        jnp.asarray(log_z(logits) - log_z(logits)[..., 1:2] / np.array(TEMPERATURES, np.float32)),
    )
    return query_logits, ids, stored, logits, c.Candidates(*found, jnp.asarray(log_z(query_logits))), neighbors


def dense_scores(query_logits, ids, stored, logits, neighbors, setting):
    """Compute the formula over the whole vocabulary, in NumPy."""
    queries, vocab = query_logits.shape
    k, t = setting.k, setting.temperature
    base = np.exp(query_logits / t) / np.exp(query_logits / t).sum(-1, keepdims=True)
    distances, tokens = np.asarray(neighbors.distances)[:, :k], np.asarray(neighbors.tokens)[:, :k]
    weights = np.exp(-distances / setting.sigma)
    weights /= weights.sum(-1, keepdims=True)
    onehot = np.eye(vocab)[tokens]
    if setting.formula == "knnlm":
        return (1 - setting.lambda_) * base + setting.lambda_ * np.einsum("qk,qkv->qv", weights, onehot)
    one = np.exp(logits[:, :k]) / np.exp(logits[:, :k]).sum(-1, keepdims=True)
    p = np.zeros((queries, k, vocab))  # stored probabilities
    np.put_along_axis(p, ids[:, :k], dequantize_probabilities(stored[:, :k]), axis=-1)
    np.put_along_axis(p, tokens[..., None], np.take_along_axis(one, tokens[..., None], axis=-1), axis=-1)
    p = p ** (1 / t) / (one ** (1 / t)).sum(-1, keepdims=True)
    return base + setting.lambda_ * np.einsum("qk,qkv->qv", weights, onehot - p)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(5, 1, 9), (5, 6, 60)]),  # few shapes: each is compiled
    st.sampled_from([0.5, 3.0]),
    st.sampled_from([1, 5, 60]),
    st.sampled_from([1, 6]),
    SETTINGS,
)
def test_candidates_have_the_scores_of_the_dense_formula_and_certified_predictions_are_right(seed, shape, spread, entries, base, setting):
    query_logits, ids, stored, logits, candidates, neighbors = problem(seed, shape, spread, entries, base)
    setting = setting._replace(k=min(setting.k, shape[1]))
    number = TEMPERATURES.index(setting.temperature)
    scores = SCORE(candidates, neighbors, jnp.array([setting.k]), jnp.array([setting.sigma]), setting.temperature, number)
    found = np.asarray(TOTALS(scores, jnp.array([setting.formula == "resmem"]), jnp.array([setting.lambda_]))[0])
    bound = scores.bound * (1 - setting.lambda_ if setting.formula == "knnlm" else 1)
    dense = dense_scores(query_logits, ids, stored, logits, neighbors, setting)
    np.testing.assert_allclose(found, np.take_along_axis(dense, np.asarray(candidates.ids), axis=1), atol=3e-5)

    winners, top = BEST(jnp.asarray(found), candidates.ids)
    sure = np.asarray(top) >= np.asarray(bound)
    winning = np.take_along_axis(dense, np.asarray(winners)[:, None], axis=1)[:, 0]
    assert (winning[sure] >= dense.max(-1)[sure] - 6e-5).all()
    outside = np.ones_like(dense, bool)
    np.put_along_axis(outside, np.asarray(candidates.ids), False, axis=1)
    assert (np.where(outside, dense, -np.inf).max(-1) <= np.asarray(bound) + 3e-5).all()


def test_the_best_token_has_the_lowest_id_among_equals():
    winners, top = c.best(jnp.array([[0.5, 0.5, 0.1]]), jnp.array([[7, 3, 1]]))
    assert (int(winners[0]), float(top[0])) == (3, 0.5)
