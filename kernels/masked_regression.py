"""The regression head's last layer and its squared error at masked tokens, in one pass over the hidden states.

    p = hidden · w + b,   loss = Σ (p − t)²,   with r = 2 (p − t):   ∂w = Σ r hidden,   ∂b = Σ r,   ∂hidden = r wᵀ

The forward pass has r while it holds a tile of hidden states, so it adds up ∂w and ∂b too; the backward pass multiplies them
by the loss's gradient g and writes ∂hidden, which needs p, t and w alone: hidden states are read once and not kept.

Layout: [M, D] row-major, a tile of whole rows in registers (D ≤ 16384), everything in fp32 (fp64 for fp64).

Races: a program writes only its own predictions, its own row of partial sums and its own rows of ∂hidden.

Bytes that must move, e the size of an element: forward M D e + 8 M + D e (hidden, targets, predictions, weight), backward
M D e + 8 M + 2 D e + 4 D (∂hidden; predictions and targets; weight and ∂weight, saved in fp32). Besides: partial sums,
2 · 4 (D + 2) bytes a program of 64 rows.
"""

import torch
from torch import Tensor

from scbench.kernels import backend
from scbench.kernels.checks import FLOATS, VALUES, check
from scbench.kernels.row_tiles import PROGRAM_ROWS, TILE, accumulator, column_sums, row_block, rows_of_tile, triton_accumulator

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        hidden, weight, bias, targets, predictions, partials,
        n_rows, D, partial_columns,
        ROWS: tl.constexpr, PROGRAM_ROWS: tl.constexpr, D_BLOCK: tl.constexpr, GRADIENTS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, D_BLOCK)
        w = tl.load(weight + column, mask=column < D, other=0).to(ACC)
        b = tl.load(bias).to(ACC)
        loss = tl.zeros([ROWS], ACC)
        grad_bias = tl.zeros([ROWS], ACC)
        grad_weight = tl.zeros([ROWS, D_BLOCK], ACC)
        for start in range(0, PROGRAM_ROWS, ROWS):
            row = program * PROGRAM_ROWS + start + tl.arange(0, ROWS)
            mask = (row < n_rows)[:, None] & (column < D)[None, :]
            states = tl.load(hidden + row[:, None] * D + column[None, :], mask=mask, other=0).to(ACC)
            prediction = tl.sum(states * w[None, :], axis=1) + b
            error = tl.where(row < n_rows, prediction - tl.load(targets + row, mask=row < n_rows, other=0).to(ACC), 0)
            tl.store(predictions + row, prediction, mask=row < n_rows)
            loss += error * error
            if GRADIENTS:
                grad_weight += 2 * error[:, None] * states
                grad_bias += 2 * error
        sums = partials + program * partial_columns
        if GRADIENTS:
            tl.store(sums + column, tl.sum(grad_weight, axis=0), mask=column < D)
            tl.store(sums + D, tl.sum(grad_bias, axis=0))
            tl.store(sums + D + 1, tl.sum(loss, axis=0))
        else:
            tl.store(sums, tl.sum(loss, axis=0))

    @triton.jit
    def _backward_kernel(
        predictions, targets, weight, grad_loss, grad_hidden,
        n_rows, D,
        ROWS: tl.constexpr, D_BLOCK: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, D_BLOCK)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        target = tl.load(targets + row, mask=row < n_rows, other=0).to(ACC)
        error = tl.load(predictions + row, mask=row < n_rows, other=0) - target
        w = tl.load(weight + column, mask=column < D, other=0).to(ACC)
        grad = (2 * tl.load(grad_loss) * error)[:, None] * w[None, :]
        mask = (row < n_rows)[:, None] & (column < D)[None, :]
        tl.store(grad_hidden + row[:, None] * D + column[None, :], grad.to(grad_hidden.dtype.element_ty), mask=mask)


