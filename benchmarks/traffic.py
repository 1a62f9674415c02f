"""Memory traffic of every op, forward and backward, counted without a GPU under Triton's interpreter.

    python benchmarks/traffic.py --json traffic.json          # D = 256, 32 cells of 513 tokens: several minutes
    python benchmarks/traffic.py --ops add_norm mvc --dtypes fp32

bytes_moved      what the Triton path moves, launches and plain torch operations, by the rule in meter.py
bytes_required   what must move (required_bytes.py; each op's docstring derives it)
bytes_eager      what plain PyTorch moves (eager.py), every operation's inputs and outputs
bytes_cached     as bytes_moved by a lenient reading: a reused set is what waits for its next use at one time
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import machine
import tyro
from record import print_table, write

from scbench.errors import UserError

IDENTITY = ("op", "direction", "dtype")


@dataclass(frozen=True, kw_only=True)
class TrafficOptions:
    """Count memory traffic."""

    ops: tuple[str, ...] = ()
    """Which ones; all by default."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of states and weights."""
    width: int = 256
    """Width of the model."""
    batch: int = 32
    """Cells; the rows are of this batch, nothing is scaled."""
    tokens: int = 513
    """Of each cell."""
    details: bool = False
    """Print every launch and operation."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""


def measure(options: TrafficOptions) -> list[dict]:
    """Two rows, forward and backward, an op and dtype."""
    from kernel_inputs import OPS, Shape  # reads the environment that main sets

    unknown = set(options.ops) - set(OPS)
    if unknown:
        raise UserError(f"--ops {' '.join(sorted(unknown))}: there is no such op; there are {', '.join(OPS)}.")
    shape = Shape(width=options.width, cells=options.batch, tokens=options.tokens)
    rows = []
    for op in options.ops or OPS:
        for dtype in options.dtypes:
            found = count_op(op, shape, dtype, details=options.details)
            ratios = [f"{row['direction']} {row['bytes_moved'] / row['bytes_required']:.3f}" for row in found]
            print(f"{op} {dtype}: {', '.join(ratios)}", file=sys.stderr, flush=True)  # takes minutes: say where it is
            rows += found
    return rows


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Without the checks of offsets that are made on a CPU only: on a GPU they are no launches."""
    from scbench.kernels import attention, causal_conv, selective_scan

    with ExitStack() as stack:
        for module in (attention, causal_conv, selective_scan):
            stack.enter_context(patch.object(module, "check_offsets", lambda *_: None))
        yield


def count_op(op: str, shape, dtype: str, *, details: bool = False) -> list[dict]:
    """The rows of one op."""
    import torch
    from kernel_inputs import build
    from meter import count, count_operations
    from required_bytes import required

    case = build(op, shape, dtype)
    counted = {}
    for name, function, on, counting in (
        ("moved", case.function, case, count), ("eager", case.eager, case.on("meta"), count_operations)
    ):
        with _as_on_a_gpu(), counting() as forward:
            output = on.forward(function)
        seed = torch.ones_like(output)
        with counting() as backward:
            torch.autograd.grad(output, on.wanted, seed)
        counted[name] = forward, backward
    rows = []
    for number, direction in enumerate(("forward", "backward")):
        ours, eager = counted["moved"][number], counted["eager"][number]
        if details:
            for launch in ours.launches:
                print(f"{op} {direction} {dtype}: {launch.kernel}: loads {launch.loaded}, stores {launch.stored}")
            print(f"{op} {direction} {dtype}: torch {ours.operations}")
        rows.append({
            "op": op, "direction": direction, "dtype": dtype,
            "bytes_moved": ours.moved, "bytes_required": required(case)[number], "bytes_eager": eager.moved,
            "bytes_cached": ours.cached, "launches": len(ours.launches) + len(ours.operations),
            "triton_launches": len(ours.launches), "eager_launches": len(eager.operations),
            "width": shape.width, "cells": shape.cells, "tokens": shape.tokens,
        })
    return rows


def report(rows: list[dict]) -> None:
    """Print the table."""
    kinds = ["moved", "cached", "required", "eager"]
    lines = [[
        row["op"], row["direction"], row["dtype"], *(f"{row[f'bytes_{kind}'] / 1e6:,.2f}" for kind in kinds),
        f"{row['bytes_moved'] / row['bytes_required']:.3f}", f"{row['bytes_moved'] / row['bytes_eager']:.3f}",
        str(row["launches"]), str(row["triton_launches"]),
    ] for row in rows]
    columns = ["op", "direction", "dtype", *(f"MB {kind}" for kind in kinds), "moved/required", "moved/eager", "launches",
               "of Triton"]
    print_table(columns, lines)


def main(arguments: list[str] | None = None) -> None:
    """Count, print, write."""
    options = tyro.cli(TrafficOptions, args=arguments, description=__doc__)
    os.environ.update(TRITON_INTERPRET="1", SCBENCH_KERNELS="triton")  # before any kernel is imported
    rows = measure(options)
    report(rows)
    if options.json is not None:
        write(options.json, rows, machine.describe(), IDENTITY)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"traffic.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
