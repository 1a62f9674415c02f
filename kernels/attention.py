"""Softmax attention inside each cell of a packed batch.

Four ways, chosen by `attention_path`: flash-attn, torch's varlen attention, our own Triton kernels (attention_triton.py: the
maths, the layout and the traffic) and, on a CPU, cell by cell: in C for bf16 (attention_cpu.py), else matrix products.
"""

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import attention_cpu, backend, random
from scbench.kernels.add_norm import dropout_oracle
from scbench.kernels.checks import FLOATS, INDICES, check, check_offsets

if backend.HAS_TRITON:
    from scbench.kernels.attention_triton import TritonAttention

WIDEST_HEAD = 256  # of all three GPU paths


def _heads_first(start: int, stop: int, *tensors: Tensor) -> Iterator[Tensor]:
    """One cell's [n, H, d] rows as [H, n, d] views."""
    return (x[start:stop].transpose(0, 1) for x in tensors)


def _probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(scale · query · keyᵀ) of one cell: [H, n, d] and [H, m, d] → [H, n, m]; the softmax is computed in fp32."""
    scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=scale)
    return torch.softmax(scores, -1)


def _dropped(token_keys: Tensor | None, heads: int, keys: int, probability: float) -> Tensor | None:
    """What of one cell's probabilities is dropped: bool [H, n, m]; token_keys [n], None for nothing."""
    if token_keys is None or probability == 0:
        return None
    keep = random.keep_torch(token_keys, keys * heads, probability)
    return keep.reshape(-1, keys, heads).permute(2, 0, 1).logical_not()


def _drop(x: Tensor, dropped: Tensor | None, probability: float) -> Tensor:
    """Dropout is linear and symmetric: forward it takes the probabilities, backward their gradient."""
    if dropped is None:
        return x
    return (x * (65536 / (65536 - round(probability * 65536)))).masked_fill_(dropped, 0)


class _CellAttention(torch.autograd.Function):
    """Attention cell by cell in matrix products: what the C code does not take (dropout, other processors); in bf16 twice
    as fast as torch's own kernel (in fp32 torch's is faster). Saves its inputs only: the backward computes the
    probabilities again, which keeps memory at one cell's [H, n, n]."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float | None = None,
        key_lengths: Tensor | None = None, token_keys: Tensor | None = None, probability: float = 0.0,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, token_keys)
        ctx.scale, ctx.probability = query.shape[2] ** -0.5 if scale is None else scale, probability
        starts = cell_offsets[:-1]
        key_stops = cell_offsets[1:] if key_lengths is None else starts + key_lengths
        ctx.cells = list(zip(starts.tolist(), cell_offsets[1:].tolist(), key_stops.tolist(), strict=True))
        output = value.new_empty(value.shape)
        for start, stop, key_stop in ctx.cells:
            q, out = _heads_first(start, stop, query, output)
            k, v = _heads_first(start, key_stop, key, value)
            keys = None if token_keys is None else token_keys[start:stop]
            dropped = _dropped(keys, len(q), k.shape[1], probability)
            out.copy_(torch.bmm(_drop(_probabilities(q, k, ctx.scale), dropped, probability), v))
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, token_keys = ctx.saved_tensors
        grads = [x.new_zeros(x.shape) for x in (query, key, value)]
        for start, stop, key_stop in ctx.cells:
            q, g, grad_q = _heads_first(start, stop, query, grad, grads[0])
            k, v, grad_k, grad_v = _heads_first(start, key_stop, key, value, *grads[1:])
            p = _probabilities(q, k, ctx.scale)
            keys = None if token_keys is None else token_keys[start:stop]
            dropped = _dropped(keys, len(q), k.shape[1], ctx.probability)
            grad_v.copy_(torch.bmm(_drop(p, dropped, ctx.probability).transpose(1, 2), g))
            grad_p = _drop(torch.bmm(g, v.transpose(1, 2)), dropped, ctx.probability)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q.copy_(torch.bmm(grad_scores, k)).mul_(ctx.scale)
            grad_k.copy_(torch.bmm(grad_scores.transpose(1, 2), q)).mul_(ctx.scale)
        return *grads, None, None, None, None, None


@cache
def _flash_attn() -> ModuleType | None:
    """flash-attn. The package can be there without its compiled part: then the import fails."""
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


@cache
def _torch_varlen() -> Callable | None:
    """torch's function, from CUDA builds that have it."""
    if torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def attention_path(query: Tensor, *, plain: bool) -> str:
    """Which implementation takes `query`: "flash_attn", "torch_varlen", "triton" or "cells".

    `plain`: values as wide as queries, no scale, pads or dropout. SCBENCH_KERNELS=triton always means our kernels (head
    widths up to 256), torch the products cell by cell.
    """
    width = query.shape[2]
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if half and plain and not backend.FORCED and width <= WIDEST_HEAD:
        ampere = torch.cuda.get_device_capability(query.device) >= (8, 0)
        if ampere and _flash_attn():
            return "flash_attn"
        if ampere and _torch_varlen() and width % 8 == 0:
            return "torch_varlen"
    return "triton" if backend.use_triton(query) and width <= WIDEST_HEAD else "cells"


