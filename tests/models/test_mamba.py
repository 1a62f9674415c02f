"""The Mamba encoder against an oracle of its own: cell by cell, the scan in closed form instead of a recurrence, float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.kernels import random
from scbench.kernels.add_norm import dropout_oracle
from scbench.models.dropout_keys import dropout_keys, no_dropout
from scbench.models.encoders.mamba import MambaEncoder

F64 = torch.float64
LENGTHS = (5, 0, 16, 1, 9)  # genes; <cls> comes on top


def make_encoder(width=20, **options) -> MambaEncoder:
    config = ModelConfig(vocabulary_size=43, structure="mamba", width=width, layers=2, **{"dropout": 0.0, **options})
    encoder = MambaEncoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if not encoder.initialize(name, parameter, generator):
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
            elif "step" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)  # away from 1, where errors hide
            else:
                parameter.mul_(3 if name.endswith("weight") else 0.3)  # larger steps, which differ between tokens
    return encoder.to(F64)


def make_batch(lengths=LENGTHS, **options) -> CellBatch:
    rng = np.random.default_rng(0)
    return CellBatch.from_lists([rng.choice(40, n, replace=False) for n in lengths], [np.ones(n) for n in lengths], **options)


def draw_states(tokens, width=20, seed=0):
    return torch.randn(tokens, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def root_mean_square_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def oracle_block(layer, x):
    """Mamba of one cell, x [L, D], with y_t = Σ over s ≤ t of C_t · exp(A (Δ_(s+1) + … + Δ_t)) Δ_s B_s u_s + D u_t."""
    channels = layer.skip.numel()
    projected = x @ layer.input_projection.weight.T
    u, gate = projected[:, :channels], projected[:, channels:]
    padded = F.pad(u.T[None], (3, 0))
    u = F.silu(F.conv1d(padded, layer.convolution_weight[:, None], layer.convolution_bias, groups=channels))[0].T
    selected = u @ layer.selection.weight.T
    rank = math.ceil(x.shape[1] / 16)
    b, c = selected[:, rank : rank + 4], selected[:, rank + 4 :]
    step = torch.log1p(torch.exp(selected[:, :rank] @ layer.step_weight.T + layer.step_bias))
    total = step.cumsum(0)
    past = torch.ones(len(x), len(x), dtype=x.dtype).tril()  # [t, s]
    elapsed = (total[:, None] - total[None]) * past[..., None]  # [t, s, E]
    kernel = torch.exp(-layer.decay_logarithm.exp() * elapsed[..., None]) * past[..., None, None]
    y = torch.einsum("tn,tsen,sn,se->te", c, kernel, b, step * u) + layer.skip * u
    return (y * gate * torch.sigmoid(gate)) @ layer.output_projection.weight.T


def oracle(encoder, states, batch, kept=lambda number: torch.ones(1, 1)):
    """`kept(layer)` multiplies a block's output, [T, D]."""
    cells = []
    for start, x in zip(batch.cell_offsets.tolist(), states.split(batch.cell_offsets.diff().tolist()), strict=False):
        for number, layer in enumerate(encoder.layers):
            block = oracle_block(layer, root_mean_square_norm(x, layer.norm.weight))
            x = x + block * kept(number).expand(len(states), -1)[start : start + len(x)]
        cells.append(root_mean_square_norm(x, encoder.final_norm.weight))
    return torch.cat(cells)


