"""Encoders with weights that show every error, and packed states to put in."""

import numpy as np
import pytest
import torch

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.models.dropout_keys import dropout_keys
from scbench.models.encoders.cnn import CnnEncoder
from scbench.models.encoders.encoder import Encoder
from scbench.models.encoders.gnn import GnnEncoder
from scbench.models.encoders.linear import LinearEncoder
from scbench.models.encoders.linear_mixer import LinearMixerEncoder

GENES = 600
PAD, CLS = GENES, GENES + 1
ENCODERS = {"cnn": CnnEncoder, "linear": LinearEncoder, "linear_mixer": LinearMixerEncoder, "gnn": GnnEncoder}


def encoder_of(structure: str, **options) -> Encoder:
    """An encoder in float64, by default 3 layers of width 6; nothing in it is 0 or 1."""
    settings = {"width": 6, "layers": 3, "dropout": 0.0, "max_genes": 20, **options}
    encoder = ENCODERS[structure](ModelConfig(structure=structure, vocabulary_size=GENES + 2, **settings)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            spread = 0.2 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * spread + (name.endswith("norm.weight")))
    return encoder


def cells_of(lengths, width=6, seed=0) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """States float64 [n, D] and gene ids [n − 1] of one cell an element of `lengths` (tokens, <cls> included)."""
    rng = np.random.default_rng(seed)
    states = [torch.from_numpy(rng.normal(size=(n, width))) for n in lengths]
    return states, [rng.choice(GENES, n - 1, replace=False) for n in lengths]


def packed(states, genes, *, pad_to=None, samples=None):
    """(states [T, D], a leaf; batch) of such cells; pads get states of 3."""
    values = [np.zeros(len(g)) for g in genes]
    batch = CellBatch.from_lists(genes, values, cls_token=CLS, pad_token=PAD, pad_to=pad_to, samples=samples)
    if pad_to is not None:
        states = [torch.cat([x, x.new_full((pad_to + 1 - len(x), x.shape[1]), 3.0)]) for x in states]
    return torch.cat(states).requires_grad_(), batch


def keys_of(batch: CellBatch, seed=5):
    """The dropout keys of a batch."""
    lengths = batch.cell_offsets.diff()
    cell_index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sites = [(layer, *place) for layer in range(12) for place in ((), (0,), (1,), (2,), (3,))]
    positions = torch.arange(len(batch.genes)) - batch.cell_offsets[cell_index]
    return dropout_keys(seed, sites, batch.samples, cell_index, positions)


def assert_same_gradients(mine: torch.Tensor, theirs: torch.Tensor, leaves: dict[str, torch.Tensor], tolerance=1e-11):
    """Outputs are equal, and so are the gradients of every leaf, for a random upstream gradient."""
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3), dtype=mine.dtype)
    gradients = [torch.autograd.grad((x * upstream).sum(), leaves.values(), retain_graph=True) for x in (mine, theirs)]
    for name, ours, expected in zip(leaves, *gradients, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        assert float((ours - expected).abs().max()) <= tolerance * scale, name
        assert float(expected.abs().max()) > 0 or expected.shape[0] == 0, f"{name} has no gradient to compare"


@pytest.fixture(scope="session")
def encoders():
    """The functions above, by name."""

    class Namespace:
        make, cells, pack, keys = map(staticmethod, (encoder_of, cells_of, packed, keys_of))
        assert_same = staticmethod(assert_same_gradients)

    return Namespace
