"""The linear mixer, cell by cell from the definition; with batch norm, against torch's modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scbench.errors import UserError
from scbench.models.dropout_keys import no_dropout


def window(i, positions, new_positions):
    """Where adaptive average pooling looks, by its definition."""
    return range(i * positions // new_positions, -(-(i + 1) * positions // new_positions))


def oracle(encoder, x):
    """One cell alone, [n, D] → [D]."""
    positions = encoder.config.max_genes + 1
    for i, layer in enumerate(encoder.layers):
        new = 1 if i == len(encoder.layers) - 1 else max(1, positions // 2)
        assert layer.position_mix.weight.shape == (new, positions)
        channels = F.linear(x, layer.channel_mix.weight, layer.channel_mix.bias)
        mixed = layer.position_mix.weight[:, : len(x)] @ channels + layer.position_mix.bias[:, None]
        y = F.gelu(F.layer_norm(mixed, mixed.shape[1:], layer.norm.weight, layer.norm.bias))
        seen = [[p for p in window(j, positions, new) if p < len(x)] for j in range(new)]
        x = y + torch.stack([x[places].mean(0) if places else x.new_zeros(x.shape[1]) for places in seen])
        positions = new
    return x[0]


@pytest.mark.parametrize("max_genes", [20, 15, 1])
@pytest.mark.parametrize("layers", [1, 2, 6])
def test_embeddings_and_gradients_equal_the_oracle(encoders, max_genes, layers):
    encoder = encoders.make("linear_mixer", layers=layers, max_genes=max_genes)
    lengths = [n for n in (1, 2, 9, 16, 21) if n <= max_genes + 1]
    states, batch = encoders.pack(*encoders.cells(lengths))
    expected = torch.stack([oracle(encoder, x) for x in states.split(lengths)])
    leaves = {"states": states, **dict(encoder.named_parameters())}
    encoders.assert_same(encoder(states, batch, no_dropout), expected, leaves)


def test_513_tokens(encoders):
    encoder = encoders.make("linear_mixer", layers=12, max_genes=512)
    states, batch = encoders.pack(*encoders.cells([513, 40]))
    expected = torch.stack([oracle(encoder, x) for x in states.split([513, 40])])
    torch.testing.assert_close(encoder(states, batch, no_dropout), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("max_genes", [16, 15])
def test_pads_and_where_a_cell_lies_change_nothing(encoders, max_genes):
    encoder = encoders.make("linear_mixer", max_genes=max_genes)
    rows, genes = encoders.cells([max_genes + 1, 4, 1, max_genes + 1])
    alone = [encoder(*encoders.pack([x], [g]), no_dropout)[0] for x, g in zip(rows, genes, strict=True)]
    for pad_to in (None, max_genes):
        together = encoder(*encoders.pack(rows, genes, pad_to=pad_to), no_dropout)
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[513, 513], [40, 513]])
def test_bf16_is_near_float64(encoders, lengths):
    encoder = encoders.make("linear_mixer", layers=6, max_genes=512, width=64)
    states, batch = encoders.pack(*encoders.cells(lengths, width=64))
    leaves = [states, *(p for name, p in encoder.named_parameters() if not name.endswith("position_mix.bias"))]  # no gradient
    exact = encoder(states, batch, no_dropout)
    expected = torch.autograd.grad(exact.sum(), leaves)
    encoder.to(torch.bfloat16)
    states = states.detach().to(torch.bfloat16).requires_grad_()
    leaves = [states, *(p for name, p in encoder.named_parameters() if not name.endswith("position_mix.bias"))]
    mine = encoder(states, batch, no_dropout)
    assert mine.dtype == torch.float32
    gradients = torch.autograd.grad(mine.sum(), leaves)
    for ours, theirs in zip([mine, *gradients], [exact, *expected], strict=True):
        assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 0.05
    again = torch.autograd.grad(encoder(states, batch, no_dropout).sum(), leaves)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, again, strict=True))


@pytest.mark.parametrize("max_genes", [15, 16])
def test_recipe_aaai2025_takes_pads_as_data_and_normalises_over_the_batch(encoders, max_genes):
    encoder = encoders.make("linear_mixer", recipe="aaai2025", layers=4, max_genes=max_genes)
    states, batch = encoders.pack(*encoders.cells([3, 16, 9]), pad_to=max_genes)
    norms = [nn.BatchNorm1d(6).double() for _ in encoder.layers]
    for layer, norm in zip(encoder.layers, norms, strict=True):
        norm.weight, norm.bias = layer.norm.weight, layer.norm.bias

    def torchs():
        x = states.view(3, max_genes + 1, 6)
        for layer, norm in zip(encoder.layers, norms, strict=True):
            mixed = F.linear(x, layer.channel_mix.weight, layer.channel_mix.bias).transpose(1, 2)
            mixed = F.linear(mixed, layer.position_mix.weight, layer.position_mix.bias)
            x = (F.gelu(norm(mixed)) + F.adaptive_avg_pool1d(x.transpose(1, 2), mixed.shape[2])).transpose(1, 2)
        return x[:, 0]

    leaves = {"states": states, **{name: p for name, p in encoder.named_parameters() if "position_mix.bias" not in name}}
    encoders.assert_same(encoder(states, batch, no_dropout), torchs(), leaves, tolerance=1e-9)
    for layer, norm in zip(encoder.layers, norms, strict=True):
        torch.testing.assert_close(layer.norm.running_mean, norm.running_mean)
        torch.testing.assert_close(layer.norm.running_var, norm.running_var)
        norm.eval()
    encoder.eval()
    torch.testing.assert_close(encoder(states, batch, no_dropout), torchs())


def test_longer_cells_are_refused_in_one_sentence(encoders):
    encoder = encoders.make("linear_mixer", max_genes=7)
    with pytest.raises(UserError, match=r"a cell has 8 genes.*at most 7") as error:
        encoder(*encoders.pack(*encoders.cells([9, 2])), no_dropout)
    assert "\n" not in str(error.value)
