"""What the compilers say of every Triton kernel, without a GPU: registers, spills, shared memory, instructions.

The public op is called with CPU tensors, forward and backward, under a driver that only names a GPU: each launch compiles
the kernel for that GPU exactly as the launcher would have it (tile, warps, alignment of the arguments) and runs nothing.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program
TENSOR_CORE = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"
LOAD = r"\bld\.global\b|\bcp\.async\.c[ag]\b|\b(?:global|buffer)_load_"
WIDE_LOAD = (r"\bld\.global\S*\.(?:v4\.[bfu]32|v8\.[bfu]32|v2\.[bfu]64|v4\.[bfu]64)|\bcp\.async\.cg.*, (?:0x10|16)\b"
             r"|\b(?:global|buffer)_load_(?:dwordx4|b128)")


class _Driver:
    """Names a GPU; nothing can run on it."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Zeroed(TorchDispatchMode):
    """Kernels write nothing here, so what they should have filled must at least be valid indices: zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            result.zero_()
        return result


@contextmanager
def compiled(target: str) -> Iterator[list]:
    """Inside, Triton launches compile for `target` and run nothing; gives the list of (JITFunction, compiled kernel)."""
    kernels, run, functions = [], JITFunction.run, set()

    def compile_only(function, *args, grid, warmup, **kwargs):
        if function not in functions:
            functions.add(function)
            function.device_caches.clear()  # kept by device number, which is 0 for every target
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((function, kernel))
        return kernel

    driver.set_active(_Driver(TARGETS[target]))
    JITFunction.run = compile_only
    try:
        with _Zeroed():
            yield kernels
    finally:
        JITFunction.run = run
        driver._active = None
        for function in functions:
            function.device_caches.clear()


def rows_of(call: Callable[[], object], target: str) -> list[dict]:
    """One row a distinct kernel that `call` launches: what the compiler for `target` made of it."""
    with compiled(target) as kernels:
        call()
    return list({kernel.hash: _row(function, kernel, target) for function, kernel in kernels}.values())


def _row(function: JITFunction, kernel, target: str) -> dict:
    metadata, assembly = kernel.metadata, kernel.asm
    text = assembly["ptx"] if "ptx" in assembly else assembly["amdgcn"]
    registers, spills = _nvidia(assembly["cubin"]) if "ptx" in assembly else _amd(text)
    tile = {p.name: kernel.src.constants.get((p.num,)) for p in function.params if p.is_constexpr}
    core = re.search(TENSOR_CORE, text)
    dots = re.findall(r"tt\.dot.*: tensor<[\dx]+x(\w+)> \*", assembly["ttir"])
    return {
        "kernel": function.fn.__name__, "target": target, "registers": registers, "spills": spills,
        "shared_bytes": metadata.shared, "shared_limit": SHARED_LIMIT[target],
        "tile": {name: int(value) for name, value in tile.items() if isinstance(value, (bool, int))},
        "warps": metadata.num_warps, "stages": metadata.num_stages,
        "dot": "+".join(sorted(set(dots))) or None, "tensor_core": core.group(1) if core else None,
        "loads": len(re.findall(LOAD, text)), "wide_loads": len(re.findall(WIDE_LOAD, text)),
        "flop_per_byte": flop_per_byte(assembly["ttir"]),
    }


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, 32-bit registers spilled) a thread, from the binary itself: what it keeps on its stack is spilled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], (usage["STACK"] + usage["LOCAL"]) // 4


def _amd(text: str) -> tuple[int, int]:
    """The same from the assembly's metadata; registers are vector ones, accumulators included."""
    usage = {name: int(value) for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    return usage["vgpr_count"], usage["vgpr_spill_count"] or usage["private_segment_fixed_size"] // 4


def flop_per_byte(ttir: str) -> float | None:
    """Floating-point operations over bytes loaded and stored by one program's code, every loop's body counted once."""
    flops = moved = 0
    for line in ttir.splitlines():
        shapes = [([int(n) for n in dims.split("x") if n], kind) for dims, kind in
                  re.findall(r"tensor<((?:\d+x)+)([^<>]*(?:<[^<>]*>)?)>", line)]
        if re.search(r"\btt\.(load|store|atomic)", line):
            bits = re.search(r"!tt\.ptr<[a-z]+(\d+)", line)
            moved += prod(shapes[0][0] if shapes else []) * max(8, int(bits.group(1))) // 8
        elif "tt.dot" in line and len(shapes) >= 3:
            flops += 2 * prod(shapes[0][0]) * shapes[-1][0][-1]
        elif re.search(r"= (arith\.(?!ext|trunc|cmp)\w+f\b|math\.)", line):
            flops += prod(shapes[-1][0]) if shapes else 1
    return round(flops / moved, 2) if moved else None


def versions() -> dict[str, str]:
    """Triton's, and its flags' that change code."""
    return {"triton": triton.__version__, "flags": json.dumps({"fp_fusion": knobs.language.default_fp_fusion})}
