"""The registry of ops: what each is called with in a training step, and its plain PyTorch rival.

One place for the compile report, the traffic meter and the timings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import eager
import torch
from cells import load_batches
from options import Options
from torch import Tensor

from scbench.data.batch import CellBatch
from scbench.kernels import random
from scbench.kernels.add_norm import add_norm, dropout, relu_dropout
from scbench.kernels.attention import attention
from scbench.kernels.causal_conv import causal_conv
from scbench.kernels.gene_value_embedding import gene_value_embedding
from scbench.kernels.masked_regression import masked_regression
from scbench.kernels.mvc import mvc
from scbench.kernels.selective_scan import selective_scan
from scbench.kernels.table_rows import table_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUT = 0.15
STATES, TAPS, EXPANSION = 4, 4, 2  # of Mamba
FACTORS = 128  # of the gene graph: F and G, 64 each


@dataclass(frozen=True)
class Shape:
    """A batch of equally long cells: the goal's shape by default."""

    width: int = 256
    cells: int = 32
    tokens: int = 513
    """Of each cell, `<cls>` included."""
    heads: int = 8
    vocabulary: int = 60_697


class Case(NamedTuple):
    """One op with its arguments."""

    op: str
    function: Callable
    """The public op."""
    eager: Callable
    arguments: dict[str, object]

    def on(self, device: str | torch.device) -> "Case":
        """The same on another device ("meta" computes nothing); layouts and who wants a gradient are kept."""
        return self._replace(arguments={name: _moved(x, device) for name, x in self.arguments.items()})

    @property
    def wanted(self) -> list[Tensor]:
        """The arguments that get a gradient."""
        return [x for x in self.arguments.values() if isinstance(x, Tensor) and x.requires_grad]

    def forward(self, function: Callable) -> Tensor:
        """The differentiable output of `function`, the public op or its rival: [T, …], or a loss."""
        output = function(**self.arguments)
        return output[0] if isinstance(output, tuple) else output


def _moved(x, device):
    if not isinstance(x, Tensor):
        return x
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    if torch.device(device).type != "meta":
        moved.copy_(x.detach())
    return moved.requires_grad_(x.requires_grad)


def _batch(shape: Shape) -> CellBatch:
    return _batch_of(shape.cells, shape.tokens, shape.vocabulary)


@cache
def _batch_of(cells: int, tokens: int, vocabulary: int) -> CellBatch:
    options = Options(genes=tokens - 1, batch_cells=cells, vocabulary_size=vocabulary)
    return load_batches(options, 1)[1][0]


