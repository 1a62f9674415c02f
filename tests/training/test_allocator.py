"""Freed memory stays with the process: the second use of a large block brings no page faults."""

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource
from scbench.training.allocator import keep_freed_memory
kept = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(100_000_000)
    ctypes.memset(block, 1, 100_000_000)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), *faults)
"""


def test_a_freed_block_is_used_again():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    kept, first, second = map(int, result.stdout.split())
    if not kept:
        pytest.skip("not glibc")
    assert first > 1000
    assert second < 100
