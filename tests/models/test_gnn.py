"""The graph encoder, cell by cell from the definition."""

import pytest
import torch
from torch.nn import functional as F

from scbench.kernels import backend, random
from scbench.kernels.add_norm import dropout_oracle
from scbench.models.dropout_keys import no_dropout


def oracle(encoder, x, genes, real=None, drop=lambda y: y):
    """One cell alone, [n, D] → [n, D]; `real`: tokens before the pads."""
    for layer in encoder.layers:
        rows = layer.factor_linear_table[genes.long()]
        f, g = layer.factor_mlp2(F.gelu(layer.factor_mlp1(rows))), layer.factor_table[genes.long()]
        logits = (f @ f.T + g @ g.T)[:, :real]
        weights = logits.exp() / logits.exp().sum(1, keepdim=True)
        mixed = layer.linear(weights @ x[:real])
        x = x + drop(F.gelu(F.layer_norm(mixed, mixed.shape[1:], layer.norm.weight, layer.norm.bias)))
    return x


@pytest.mark.parametrize("lengths", [[1], [2], [1, 7, 2, 12], [513, 30]])
def test_states_and_gradients_equal_the_oracle(encoders, lengths):
    encoder = encoders.make("gnn")
    states, batch = encoders.pack(*encoders.cells(lengths))
    cells = zip(states.split(lengths), batch.genes.split(lengths), strict=True)
    expected = torch.cat([oracle(encoder, x, genes) for x, genes in cells])
    # A single token attends to itself whatever the factors are: they have no gradient then.
    leaves = {"states": states}
    leaves |= {name: p for name, p in encoder.named_parameters() if "factor" not in name or len(lengths) > 1}
    encoders.assert_same(encoder(states, batch, no_dropout), expected, leaves)


def test_recipe_aaai2025_attends_to_no_pads_and_drops_nothing(encoders):
    encoder = encoders.make("gnn", recipe="aaai2025", dropout=0.3)
    states, batch = encoders.pack(*encoders.cells([3, 10, 7]), pad_to=9)
    cells = zip(states.split(10), batch.genes.split(10), [3, 10, 7], strict=True)
    expected = torch.cat([oracle(encoder, x, genes, real) for x, genes, real in cells])
    leaves = {"states": states, **dict(encoder.named_parameters())}
    encoders.assert_same(encoder(states, batch, encoders.keys(batch)), expected, leaves)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "pad_to"), [([1], None), ([1, 1, 1], None), ([2, 1, 300, 40], None), ([3, 9, 2], 12)])
def test_a_gene_at_a_time_is_a_token_at_a_time(encoders, monkeypatch, precision, lengths, pad_to):
    """What a CPU computes once a gene, a GPU once a token."""
    encoder = encoders.make("gnn", layers=2).to(precision)
    states, batch = encoders.pack(*encoders.cells(lengths), pad_to=pad_to)
    states = states.detach().to(precision).requires_grad_()
    found, upstream = [], torch.randn(states.shape, generator=torch.Generator().manual_seed(4)).to(precision)
    for forced in ("", "", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "FORCED", forced)
            output = encoder(states, batch, no_dropout)
            found.append([output, *torch.autograd.grad(output, [states, *encoder.parameters()], upstream)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[precision]
    for mine, again, theirs in zip(*found, strict=True):
        assert torch.equal(mine, again) and mine.shape == theirs.shape and mine.dtype == theirs.dtype
        mine, theirs = mine.detach(), theirs.detach()
        assert float((mine - theirs).norm()) <= tolerance * max(1.0, float(theirs.norm()))


def test_dropout_is_at_the_output(encoders):
    encoder = encoders.make("gnn", layers=1, dropout=0.3)
    states, batch = encoders.pack(*encoders.cells([8]))
    keys = random.bits_torch(11, torch.arange(8))
    expected = oracle(encoder, states, batch.genes, drop=lambda y: dropout_oracle(y, keys, 0.3))
    torch.testing.assert_close(encoder(states, batch, lambda layer: keys), expected)


@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_factor_tables_start_as_documented(encoders, recipe):
    encoder = encoders.make("gnn", recipe=recipe, layers=1)
    generator = torch.Generator().manual_seed(0)
    kept = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    with torch.no_grad():
        filled = {name for name, p in encoder.named_parameters() if encoder.initialize(name, p, generator)}
    assert filled == {"layers.0.factor_linear_table", "layers.0.factor_table"}
    for name, p in encoder.named_parameters():
        if name not in filled:
            assert torch.equal(p, kept[name])
        elif recipe == "aaai2025":
            assert 0 <= p.min() < 0.01 and 0.99 < p.max() < 1
            assert abs(p.mean().item() - 0.5) < 0.01
        else:
            assert abs(p.mean().item()) < 0.005
            assert abs(p.std().item() - 0.125) < 0.005
