"""Input values: log1p, counts per 10,000, bins; and the way back."""

import numpy as np
import pytest

from scbench.data.values import log1p_counts


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_values(dtype):
    counts = np.array([0, 1, 9, 200, np.iinfo(dtype).max], dtype=dtype)
    values = log1p_counts(counts)
    assert values.dtype == np.float32
    assert np.array_equal(values, np.array([np.float32(np.log1p(float(c))) for c in counts]))
