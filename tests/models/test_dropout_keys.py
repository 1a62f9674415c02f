"""A key is a word of the site's stream, by the definition: seed, site, sample, position."""

import numpy as np
import pytest
import torch

from scbench.kernels import random
from scbench.models.dropout_keys import dropout_keys


@pytest.mark.parametrize("sites", [[(0,)], [(0, 0), (0, 1), (5,), (2, 3)], []])
def test_keys(sites):
    samples, cell_index = torch.tensor([7, 2**40, 0]), torch.tensor([0, 0, 1, 2, 2, 2])
    positions = torch.tensor([0, 1, 0, 0, 1, 2])
    keys = dropout_keys(11, sites, samples, cell_index, positions)
    for site in sites:
        stream = random.key(11, random.Stream.DROPOUT, *site)
        places = zip(samples[cell_index].tolist(), positions.tolist(), strict=True)
        expected = [random.fold(stream, *place) for place in places]
        assert keys(*site).numpy().view(np.uint64).tolist() == expected
    with pytest.raises(KeyError):
        keys(9, 9, 9)
