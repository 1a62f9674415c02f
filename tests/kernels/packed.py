"""Inputs of the operations on packed cells, and what they and their oracles give."""

import torch

from scbench.kernels.selective_scan import selective_scan_oracle

F64 = torch.float64


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def scan_inputs(lengths, channels=6, states=4, dtype=F64):
    """x, step, decay, input_matrix, output_matrix, skip."""
    generator = torch.Generator().manual_seed(sum(lengths) + channels)

    def draw(*shape):
        return torch.randn(*shape, dtype=F64, generator=generator)

    tokens = sum(lengths)
    inputs = [draw(tokens, channels), draw(tokens, channels).exp() / 4, -draw(channels, states).exp(),
              draw(tokens, states), draw(tokens, states), draw(channels)]
    return [x.to(dtype) for x in inputs]


def gated_scan_inputs(lengths, channels=6, states=4, dtype=F64):
    """x, step, step_bias, decay, input_matrix, output_matrix, skip, gate."""
    x, _, *others = scan_inputs(lengths, channels, states, dtype)
    generator = torch.Generator().manual_seed(1)
    step, gate = (3 * torch.randn(x.shape, dtype=F64, generator=generator).to(dtype) for _ in range(2))
    return [x, step, torch.randn(channels, dtype=F64, generator=generator).to(dtype), *others, gate]


def gated_scan_oracle(x, step, step_bias, decay, input_matrix, output_matrix, skip, gate, offsets):
    """By the definition: steps log(1 + exp(step + step_bias)), and gate / (1 + exp(-gate)) times what the scan gives."""
    positive = torch.logaddexp(step + step_bias, torch.zeros(()))
    out = selective_scan_oracle(x, positive, decay, input_matrix, output_matrix, skip, offsets)
    return out * gate * torch.sigmoid(gate)


def convolution_inputs(lengths, channels=6, taps=4, dtype=F64):
    """x, weight, bias."""
    generator = torch.Generator().manual_seed(sum(lengths) + channels)
    shapes = [(sum(lengths), channels), (channels, taps), (channels,)]
    return [torch.randn(*shape, dtype=F64, generator=generator).to(dtype) for shape in shapes]


def output_and_gradients(function, inputs, offsets, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    output = function(*leaves, offsets)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).bfloat16()  # exact in every precision
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def results(function, inputs, lengths, dtype=None):
    """output_and_gradients of cells of these lengths."""
    return output_and_gradients(function, inputs, offsets_of(lengths), dtype)