def _flash(query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, longest: int) -> Tensor:
    offsets = cell_offsets.int()
    function = _flash_attn().flash_attn_varlen_func
    return function(query, key, value, offsets, offsets, longest, longest, deterministic=True)


def _flash_packed(projection: Tensor, cell_offsets: Tensor, longest: int) -> Tensor:
    """Of [T, 3, H, d], with one gradient for the three."""
    return _flash_attn().flash_attn_varlen_qkvpacked_func(projection, cell_offsets.int(), longest, deterministic=True)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, longest: int) -> Tensor:
    """Its backward adds up in no fixed order unless torch.use_deterministic_algorithms is on."""
    offsets = cell_offsets.int()
    return _torch_varlen()(query, key, value, offsets, offsets, longest, longest)


def _check(
    query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, key_lengths: Tensor | None, token_keys: Tensor | None
) -> None:
    if query.shape != key.shape or query.shape[:2] != value.shape[:2] or query.ndim != 3 or value.ndim != 3:
        raise ValueError("query, key and value must be [T, H, d], [T, H, d] and [T, H, e], not "
                         f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}")
    check(query.device, FLOATS, query=query)
    check(query.device, (query.dtype,), key=key, value=value)
    check(query.device, INDICES, cell_offsets=cell_offsets)
    if key_lengths is not None:
        check(query.device, INDICES, key_lengths=key_lengths)
        if key_lengths.shape != cell_offsets[1:].shape:
            raise ValueError(f"key_lengths must be [{len(cell_offsets) - 1}], not {list(key_lengths.shape)}")
    if token_keys is not None:
        check(query.device, (torch.int64,), token_keys=token_keys)
        if token_keys.shape != query.shape[:1]:
            raise ValueError(f"token_keys must have one element a token: {list(token_keys.shape)} for {list(query.shape)}")
    check_offsets(cell_offsets, len(query))
    if key_lengths is None or (query.is_cuda and not backend.DEBUG):
        return  # reading numbers would make the host wait
    if ((key_lengths < 1) | (key_lengths > cell_offsets.diff())).any():
        raise ValueError("key_lengths must be between 1 and the tokens of each cell")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cell_offsets: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    token_keys: Tensor | None = None,
    probability: float = 0.0,
    max_tokens: int | None = None,
) -> Tensor:
    """dropout(softmax(scale · query · keyᵀ)) · value within each cell; cells never see each other.

    Parameters
    ----------
    query, key
        [T, H, d]: H heads of width d. On a CPU without the C code the scores of bf16 are rounded to bf16.
    value
        [T, H, e]; its width may differ from that of query and key.
    cell_offsets
        int32 [B+1], where each cell's tokens start; the last is T.
    scale
        1 / √d by default.
    key_lengths
        int32 [B], at least 1: the tokens of each cell that are attended to, the first ones (the rest are pads, which still
        attend). By default all.
    token_keys
        int64 [T], dropout keys of the query tokens, or None for no dropout (evaluation). Head h of token t keeps its
        cell's j-th key where column j · H + h of `random.keep_torch(token_keys, …)` says so: tokens that follow the
        j-th decide nothing about it.
    probability
        Of dropout.
    max_tokens
        The longest cell's tokens, which flash-attn and torch lay their grids out by; by default T, with many idle blocks.

    Returns
    -------
    [T, H, e].

    Raises
    ------
    ValueError
        For shapes, dtypes, devices, offsets or lengths that do not fit (offsets and lengths on a GPU: only with
        SCBENCH_KERNELS_DEBUG=1).
    """
    _check(query, key, value, cell_offsets, key_lengths, token_keys)
    if probability == 0:
        token_keys = None
    plain = query.shape == value.shape and scale is None and key_lengths is None and token_keys is None
    path = attention_path(query, plain=plain)
    if path in ("flash_attn", "torch_varlen"):
        longest = query.shape[0] if max_tokens is None else max_tokens
        return (_flash if path == "flash_attn" else _varlen)(query, key, value, cell_offsets, longest)
    if path == "triton":
        scale = query.shape[2] ** -0.5 if scale is None else scale
        return TritonAttention.apply(query, key, value, cell_offsets, scale, key_lengths, token_keys, probability)
    if token_keys is None and attention_cpu.takes(query):
        scale = query.shape[2] ** -0.5 if scale is None else scale
        return attention_cpu.CpuAttention.apply(query, key, value, cell_offsets, scale, key_lengths)
    if not plain or (query.dtype == torch.bfloat16 and query.device.type == "cpu"):
        return _CellAttention.apply(query, key, value, cell_offsets, scale, key_lengths, token_keys, probability)
    # torch.split, not slices: the gradient of a split is one concatenation, that of n slices n whole buffers.
    lengths = cell_offsets.diff().tolist()
    cells = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in cells], 1).transpose(0, 1)


