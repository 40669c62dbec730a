import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.evaluation.adaptive import Gate, GateFeatures, distribution, fit, gate_features
from resmem_lm.evaluation.calibrated import target_probability
from resmem_lm.evaluation.candidates import Block, Candidates, Neighbors
from resmem_lm.evaluation.gate_network import initial_weights
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.workdir.run import Run

QUERIES, K, VOCAB = 40, 6, 20
GATE_FEATURES = jax.jit(gate_features, static_argnames="unit")
DISTRIBUTION = jax.jit(distribution)


def drawn(seed, absent=0):
    """DeepNet's log-probabilities, candidates and neighbors; the last `absent` neighbors are missing."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(QUERIES, VOCAB)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (QUERIES, K))
    order = np.argsort(-logits, axis=1)[:, :4]
    ids = np.concatenate([order, tokens], axis=1)
    log_z = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    candidates = Candidates(*map(jnp.asarray, (ids, np.take_along_axis(logits, ids, axis=1), np.zeros(QUERIES), log_z)))
    distances = np.sort(rng.random((QUERIES, K)), axis=1)
    distances[:, K - absent :] = np.inf
    quantized = rng.integers(0, 256, (QUERIES, K, ids.shape[1])).astype(np.uint8)
    neighbors = Neighbors(*map(jnp.asarray, (distances, tokens, quantized, np.full((QUERIES, K), -0.7), np.zeros((QUERIES, K, 1)))))
    return logits - log_z, candidates, neighbors


def some_gate(features, seed):
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape) / 3), initial_weights(features, 0))
    return Gate(weights, jnp.zeros(features), jnp.ones(features))


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1), st.integers(0, K - 1))
def test_the_gate_gives_a_distribution_that_changes_the_neighbors_tokens_only(seed, absent):
    log_p, candidates, neighbors = drawn(seed, absent)
    found, of_token = np.asarray(neighbors.tokens)[:, : K - absent], []
    for token in range(VOCAB):
        targets = jnp.full(QUERIES, token)
        some = GATE_FEATURES(Block(candidates, neighbors, targets, jnp.exp(log_p[:, [token]])), 1.0, unit=0)
        assert np.isfinite(some.features).all()
        q = DISTRIBUTION(some_gate(some.features.shape[-1], seed), some)
        of_token.append(np.asarray(target_probability(q, some.target, some.target_base)))
        outside = ~(found == token).any(axis=1)
        np.testing.assert_allclose(of_token[-1][outside], (np.asarray(q.other) * np.exp(log_p[:, token]))[outside], rtol=1e-5)
    np.testing.assert_allclose(np.sum(of_token, axis=0), 1, rtol=1e-4)


def trusted(seed, queries=1000):
    """Features of tokens whose neighbor is right if and only if it is near. DeepNet's probability of neighbor and target is 0.2."""
    rng = np.random.default_rng(seed)
    near = rng.random(queries)
    right = near < 0.5
    features = np.stack([near, rng.random(queries)], axis=1)[:, None].astype(np.float32)
    some = (np.full((queries, 1), 0.2, np.float32), np.ones((queries, 1), bool), right[:, None], np.full(queries, 0.2, np.float32))
    return GateFeatures(features, *some), np.arange(queries) // 30


def test_the_gate_learns_when_to_trust_the_memory_and_is_deterministic():
    some, documents = trusted(0)
    gate = fit(some, documents)
    other = GateFeatures(*map(jnp.asarray, trusted(1)[0]))
    right = np.asarray(other.target[:, 0])
    p = np.asarray(distribution(gate, other).candidates)[:, 0]
    assert np.median(p[right]) > 0.9
    assert np.median(p[~right]) < 0.02
    again = fit(some, documents)
    jax.tree.map(np.testing.assert_array_equal, gate.weights, again.weights)


def test_a_gate_with_nothing_to_learn_stays_near_deepnet():
    rng = np.random.default_rng(2)
    some, documents = trusted(0, 600)
    noise = some._replace(target=rng.random((600, 1)) < 0.2)  # DeepNet's own probability
    other = GateFeatures(*map(jnp.asarray, trusted(1)[0]))
    assert np.abs(np.asarray(distribution(fit(noise, documents), other).candidates) - 0.2).max() < 0.1


def test_initial_weights_are_deepnet_on_a_run(tiny_run):
    scorer = SplitScorer("test", open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore"))
    some, documents = scorer.gate_features(1.0, 10**6)
    assert len(documents) == len(scorer.queries.tokens)
    third, _ = scorer.gate_features(1.0, len(documents) // 3)
    np.testing.assert_array_equal(third.target_base[:256], some.target_base[:256])
    assert len(third.target_base) < len(documents)
    features = some.features.shape[-1]
    found = scorer.adaptive(Gate(initial_weights(features, 0), jnp.zeros(features), jnp.ones(features)), 1.0)
    q = scorer.queries
    base = np.asarray(q.candidate_ids)[np.arange(len(q.tokens)), np.argmax(q.candidate_logits, axis=1)]
    np.testing.assert_array_equal(found.predictions, base)
    np.testing.assert_allclose(found.target_probability, some.target_base, rtol=1e-4)
