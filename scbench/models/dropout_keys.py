"""The dropout key of every token at every site of a model, for one batch."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from scbench.kernels import random

DropoutKeys = Callable[..., Tensor | None]
Site = tuple[int, ...]  # a path of integers: layer, place


@cache
def _site_keys(seed: int, sites: tuple[Site, ...], device: torch.device) -> Tensor:
    """int64 [S, 1]; made once, for a GPU's host would wait for the copy."""
    keys = [random.key(seed, random.Stream.DROPOUT, *site) for site in sites]
    return torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64))[:, None].to(device)


def dropout_keys(
    seed: int, sites: Sequence[Site], samples: Tensor, cell_index: Tensor, positions: Tensor
) -> DropoutKeys:
    """A function from a site, `keys(layer, place)`, to its keys, int64 [T].

    A site's key comes from the seed, a token's from its sample number and its position in the cell: which cells share
    a batch, a micro-step or a rank changes nothing. All sites are computed together: a GPU has some thirty launches for
    them, not thirty a site.

    Parameters
    ----------
    sites
        All that will be asked for.
    samples
        int64 [B], sample numbers.
    cell_index, positions
        int64 [T], the cell of each token and the token's place in it.
    """
    sample_keys = random.bits_torch(_site_keys(seed, tuple(sites), samples.device), samples)
    rows = dict(zip(sites, random.bits_torch(sample_keys[:, cell_index], positions).unbind(), strict=True))
    return lambda *site: rows[site]


def no_dropout(*site: int) -> None:
    """The keys of a model that does not drop anything (evaluation)."""
    return None
