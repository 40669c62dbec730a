import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.evaluation.adaptive import Adaptive, Gate, GateInputs, distribution, fit, gate_inputs
from resmem_lm.evaluation.calibrated import target_probability
from resmem_lm.evaluation.candidates import Block, Candidates, Exact, Neighbors
from resmem_lm.evaluation.features import EVERY, MEMORY, Features
from resmem_lm.evaluation.gate_network import initial_weights
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.suffix_index import CONTINUATIONS
from resmem_lm.workdir.run import Run

QUERIES, OWN, K, ROWS, VOCAB = 40, 4, 6, 3, 20
SOURCES = (("neighbors",), ("exact",), MEMORY, EVERY)
GATE_INPUTS = jax.jit(gate_inputs, static_argnames=("unit", "sources"))
DISTRIBUTION = jax.jit(distribution)


def drawn_rows(rng, tokens, width, absent=0):
    distances = np.sort(rng.random(tokens.shape), axis=1)
    distances[:, tokens.shape[1] - absent :] = np.inf
    quantized = rng.integers(0, 256, (*tokens.shape, width)).astype(np.uint8)
    matches = rng.integers(0, 33, tokens.shape).astype(np.uint8)
    arrays = (distances, tokens, matches, quantized, np.full(tokens.shape, -0.7), np.zeros((*tokens.shape, 1)))
    return Neighbors(*map(jnp.asarray, arrays))


def drawn(seed, absent=0):
    """DeepNet's log-probabilities, and a block without targets; the last `absent` neighbors are missing."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(QUERIES, VOCAB)).astype(np.float32)
    proposed = rng.integers(0, VOCAB, (QUERIES, CONTINUATIONS + ROWS + K))
    ids = np.concatenate([np.argsort(-logits, axis=1)[:, :OWN], proposed], axis=1)
    log_z = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    candidates = Candidates(*map(jnp.asarray, (ids, np.take_along_axis(logits, ids, axis=1), np.zeros(QUERIES), log_z)))
    neighbors = drawn_rows(rng, ids[:, -K:], ids.shape[1], absent)
    document = drawn_rows(rng, ids[:, -K - ROWS : -K], ids.shape[1], ROWS * (seed % 2))
    exact = Exact(jnp.asarray(np.log(rng.random(ids.shape))), jnp.asarray(rng.integers(0, 9, (QUERIES, 3)).astype(np.float32)))
    return logits - log_z, Block(candidates, neighbors, document, exact, jnp.zeros(QUERIES, int), jnp.zeros((QUERIES, 1)))


def some_gate(features, weights):
    widths = [array.shape[-1] for array in features]
    return Gate(weights, Features(*map(jnp.zeros, widths)), Features(*map(jnp.ones, widths)))


def random_weights(features, seed):
    rng = np.random.default_rng(seed)
    initial = initial_weights(*(array.shape[-1] for array in features), 0)
    return jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape) / 3), initial)


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1), st.integers(0, K - 1), st.sampled_from(SOURCES))
def test_the_gate_gives_a_distribution_that_changes_the_proposed_tokens_only(seed, absent, sources):
    log_p, block = drawn(seed, absent)
    proposed = np.asarray(block.candidates.ids)  # those of other sources too
    of_token = []
    for token in range(VOCAB):
        some = block._replace(targets=jnp.full(QUERIES, token), target_base=jnp.exp(log_p[:, [token]]))
        some = GATE_INPUTS(some, 1.0, unit=0, sources=sources)
        assert all(np.isfinite(array).all() for array in some.features)
        q = DISTRIBUTION(some_gate(some.features, random_weights(some.features, seed)), some)
        of_token.append(np.asarray(target_probability(q, some.target, some.target_base)))
        outside = ~(proposed == token).any(axis=1)
        np.testing.assert_allclose(of_token[-1][outside], (np.asarray(q.other) * np.exp(log_p[:, token]))[outside], rtol=1e-5)
    np.testing.assert_allclose(np.sum(of_token, axis=0), 1, rtol=1e-4)


def trusted(seed, queries=1000):
    """Inputs for tokens whose neighbor is right if and only if it is near. DeepNet's probability of neighbor and target is 0.2."""
    rng = np.random.default_rng(seed)
    near = rng.random(queries)
    right = near < 0.5
    features = Features(near[:, None, None].astype(np.float32), rng.random((queries, 1)).astype(np.float32))
    some = (np.full((queries, 1), 0.2, np.float32), np.ones((queries, 1), bool), right[:, None], np.full(queries, 0.2, np.float32))
    return GateInputs(features, *some), np.arange(queries) // 30


def test_the_gate_learns_when_to_trust_the_memory_and_is_deterministic():
    some, documents = trusted(0)
    gate = fit(some, documents)
    other = jax.tree.map(jnp.asarray, trusted(1)[0])
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
    other = jax.tree.map(jnp.asarray, trusted(1)[0])
    assert np.abs(np.asarray(distribution(fit(noise, documents), other).candidates) - 0.2).max() < 0.1


@pytest.mark.parametrize("sources", [MEMORY, EVERY])
def test_initial_weights_are_deepnet_on_a_run(tiny_run, sources):
    scorer = SplitScorer("test", open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore"))
    some, documents = scorer.gate_inputs(1.0, sources, 10**6)
    assert len(documents) == len(scorer.queries.tokens)
    third, _ = scorer.gate_inputs(1.0, sources, len(documents) // 3)
    np.testing.assert_array_equal(third.target_base[:256], some.target_base[:256])
    assert len(third.target_base) < len(documents)
    weights = initial_weights(*(array.shape[-1] for array in some.features), 0)
    found = scorer.adaptive(Adaptive(some_gate(some.features, weights), 1.0, sources))
    q = scorer.queries
    base = np.asarray(q.candidate_ids)[np.arange(len(q.tokens)), np.argmax(q.candidate_logits, axis=1)]
    np.testing.assert_array_equal(found.predictions, base)
    np.testing.assert_allclose(found.target_probability, some.target_base, rtol=1e-4)
