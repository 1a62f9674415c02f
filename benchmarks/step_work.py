"""What one bf16 training step does on a GPU, operation by operation, counted without one.

Forward and backward run at their true shapes on meta tensors, which compute nothing, down the paths of a GPU:

- a plain torch operation is a launch; it moves what meter.py's rule says, and torch's own formulas have its FLOPs;
- one of our ops is one operation: its launcher runs up to its Triton launches, which are counted; it moves what must move
  (required_bytes.py) times what traffic.py counted over that, for the same op and direction;
- plain attention is flash-attn's: its inputs and outputs, and an fp32 sum of the queries' gradient that is zeroed, added to
  and read; the backward multiplies five times to the forward's two;
- an RMSNorm is one launch a direction, as in torch's CUDA builds.

The update is counted on the CPU: DeepSpeed (ZeRO 1, one rank) around the model's own parameters, with a forward and backward
that only hand over gradients. So its reductions are in, the gradient's norm, clipping and AdamW.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import required_bytes
import torch
from cells import load_batches, vocabulary_of
from implementations import DEEPSPEED, DROPOUT
from kernel_inputs import Case
from kernel_timings import own_flops
from meter import operation_bytes
from options import Options
from ours import ScbenchStep
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from scbench.data.batch import CellBatch
from scbench.errors import UserError
from scbench.kernels import (
    add_norm,
    attention,
    attention_triton,
    backend,
    causal_conv,
    gene_value_embedding,
    masked_regression,
    mvc,
    selective_scan_triton,
    table_rows,
)
from scbench.models import model as models
from scbench.models.flops import SCAN
from scbench.models.model import ExpressionModel, ExpressionOutput

FUNCTIONS = {  # of each op that a training step makes: what its Triton path applies
    "gene_value_embedding": gene_value_embedding._GeneValueEmbedding, "table_rows": table_rows._TableRowsTriton,
    "masked_regression": masked_regression._MaskedRegression, "mvc": mvc._Mvc, "dropout": add_norm._DropoutTriton,
    "relu_dropout": add_norm._ReluDropout, "add_norm": add_norm._AddNorm, "gene_graph": attention_triton.TritonAttention,
    "selective_scan": selective_scan_triton.TritonSelectiveScan, "causal_conv": causal_conv._CausalConvolutionTriton,
}
CACHE = 40_000_000  # bytes, of an A100 (H100: 50 MB): what our launchers cut their launches by
FLASH_LAUNCHES = (1, 4)  # backward: zeros, δ, the products, the queries' gradient rounded
FLASH_PRODUCTS = 2.5  # of the backward over the forward's: the scores are computed again
FLASH_SUMS = 16  # bytes an element of the queries' gradient: an fp32 sum zeroed, read, written and read


class Operation(NamedTuple):
    """One operation of a step."""

    name: str
    moved: float  # bytes
    flops: float
    launches: int
    precision: str  # of its products: bf16 or fp32


class Meter(TorchDispatchMode):
    """Lists plain torch operations, and those that `one` encloses as one."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.inside: int | None = None  # launches so far of the op under way

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        moved = operation_bytes(function, args, kwargs, result)
        if function.overloadpacket is torch.ops.aten._fused_adamw_:
            moved -= sum(x.nbytes for x in args[1])  # its schema says that it writes the gradients; it does so for a scaler
        if moved and self.inside is not None:
            self.inside += 1
        elif moved:
            packet = function.overloadpacket
            flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
            half = any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in args)
            self.operations.append(Operation(packet.__name__, moved, flops, 1, "bf16" if half else "fp32"))
        return result

    def launch(self, *_, **__) -> None:
        """In place of a Triton launch."""
        self.inside += 1

    @contextmanager
    def one(self, name: str, moved: float, flops: float, precision: str) -> Iterator[None]:
        """What happens inside is one operation; its launches are counted."""
        self.inside = 0
        try:
            yield
            self.operations.append(Operation(name, moved, flops, self.inside, precision))
        finally:
            self.inside = None


class Facts(NamedTuple):
    """What shapes do not tell of a batch."""

    distinct: int  # genes that occur
    pairs: int  # Σ of squared cell lengths


