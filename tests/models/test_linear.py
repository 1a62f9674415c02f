"""The linear encoder against its definition, and where it drops."""

import pytest
import torch
from torch.nn import functional as F

from scbench.kernels import random
from scbench.kernels.add_norm import dropout_oracle
from scbench.models.dropout_keys import no_dropout


def oracle(encoder, states):
    for layer in encoder.layers:
        hidden = layer.linear2(torch.relu(layer.linear1(states)))
        centred = hidden - hidden.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        states = states + F.gelu(normed * layer.norm.weight + layer.norm.bias)
    return states


@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_states_and_gradients_equal_the_oracle(encoders, recipe):
    encoder = encoders.make("linear", recipe=recipe)
    states, batch = encoders.pack(*encoders.cells([1, 2, 7]), pad_to=9 if recipe == "aaai2025" else None)
    leaves = {"states": states, **dict(encoder.named_parameters())}
    encoders.assert_same(encoder(states, batch, no_dropout), oracle(encoder, states), leaves)


def test_dropout_is_inside_and_at_the_output(encoders):
    encoder = encoders.make("linear", layers=1, dropout=0.3)
    states, batch = encoders.pack(*encoders.cells([4, 6]))
    keys = [random.bits_torch(site, torch.arange(10)) for site in (11, 12)]
    layer = encoder.layers[0]
    inner = dropout_oracle(torch.relu(layer.linear1(states)), keys[0], 0.3)
    expected = states + dropout_oracle(F.gelu(layer.norm(layer.linear2(inner))), keys[1], 0.3)
    torch.testing.assert_close(encoder(states, batch, lambda layer, site: keys[site]), expected)


def test_recipe_aaai2025_drops_nothing(encoders):
    encoder = encoders.make("linear", recipe="aaai2025", dropout=0.3)
    states, batch = encoders.pack(*encoders.cells([4, 6]), pad_to=9)
    assert torch.equal(encoder(states, batch, encoders.keys(batch)), encoder(states, batch, no_dropout))
