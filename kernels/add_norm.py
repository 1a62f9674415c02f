"""Dropout from the shared generator, fused with what surrounds it: residual + LayerNorm, ReLU, and LayerNorm + GELU; RMSNorm.

    dropout(x)      = x · keep · s,  s = 65536 / (65536 − round(65536 p)): the probability that 16 bits can express
    relu_dropout(x) = dropout(max(x, 0))
    add_norm        = (z − mean z) / sqrt(var z + ε) · weight + bias,  z = residual + dropout(x)
    norm_gelu_add   = residual + dropout(GELU(LayerNorm(x)));  one pass on a CPU in bf16 (no Triton kernel)
    rms_norm        = x / sqrt(mean x² + ε) · weight;          one pass on a CPU (no Triton kernel)

`keep` depends on the token's key and the column alone (kernels/random.py), so the backward pass makes it again.
On a CPU bf16 and fp32 are add_norm_cpu.py's.

Layout: [T, D] row-major, a tile of whole rows in registers (D ≤ 16384), statistics in fp32 (fp64 for fp64). One word of the
generator serves four neighbouring columns and is hashed once.

Races: a program writes only its own rows, and its own row of the partial sums of the weight's and the bias's gradients.

Bytes that must move, e the size of an element, without the 8 T of keys (dropout and its backward) that each pass reads:
    add_norm        forward 3 T D e + 2 D e (x, residual, out); backward 5 T D e + 3 D e (grad, x, residual; both gradients),
                    4 T D e without dropout, where the gradients are one tensor. mean and variance are computed again from
                    what autograd keeps anyway. Besides: partial sums, 2 · 2 D · 4 bytes a program of 64 rows.
    relu_dropout    forward 2 T D e; backward 3 T D e, without keys: what was kept is where the output is positive, and the
                    layer behind keeps the output anyway.
    dropout         forward 2 T D e; backward 2 T D e.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import add_norm_cpu, backend, random
from scbench.kernels.checks import FLOATS, check
from scbench.kernels.row_tiles import PROGRAM_ROWS, TILE, accumulator, column_sums, row_block, rows_of_tile, triton_accumulator

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    from scbench.kernels.random_triton import bits_triton

    @triton.jit
    def _keep(token_keys, threshold, D_BLOCK: tl.constexpr):
        """random_triton.keep_triton of all columns of some tokens, with one hash a word: bool [tokens, D_BLOCK]."""
        word = bits_triton(token_keys[:, None], tl.arange(0, D_BLOCK // 4)[None, :])
        even = tl.join(word & 0xFFFF, (word >> 32) & 0xFFFF)
        odd = tl.join((word >> 16) & 0xFFFF, (word >> 48) & 0xFFFF)
        lane = tl.join(even, odd).to(tl.uint16).to(tl.int16, bitcast=True)  # [tokens, word, lane // 2, lane % 2]
        return tl.reshape(lane, [token_keys.shape[0], D_BLOCK]).to(tl.int32) >= threshold

    @triton.jit
    def _tile(row, n_rows, D, D_BLOCK: tl.constexpr):
        """Offsets and mask of whole rows."""
        column = tl.arange(0, D_BLOCK)
        return row.to(tl.int64)[:, None] * D + column[None, :], (row < n_rows)[:, None] & (column < D)[None, :]

    @triton.jit
    def _normalised(x, residual, keep, kept, mask, D, eps, DROP: tl.constexpr):
        """((z − mean z) · rstd, rstd) of a tile; x and residual in the accumulator's dtype, 0 outside the mask."""
        z = residual + (tl.where(keep, x, 0) * (65536 / kept.to(x.dtype)) if DROP else x)
        mean = tl.sum(z, axis=1) / D
        centred = tl.where(mask, z - mean[:, None], 0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
        return centred * rstd[:, None], rstd

    @triton.jit(do_not_specialize=["kept"])  # it must stay a tensor when it is 1
    def _dropout_kernel(
        x, token_keys, out,
        n_rows, D, threshold, kept,
        ROWS: tl.constexpr, D_BLOCK: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        offset, mask = _tile(row, n_rows, D, D_BLOCK)
        keep = _keep(tl.load(token_keys + row, mask=row < n_rows, other=0), threshold, D_BLOCK)
        states = tl.load(x + offset, mask=mask, other=0).to(ACC)
        if RELU:
            states = tl.where(states <= 0, 0, states)
        tl.store(out + offset, tl.where(keep, states * (65536 / kept.to(ACC)), 0).to(out.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["kept"])
    def _relu_dropout_backward_kernel(
        out, grad, grad_x,
        n_elements, kept,
        BLOCK: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < n_elements
        scaled = tl.load(grad + offset, mask=mask, other=0).to(ACC) * (65536 / kept.to(ACC))
        positive = tl.load(out + offset, mask=mask, other=0).to(ACC) <= 0
        tl.store(grad_x + offset, tl.where(positive, 0, scaled).to(grad_x.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["kept"])
    def _forward_kernel(
        x, residual, weight, bias, token_keys, out,
        n_rows, D, eps, threshold, kept,
        ROWS: tl.constexpr, D_BLOCK: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, D_BLOCK)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        offset, mask = _tile(row, n_rows, D, D_BLOCK)
        keep = _keep(tl.load(token_keys + row, mask=row < n_rows, other=0), threshold, D_BLOCK) if DROP else mask
        states = tl.load(x + offset, mask=mask, other=0).to(ACC)
        residuals = tl.load(residual + offset, mask=mask, other=0).to(ACC)
        normalised, _ = _normalised(states, residuals, keep, kept, mask, D, eps, DROP)
        scale = tl.load(weight + column, mask=column < D, other=0).to(ACC)
        shift = tl.load(bias + column, mask=column < D, other=0).to(ACC)
        tl.store(out + offset, (normalised * scale[None, :] + shift[None, :]).to(out.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["kept"])
    def _backward_kernel(
        x, residual, weight, token_keys, grad, grad_x, grad_residual, partials,
        n_rows, D, eps, threshold, kept,
        ROWS: tl.constexpr, PROGRAM_ROWS: tl.constexpr, D_BLOCK: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, D_BLOCK)
        scale = tl.load(weight + column, mask=column < D, other=0).to(ACC)
        grad_weight = tl.zeros([ROWS, D_BLOCK], ACC)
        grad_bias = tl.zeros([ROWS, D_BLOCK], ACC)
        for start in range(0, PROGRAM_ROWS, ROWS):
            row = program * PROGRAM_ROWS + start + tl.arange(0, ROWS)
            offset, mask = _tile(row, n_rows, D, D_BLOCK)
            keep = _keep(tl.load(token_keys + row, mask=row < n_rows, other=0), threshold, D_BLOCK) if DROP else mask
            states = tl.load(x + offset, mask=mask, other=0).to(ACC)
            residuals = tl.load(residual + offset, mask=mask, other=0).to(ACC)
            upstream = tl.load(grad + offset, mask=mask, other=0).to(ACC)
            normalised, rstd = _normalised(states, residuals, keep, kept, mask, D, eps, DROP)
            grad_weight += upstream * normalised
            grad_bias += upstream
            inner = upstream * scale[None, :]
            along = tl.sum(inner * normalised, axis=1) / D
            level = tl.sum(inner, axis=1) / D
            grad_z = (inner - normalised * along[:, None] - level[:, None]) * rstd[:, None]
            tl.store(grad_residual + offset, grad_z.to(grad_residual.dtype.element_ty), mask=mask)
            if DROP:
                grad_kept = tl.where(keep, grad_z * (65536 / kept.to(ACC)), 0)
                tl.store(grad_x + offset, grad_kept.to(grad_x.dtype.element_ty), mask=mask)
        sums = partials + program * 2 * D + column
        tl.store(sums, tl.sum(grad_weight, axis=0), mask=column < D)
        tl.store(sums + D, tl.sum(grad_bias, axis=0), mask=column < D)


def _dropped(probability: float) -> dict[str, int]:
    """The kernels' arguments: whole numbers, exact in any precision."""
    return {"threshold": random.keep_threshold(probability), "kept": 65536 - round(probability * 65536)}


def _launch_dropout(x: Tensor, token_keys: Tensor, probability: float, relu: bool) -> Tensor:
    """Tile: TILE elements of whole rows, 4 warps."""
    x, token_keys = x.contiguous(), token_keys.contiguous()
    out = torch.empty_like(x)
    if x.numel() > 0:
        (n_rows, width), rows = x.shape, rows_of_tile(x.shape[1])
        _dropout_kernel[(triton.cdiv(n_rows, rows),)](
            x, token_keys, out, n_rows, width, **_dropped(probability),
            ROWS=rows, D_BLOCK=row_block(width), RELU=relu, ACC=triton_accumulator(x.dtype), num_warps=4,
        )  # fmt: skip
    return out


def _launch_relu_dropout_backward(out: Tensor, grad: Tensor, probability: float) -> Tensor:
    """Tile: TILE elements, 4 warps."""
    grad = grad.contiguous()
    grad_x = torch.empty_like(grad)
    if grad.numel() > 0:
        _relu_dropout_backward_kernel[(triton.cdiv(grad.numel(), TILE),)](
            out, grad, grad_x, grad.numel(), _dropped(probability)["kept"],
            BLOCK=TILE, ACC=triton_accumulator(grad.dtype), num_warps=4,
        )  # fmt: skip
    return grad_x


def _launch_forward(x, residual, weight, bias, token_keys, probability: float, eps: float) -> Tensor:
    """Tile: TILE elements of whole rows, 4 warps."""
    out = torch.empty_like(x)
    if x.numel() > 0:
        (n_rows, width), rows = x.shape, rows_of_tile(x.shape[1])
        _forward_kernel[(triton.cdiv(n_rows, rows),)](
            x, residual, weight, bias, token_keys, out, n_rows, width, eps, **_dropped(probability),
            ROWS=rows, D_BLOCK=row_block(width), DROP=token_keys is not None, ACC=triton_accumulator(x.dtype), num_warps=4,
        )  # fmt: skip
    return out


def _launch_backward(x, residual, weight, token_keys, probability: float, eps: float, grad: Tensor) -> tuple[Tensor, ...]:
    """(gradients of x, residual, weight and bias).

    Tile: 4 KB of whole rows, half of TILE in 16 bits, because the two sums over rows stay in registers; 4 warps.
    """
    n_rows, width = x.shape
    grad = grad.contiguous()
    grad_residual = torch.empty_like(x)
    grad_x = grad_residual if token_keys is None else torch.empty_like(x)
    dtype = accumulator(x.dtype)
    if x.numel() == 0:
        return grad_x, grad_residual, torch.zeros_like(weight), torch.zeros_like(weight)
    programs, rows = triton.cdiv(n_rows, PROGRAM_ROWS), rows_of_tile(width, TILE // x.element_size())
    partials = torch.empty(programs, 2 * width, dtype=dtype, device=x.device)
    _backward_kernel[(programs,)](
        x, residual, weight, token_keys, grad, grad_x, grad_residual, partials,
        n_rows, width, eps, **_dropped(probability), ROWS=min(rows, PROGRAM_ROWS), PROGRAM_ROWS=PROGRAM_ROWS,
        D_BLOCK=row_block(width), DROP=token_keys is not None, ACC=triton_accumulator(x.dtype), num_warps=4,
    )  # fmt: skip
    grad_weight, grad_bias = column_sums(partials).to(weight.dtype).split(width)
    return grad_x, grad_residual, grad_weight, grad_bias


class _DropoutTriton(torch.autograd.Function):
    """Dropout; the decisions are made again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
        ctx.save_for_backward(token_keys)
        ctx.probability = probability
        return _launch_dropout(x, token_keys, probability, relu=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (token_keys,) = ctx.saved_tensors
        return _launch_dropout(grad, token_keys, ctx.probability, relu=False), None, None


class _ReluDropout(torch.autograd.Function):
    """ReLU + dropout. Where the output is positive, x was and is kept: the scale is at least 1, so nothing underflows."""

    @staticmethod
    def forward(ctx, x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
        out = _launch_dropout(x, token_keys, probability, relu=True)
        ctx.save_for_backward(out)
        ctx.probability = probability
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (out,) = ctx.saved_tensors
        return _launch_relu_dropout_backward(out, grad, ctx.probability), None, None


class _AddNorm(torch.autograd.Function):
    """Dropout + residual + LayerNorm. Keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, token_keys, probability: float, eps: float) -> Tensor:
        x, residual, weight, bias = x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous()
        token_keys = None if token_keys is None else token_keys.contiguous()
        ctx.save_for_backward(x, residual, weight, token_keys)
        ctx.probability, ctx.eps = probability, eps
        return _launch_forward(x, residual, weight, bias, token_keys, probability, eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_launch_backward(*ctx.saved_tensors, ctx.probability, ctx.eps, grad), None, None, None


class _Dropout(torch.autograd.Function):
    """x · keep / (1 − p); the decisions depend on the token's key and the column alone."""

    @staticmethod
    def forward(ctx, x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
        dropped = random.keep_torch(token_keys, x.shape[1], probability).logical_not_()
        # The scale undoes the probability that 16 bits can express, not the one asked for.
        ctx.scale = 65536 / (65536 - round(probability * 65536))
        ctx.save_for_backward(dropped)
        return (x * ctx.scale).masked_fill_(dropped, 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (dropped,) = ctx.saved_tensors
        return (grad * ctx.scale).masked_fill_(dropped, 0), None, None


def dropout(x: Tensor, token_keys: Tensor | None, probability: float) -> Tensor:
    """Dropout of [T, D] states; `token_keys` int64 [T], one a token and site, or None for none (evaluation).

    ValueError for a shape, dtype or device that does not fit, as in the two functions below.
    """
    if token_keys is None or probability == 0:
        return x
    _check_keys(x, token_keys)
    if add_norm_cpu.takes(x):
        return add_norm_cpu.CpuDropout.apply(x, token_keys, probability)
    function = _DropoutTriton if backend.use_triton(x) else _Dropout
    return function.apply(x, token_keys, probability)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, token_keys: Tensor | None, probability: float, eps: float = 1e-5
) -> Tensor:
    """LayerNorm(residual + dropout(x)): x, residual [T, D] of one dtype; weight, bias [D]; statistics in fp32."""
    _check_norm(x, residual, weight, bias)
    native = add_norm_cpu.takes(x)
    if not native and not backend.use_triton(x):
        return F.layer_norm(residual + dropout(x, token_keys, probability), weight.shape, weight, bias, eps)
    if token_keys is None or probability == 0:
        token_keys, probability = None, 0.0
    else:
        _check_keys(x, token_keys)
    function = add_norm_cpu.CpuAddNorm if native else _AddNorm
    return function.apply(x, residual, weight, bias, token_keys, probability, eps)


def norm_gelu_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, token_keys: Tensor | None, probability: float, eps: float = 1e-5
) -> Tensor:
    """residual + dropout(GELU(LayerNorm(x))): shapes, dtypes and errors as in `add_norm`. On a CPU in bf16 in one pass."""
    _check_norm(x, residual, weight, bias)
    if x.dtype != torch.bfloat16 or not add_norm_cpu.takes(x):  # in fp32 torch's own are 3 % of a step faster
        return residual + dropout(F.gelu(F.layer_norm(x, weight.shape, weight, bias, eps)), token_keys, probability)
    if token_keys is None or probability == 0:
        token_keys, probability = None, 0.0
    else:
        _check_keys(x, token_keys)
    return add_norm_cpu.CpuNormGelu.apply(x, residual, weight, bias, token_keys, probability, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x² + ε) · weight of [T, D] states, in the dtype of `x`; statistics in fp32. On a CPU one pass.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), equation 4.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x and weight must be [T, D] and [D], not {list(x.shape)} and {list(weight.shape)}")
    check(x.device, FLOATS, x=x, weight=weight)
    if add_norm_cpu.takes(x):
        return add_norm_cpu.CpuRmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def relu_dropout(x: Tensor, token_keys: Tensor | None, probability: float) -> Tensor:
    """dropout(relu(x)) of [T, D] states."""
    if token_keys is None or probability == 0:
        return torch.relu(x)
    _check_keys(x, token_keys)
    if add_norm_cpu.takes(x):
        return add_norm_cpu.CpuReluDropout.apply(x, token_keys, probability)
    if backend.use_triton(x):
        return _ReluDropout.apply(x, token_keys, probability)
    return _Dropout.apply(torch.relu(x), token_keys, probability)


def _check_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 2 or residual.shape != x.shape or not weight.shape == bias.shape == x.shape[1:]:
        raise ValueError(f"x, residual, weight and bias must be [T, D], [T, D], [D] and [D], not {list(x.shape)}, "
                         f"{list(residual.shape)}, {list(weight.shape)} and {list(bias.shape)}")
    check(x.device, FLOATS, x=x, weight=weight, bias=bias)
    check(x.device, (x.dtype,), residual=residual)


def _check_keys(x: Tensor, token_keys: Tensor) -> None:
    check(x.device, FLOATS, x=x)
    check(x.device, (torch.int64,), token_keys=token_keys)
    if x.ndim != 2 or token_keys.shape != x.shape[:1]:
        raise ValueError(f"x must be [T, D] and token_keys have one element a token, not {list(x.shape)} and "
                         f"{list(token_keys.shape)}")


def dropout_oracle(x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
    """Dropout by the definition, one 16-bit lane of one word at a time, in Python integers."""
    drop_below = round(probability * 65536)
    rows = []
    for token_key, row in zip(token_keys.tolist(), x, strict=True):
        lanes = [random.fold(token_key % 2**64, c // 4) >> 16 * (c % 4) & 0xFFFF for c in range(len(row))]
        keep = torch.tensor([(lane ^ 0x8000) >= drop_below for lane in lanes], dtype=x.dtype)  # read as signed
        rows.append(row * keep * 65536 / (65536 - drop_below))
    return torch.stack(rows)