def read_ratios(path: Path) -> dict[tuple[str, str], float]:
    """Bytes moved over bytes required of (op, direction) in bf16, as traffic.py wrote them; a UserError for
    a file that is not there or lacks an op."""
    if not path.is_file():
        raise UserError(f"--traffic {path} does not exist: write it with benchmarks/traffic.py --json.")
    ratios = {(row["op"], row["direction"]): row["bytes_moved"] / row["bytes_required"]
              for row in json.loads(path.read_text(encoding="utf-8")) if row["dtype"] == "bf16"}
    missing = [op for op in FUNCTIONS if (op, "backward") not in ratios]
    if missing:
        raise UserError(f"--traffic {path} lacks {', '.join(missing)} in bf16: count all ops with benchmarks/traffic.py.")
    return ratios


def own_products(op: str, arguments: dict, facts: Facts) -> tuple[float, float, str]:
    """FLOPs of one of our ops, forward and backward, and what they are computed in: only the graph's are tensor cores'."""
    match op:
        case "gene_value_embedding":
            return *own_flops(Case(op, None, None, arguments), (0, 0)), "fp32"
        case "gene_graph":
            (_, heads, width), value_width = arguments["query"].shape, arguments["value"].shape[2]
            forward = 2 * heads * (width + value_width) * facts.pairs
            return *own_flops(Case(op, None, None, arguments), (forward, 2 * forward)), "bf16"
        case "masked_regression" | "mvc":
            forward = 2 * len(arguments["targets"]) * (arguments.get("hidden", arguments.get("queries"))).shape[1]
        case "selective_scan":
            forward = SCAN * arguments["x"].numel() * arguments["decay"].shape[1]
        case "causal_conv":
            forward = 2 * arguments["x"].numel() * arguments["weight"].shape[1]
        case _:
            forward = 0
    return forward, 2 * forward, "fp32"