def self_attention(projection: Tensor, cell_offsets: Tensor, **options) -> Tensor:
    """`attention` of projection[:, 0], [:, 1] and [:, 2], of a [T, 3, H, d]; options and errors as there.

    flash-attn and the C code write one gradient for the three, which need not be put side by side then.
    """
    query, key, value = projection.unbind(1)
    scale, key_lengths = options.get("scale"), options.get("key_lengths")
    if options.get("token_keys") is not None and options.get("probability", 0) > 0:
        return attention(query, key, value, cell_offsets, **options)
    path = attention_path(query, plain=scale is None and key_lengths is None)
    if path != "flash_attn" and not attention_cpu.takes(projection):
        return attention(query, key, value, cell_offsets, **options)
    _check(query, key, value, cell_offsets, key_lengths, None)
    if path == "flash_attn":
        return _flash_packed(projection, cell_offsets, options.get("max_tokens") or len(projection))
    return attention_cpu.CpuSelfAttention.apply(
        projection, cell_offsets, query.shape[2] ** -0.5 if scale is None else scale, key_lengths
    )


def attention_oracle(
    query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, *, scale: float | None = None,
    key_lengths: Tensor | None = None, token_keys: Tensor | None = None, probability: float = 0.0,
) -> Tensor:
    """The same by the definition, with one block-diagonal mask over the whole batch."""
    lengths = cell_offsets.diff()
    cell = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    attended = cell[:, None] == cell[None, :]
    if key_lengths is not None:
        attended &= torch.arange(len(cell)) < (cell_offsets[:-1] + key_lengths)[cell]
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    probabilities = scores.masked_fill(~attended, float("-inf")).softmax(-1)
    if token_keys is not None:
        dropped = torch.zeros_like(probabilities)
        for start, stop in zip(cell_offsets.tolist(), cell_offsets[1:].tolist(), strict=False):
            rows = probabilities[:, start:stop, start:stop].permute(1, 2, 0)  # [n, n, H]: column j · H + h
            rows = dropout_oracle(rows.flatten(1), token_keys[start:stop], probability).view(rows.shape)
            dropped[:, start:stop, start:stop] = rows.permute(2, 0, 1)
        probabilities = dropped
    return torch.einsum("hqk,khd->qhd", probabilities, value)
