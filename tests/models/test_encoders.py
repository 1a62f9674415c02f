"""What holds of every structure here: a cell stands alone, any depth runs, low precision stays close."""

import numpy as np
import pytest
import torch

from scbench.models.dropout_keys import no_dropout

STRUCTURES = ["cnn", "linear", "linear_mixer", "gnn"]
LENGTHS = [7, 1, 16, 2, 513, 33]


def per_cell(encoder, output, lengths):
    """A list of each cell's tensor."""
    return list(output) if encoder.pools else list(output.split(lengths))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_a_cell_does_not_depend_on_its_company_nor_on_pads(encoders, structure, probability):
    """Alone, grouped, reordered or padded; with dropout too, for it is keyed by sample and place."""
    encoder = encoders.make(structure, max_genes=512, layers=8, dropout=probability)
    cells, genes = encoders.cells(LENGTHS)
    samples = np.array([5, 2**40, 3, 9, 8, 7])

    def run(part, **options):
        states, batch = encoders.pack([cells[i] for i in part], [genes[i] for i in part], samples=samples[part], **options)
        output = encoder(states, batch, encoders.keys(batch) if probability else no_dropout)
        return dict(zip(part, per_cell(encoder, output, batch.cell_offsets.diff().tolist()), strict=True))

    together = run([0, 1, 2, 3, 4, 5])
    others = [
        run([4, 2, 0, 5, 1, 3]),
        {**run([0, 4]), **run([3, 1, 5]), **run([2])},
        {i: x for part in range(6) for i, x in run([part]).items()},
        run([0, 1, 2, 3, 4, 5], pad_to=512),
        run([5, 0], pad_to=40),
    ]
    for other in others:
        for i, x in other.items():
            x = x if encoder.pools else x[: LENGTHS[i]]
            torch.testing.assert_close(x, together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_every_depth_trains(encoders, structure, recipe):
    for layers in range(1, 13):
        encoder = encoders.make(structure, recipe=recipe, layers=layers, max_genes=12, dropout=0.1)
        states, batch = encoders.pack(*encoders.cells([1, 2, 7, 13]), pad_to=12 if recipe == "aaai2025" else None)
        output = encoder(states, batch, encoders.keys(batch))
        assert output.shape == ((4, 6) if encoder.pools else states.shape)
        output.square().sum().backward()
        for name, leaf in [("states", states), *encoder.named_parameters()]:
            assert leaf.grad is not None and leaf.grad.isfinite().all(), f"{layers} layers: {name}"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_cells_of_cls_alone(encoders, structure):
    encoder = encoders.make(structure)
    states, batch = encoders.pack(*encoders.cells([1, 1]))
    output = encoder(states, batch, no_dropout)
    output.sum().backward()
    assert output.isfinite().all() and states.grad.isfinite().all()
    assert not torch.equal(output[0], output[1])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_bf16_stays_close_and_embeddings_are_fp32(encoders, structure, recipe):
    encoder = encoders.make(structure, recipe=recipe, width=32)
    states, batch = encoders.pack(*encoders.cells([5, 21, 2], width=32), pad_to=20 if recipe == "aaai2025" else None)
    low = encoder.bfloat16()(states.bfloat16(), batch, no_dropout)
    exact = encoder.double()(states.bfloat16().double(), batch, no_dropout)
    assert low.dtype == (torch.float32 if encoder.pools else torch.bfloat16)
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()
