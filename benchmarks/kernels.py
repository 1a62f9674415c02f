"""Each op beside plain PyTorch and torch.compile: time and memory, forward and backward; and what the compilers say of it.

    python benchmarks/kernels.py --json kernels.json                     # on the GPU if there is one, else the CPU path
    python benchmarks/kernels.py --traffic traffic.json --json out.json  # with predictions for an A100 and an H100
    python benchmarks/kernels.py --compile-report compile.json           # every Triton kernel for four GPUs, without any
    python benchmarks/kernel_plots.py …                                  # pictures of what was written

scbench   the public op: Triton on a GPU, its PyTorch path on a CPU
eager     the same in plain PyTorch (eager.py)
compiled  eager.py through torch.compile (ask for it: compiling takes long)

First, without dropout, outputs and gradients must agree with eager PyTorch's in fp32: who fails gets no number. Machines are
shared: compare numbers of one run only. Predicted figures are marked so; they need the traffic that traffic.py counts.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import machine
import tyro
from record import print_table, write

from scbench.errors import UserError

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """Time ops, or compile their kernels."""

    ops: tuple[str, ...] = ()
    """Which ones; all by default."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of states and weights."""
    widths: tuple[int, ...] = ()
    """Of the model; by default 256, and 512 too in the compile report."""
    batch: int = 32
    """Cells."""
    tokens: int = 513
    """Of each cell."""
    implementations: tuple[Literal["scbench", "eager", "compiled"], ...] = ("scbench", "eager")
    """What is timed."""
    steps: int = 5
    """Timed calls of each, after two that are not."""
    traffic: Path | None = None
    """What traffic.py wrote for the same shape; adds predictions for an A100 and an H100."""
    json: Path | None = None
    """File for the timings; a long CSV is written beside it."""
    plots: Path | None = None
    """Folder for pictures of the timings, and of the traffic and the predictions if --traffic is given."""
    compile_report: Path | None = None
    """Compile every Triton kernel through its launcher and write registers, spills, shared memory, tile here; no timings."""
    targets: tuple[Literal["sm_80", "sm_90", "sm_100", "gfx942"], ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """GPUs of the compile report."""

    def __post_init__(self) -> None:
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be at least 1.")
        for name in ("json", "compile_report"):
            path = getattr(self, name)
            if path is not None and path.suffix == ".csv":
                raise UserError(f"--{name.replace('_', '-')} {path} would be overwritten by the CSV beside it: name it .json.")


def selected(ops: tuple[str, ...]) -> list[str]:
    """The names, or all; a UserError for an unknown one."""
    from kernel_inputs import OPS

    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise UserError(f"--ops {' '.join(unknown)}: no such op; there are {', '.join(OPS)}.")
    return list(ops or OPS)


def compile_all(options: KernelOptions) -> list[dict]:
    """The compile report's rows, one a kernel, target, dtype and width."""
    import torch
    from compile_report import rows_of
    from kernel_inputs import Shape, build

    rows = []
    for op in selected(options.ops):
        for width in options.widths or (256, 512):
            for dtype in options.dtypes:
                case = build(op, Shape(width=width, cells=options.batch, tokens=options.tokens), dtype)

                def call(case=case):
                    output = case.forward(case.function)
                    torch.autograd.grad(output, case.wanted, torch.ones_like(output))

                for target in options.targets:
                    found = rows_of(call, target)
                    rows += [{"op": op, "dtype": dtype, "width": width, **row} for row in found]
                    print(f"{op} {dtype} {width} {target}: {len(found)} kernels, {sum(row['spills'] for row in found)} spills",
                          file=sys.stderr, flush=True)  # takes minutes: say where it is
    return rows


def report_compiled(rows: list[dict], ops: list[str]) -> None:
    """Print the rows, and what is wrong."""
    lines = [[
        row["op"], row["kernel"], row["target"], row["dtype"], str(row["width"]), str(row["registers"]), str(row["spills"]),
        f"{row['shared_bytes']:,}", f"{row['shared_limit']:,}", " ".join(f"{k}={v}" for k, v in row["tile"].items()),
        str(row["warps"]), row["tensor_core"] or "-", f"{row['wide_loads']}/{row['loads']}", str(row["flop_per_byte"]),
    ] for row in rows]
    print_table(["op", "kernel", "target", "dtype", "width", "registers", "spills", "shared", "limit", "tile", "warps",
                 "tensor core", "16-byte loads", "FLOP/byte"], lines)
    for row in rows:
        name = f"{row['op']} {row['kernel']} {row['target']} {row['dtype']} {row['width']}"
        if row["spills"]:
            print(f"SPILLS: {name}: {row['spills']} registers")
        if row["shared_bytes"] > row["shared_limit"]:
            print(f"DOES NOT FIT: {name}: {row['shared_bytes']:,} bytes of shared memory")
    without = sorted(set(ops) - {row["op"] for row in rows})
    if without:
        print(f"No Triton kernel: {', '.join(without)}")


def report_timed(rows: list[dict]) -> None:
    """Print the table and the failures."""
    from roofline import FORMULA, GPUS

    eager = {(r["op"], r["dtype"], r["width"], r["direction"]): r["seconds"] for r in rows if r["implementation"] == "eager"}
    lines = []
    for row in rows:
        timing, base = row["seconds"], eager.get((row["op"], row["dtype"], row["width"], row["direction"]))
        times = [f"{timing['median'] * 1e3:,.2f} ({timing['p20'] * 1e3:,.2f}-{timing['p80'] * 1e3:,.2f})" if timing else "-",
                 f"{base['median'] / timing['median']:.2f}" if timing and base else "-"]
        memory = "-" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 1e6:,.1f}"
        predicted = [row[f"predicted_{gpu}_seconds"] for gpu in GPUS]
        lines.append([row["op"], row["direction"], row["dtype"], str(row["width"]), row["implementation"], *times, memory,
                      *("-" if p is None else f"{p * 1e6:,.0f}" for p in predicted)])
    print_table(["op", "direction", "dtype", "width", "", "ms (p20-p80)", "x eager", "MB kept",
                 *(f"predicted {gpu.upper()} us" for gpu in GPUS)], lines)
    if any(row[f"predicted_{gpu}_seconds"] for row in rows for gpu in GPUS):
        print(FORMULA)
    failed = [row for row in rows if row["status"] != "ok"]
    for text in dict.fromkeys(f"{row['op']} {row['implementation']}, width {row['width']}: {row['status']}" for row in failed):
        print(text)


def main(arguments: list[str] | None = None) -> None:
    """Compile or measure, print, write."""
    options = tyro.cli(KernelOptions, args=arguments, description=__doc__)
    if options.compile_report is not None:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["SCBENCH_KERNELS"] = "triton"  # before any kernel is imported
        rows = compile_all(options)
        report_compiled(rows, selected(options.ops))
        from compile_report import versions

        write(options.compile_report, rows, {**machine.describe(), **versions()}, ("op", "kernel", "target", "dtype", "width"))
        return
    if machine.device().type == "cuda":
        os.environ.setdefault("SCBENCH_KERNELS", "triton")  # what is timed on a GPU; =torch times the PyTorch path there
    from kernel_timings import measure

    traffic = None if options.traffic is None else json.loads(options.traffic.read_text(encoding="utf-8"))
    rows = measure(
        selected(options.ops), options.dtypes, options.widths or (256,), options.implementations, cells=options.batch,
        tokens=options.tokens, steps=options.steps, traffic=traffic,
    )
    report_timed(rows)
    if options.json is not None:
        write(options.json, rows, machine.describe(), ("op", "direction", "dtype", "width", "implementation", "status"))
    if options.plots is not None:
        from kernel_plots import draw

        draw(options.plots, rows, traffic)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
