"""Masked value prediction from the cell embedding (MVC, scGPT's name): gene query · cell embedding.

    pᵢ = q[uᵢ] · c[bᵢ],   loss = Σ (pᵢ − tᵢ)²,   with rᵢ = 2 (pᵢ − tᵢ):   ∂c[b] = Σ rᵢ q[uᵢ],   ∂q[u] = Σ rᵢ c[bᵢ]

The masked tokens come cell by cell. A program takes one cell, reads its tokens' queries a tile at a time, and while it has
them makes predictions, loss and ∂c. The backward pass multiplies ∂c by the loss's gradient and makes ∂q from a stable sort of
the tokens by query (kernels/segments.py): neither side is ever copied a row a token.

Layout: [U, D], [B, D] row-major, a tile of whole rows in registers (D ≤ 16384), everything in fp32 (fp64 for fp64).

Races: a program writes its own cell's loss and gradient and its own tokens' predictions; each row of ∂q has one program.

Bytes that must move, e and f the sizes of an element of q and c (all U D e of queries fit the cache, so they count once):
    forward     U D e + B D f + 4 B D + M (12 + 8)      q, c, ∂c; indices (4 and 8), targets and predictions
    backward    U D e + B D f + 4 B D + B D f + M (12 + 8)      ∂q, c, ∂c read, ∂c written; indices, targets and predictions
    besides     8 U of segment bounds, written twice and read; the sort, about 50 M; 36 M of order and coefficients.
"""

import torch
from torch import Tensor

from scbench.kernels import backend
from scbench.kernels.row_tiles import TILE, accumulator, row_block, rows_of_tile
from scbench.kernels.segments import segment_bounds, segment_sums

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _first_at_least(ascending, n_elements, value):
        """The first place of an ascending list whose element is at least `value`; n_elements if there is none."""
        low = tl.zeros([], tl.int32)
        high = low + n_elements
        while low < high:
            middle = (low + high) // 2
            if tl.load(ascending + middle) < value:
                low = middle + 1
            else:
                high = middle
        return low

    @triton.jit
    def _forward_kernel(
        queries, query_index, cells, cell_index, targets, predictions, losses, grad_cells,
        n_tokens, D,
        ROWS: tl.constexpr, D_BLOCK: tl.constexpr, GRADIENTS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        cell = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, D_BLOCK)
        embedding = tl.load(cells + cell * D + column, mask=column < D, other=0).to(ACC)
        loss = tl.zeros([ROWS], ACC)
        grad = tl.zeros([ROWS, D_BLOCK], ACC)
        stop = _first_at_least(cell_index, n_tokens, cell + 1)
        for start in range(_first_at_least(cell_index, n_tokens, cell), stop, ROWS):
            token = start + tl.arange(0, ROWS)
            query = tl.load(query_index + token, mask=token < stop, other=0).to(tl.int64)
            mask = (token < stop)[:, None] & (column < D)[None, :]
            rows = tl.load(queries + query[:, None] * D + column[None, :], mask=mask, other=0).to(ACC)
            prediction = tl.sum(rows * embedding[None, :], axis=1)
            error = prediction - tl.load(targets + token, mask=token < stop, other=0).to(ACC)  # 0 outside the cell
            tl.store(predictions + token, prediction, mask=token < stop)
            loss += error * error
            if GRADIENTS:
                grad += 2 * error[:, None] * rows
        tl.store(losses + cell, tl.sum(loss, axis=0))
        if GRADIENTS:
            tl.store(grad_cells + cell * D + column, tl.sum(grad, axis=0), mask=column < D)