def _launch_forward(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, gradients: bool) -> tuple[Tensor, ...]:
    """(loss, predictions, ∂weight and ∂bias or None). Tile: half of TILE, because a sum over rows stays in registers."""
    (n_rows, width), dtype = hidden.shape, accumulator(hidden.dtype)
    predictions = torch.empty(n_rows, dtype=dtype, device=hidden.device)
    columns = triton.cdiv(width + 2, 4) * 4 if gradients else 1  # rows that start at 16 bytes
    if n_rows == 0:
        sums = torch.zeros(columns, dtype=dtype, device=hidden.device)
    else:
        programs = triton.cdiv(n_rows, PROGRAM_ROWS)
        partials = torch.empty(programs, columns, dtype=dtype, device=hidden.device)
        _forward_kernel[(programs,)](
            hidden, weight, bias, targets, predictions, partials, n_rows, width, columns,
            ROWS=min(rows_of_tile(width, TILE // 2), PROGRAM_ROWS), PROGRAM_ROWS=PROGRAM_ROWS, D_BLOCK=row_block(width),
            GRADIENTS=gradients, ACC=triton_accumulator(hidden.dtype), num_warps=4,
        )  # fmt: skip
        sums = column_sums(partials)
    if not gradients:
        return sums[0], predictions, None, None
    return sums[width + 1], predictions, sums[:width], sums[width : width + 1]


def _launch_backward(predictions: Tensor, targets: Tensor, weight: Tensor, grad_loss: Tensor) -> Tensor:
    """∂hidden. Tile: TILE elements of whole rows, 4 warps."""
    n_rows, width = len(predictions), weight.shape[1]
    grad_hidden = torch.empty(n_rows, width, dtype=weight.dtype, device=weight.device)
    rows = rows_of_tile(width)
    if n_rows > 0:
        _backward_kernel[(triton.cdiv(n_rows, rows),)](
            predictions, targets, weight, grad_loss, grad_hidden, n_rows, width,
            ROWS=rows, D_BLOCK=row_block(width), ACC=triton_accumulator(weight.dtype), num_warps=4,
        )  # fmt: skip
    return grad_hidden


class _MaskedRegression(torch.autograd.Function):
    """Keeps predictions, targets and the parameters' gradients; no hidden states."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
        hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
        loss, predictions, grad_weight, grad_bias = _launch_forward(hidden, weight, bias, targets, gradients)
        ctx.save_for_backward(predictions, targets, weight, grad_weight, grad_bias)
        ctx.mark_non_differentiable(predictions)
        ctx.set_materialize_grads(False)  # no zeros for the predictions
        return loss, predictions

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        predictions, targets, weight, grad_weight, grad_bias = ctx.saved_tensors
        grad_hidden = _launch_backward(predictions, targets, weight, grad_loss)
        grad_weight, grad_bias = ((grad * grad_loss).to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_hidden, grad_weight[None], grad_bias, None, None


def masked_regression(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predict one value a masked token and add up the squared errors, in fp32.

    Parameters
    ----------
    hidden
        [M, D], the head's hidden states at masked tokens.
    weight, bias
        [1, D] and [1], in the same dtype.
    targets
        float32 [M] (float64 will do for float64 inputs).

    Returns
    -------
    (sum over tokens of (prediction − target)², a scalar; predictions [M]), float32 (float64 for float64 inputs).
    With M = 0 the sum is 0 and still has a graph. Predictions have none: only the sum can be differentiated.
    """
    if hidden.ndim != 2 or weight.shape != (1, hidden.shape[1]) or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden, weight and targets must be [M, D], [1, D] and [M], not {list(hidden.shape)}, "
                         f"{list(weight.shape)} and {list(targets.shape)}")
    if bias.shape != (1,):
        raise ValueError(f"bias must be [1], not {list(bias.shape)}")
    check(hidden.device, FLOATS, hidden=hidden)
    check(hidden.device, (hidden.dtype,), weight=weight, bias=bias)
    check(hidden.device, VALUES, targets=targets)
    if backend.use_triton(hidden):
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
        return _MaskedRegression.apply(hidden, weight, bias, targets, gradients)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    predictions = hidden.to(dtype) @ weight[0].to(dtype) + bias.to(dtype)
    return (predictions - targets).square().sum(), predictions.detach()


def masked_regression_oracle(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the definition, token by token."""
    predictions = torch.stack([(row * weight[0]).sum() + bias[0] for row in hidden]) if len(hidden) else hidden.sum(1)
    return sum(((p - t) ** 2 for p, t in zip(predictions, targets, strict=True)), hidden.sum() * 0), predictions
