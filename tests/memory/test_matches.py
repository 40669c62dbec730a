import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.memory.matches import LONGEST, match_lengths

EOS = 1
document = st.lists(st.integers(2, 3), max_size=40).map(lambda tokens: [*tokens, EOS])


@given(st.lists(document, min_size=1, max_size=4), st.lists(document, min_size=1, max_size=2))
def test_a_match_is_the_number_of_equal_tokens_before_both(stored, queries):
    memory, tokens = np.concatenate(stored), np.concatenate(queries)
    positions = np.concatenate([np.arange(len(query)) for query in queries])
    rows = np.random.default_rng(0).integers(-1, len(memory), (len(tokens), 3))
    found = match_lengths(rows, lambda some: memory[some], tokens, positions)
    for query in range(len(tokens)):
        for place, row in enumerate(rows[query]):
            length = 0
            while length < min(LONGEST, positions[query], row) and tokens[query - 1 - length] == memory[row - 1 - length] and row >= 0:
                length += 1
            assert found[query, place] == length
