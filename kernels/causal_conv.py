"""Depthwise causal convolution inside each cell of a packed batch.

Triton. A program walks the tokens of one block (ROWS) for one block of channels, 8 rows at a time, and keeps the K − 1 rows
before them in registers: each row is read once, but for the K − 1 before a block. A search in `cell_offsets` finds the block's
first cell; where a cell begins the rows before it are zeros. The backward walks backwards and keeps the gradient's K − 1 rows
after: grad_x_t = Σ_s taps_s g_(t+s), and the same rows times x_t are the taps' gradient, so that x needs no others.

Races. A row of y or grad_x belongs to one program. Every program stores its part of the gradients of weight and bias in a
place of its own; torch.sum adds them in a fixed order. No atomics: two runs are bit-identical.

Tile. A warp a program, 512 bytes of a row, which are 16 a lane on NVIDIA's; blocks of 64 tokens forward, and of 128 backward,
where fewer blocks leave fewer parts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import backend, causal_conv_cpu
from scbench.kernels.checks import FLOATS, INDICES, check, check_offsets
from scbench.kernels.row_tiles import triton_accumulator

ROW_BYTES = 512
FORWARD_ROWS, BACKWARD_ROWS = 64, 128
ROWS_AT_ONCE = 8
OFFSETS_AT_ONCE = 256

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _cell_of(token, cell_offsets, cells, SEARCH: tl.constexpr):
        """The cell that holds `token`: the last one that starts at or before it."""
        count = tl.zeros([SEARCH], tl.int32)
        for block in range(0, cells, SEARCH):
            cell = block + tl.arange(0, SEARCH)
            starts = tl.load(cell_offsets + cell, mask=cell < cells, other=0)
            count += ((cell < cells) & (starts <= token)).to(tl.int32)
        return tl.sum(count, axis=0) - 1

    @triton.jit
    def _forward_kernel(
        x, weight, bias, cell_offsets, y,
        tokens, cells, channels: tl.constexpr,
        x_row: tl.constexpr, x_column: tl.constexpr, w_row: tl.constexpr, w_column: tl.constexpr, bias_stride: tl.constexpr,
        ROWS: tl.constexpr, UNROLL: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
        ACC: tl.constexpr,
    ):  # fmt: skip
        channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_channel = channel < channels
        p_x, p_y = x + channel * x_column, y + channel
        b = tl.load(bias + channel * bias_stride, mask=m_channel, other=0).to(ACC)
        ws = ()
        for k in tl.static_range(TAPS):
            ws += (tl.load(weight + channel * w_row + k * w_column, mask=m_channel, other=0).to(ACC),)
        begin = tl.program_id(0).to(tl.int64) * ROWS
        block_end = tl.minimum(begin + ROWS, tokens)
        cell = _cell_of(begin, cell_offsets, cells, SEARCH)
        while (begin < block_end) & (cell < cells):
            start = tl.load(cell_offsets + cell).to(tl.int64)
            end = tl.minimum(tl.load(cell_offsets + cell + 1).to(tl.int64), block_end)
            past = ()
            for k in tl.static_range(TAPS - 1):
                token = begin - (TAPS - 1) + k
                m = (token >= start) & (begin < end) & m_channel  # an empty cell reads nothing
                past += (tl.load(p_x + token * x_row, mask=m, other=0).to(ACC),)
            for first in range(begin, end, UNROLL):
                left = (end - first).to(tl.int32)
                rows = past
                for i in tl.static_range(UNROLL):
                    m = (i < left) & m_channel
                    rows += (tl.load(p_x + first * x_row + i * x_row, mask=m, other=0).to(ACC),)
                for i in tl.static_range(UNROLL):
                    out = b
                    for k in tl.static_range(TAPS):
                        out += ws[k] * rows[i + k]
                    tl.store(p_y + first * channels + i * channels, out.to(y.dtype.element_ty), mask=(i < left) & m_channel)
                past = rows[UNROLL:]
            begin = end
            cell += 1

    @triton.jit
    def _backward_kernel(
        x, weight, cell_offsets, grad, grad_x, parts,
        tokens, cells, channels: tl.constexpr,
        x_row: tl.constexpr, x_column: tl.constexpr, w_row: tl.constexpr, w_column: tl.constexpr,
        grad_row: tl.constexpr, grad_column: tl.constexpr,
        ROWS: tl.constexpr, UNROLL: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
        ACC: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_channel = channel < channels
        p_x, p_grad, p_grad_x = x + channel * x_column, grad + channel * grad_column, grad_x + channel
        ws, grad_ws = (), ()
        for k in tl.static_range(TAPS):
            ws += (tl.load(weight + channel * w_row + k * w_column, mask=m_channel, other=0).to(ACC),)
            grad_ws += (tl.zeros([BLOCK], ACC),)
        grad_b = tl.zeros([BLOCK], ACC)
        block_begin = block * ROWS
        end = tl.minimum(block_begin + ROWS, tokens)
        cell = _cell_of(end - 1, cell_offsets, cells, SEARCH)
        while (end > block_begin) & (cell >= 0):
            begin = tl.maximum(tl.load(cell_offsets + cell).to(tl.int64), block_begin)
            stop = tl.load(cell_offsets + cell + 1).to(tl.int64)
            future = ()
            for k in tl.static_range(TAPS - 1):
                token = end + (TAPS - 2) - k  # the farthest first
                m = (token < stop) & (begin < end) & m_channel
                future += (tl.load(p_grad + token * grad_row, mask=m, other=0).to(ACC),)
            for done in range(0, end - begin, UNROLL):
                last = end - 1 - done
                left = (last - begin).to(tl.int32)  # rows before `last`
                us, gs = (), future
                for i in tl.static_range(UNROLL):
                    m = (i <= left) & m_channel
                    us += (tl.load(p_x + last * x_row - i * x_row, mask=m, other=0).to(ACC),)
                    gs += (tl.load(p_grad + last * grad_row - i * grad_row, mask=m, other=0).to(ACC),)
                for i in tl.static_range(UNROLL):
                    out, sums = tl.zeros([BLOCK], ACC), ()
                    for k in tl.static_range(TAPS):  # gs[i + k] is g of the token TAPS − 1 − k places after
                        out += ws[k] * gs[i + k]
                        sums += (grad_ws[k] + us[i] * gs[i + k],)
                    grad_ws = sums
                    grad_b += gs[i + TAPS - 1]
                    m = (i <= left) & m_channel
                    tl.store(p_grad_x + last * channels - i * channels, out.to(grad_x.dtype.element_ty), mask=m)
                future = gs[UNROLL:]
            end = begin
            cell -= 1
        p_part = parts + block * (TAPS + 1) * channels + channel
        for k in tl.static_range(TAPS):
            tl.store(p_part + k * channels, grad_ws[k], mask=m_channel)
        tl.store(p_part + TAPS * channels, grad_b, mask=m_channel)


def _tile(x: Tensor, taps: int) -> dict[str, object]:
    """The rule of the module's docstring; narrow rows have one block."""
    return {
        "UNROLL": ROWS_AT_ONCE,
        "TAPS": taps,
        "BLOCK": min(triton.next_power_of_2(x.shape[1]), ROW_BYTES // x.element_size()),
        "SEARCH": OFFSETS_AT_ONCE,
        "ACC": triton_accumulator(x.dtype),
        "num_warps": 1,
    }


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
    (tokens, channels), tile = x.shape, _tile(x, weight.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward_kernel[(triton.cdiv(tokens, FORWARD_ROWS), triton.cdiv(channels, tile["BLOCK"]))](
        x, weight, bias, cell_offsets, y,
        tokens, len(cell_offsets) - 1, channels,
        *x.stride(), *weight.stride(), *bias.stride(),
        ROWS=FORWARD_ROWS, **tile,
    )  # fmt: skip
    return y


def _launch_backward(x: Tensor, weight: Tensor, cell_offsets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(the gradient of x, those of the taps and the bias [K + 1, E] in the precision of the sums)."""
    (tokens, channels), taps = x.shape, weight.shape[1]
    tile, blocks = _tile(x, taps), triton.cdiv(tokens, BACKWARD_ROWS)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = torch.empty(blocks, taps + 1, channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    _backward_kernel[(blocks, triton.cdiv(channels, tile["BLOCK"]))](
        x, weight, cell_offsets, grad, grad_x, parts,
        tokens, len(cell_offsets) - 1, channels,
        *x.stride(), *weight.stride(), *grad.stride(),
        ROWS=BACKWARD_ROWS, **tile,
    )  # fmt: skip
    return grad_x, parts.sum(0)


class _CausalConvolutionTriton(torch.autograd.Function):
    """Saves its inputs but the bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
        cell_offsets = cell_offsets.contiguous()
        ctx.save_for_backward(x, weight, cell_offsets)
        ctx.bias_dtype = bias.dtype
        return _launch_forward(x, weight, bias, cell_offsets)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, cell_offsets = ctx.saved_tensors
        grad_x, sums = _launch_backward(x, weight, cell_offsets, grad)
        return grad_x, sums[:-1].T.to(weight.dtype), sums[-1].to(ctx.bias_dtype), None


class _CausalConvolution(torch.autograd.Function):
    """One shifted product a tap, cell by cell: a cell's rows stay in the cache, and no mask is needed."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.lengths = cell_offsets.diff().tolist()
        dtype = torch.promote_types(x.dtype, torch.float32)
        taps = weight.T.flip(0).to(dtype).contiguous()  # taps[s] weighs the token s places before
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        for cell, out in zip(x.split(ctx.lengths), output.split(ctx.lengths), strict=True):
            cell = cell.to(dtype)
            mixed = torch.addcmul(bias.to(dtype), cell, taps[0])
            for shift in range(1, len(taps)):
                mixed[shift:].addcmul_(cell[:-shift], taps[shift])
            out.copy_(mixed)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        taps = weight.T.flip(0).to(dtype).contiguous()
        grad_x, grad_taps = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(taps)
        grad_bias = taps.new_zeros(bias.shape)
        for cell, g, out in zip(*(rows.split(ctx.lengths) for rows in (x, grad, grad_x)), strict=True):
            cell, g = cell.to(dtype), g.to(dtype)
            grad_cell = g * taps[0]
            grad_taps[0] += (g * cell).sum(0)
            for shift in range(1, len(taps)):
                grad_cell[:-shift].addcmul_(g[shift:], taps[shift])
                grad_taps[shift] += (g[shift:] * cell[:-shift]).sum(0)
            grad_bias += g.sum(0)
            out.copy_(grad_cell)
        return grad_x, grad_taps.flip(0).T.to(weight.dtype), grad_bias.to(bias.dtype), None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
    """y_t = bias + Σ_k weight[:, k] · x_(t − K + 1 + k) in each channel, with x = 0 before the cell's first token.

    The weights stand as in torch's Conv1d: the last one weighs the token itself. Sums in fp32 (fp64 for fp64 inputs).

    Bytes that must move, b a number: forward 2 T E b (x in, y out), backward 3 T E b (x and y's gradient in, x's out); and the
    parameters, (K + 1) E b, twice in the backward. The Triton kernels move besides the parts of the parameters' gradients,
    8 (K + 1) E bytes for every 128 tokens: for bf16 and K = 4, 1.05 times as much as must move in the backward.

    Parameters
    ----------
    x
        [T, E].
    weight, bias
        [E, K] and [E].
    cell_offsets
        int32 [B+1], where each cell's tokens start; the last is T.

    Returns
    -------
    [T, E] in the dtype of `x`.
    """
    _check(x, weight, bias, cell_offsets)
    function = _CausalConvolutionTriton if backend.use_triton(x) else _CausalConvolution
    return function.apply(x, weight, bias, cell_offsets)


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
    """SiLU(causal_conv(x, weight, bias, cell_offsets)), SiLU(y) = y / (1 + exp(−y)); on a CPU one pass, rounded once
    (causal_conv_cpu.py)."""
    _check(x, weight, bias, cell_offsets)
    if causal_conv_cpu.takes(x, weight, bias):
        return causal_conv_cpu.CpuCausalConvSilu.apply(x, weight, bias, cell_offsets)
    return F.silu(causal_conv(x, weight, bias, cell_offsets))


def _check(x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 2 or not weight.shape[:1] == bias.shape == x.shape[1:] or weight.shape[1] == 0:
        raise ValueError("x, weight and bias must be [T, E], [E, K > 0] and [E], not "
                         f"{list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}")
    check(x.device, FLOATS, x=x, weight=weight, bias=bias)
    check(x.device, INDICES, cell_offsets=cell_offsets)
    check_offsets(cell_offsets, x.shape[0])


def causal_conv_oracle(x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
    """The same by the definition, token by token and tap by tap."""
    taps = weight.shape[1]
    rows = []
    for start, stop in zip(cell_offsets.tolist(), cell_offsets.tolist()[1:], strict=False):
        for t in range(start, stop):
            past = [(k, t - taps + 1 + k) for k in range(taps)]
            rows.append(bias + sum(weight[:, k] * x[s] for k, s in past if s >= start))
    return torch.stack(rows)
