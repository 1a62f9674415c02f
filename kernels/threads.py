"""C functions on torch's own threads: a pool beside it would fight with it for the cores.

torch's threads belong to an OpenMP library, which gives them to any caller: GOMP_parallel runs a function on each (GNU's name;
LLVM's and Intel's libraries have it too). Without it one thread does the work. The C code shares the work out by a counter.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor


@cache
def _gomp_parallel():
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


def count() -> int:
    """The most threads that `run` uses."""
    return torch.get_num_threads() if _gomp_parallel() is not None else 1


def scratch(size: int) -> tuple[Tensor, int]:
    """(memory of `size` bytes, a multiple of 64, for each of `count()` threads; where it begins, at a multiple of 64 too). The
    caller keeps the first for as long as the second is used."""
    memory = torch.empty(count() * size + 64, dtype=torch.uint8)
    return memory, memory.data_ptr() + -memory.data_ptr() % 64


def rows(x: Tensor) -> Tensor:
    """`x` [T, E] with the columns of a row side by side, itself if they are: C code takes part of wider rows as it is."""
    return x if x.stride(1) == 1 else x.contiguous()


def run(function, job: ctypes.Structure) -> None:
    """Call the C function void f(struct job *) on each of `count()` threads and wait for all. Python's other threads go on."""
    if count() > 1:
        _gomp_parallel()(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(job), count(), 0)
    else:
        function(ctypes.addressof(job))