def _metered(meter: Meter, op: str, facts: Facts, ratios: dict[tuple[str, str], float]):
    """A patch: the op's function, each direction one operation."""
    function, formula = FUNCTIONS[op], required_bytes.FORMULAS[op]
    forward, backward = function.forward, function.backward
    names = [p.name for p in inspect.signature(formula).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    def metered_forward(ctx, *args):
        arguments = dict(zip(names, args, strict=False))
        needed, (*flops, precision) = formula(**arguments), own_products(op, arguments, facts)
        here, ctx.there = ((ratios[op, direction] * size, work, precision)
                           for direction, size, work in zip(("forward", "backward"), needed, flops, strict=True))
        with meter.one(op, *here):
            return forward(ctx, *args)

    def metered_backward(ctx, *gradients):
        with meter.one(op, *ctx.there):
            return backward(ctx, *gradients)

    return patch.multiple(function, forward=staticmethod(metered_forward), backward=staticmethod(metered_backward))


class _Fused(torch.autograd.Function):
    """A fused operation of GPUs by its shapes; `works`: bytes, FLOPs and launches."""

    @staticmethod
    def forward(ctx, meter: Meter, name: str, works: tuple[tuple, tuple], shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        ctx.of = meter, name, works[1], inputs
        meter.operations.append(Operation(name, *works[0], "bf16"))
        return inputs[0].new_empty(shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        meter, name, work, inputs = ctx.of
        meter.operations.append(Operation(name, *work, "bf16"))
        return None, None, None, None, *(x.new_empty(x.shape) for x in inputs)


@contextmanager
def _as_on_a_gpu(meter: Meter, facts: Facts, ratios: dict[tuple[str, str], float]) -> Iterator[None]:
    """Our ops take their Triton paths, plain attention flash-attn's; nothing is launched."""
    path_of = attention.attention_path

    def path(query: Tensor, *, plain: bool) -> str:
        return "flash_attn" if plain else path_of(query, plain=plain)

    def flash(projection: Tensor, cell_offsets: Tensor, longest: int) -> Tensor:
        query, key, value = projection.unbind(1)
        moved = required_bytes.FORMULAS["attention"](query, key, value, cell_offsets)
        flops = 4 * query.shape[1] * query.shape[2] * facts.pairs
        works = ((moved[0], flops, FLASH_LAUNCHES[0]),
                 (moved[1] + FLASH_SUMS * query.numel(), FLASH_PRODUCTS * flops, FLASH_LAUNCHES[1]))
        return _Fused.apply(meter, "flash_attn", works, query.shape, projection)

    def rms_norm(x: Tensor, shape: tuple[int], weight: Tensor, eps: float) -> Tensor:
        rest = weight.nbytes + 4 * (x.numel() // len(weight))  # and a number a row
        works = (2 * x.nbytes + rest, 0, 1), (3 * x.nbytes + rest + weight.nbytes, 0, 1)
        return _Fused.apply(meter, "rms_norm", works, x.shape, weight, x)

    def rows(table: Tensor, genes: Tensor) -> int:
        return facts.distinct * table.shape[1] * table.element_size()

    with ExitStack() as stack:
        for patched in (
            patch.object(Tensor, "is_cuda", True), patch.object(backend, "use_triton", lambda _: True),
            patch.object(backend, "_second_level_cache", lambda _: CACHE), patch.object(attention, "attention_path", path),
            patch.object(attention, "_flash_packed", flash), patch.object(functional, "rms_norm", rms_norm),
            patch.object(required_bytes, "_rows", rows),
            patch.object(selective_scan_triton, "_lanes", lambda: 32), patch.object(JITFunction, "run", meter.launch),
            *(_metered(meter, op, facts, ratios) for op in FUNCTIONS),
        ):
            stack.enter_context(patched)
        yield


@cache
def batch_of(cells: int, genes: int, vocabulary: int) -> CellBatch:
    """A synthetic batch; another structure's differs in its tokens' order alone."""
    return load_batches(Options(batch_cells=cells, genes=genes, vocabulary_size=vocabulary), 1)[1][0]


def model_work(options: Options, ratios: dict[tuple[str, str], float]) -> list[Operation]:
    """Forward and backward, heads and losses included, of one micro-batch."""
    batch = batch_of(options.batch_cells, options.genes, options.vocabulary_size)
    facts = Facts(len(batch.genes.unique()), int(batch.lengths.long().square().sum()))
    config = options.model(options.vocabulary_size, dropout=DROPOUT)
    with torch.device("meta"), patch.object(models, "initialize"):
        model = ExpressionModel(config, vocabulary_of(options)).to(torch.bfloat16).train()
    batch, meter = batch.to("meta"), Meter()
    with _as_on_a_gpu(meter, facts, ratios), meter:
        model(batch).loss.backward()
    return meter.operations


class _Gradients(torch.autograd.Function):
    """A loss whose gradient by every parameter is there at once."""

    @staticmethod
    def forward(ctx, made: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        ctx.made = made
        ctx.save_for_backward(*parameters)
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *map(ctx.made, ctx.saved_tensors)


def update_work(options: Options) -> list[Operation]:
    """What follows the gradients: DeepSpeed's buffers and reductions, the norm, clipping, AdamW, the new weights."""
    config = options.training(precision="bf16", deepspeed=DEEPSPEED, dropout=DROPOUT)
    model = ExpressionModel(options.model(options.vocabulary_size, dropout=DROPOUT), vocabulary_of(options))
    batch, meter = batch_of(1, 1, options.vocabulary_size), Meter()

    def gradient(parameter: Tensor) -> Tensor:
        with meter.one("gradient", 0, 0, "bf16"):  # the model's work, which is counted elsewhere
            return torch.zeros_like(parameter)

    def forward(_) -> ExpressionOutput:
        loss = _Gradients.apply(gradient, *model.parameters())
        return ExpressionOutput(loss, loss, loss, None, None, None)

    model.forward = forward
    step = ScbenchStep(model, config)
    for _ in range(3):  # the optimizer's state and every buffer exist by then
        meter.operations.clear()
        with meter:
            step.forward_backward([batch])
            step.update()
    step.engine.destroy()
    return [operation for operation in meter.operations if operation.moved]
