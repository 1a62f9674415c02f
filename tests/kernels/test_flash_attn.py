"""Which attention runs where, and that flash-attn and torch's varlen attention are called as they want to be."""

import importlib.util
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from scbench.kernels import attention as module
from scbench.kernels import backend
from scbench.kernels.attention import attention_oracle, attention_path

# flash-attn's own AMD backend is written in Triton and runs under its interpreter; its operations know only GPUs until told.
CALL = """
import torch
import flash_attn.flash_attn_interface as interface
from scbench.kernels import attention as module

for operation in (interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward):
    operation.register_kernel("cpu")(operation._init_fn)
module.attention_path = lambda query, plain: "flash_attn"
generator = torch.Generator().manual_seed(0)
offsets = torch.tensor([0, 5, 6, 26], dtype=torch.int32)
for dtype, tolerance in ((torch.float32, 5e-6), (torch.float16, 5e-3)):
    for width, max_tokens in ((32, 20), (32, None), (12, 20)):
        fused, upstream = (torch.randn(26, n, 2, width, generator=generator).to(dtype) for n in (3, 1))
        results = []
        for function, precision, options in (
            (lambda x, *rest, **options: module.attention(*x.unbind(1), *rest, **options), dtype, {"max_tokens": max_tokens}),
            (module.self_attention, dtype, {"max_tokens": max_tokens}),
            (lambda x, *rest: module.attention_oracle(*x.unbind(1), *rest), torch.float64, {}),
        ):
            leaf = fused.detach().to(precision, copy=True).requires_grad_()
            output = function(leaf, offsets, **options)
            output.backward(upstream[:, 0].to(precision))
            results.append((output.double(), leaf.grad.double()))
        for alone, packed, exact in zip(*results):
            torch.testing.assert_close(alone, exact, rtol=0, atol=tolerance)
            torch.testing.assert_close(packed, exact, rtol=0, atol=tolerance)
print("equal")
"""


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attn_equals_the_oracle():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("equal")


def test_torchs_varlen_attention_is_called_with_its_arguments(monkeypatch):
    """It has no CPU kernel: a stand-in with its signature, which the call must fit, checks what reaches it."""
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)

    def stand_in(*arguments, **options):
        bound = signature.bind(*arguments, **options).arguments
        assert bound["cu_seq_q"].dtype == bound["cu_seq_k"].dtype == torch.int32
        assert bound["max_q"] == bound["max_k"] == 4
        return attention_oracle(bound["query"], bound["key"], bound["value"], bound["cu_seq_q"])

    monkeypatch.setattr(module, "_torch_varlen", lambda: stand_in)
    monkeypatch.setattr(module, "attention_path", lambda query, plain: "torch_varlen")
    inputs, offsets = [draw(5, 2, 8, seed=n) for n in range(3)], torch.tensor([0, 4, 5])
    result = module.attention(*inputs, offsets, max_tokens=4)
    torch.testing.assert_close(result, attention_oracle(*inputs, offsets))


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("found", "dtype", "width", "plain", "capability", "forced", "path"), [
    ("flash varlen", BF16, 32, True, (9, 0), "", "flash_attn"),
    ("flash varlen", torch.float16, 12, True, (8, 0), "", "flash_attn"),
    ("flash varlen", BF16, 32, False, (9, 0), "", "triton"),
    ("flash varlen", FP32, 32, True, (9, 0), "", "triton"),
    ("flash varlen", BF16, 32, True, (7, 5), "", "triton"),
    ("flash varlen", BF16, 32, True, (9, 0), "triton", "triton"),
    ("flash varlen", BF16, 32, True, (9, 0), "torch", "cells"),
    ("flash varlen", BF16, 512, True, (9, 0), "", "cells"),
    ("varlen", BF16, 32, True, (9, 0), "", "torch_varlen"),
    ("varlen", BF16, 12, True, (9, 0), "", "triton"),
    ("", BF16, 32, True, (9, 0), "", "triton"),
])  # fmt: skip
def test_which_way_a_gpu_goes(monkeypatch, found, dtype, width, plain, capability, forced, path):
    monkeypatch.setattr(module, "_flash_attn", lambda: "flash" in found)
    monkeypatch.setattr(module, "_torch_varlen", lambda: "varlen" in found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backend, "FORCED", forced)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "PROVEN", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    query = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(7, 4, width), device=torch.device("cuda:0"))
    assert attention_path(query, plain=plain) == path


def test_a_cpu_goes_cell_by_cell(monkeypatch):
    monkeypatch.setattr(backend, "FORCED", "")
    assert attention_path(draw(3, 1, 4, seed=0).bfloat16(), plain=True) == "cells"


def test_a_flash_attn_without_its_compiled_part_is_none_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    module._flash_attn.cache_clear()
    assert module._flash_attn() is None
    module._flash_attn.cache_clear()
