"""Where the transformer drops: at three sites of a layer by default, at four in the recipe aaai2025 (torch's own layer)."""

import pytest
import torch

from scbench.config import ModelConfig
from scbench.models.dropout_keys import no_dropout
from scbench.models.encoders.transformer import (
    ATTENTION_OUTPUT,
    ATTENTION_PROBABILITIES,
    FEED_FORWARD_INNER,
    FEED_FORWARD_OUTPUT,
    TransformerEncoder,
)

SITES = [ATTENTION_OUTPUT, FEED_FORWARD_INNER, FEED_FORWARD_OUTPUT, ATTENTION_PROBABILITIES]


@pytest.mark.parametrize(("recipe", "dropping"), [("default", SITES[:3]), ("aaai2025", SITES)])
def test_sites_of_the_recipes(encoders, recipe, dropping):
    config = ModelConfig(vocabulary_size=602, recipe=recipe, width=6, heads=2, layers=2, dropout=0.4, max_genes=12)
    encoder = TransformerEncoder(config).double()
    states, batch = encoders.pack(*encoders.cells([5, 13, 2]), pad_to=config.inputs.pad_to)
    keys, plain = encoders.keys(batch), encoder(states, batch, no_dropout)

    def only(chosen):
        """The states when nothing is dropped but at one site."""
        return encoder(states, batch, lambda layer, site: keys(layer, site) if site == chosen else None)

    assert [site for site in SITES if not torch.equal(only(site), plain)] == dropping
    assert not any(torch.equal(only(a), only(b)) for a in dropping for b in dropping if a != b)
