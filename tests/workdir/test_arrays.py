import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.workdir.arrays import ShardedArray


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.sampled_from([(), (3,), (2, 2)]), st.data())
def test_shards_behave_as_one_array(lengths, width, data):
    whole = np.arange(sum(lengths) * int(np.prod(width))).reshape(-1, *width)
    parts = np.split(whole, np.cumsum(lengths)[:-1])
    sharded = ShardedArray(parts)
    np.testing.assert_array_equal(np.asarray(sharded), whole)
    np.testing.assert_array_equal(np.asarray(sharded, np.float16), whole.astype(np.float16))
    assert (len(sharded), sharded.shape) == (len(whole), whole.shape)
    rows = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)) if len(whole) else []
    for some in (np.array(rows, np.int64), np.array(2 * [rows], np.int32)):
        np.testing.assert_array_equal(sharded[some], whole[some])
        assert sharded[some].dtype == whole.dtype
