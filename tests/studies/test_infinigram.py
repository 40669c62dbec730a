import collections
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.studies.infinigram import SEPARATOR, TOKENS, Continuations, build, continuations, installed, mixture

EOS = 1
needs_package = pytest.mark.skipif(not installed(), reason="needs infini-gram: pip install 'resmem_lm[infini-gram]'")


def after_longest_suffix(documents, context):
    """Count what follows the longest suffix of a context that occurs in the documents."""
    for length in range(len(context), -1, -1):
        end, counts = context[len(context) - length :], collections.Counter()
        for document in documents:
            for place in range(len(document) - length):
                if document[place : place + length] == end:
                    counts[document[place + length]] += 1
        if counts:
            return counts
    raise AssertionError


@needs_package
def test_continuations_follow_the_longest_suffix_in_the_documents(tmp_path):
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(3, 12, rng.integers(3, 20)), EOS) for _ in range(30)]
    build(tmp_path / "index", documents)
    queries = [documents[0], np.append(rng.integers(3, 12, 25), EOS)]
    found = continuations(tmp_path / "index", EOS, queries)
    seen = [[SEPARATOR, *document.tolist()] for document in documents]
    contexts = [[SEPARATOR, *query[:position].tolist()] for query in queries for position in range(len(query))]
    for number, context in enumerate(contexts):
        counts = after_longest_suffix(seen, context)
        shares = {int(t): float(s) for t, s in zip(found.tokens[number], found.shares[number], strict=True) if t >= 0}
        assert len(shares) == min(TOKENS, len(counts))
        for token, share in shares.items():
            assert share == pytest.approx(counts[token] / sum(counts.values()))
        assert found.sparse[number] == (len(counts) == 1)


@needs_package
def test_a_context_that_never_occurs_has_no_continuations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for a relative path
    folder = Path("index")
    build(folder, [np.array([5, 6, EOS])] * 3)
    found = continuations(folder, EOS, [np.array([8, 9])])
    assert found.tokens[0, 0] == 5
    assert (found.tokens[1] == -1).all()
    assert not found.sparse[1]


@needs_package
def test_token_ids_that_are_too_large_are_refused(tmp_path):
    with pytest.raises(UserError, match="token 70000 is not below 65535"):
        build(tmp_path / "index", [np.array([5, 70_000])])


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_a_mixture_predicts_the_token_with_the_largest_sum(seed, lambda_, sparse_lambda):
    rng = np.random.default_rng(seed)
    queries, vocab = 6, 40
    p, share = rng.dirichlet(np.ones(vocab), queries), rng.dirichlet(np.ones(vocab) / 10, queries)
    tokens = np.argsort(-share, axis=1)[:, :TOKENS].astype(np.int32)
    share = np.where(np.isin(np.arange(vocab), tokens), share, 0)
    found = Continuations(tokens, np.take_along_axis(share, tokens, axis=1).astype(np.float32), rng.random(queries) < 0.5)
    every = rng.permuted(np.tile(np.arange(vocab), (queries, 1)), axis=1)
    candidates = np.concatenate([every, rng.integers(0, vocab, (queries, 4))], axis=1)
    mixed = mixture(found, candidates, np.take_along_axis(p, candidates, axis=1))
    weight = np.where(found.sparse, sparse_lambda, lambda_)[:, None]
    total = (1 - weight) * p + weight * share
    np.testing.assert_allclose(total[np.arange(queries), mixed.predict(lambda_, sparse_lambda)], total.max(axis=1), rtol=1e-5)