class _Draw:
    """Normal numbers and dropout keys, the same for every run."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, random.generator(random.key(0, random.Stream.EVALUATION))

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(dtype or self.dtype).requires_grad_()

    def keys(self, tokens: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (tokens,), generator=self.generator)


def _gene_value_embedding(shape: Shape, draw: _Draw) -> dict:
    batch, d = _batch(shape), shape.width
    return {
        "genes": batch.genes, "values": batch.values, "gene_order": batch.gene_order, "table": draw(shape.vocabulary, d),
        "weight1": draw(d, 1), "bias1": draw(d), "weight2": draw(d, d, scale=d**-0.5), "bias2": draw(d),
    }


def _table_rows(shape: Shape, draw: _Draw) -> dict:
    batch = _batch(shape)
    return {"table": draw(shape.vocabulary, FACTORS // 2), "genes": batch.genes, "gene_order": batch.gene_order}


def _masked_regression(shape: Shape, draw: _Draw) -> dict:
    batch, d = _batch(shape), shape.width
    return {"hidden": draw(len(batch.masked), d), "weight": draw(1, d, scale=d**-0.5), "bias": draw(1),
            "targets": batch.targets}


def _mvc(shape: Shape, draw: _Draw) -> dict:
    batch, d = _batch(shape), shape.width
    return {
        "queries": draw(len(batch.query_genes), d, scale=d**-0.5), "query_index": batch.query_index,
        "query_order": batch.query_order, "cell_embedding": draw(shape.cells, d), "targets": batch.targets,
        "cell_index": (torch.searchsorted(batch.cell_offsets, batch.masked, right=True) - 1).int(),
    }


def _dropout(shape: Shape, draw: _Draw) -> dict:
    tokens = shape.cells * shape.tokens
    return {"x": draw(tokens, shape.width), "token_keys": draw.keys(tokens), "probability": DROPOUT}


def _add_norm(shape: Shape, draw: _Draw) -> dict:
    d = shape.width
    return {**_dropout(shape, draw), "residual": draw(shape.cells * shape.tokens, d), "weight": draw(d), "bias": draw(d)}


def _attention(shape: Shape, draw: _Draw) -> dict:
    """Views of one projection, as in the transformer."""
    tokens = shape.cells * shape.tokens
    views = draw(tokens, 3, shape.heads, shape.width // shape.heads).detach().unbind(1)
    query, key, value = (view.detach().requires_grad_() for view in views)
    return {"query": query, "key": key, "value": value, "cell_offsets": _batch(shape).cell_offsets}


def _attention_dropout(shape: Shape, draw: _Draw) -> dict:
    return {**_attention(shape, draw), "token_keys": draw.keys(shape.cells * shape.tokens), "probability": DROPOUT}


def _gene_graph(shape: Shape, draw: _Draw) -> dict:
    """Queries and keys are the same tensor in the model; here two, so that the gradients are two."""
    tokens = shape.cells * shape.tokens
    query, key = (draw(tokens, 1, FACTORS, scale=FACTORS**-0.5) for _ in range(2))
    return {"query": query, "key": key, "value": draw(tokens, 1, shape.width), "cell_offsets": _batch(shape).cell_offsets,
            "scale": 1.0}


def _selective_scan(shape: Shape, draw: _Draw) -> dict:
    """The step is fp32 in every run, the decays too."""
    tokens, e = shape.cells * shape.tokens, EXPANSION * shape.width
    step = draw(tokens, e, dtype=torch.float32).detach().sigmoid_().mul_(0.1).requires_grad_()
    decay = -torch.arange(1, STATES + 1, dtype=torch.float32).expand(e, STATES).contiguous()
    return {
        "x": draw(tokens, e), "step": step, "decay": decay.requires_grad_(), "input_matrix": draw(tokens, STATES),
        "output_matrix": draw(tokens, STATES), "skip": draw(e), "cell_offsets": _batch(shape).cell_offsets,
    }


def _causal_conv(shape: Shape, draw: _Draw) -> dict:
    e = EXPANSION * shape.width
    return {"x": draw(shape.cells * shape.tokens, e), "weight": draw(e, TAPS, scale=0.5), "bias": draw(e),
            "cell_offsets": _batch(shape).cell_offsets}


OPS: dict[str, tuple[Callable, Callable, Callable]] = {  # the public op, its rival, its arguments
    "gene_value_embedding": (gene_value_embedding, eager.gene_value_embedding, _gene_value_embedding),
    "table_rows": (table_rows, eager.table_rows, _table_rows),
    "masked_regression": (masked_regression, eager.masked_regression, _masked_regression),
    "mvc": (mvc, eager.mvc, _mvc),
    "dropout": (dropout, eager.dropout, _dropout),
    "add_norm": (add_norm, eager.add_norm, _add_norm),
    "relu_dropout": (relu_dropout, eager.relu_dropout, _dropout),
    "attention": (attention, eager.attention, _attention),
    "attention_dropout": (attention, eager.attention, _attention_dropout),
    "gene_graph": (attention, eager.attention, _gene_graph),
    "selective_scan": (selective_scan, eager.selective_scan, _selective_scan),
    "causal_conv": (causal_conv, eager.causal_conv, _causal_conv),
}


def build(op: str, shape: Shape, dtype: str) -> Case:
    """An op of OPS with its arguments on the CPU, the same for every run."""
    function, rival, arguments = OPS[op]
    return Case(op, function, rival, arguments(shape, _Draw(DTYPES[dtype])))
