"""Masked value prediction from the cell embedding (MVC, scGPT's name): gene query · cell embedding.

    pᵢ = q[uᵢ] · c[bᵢ],   loss = Σ (pᵢ − tᵢ)²,   with rᵢ = 2 (pᵢ − tᵢ):   ∂c[b] = Σ rᵢ q[uᵢ],   ∂q[u] = Σ rᵢ c[bᵢ]

The masked tokens come cell by cell. A program takes one cell, reads its tokens' queries a tile at a time, and while it has
them makes predictions, loss and ∂c. The backward pass multiplies ∂c by the loss's gradient and makes ∂q by segments of the
tokens sorted by query (kernels/segments.py, the coefficients included): neither side is ever copied a row a token.

Layout: [U, D], [B, D] row-major, a tile of whole rows in registers (D ≤ 16384), everything in fp32 (fp64 if one side is).

Races: a program writes its own cell's loss and gradient and its own tokens' predictions; each row of ∂q has one program.

Bytes that must move, e and f the sizes of an element of q and c, i of a cell's index (all of q and c fit the cache, so they
count once):
    forward     U D e + B D f + 4 B D + 12 M    q, c, ∂c; queries' indices, targets and predictions
    backward    U D e + 2 B D f + 4 B D + (16 + i) M    ∂q, c, ∂c read and written; as before, order, cells' indices
    besides     forward at most 32 bytes a step of the cells' searches, 8 B of losses; backward, in low precision, 8 B D of ∂c
                times the loss's gradient before it is rounded.
"""

import torch
from torch import Tensor

from scbench.kernels import backend
from scbench.kernels.checks import FLOATS, INDICES, VALUES, check, check_order
from scbench.kernels.row_tiles import TILE, accumulator, row_block, rows_of_tile, triton_accumulator
from scbench.kernels.segments import segment_sums

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    from scbench.kernels.segments import first_places

    @triton.jit
    def _forward_kernel(
        queries, query_index, cells, cell_index, targets, predictions, losses, grad_cells,
        n_tokens, search_steps, D,
        ROWS: tl.constexpr, D_BLOCK: tl.constexpr, GRADIENTS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        start = first_places(cell_index, None, tl.program_id(0), n_tokens, search_steps)
        stop = first_places(cell_index, None, tl.program_id(0) + 1, n_tokens, search_steps)
        cell = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, D_BLOCK)
        embedding = tl.load(cells + cell * D + column, mask=column < D, other=0).to(ACC)
        loss = tl.zeros([ROWS], ACC)
        grad = tl.zeros([ROWS, D_BLOCK], ACC)
        for first in range(start, stop, ROWS):
            token = first + tl.arange(0, ROWS)
            query = tl.load(query_index + token, mask=token < stop, other=0).to(tl.int64)
            mask = (token < stop)[:, None] & (column < D)[None, :]
            rows = tl.load(queries + query[:, None] * D + column[None, :], mask=mask, other=0).to(ACC)
            prediction = tl.sum(rows * embedding[None, :], axis=1)
            error = prediction - tl.load(targets + token, mask=token < stop, other=0).to(ACC)  # 0 outside the cell
            tl.store(predictions + token, prediction, mask=token < stop)
            loss += error * error
            if GRADIENTS:
                grad += error[:, None] * rows
        tl.store(losses + cell, tl.sum(loss, axis=0))
        if GRADIENTS:
            tl.store(grad_cells + cell * D + column, 2 * tl.sum(grad, axis=0), mask=column < D)


