"""The dropout key of every token at every site of a model, for one batch."""

from collections.abc import Callable

from torch import Tensor

from scbench.kernels import random

DropoutKeys = Callable[..., Tensor | None]


def dropout_keys(seed: int, samples: Tensor, cell_index: Tensor, positions: Tensor) -> DropoutKeys:
    """A function from a site (a path of integers: layer, place) to its keys, int64 [T].

    A site's key comes from the seed, a token's from its sample number and its position in the cell: which cells share
    a batch, a micro-step or a rank changes nothing.

    Parameters
    ----------
    samples
        int64 [B], sample numbers.
    cell_index, positions
        int64 [T], the cell of each token and the token's place in it.
    """

    def site(*path: int) -> Tensor:
        sample_keys = random.bits_torch(random.key(seed, random.Stream.DROPOUT, *path), samples)
        return random.bits_torch(sample_keys[cell_index], positions)

    return site


def no_dropout(*path: int) -> None:
    """The keys of a model that does not drop anything (evaluation)."""
    return None