@pytest.mark.parametrize("width", [20, 16, 33])
@pytest.mark.parametrize("lengths", [LENGTHS, (0,), (0, 0), (7,)])
def test_states_and_every_gradient_equal_the_dense_oracle(lengths, width):
    encoder, batch = make_encoder(width), make_batch(lengths)
    tokens = batch.genes.shape[0]
    upstream = draw_states(tokens, width, seed=5)
    results = []
    for function in (lambda x: encoder(x, batch, no_dropout), lambda x: oracle(encoder, x, batch)):
        encoder.zero_grad(set_to_none=True)
        states = draw_states(tokens, width).requires_grad_()
        output = function(states)
        output.backward(upstream)
        results.append({"output": output.detach(), "states": states.grad}
                       | {name: parameter.grad for name, parameter in encoder.named_parameters()})
    ours, expected = results
    for name, theirs in expected.items():
        assert theirs.abs().max() > 0 or tokens == len(lengths), name
        torch.testing.assert_close(ours[name], theirs, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_falls_on_each_blocks_output():
    encoder, batch = make_encoder(dropout=0.3), make_batch()
    states = draw_states(batch.genes.shape[0])

    def keys(*site):
        return random.bits_torch(random.key(4, *site), torch.arange(len(states)))

    expected = oracle(encoder, states, batch, lambda number: dropout_oracle(torch.ones_like(states), keys(number, 0), 0.3))
    torch.testing.assert_close(encoder(states, batch, keys), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_company_and_order_of_cells_change_nothing_even_with_dropout(dtype, tolerance):
    encoder, samples = make_encoder(dropout=0.3).to(dtype), np.array([100, 7, 3, 9, 10**12])
    batch = make_batch()
    states = draw_states(batch.genes.shape[0]).to(dtype)
    cells = states.split(batch.lengths.tolist())

    def encode(order):
        part = make_batch([LENGTHS[i] for i in order], samples=samples[order])
        index = torch.repeat_interleave(torch.arange(len(order)), part.lengths)
        positions = torch.arange(len(index)) - part.cell_offsets[index]
        keys = dropout_keys(0, encoder.dropout_sites(), part.samples, index, positions)
        return encoder(torch.cat([cells[i] for i in order]), part, keys).split(part.lengths.tolist())

    together = encode([0, 1, 2, 3, 4])
    for order in ([3, 0, 4, 2, 1], [1], [2, 4]):
        for i, ours in zip(order, encode(order), strict=True):
            torch.testing.assert_close(ours, together[i], rtol=tolerance, atol=tolerance)


def test_the_reference_recipe_drops_nothing():
    encoder, batch = make_encoder(dropout=0.3, recipe="aaai2025"), make_batch()
    states, tokens = draw_states(batch.genes.shape[0]), torch.arange(batch.genes.shape[0])
    dropped = encoder(states, batch, lambda *site: tokens)
    assert torch.equal(dropped, encoder(states, batch, no_dropout))


def test_pads_at_the_end_change_no_token_before_them():
    encoder, batch, padded = make_encoder(), make_batch(), make_batch(pad_to=16)
    states = draw_states(batch.genes.shape[0])
    places = torch.cat([start + torch.arange(n) for start, n in zip(padded.cell_offsets[:-1], padded.lengths, strict=True)])
    with_pads = draw_states(padded.genes.shape[0], seed=3).index_copy(0, places, states)
    ours = encoder(with_pads, padded, no_dropout)[places]
    torch.testing.assert_close(ours, encoder(states, batch, no_dropout), rtol=1e-12, atol=1e-12)


def test_a_repetition_is_bit_identical():
    encoder, batch = make_encoder().float(), make_batch()
    states = draw_states(batch.genes.shape[0]).float()
    results = []
    for _ in range(2):
        encoder.zero_grad(set_to_none=True)
        output = encoder(states, batch, no_dropout)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in encoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_weights_work():
    encoder, batch = make_encoder().bfloat16(), make_batch()
    states = draw_states(batch.genes.shape[0]).bfloat16()
    output = encoder(states, batch, no_dropout)
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    exact = encoder.to(F64)(states.to(F64), batch, no_dropout)  # the same rounded weights
    assert (output - exact).abs().max() <= 2**-5 * exact.abs().max()


def test_new_weights_follow_the_papers_code():
    encoder = MambaEncoder(ModelConfig(vocabulary_size=43, structure="mamba", width=512, layers=1))
    weights, filled = dict(encoder.named_parameters()), []
    with torch.no_grad():
        for name, parameter in weights.items():
            if encoder.initialize(name, parameter, torch.Generator().manual_seed(0)):
                filled.append(name.removeprefix("layers.0."))
    assert filled == ["convolution_weight", "convolution_bias", "step_weight", "step_bias", "decay_logarithm", "skip"]
    torch.testing.assert_close(weights["layers.0.decay_logarithm"].exp(), torch.arange(1.0, 5).expand(1024, 4))
    assert (weights["layers.0.skip"] == 1).all()
    step = F.softplus(weights["layers.0.step_bias"].detach())
    quantiles = torch.quantile(step, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).log10()
    torch.testing.assert_close(quantiles, torch.tensor([-3.0, -2.5, -2.0, -1.5, -1.0]), atol=0.1, rtol=0)  # log-uniform
    for name, bound in [("step_weight", 32**-0.5), ("convolution_weight", 0.5), ("convolution_bias", 0.5)]:
        largest = float(weights[f"layers.0.{name}"].detach().abs().max())
        assert 0.95 * bound < largest <= bound, name
