"""Every operation that has C code gives the same where nothing can compile it: values and gradients, by its definition."""

import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from packed import F64, gated_scan_oracle, offsets_of, output_and_gradients

from scbench import kernels
from scbench.kernels import random
from scbench.kernels.add_norm import add_norm, dropout, dropout_oracle, norm_gelu_add, relu_dropout, rms_norm
from scbench.kernels.attention import attention, attention_oracle, self_attention
from scbench.kernels.causal_conv import causal_conv_oracle, causal_conv_silu
from scbench.kernels.convolution import convolution_pool
from scbench.kernels.gene_value_embedding import gene_value_embedding, gene_value_embedding_oracle
from scbench.kernels.selective_scan import gated_selective_scan, selective_scan, selective_scan_oracle
from scbench.kernels.table_rows import table_rows, table_rows_oracle

BF16, F32 = torch.bfloat16, torch.float32
TOLERANCE = {BF16: 2**-6, F32: 1e-5}
OFFSETS, T, D = offsets_of([6, 1, 4]), 11, 8
KEYS, DROPPED = random.bits_torch(random.key(3, 8), torch.arange(T)), 0.3
GENES = torch.tensor([4, 0, 2, 2, 6, 4, 4, 1, 0, 6, 2], dtype=torch.int32)
ORDER = torch.argsort(GENES, stable=True)
VALUES = torch.tensor([0, -1, 1.5, 2, -1, 0.75, 3, 0, 4, 1.5, -1])
FILES = {"attention_cpu", "causal_conv_cpu", "convolution_cpu", "selective_scan_cpu", "add_norm_cpu", "added_rows", "row_sums"}


def norm(x, weight, bias):
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x):
    return x * 0.5 * torch.special.erfc(-x / 2**0.5)


def convolution_pool_oracle(x, weight, bias, _):
    """For one cell of 11 rows, 3 taps and a stride of 2."""
    seen = torch.nn.functional.pad(x[0], (0, 0, 1, 1)).unfold(0, 3, 2)
    largest = torch.cat([x[:, :-1].unflatten(1, (-1, 2)).amax(2), x[:, -1:]], 1)
    return torch.einsum("pdk,edk->pe", seen, weight) + bias + largest


def scan_of(function):
    return lambda x, step, decay, b, c, skip, offsets: function(x, step.abs(), -decay.abs(), b, c, skip, offsets)


def gated(function):
    return lambda x, step, bias, decay, *rest: function(x, step, bias, -decay.abs(), *rest)


def silu(x):
    return x / (1 + (-x).exp())


def embedding_of_rows(*weights):
    return gene_value_embedding(GENES, VALUES.to(torch.promote_types(weights[0].dtype, F32)), ORDER, *weights)


CASES = {  # (operation, its definition, shapes of the inputs, the C file); both are called with the offsets too
    "attention": (attention, attention_oracle, [(T, 2, D)] * 3, "attention_cpu"),
    "self_attention": (self_attention, lambda p, offsets: attention_oracle(*p.unbind(1), offsets), [(T, 3, 2, D)],
                       "attention_cpu"),
    "selective_scan": (scan_of(selective_scan), scan_of(selective_scan_oracle),
                       [(T, D), (T, D), (D, 4), (T, 4), (T, 4), (D,)], "selective_scan_cpu"),
    "gated_selective_scan": (gated(gated_selective_scan), gated(gated_scan_oracle),
                             [(T, D), (T, D), (D,), (D, 4), (T, 4), (T, 4), (D,), (T, D)], "selective_scan_cpu"),
    "causal_conv_silu": (causal_conv_silu, lambda *x: silu(causal_conv_oracle(*x)), [(T, D), (D, 3), (D,)], "causal_conv_cpu"),
    "rms_norm": (lambda x, weight, _: rms_norm(x, weight, 1e-5),
                 lambda x, weight, _: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight, [(T, D), (D,)],
                 "add_norm_cpu"),
    "dropout": (lambda x, _: dropout(x, KEYS, DROPPED), lambda x, _: dropout_oracle(x, KEYS, DROPPED), [(T, D)],
                "add_norm_cpu"),
    "relu_dropout": (lambda x, _: relu_dropout(x, KEYS, DROPPED), lambda x, _: dropout_oracle(x.relu(), KEYS, DROPPED),
                     [(T, D)], "add_norm_cpu"),
    "add_norm": (lambda *x: add_norm(*x[:4], KEYS, DROPPED),
                 lambda x, residual, weight, bias, _: norm(residual + dropout_oracle(x, KEYS, DROPPED), weight, bias),
                 [(T, D), (T, D), (D,), (D,)], "add_norm_cpu"),
    "norm_gelu_add": (lambda *x: norm_gelu_add(*x[:4], KEYS, DROPPED),
                      lambda x, residual, *rest: residual + dropout_oracle(gelu(norm(x, *rest[:2])), KEYS, DROPPED),
                      [(T, D), (T, D), (D,), (D,)], "add_norm_cpu"),
    "convolution_pool": (lambda x, weight, bias, _: sum(convolution_pool(x, weight, bias, 2)), convolution_pool_oracle,
                         [(1, T, D), (D, D, 3), (D,)], "convolution_cpu"),
    "table_rows": (lambda table, _: table_rows(table, GENES, ORDER), lambda table, _: table_rows_oracle(table, GENES),
                   [(7, D)], "row_sums"),
    "gene_value_embedding": (lambda *x: embedding_of_rows(*x[:-1]),
                             lambda *x: gene_value_embedding_oracle(GENES, VALUES.double(), *x[:-1]),
                             [(7, D), (D, 1), (D,), (D, D), (D,)], "added_rows"),
}


def test_all_c_files_of_operations_are_here():
    folder = Path(kernels.__path__[0])
    assert {file.stem for file in folder.glob("*.py") if "backend.compiled(SOURCE)" in file.read_text()} == FILES
    assert {case[3] for case in CASES.values()} == FILES


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(monkeypatch, tmp_path, name, dtype):
    monkeypatch.setenv("SCBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    for file in FILES:
        module = import_module(f"scbench.kernels.{file}")
        monkeypatch.setattr(module, "library", module.library.__wrapped__)  # nothing is kept
    function, definition, shapes, file = CASES[name]
    inputs = [torch.randn(*shape, generator=torch.Generator().manual_seed(i)).bfloat16().to(dtype)
              for i, shape in enumerate(shapes)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = output_and_gradients(function, inputs, OFFSETS)
    asked = any(f"PyTorch does the work of {file}.c, slower: " in str(warning.message) for warning in caught)
    assert asked or (dtype == F32 and file == "attention_cpu")  # in fp32 attention is PyTorch's anyway
    for mine, exact in zip(ours, output_and_gradients(definition, inputs, OFFSETS, F64), strict=True):
        assert mine.dtype == dtype
        assert (mine - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
