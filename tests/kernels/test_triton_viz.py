"""triton-viz's sanitizer, which proves accesses inside their tensors for all programs at once, on the kernels it can take.

It runs kernels on symbols. What a load decides it cannot follow: where a loop ends, whether a branch is taken, rows found
through an index inside a loop; nor infinities, nor helpers that are given literal numbers. That leaves the kernels below.
All kernels are checked access by access, races too, by tests/kernels/triton/memory_check.py.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("triton_viz") is None, reason="triton-viz is not installed"),
]

BEFORE = """
import triton, triton_viz
from triton_viz.clients import Sanitizer
from triton_viz.wrapper import create_patched_jit
triton.jit = create_patched_jit(lambda kernel: triton_viz.trace(client=Sanitizer(abort_on_error=True))(kernel))
import torch
"""

OPS = """
from scbench.kernels import random
from scbench.kernels.add_norm import add_norm, dropout, relu_dropout
from scbench.kernels.masked_regression import masked_regression
for tokens, width in ((1, 6), (77, 24), (9, 130)):
    x, y = (torch.randn(tokens, width, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(width, requires_grad=True) for _ in range(2))
    keys = random.bits_torch(7, torch.arange(tokens))
    add_norm(dropout(relu_dropout(x, keys, 0.2), keys, 0.3), y, weight, bias, keys, 0.4).sum().backward()
    add_norm(x, y, weight, bias, None, 0.0).sum().backward()
    masked_regression(x, weight[None], bias[:1], torch.zeros(tokens))[0].backward()
import sys
print(len(sys.modules["triton_viz.core.trace"].launches), "launches")
"""

BROKEN = """
import triton.language as tl
exec(compile(open(FILE).read(), FILE, "exec"))
"""
KERNEL = """
@triton.jit
def broken_kernel(x, y, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, mask=i <= n, other=0), mask=i < n)

broken_kernel[(2,)](torch.zeros(30), torch.zeros(30), 30, N=16)
"""


def run(script) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SCBENCH_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", BEFORE + script], capture_output=True, text=True, env=environment)


def test_no_access_outside_a_tensor():
    done = run(OPS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-2]) >= 3 * 12, done.stdout


def test_a_load_past_the_end_is_found(tmp_path):
    path = tmp_path / "broken.py"  # the interpreter reads a kernel's source from its file
    path.write_text(KERNEL)
    done = run(BROKEN.replace("FILE", repr(str(path))))
    assert done.returncode == 1 and "broken_kernel" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