def _launch_forward(queries, query_index, cells, cell_index, targets, gradients: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, predictions, ∂cells or None). Tile: half of TILE, because a sum over rows stays in registers."""
    (n_cells, width), dtype = cells.shape, accumulator(queries.dtype)
    predictions = torch.empty(len(targets), dtype=dtype, device=cells.device)
    losses = torch.empty(n_cells, dtype=dtype, device=cells.device)
    grad_cells = torch.empty(n_cells, width, dtype=dtype, device=cells.device) if gradients else None
    _forward_kernel[(n_cells,)](
        queries, query_index, cells, cell_index, targets, predictions, losses, grad_cells, len(targets), width,
        ROWS=rows_of_tile(width, TILE // 2), D_BLOCK=row_block(width), GRADIENTS=gradients,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=4,
    )  # fmt: skip
    return losses.sum(), predictions, grad_cells


def _launch_backward(queries, query_index, cells, cell_index, targets, predictions, grad_loss: Tensor) -> Tensor:
    """∂queries."""
    order = torch.argsort(query_index, stable=True)
    bounds = segment_bounds(query_index, order, len(queries))
    return segment_sums(cells, order, bounds, queries.dtype, cell_index, (predictions - targets) * (2 * grad_loss))


class _Mvc(torch.autograd.Function):
    """Keeps ∂cells, and its inputs for ∂queries, of which the shape alone."""

    @staticmethod
    def forward(ctx, queries, query_index, cells, cell_index, targets, gradients: bool) -> tuple[Tensor, Tensor]:
        inputs = [x.contiguous() for x in (queries, query_index, cells, cell_index, targets)]
        loss, predictions, grad_cells = _launch_forward(*inputs, gradients)
        ctx.save_for_backward(*inputs, predictions, grad_cells)
        ctx.mark_non_differentiable(predictions)
        return loss, predictions

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _) -> tuple[Tensor | None, ...]:
        *saved, grad_cells = ctx.saved_tensors
        grad_queries = _launch_backward(*saved, grad_loss) if ctx.needs_input_grad[0] else None
        return grad_queries, None, (grad_cells * grad_loss).to(saved[2].dtype), None, None, None


def mvc(
    queries: Tensor, query_index: Tensor, cell_embedding: Tensor, cell_index: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Predict each masked gene's value as its query times its cell's embedding and add up the squared errors, in fp32.

    Parameters
    ----------
    queries
        [U, D], one a distinct masked gene.
    query_index, cell_index
        integer [M]: the query and the cell of each masked token; `cell_index` ascends.
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
    if targets.ndim != 1 or not query_index.shape == cell_index.shape == targets.shape:
        raise ValueError("query_index, cell_index and targets must have one element a masked token")
    if backend.DEBUG:
        _check_indices(query_index, len(queries), cell_index, len(cell_embedding))
    if backend.use_triton(queries):
        gradients = torch.is_grad_enabled() and (queries.requires_grad or cell_embedding.requires_grad)
        return _Mvc.apply(queries, query_index, cell_embedding, cell_index, targets, gradients)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    # One product of all queries with all cells, then a pick: never a [M, D] copy of either side.
    products = queries.to(dtype) @ cell_embedding.to(dtype).T  # [U, B]
    predictions = products.flatten().index_select(0, query_index.long() * cell_embedding.shape[0] + cell_index)
    return (predictions - targets).square().sum(), predictions.detach()


def _check_indices(query_index: Tensor, n_queries: int, cell_index: Tensor, n_cells: int) -> None:
    for name, index, n_rows in (("query_index", query_index, n_queries), ("cell_index", cell_index, n_cells)):
        if len(index) and not (index.min() >= 0 and index.max() < n_rows):
            raise ValueError(f"{name} holds numbers outside 0 … {n_rows - 1}")
    if (cell_index.diff() < 0).any():
        raise ValueError("cell_index must ascend")


def mvc_oracle(queries, query_index, cell_embedding, cell_index, targets) -> tuple[Tensor, Tensor]:
    """The same by the definition, with gathered copies."""
    predictions = (queries[query_index.long()] * cell_embedding[cell_index.long()]).sum(1)
    return ((predictions - targets) ** 2).sum(), predictions
