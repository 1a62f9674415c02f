"""The convolutional encoder, cell by cell from the definition; with batch norm, against torch's modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scbench.kernels.add_norm import dropout_oracle
from scbench.models.dropout_keys import no_dropout


def convolve(x, convolution, stride):
    """[n, D] → [⌈n / stride⌉, D], position by position."""
    rows = []
    for centre in range(0, len(x), stride):
        places = [p for p in range(centre - 4, centre + 5) if 0 <= p < len(x)]
        taps = convolution.weight[:, :, [p - centre + 4 for p in places]]
        rows.append(torch.einsum("oik,ki->o", taps, x[places]) + convolution.bias)
    return torch.stack(rows)


def oracle(encoder, x, drop=lambda layer, y: y):
    """One cell alone, [n, D] → [D]."""
    for i, layer in enumerate(encoder.layers):
        stride = 1 if i % 6 == 0 else 2
        y = convolve(x, layer.convolution, stride)
        y = drop(i, F.gelu(F.layer_norm(y, y.shape[1:], layer.norm.weight, layer.norm.bias)))
        x = y + torch.stack([x[p : p + stride].amax(0) for p in range(0, len(x), stride)])
    return x.mean(0)


@pytest.mark.parametrize("lengths", [[1], [2], [1, 2, 3, 8], [13, 1, 21, 16]])
@pytest.mark.parametrize("layers", [1, 4, 8])
def test_embeddings_and_gradients_equal_the_oracle(encoders, lengths, layers):
    encoder = encoders.make("cnn", layers=layers)
    cells, genes = encoders.cells(lengths)
    states, batch = encoders.pack(cells, genes)
    expected = torch.stack([oracle(encoder, x) for x in states.split(lengths)])
    leaves = {"states": states, **dict(encoder.named_parameters())}
    encoders.assert_same(encoder(states, batch, no_dropout), expected, leaves)


def test_513_tokens(encoders):
    encoder = encoders.make("cnn", layers=12)
    states, batch = encoders.pack(*encoders.cells([513, 40]))
    expected = torch.stack([oracle(encoder, x) for x in states.split([513, 40])])
    torch.testing.assert_close(encoder(states, batch, no_dropout), expected, rtol=1e-11, atol=1e-11)


def test_a_shortened_cell_is_dropped_by_the_keys_of_its_first_tokens(encoders):
    encoder = encoders.make("cnn", dropout=0.4)
    lengths = [5, 12, 1]
    states, batch = encoders.pack(*encoders.cells(lengths))
    keys = encoders.keys(batch)

    def drop_in(cell):
        return lambda layer, y: dropout_oracle(y, keys(layer).split(lengths)[cell][: len(y)], 0.4)

    expected = torch.stack([oracle(encoder, x, drop_in(cell)) for cell, x in enumerate(states.split(lengths))])
    encoders.assert_same(encoder(states, batch, keys), expected, {"states": states})


@pytest.mark.parametrize("tokens", [16, 17])
def test_recipe_aaai2025_takes_pads_as_data_and_normalises_over_the_batch(encoders, tokens):
    encoder = encoders.make("cnn", recipe="aaai2025", layers=8)
    states, batch = encoders.pack(*encoders.cells([3, 16, 9]), pad_to=tokens - 1)
    norms = [nn.BatchNorm1d(6).double() for _ in encoder.layers]
    for layer, norm in zip(encoder.layers, norms, strict=True):
        norm.weight, norm.bias = layer.norm.weight, layer.norm.bias

    def torchs():
        x = states.view(3, tokens, 6).transpose(1, 2)
        for i, (layer, norm) in enumerate(zip(encoder.layers, norms, strict=True)):
            stride = 1 if i % 6 == 0 else 2
            y = F.gelu(norm(F.conv1d(x, layer.convolution.weight, layer.convolution.bias, stride, padding=4)))
            if x.shape[2] % stride:  # where the reference stops
                x = torch.cat([x, x.new_full((3, 6, 1), -torch.inf)], 2)
            x = y + F.max_pool1d(x, stride)
        return x.mean(2)

    leaves = {"states": states, **{name: p for name, p in encoder.named_parameters() if "convolution.bias" not in name}}
    encoders.assert_same(encoder(states, batch, no_dropout), torchs(), leaves, tolerance=1e-9)
    for layer, norm in zip(encoder.layers, norms, strict=True):
        torch.testing.assert_close(layer.norm.running_mean, norm.running_mean)
        torch.testing.assert_close(layer.norm.running_var, norm.running_var)
        norm.eval()
    encoder.eval()
    torch.testing.assert_close(encoder(states, batch, no_dropout), torchs())


def test_recipe_aaai2025_drops_as_the_reference_does(encoders):
    encoder = encoders.make("cnn", recipe="aaai2025", dropout=0.3)
    states, batch = encoders.pack(*encoders.cells([4, 6]), pad_to=9)
    assert not torch.equal(encoder(states, batch, encoders.keys(batch)), encoder(states, batch, no_dropout))
