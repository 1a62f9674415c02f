"""What oneDNN compiles for products of ever new shapes does not pile up."""

import subprocess
import sys

import pytest

CODE = """
import ctypes
import torch
from scbench.kernels import backend
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    print("unknown")
    raise SystemExit
libc.mallinfo2.restype = Info
weight = torch.ones(32, 32, dtype=torch.bfloat16)
def used(rows):
    for n in rows:
        torch.ones(n, 32, dtype=torch.bfloat16) @ weight
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd
print(-used(range(40, 140)) + used(range(140, 240)))
"""


def test_a_hundred_new_shapes_need_no_more_memory():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    if result.stdout.strip() == "unknown":
        pytest.skip("not glibc")
    assert int(result.stdout) < 2_000_000  # of 30 MB and more
