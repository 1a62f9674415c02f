"""Seconds and memory of each op and its rivals, forward and backward, once they agree."""

from collections.abc import Callable

import machine
import torch
from kernel_inputs import Case, Shape, build
from record import percentiles
from roofline import GPUS, predict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scbench.kernels.gene_value_embedding_triton import CHUNK

WARMUP = 2
TOLERANCE = 1e-4  # of each tensor's largest, in fp32 and without dropout


def measure(
    ops: list[str], dtypes: tuple[str, ...], widths: tuple[int, ...], implementations: tuple[str, ...], *, cells: int,
    tokens: int, steps: int, traffic: list[dict] | None,
) -> list[dict]:
    """Two rows, forward and backward, an op, dtype, width and implementation."""
    device, rows = machine.device(), []
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: matrix products have it off by default, convolutions on
    for op in ops:
        for width in widths:
            shape = Shape(width=width, cells=cells, tokens=tokens)
            functions = _functions(build(op, shape, "fp32"), implementations)
            failures = {name: failure(_without_dropout(build(op, shape, "fp32").on(device)), function)
                        for name, function in functions.items()}
            for dtype in dtypes:
                case = build(op, shape, dtype)
                eager_flops = _flops(case)
                case = case.on(device)
                seconds = _rounds(case, {n: f for n, f in functions.items() if failures[n] is None}, steps, device)
                for name, function in functions.items():
                    kept = None if failures[name] else kept_bytes(case, function)
                    flops = own_flops(case, eager_flops) if name == "scbench" else eager_flops
                    for number, direction in enumerate(("forward", "backward")):
                        counted = _counted(traffic, op, direction, dtype, shape, name)
                        rows.append({
                            "op": op, "direction": direction, "dtype": dtype, "width": width, "implementation": name,
                            "status": failures[name] or "ok",
                            "seconds": percentiles(seconds[name][number]) if name in seconds else None,
                            "kept_bytes": kept,
                            **{f"predicted_{gpu}_seconds": counted and predict(gpu, dtype, flops=flops[number], **counted)
                               for gpu in GPUS},
                            "settings": {"cells": cells, "tokens": tokens, "steps": steps, "warmup": WARMUP,
                                         "device": device.type, "tolerance": TOLERANCE},
                        })
    return rows


def _functions(case: Case, implementations: tuple[str, ...]) -> dict[str, Callable]:
    every = {"scbench": lambda: case.function, "eager": lambda: case.eager,
             "compiled": lambda: torch.compile(case.eager, fullgraph=True, dynamic=False)}
    return {name: every[name]() for name in implementations}


def _without_dropout(case: Case) -> Case:
    off = {"token_keys": None, "probability": 0.0} if "token_keys" in case.arguments else {}
    return case._replace(arguments={**case.arguments, **off})


def failure(case: Case, function: Callable) -> str | None:
    """How `function`'s output or gradients differ from eager PyTorch's, or None."""
    got, expected = (_with_gradients(case, f) for f in (function, case.eager))
    names = ["output", *(f"gradient of {n}" for n, x in case.arguments.items() if isinstance(x, Tensor) and x.requires_grad)]
    for name, ours, theirs in zip(names, got, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1e-30)
        error = float((ours - theirs).abs().max() / scale)
        if not error <= TOLERANCE:  # True for NaN
            return f"failed: {name} differs from eager PyTorch's by {error:.1e} of its largest"
    return None


def _with_gradients(case: Case, function: Callable) -> list[Tensor]:
    output = case.forward(function)
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(output.shape, generator=generator).to(output)
    return [output.detach(), *torch.autograd.grad(output, case.wanted, seed)]


def _rounds(case: Case, functions: dict[str, Callable], steps: int, device: torch.device) -> dict[str, tuple[list, list]]:
    """Seconds of forward and backward of each; each runs once a round, so that a busy machine is unfair to all alike."""
    seconds = {name: ([], []) for name in functions}
    for number in range(WARMUP + steps):
        for name, function in functions.items():
            start = machine.clock(device)
            output = case.forward(function)
            middle = machine.clock(device)
            seed = torch.ones_like(output)
            between = machine.clock(device)
            torch.autograd.grad(output, case.wanted, seed)
            end = machine.clock(device)
            if number >= WARMUP:
                seconds[name][0].append(middle - start)
                seconds[name][1].append(end - between)
    return seconds


def kept_bytes(case: Case, function: Callable) -> int:
    """Bytes kept from forward to backward, beyond the op's inputs and output: the difference in allocated memory on a GPU;
    elsewhere the storages that autograd saves."""
    if case.wanted[0].is_cuda:
        before = torch.cuda.memory_allocated()
        output = case.forward(function)
        return torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
    storages = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = case.forward(function)
    known = [x.untyped_storage()._cdata for x in (*case.arguments.values(), output) if isinstance(x, Tensor)]
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


def _flops(case: Case) -> tuple[int, int]:
    """FLOPs of eager PyTorch's matrix products, forward and backward, counted on tensors that compute nothing."""
    case = case.on("meta")
    if case.op == "causal_conv":
        return 0, 0  # of each channel by itself: torch would count a dense product
    with FlopCounterMode(display=False) as forward:
        output = case.forward(case.eager)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(output, case.wanted, torch.empty_like(output))
    return forward.get_total_flops(), backward.get_total_flops()


def own_flops(case: Case, eager: tuple[int, int]) -> tuple[int, int]:
    """FLOPs of our kernels' matrix products, forward and backward."""
    if case.op == "gene_value_embedding":  # two products a direction: of pieces and units; of units and partial sums
        width, chunks = len(case.arguments["bias1"]), -(-len(case.arguments["genes"]) // CHUNK)
        return 4 * width**2 * (width + 1), 4 * width**2 * (2 * width + chunks)
    if "query" not in case.arguments:
        return eager
    query, value = case.arguments["query"].shape[2], case.arguments["value"].shape[2]
    tiles = -(-value // 64)  # of the backward: the scores again for dQ, for dK and, if there are several, for each tile's dV
    ours = (2 + (tiles if tiles > 1 else 0)) * query + 2 * value + 2 * query + value
    return eager[0], eager[1] * ours // (2 * value + 2 * query)


def _counted(traffic: list[dict] | None, op: str, direction: str, dtype: str, shape: Shape, name: str) -> dict | None:
    """Bytes and launches that traffic.py counted for this row, if it did."""
    if name == "compiled":
        return None
    wanted = {"op": op, "direction": direction, "dtype": dtype, "width": shape.width, "cells": shape.cells,
              "tokens": shape.tokens}
    moved, launches = ("bytes_moved", "launches") if name == "scbench" else ("bytes_eager", "eager_launches")
    for row in traffic or ():
        if all(row[key] == value for key, value in wanted.items()):
            return {"moved": row[moved], "launches": row[launches]}
    return None