def _launch_forward(queries, query_index, cells, cell_index, targets, gradients: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, predictions, ∂cells or None). Tile: half of TILE, because a sum over rows stays in registers."""
    (n_cells, width), dtype = cells.shape, accumulator(queries.dtype, cells.dtype)
    predictions = torch.empty(len(targets), dtype=dtype, device=cells.device)
    losses = torch.empty(n_cells, dtype=dtype, device=cells.device)
    grad_cells = torch.empty(n_cells, width, dtype=dtype, device=cells.device) if gradients else None
    _forward_kernel[(n_cells,)](
        queries, query_index, cells, cell_index, targets, predictions, losses, grad_cells,
        len(targets), len(targets).bit_length(), width,
        ROWS=rows_of_tile(width, TILE // 2), D_BLOCK=row_block(width), GRADIENTS=gradients,
        ACC=triton_accumulator(dtype), num_warps=4,
    )  # fmt: skip
    return losses.sum(), predictions, grad_cells


class _Mvc(torch.autograd.Function):
    """Keeps ∂cells, and for ∂queries its inputs but the queries."""

    @staticmethod
    def forward(ctx, queries, query_index, query_order, cells, cell_index, targets, gradients: bool) -> tuple[Tensor, Tensor]:
        queries, query_index, query_order, cells, cell_index, targets = (
            x.contiguous() for x in (queries, query_index, query_order, cells, cell_index, targets)
        )
        loss, predictions, grad_cells = _launch_forward(queries, query_index, cells, cell_index, targets, gradients)
        ctx.save_for_backward(query_index, query_order, cells, cell_index, targets, predictions, grad_cells)
        ctx.queries = len(queries), queries.dtype
        ctx.mark_non_differentiable(predictions)
        ctx.set_materialize_grads(False)  # no zeros for the predictions
        return loss, predictions

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        query_index, query_order, cells, cell_index, targets, predictions, grad_cells = ctx.saved_tensors
        grad_queries = None
        if ctx.needs_input_grad[0]:
            grad_queries = segment_sums(
                cells, query_index, query_order, *ctx.queries, cell_index, predictions, targets, grad_loss
            )
        return grad_queries, None, None, (grad_cells * grad_loss).to(cells.dtype), None, None, None


def mvc(
    queries: Tensor, query_index: Tensor, query_order: Tensor, cell_embedding: Tensor, cell_index: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Predict each masked gene's value as its query times its cell's embedding and add up the squared errors, in fp32.

    Parameters
    ----------
    queries
        [U, D], one a distinct masked gene.
    query_index, cell_index
        int32 or int64 [M]: the query and the cell of each masked token; `cell_index` ascends.
    query_order
        int32 or int64 [M], the masked tokens sorted by query, stable (made on the host): the segments of the queries'
        gradient.
    cell_embedding
        [B, D].
    targets
        float32 [M] (float64 will do for float64 inputs).

    Returns
    -------
    (sum over tokens of (prediction − target)², a scalar; predictions [M]), float32 (float64 for float64 inputs).
    With M = 0 the sum is 0 and still has a graph. Predictions have none: only the sum can be differentiated.
    """
    if queries.ndim != 2 or queries.shape[1:] != cell_embedding.shape[1:]:
        raise ValueError(f"queries and cell_embedding must be [U, D] and [B, D] of one width, not {list(queries.shape)} and "
                         f"{list(cell_embedding.shape)}")
    if targets.ndim != 1 or not query_index.shape == query_order.shape == cell_index.shape == targets.shape:
        raise ValueError("query_index, query_order, cell_index and targets must have one element a masked token")
    check(queries.device, FLOATS, queries=queries, cell_embedding=cell_embedding)
    check(queries.device, INDICES, query_index=query_index, query_order=query_order, cell_index=cell_index)
    check(queries.device, VALUES, targets=targets)
    if backend.DEBUG:
        check_order("query_index", query_index, "query_order", query_order, len(queries))
        _check_cells(cell_index, len(cell_embedding))
    if backend.use_triton(queries):
        gradients = torch.is_grad_enabled() and (queries.requires_grad or cell_embedding.requires_grad)
        return _Mvc.apply(queries, query_index, query_order, cell_embedding, cell_index, targets, gradients)
    dtype = accumulator(queries.dtype, cell_embedding.dtype)
    # One product of all queries with all cells, then a pick: never a [M, D] copy of either side.
    products = queries.to(dtype) @ cell_embedding.to(dtype).T  # [U, B]
    predictions = products.flatten().index_select(0, query_index.long() * cell_embedding.shape[0] + cell_index)
    return (predictions - targets).square().sum(), predictions.detach()


def _check_cells(cell_index: Tensor, n_cells: int) -> None:
    if len(cell_index) and not (cell_index.min() >= 0 and cell_index.max() < n_cells):
        raise ValueError(f"cell_index holds numbers outside 0 … {n_cells - 1}")
    if (cell_index.diff() < 0).any():
        raise ValueError("cell_index must ascend")


def mvc_oracle(queries, query_index, cell_embedding, cell_index, targets) -> tuple[Tensor, Tensor]:
    """The same by the definition, with gathered copies."""
    predictions = (queries[query_index.long()] * cell_embedding[cell_index.long()]).sum(1)
    return ((predictions - targets) ** 2).sum(), predictions
