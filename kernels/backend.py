"""Which implementation of an operation runs: Triton on a GPU once that is proven there, C on a CPU, PyTorch elsewhere.

The C code (`*_cpu.c`) is compiled at its first use; without a compiler PyTorch does the work, with a warning.
SCBENCH_KERNELS=triton or torch overrides the choice; until the kernels have run on a GPU, it is the only way to them. With
TRITON_INTERPRET=1 beside SCBENCH_KERNELS=triton everything runs through the Triton kernels on a CPU, slowly: how they are
tested without a GPU. SCBENCH_KERNELS_DEBUG=1 adds the checks that would make a GPU wait for the host.
"""

import ctypes
import os
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from scbench.kernels import native

PROVEN = False  # no kernel here has run on a device yet: the interpreter and the compilers are all that vouch for them
HAS_TRITON = find_spec("triton") is not None
FORCED = os.environ.get("SCBENCH_KERNELS", "")
DEBUG = os.environ.get("SCBENCH_KERNELS_DEBUG", "") not in ("", "0")

# On a CPU oneDNN compiles a product in bf16 for its shape and keeps the code of 1,024 shapes, torch as many again; every batch
# of cells brings a score of new ones, and memory grows. A step has fewer than 64.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")  # both read it at their first product

if FORCED not in ("", "triton", "torch"):
    raise ValueError(f"SCBENCH_KERNELS is {FORCED!r}: it must be triton or torch")
if FORCED == "triton" and not HAS_TRITON:
    raise ValueError("SCBENCH_KERNELS is triton, but Triton is not installed: install it, or unset the variable")


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`'s operation. A ValueError if they would, on another GPU than the current one."""
    chosen = FORCED == "triton" if FORCED else PROVEN and HAS_TRITON and x.is_cuda
    if chosen and x.is_cuda and x.device.index != torch.cuda.current_device():  # where Triton would launch
        raise ValueError(f"the tensors are on {x.device}, the current GPU is cuda:{torch.cuda.current_device()}: "
                         "call torch.cuda.set_device first")
    return chosen


def compiled(source: Path) -> ctypes.CDLL | None:
    """The library of a C file; None, with a warning, where it cannot be had. The caller keeps it."""
    try:
        return native.load(source)
    except native.BuildError as error:
        warnings.warn(f"PyTorch does the work of {source.name}, slower: {error} (SCBENCH_KERNELS=torch says that it may)",
                      stacklevel=4)
        return None


def use_native(x: Tensor) -> bool:
    """Whether C code takes `x`'s operation where it has one."""
    return not FORCED and x.device.type == "cpu"


@cache
def _second_level_cache(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def cache_bytes(x: Tensor) -> int:
    """What a launch may count on reading again from the cache: that of `x`'s GPU, and never less than 8 MB."""
    return max(8_000_000, _second_level_cache(x.device) if x.is_cuda else 0)
