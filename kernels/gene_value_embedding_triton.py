"""Gene table row + value MLP in Triton: the MLP as a piecewise-linear function of one scalar.

    f(v) = Σⱼ W₂[:, j] relu(wⱼ v + bⱼ) + b₂

Unit j is active beyond its breakpoint βⱼ = −bⱼ / wⱼ (above it if wⱼ > 0, below it if wⱼ < 0; where wⱼ = 0 always or never, as
bⱼ > 0 or not), so between two neighbouring breakpoints f is a line. A value's *bucket*,

    i(v) = #{j: βⱼ < v} + #{j: βⱼ ≤ v}  in 0 … 2D,

is even between breakpoints, 2a with a of them below, and 2a + t on t equal ones with a below. Each unit is active in one
interval of buckets, [2 #{β ≤ βⱼ}, 2D] or [0, 2 #{β < βⱼ}]: nothing is sorted, equal breakpoints and values that lie on one (a
unit's gradient is 0 there) need no care, and every sum below runs over the active units alone, without cancellation.

Forward. Row a of `pieces` holds slope and intercept for a breakpoints below: two products of size D × D × D, whatever T. A
token then costs the comparison with the breakpoints and one multiply-add a column: out = table[gene] + slope v + intercept.

Backward. With G₀[i] and G₁[i] the sums of ∂out and of v ∂out over the tokens of bucket i, and F₀, F₁ those over the tokens
where unit j is active, F[j] = Σ G[i] over j's interval:

    ∂W₂[:, j] = wⱼ F₁[j] + bⱼ F₀[j]    ∂wⱼ = W₂[:, j] · F₁[j]    ∂bⱼ = W₂[:, j] · F₀[j]    ∂b₂ = Σ G₀[i]

Tokens are sorted by bucket (torch.sort, stable) and cut into chunks; a program adds up one chunk's tokens bucket by bucket and
stores each sum as partial number chunk + bucket. Along the sorted tokens chunk and bucket never fall and one rises from
sum to sum, so the number is unique and needs no count of the buckets that occur. The last kernel adds the partials up by unit.

∂table is made by segments (kernels/segments.py) in the same launches: one launch takes as many columns as leave ∂out's part of
them in the cache, so that ∂out, needed in two orders, comes from memory once.

βⱼ is rounded once, and a value's side of it decides: within one unit in the last place of a breakpoint a unit may be taken for
active that PyTorch takes for inactive, where it contributes less than rounding does.
"""

import torch
from torch import Tensor

from scbench.kernels.backend import HAS_TRITON, cache_bytes
from scbench.kernels.row_tiles import TILE, accumulator, column_sums, row_block, rows_of_tile, triton_accumulator
from scbench.kernels.segments import tile_elements

CHUNK = 256  # sorted tokens a program adds up: 8·D bytes a bucket and chunk against CHUNK·D·e read
COLUMNS = 32  # of a bucket program: 64 bytes of a bf16 row
UNITS, ROWS, PARTIALS = 32, 32, 64  # of the products' tiles

if HAS_TRITON:
    import triton
    import triton.language as tl

    from scbench.kernels.segments import add_up_segments

    NOTHING = tl.constexpr(2**30)  # greater than any bucket

    @triton.jit
    def _breakpoint(weight, bias, ACC: tl.constexpr):
        """−bias / weight, correctly rounded; +∞ for a unit that has none."""
        divisor = tl.where(weight == 0, 1, weight)
        if tl.float64 == ACC:
            quotient = -bias / divisor
        else:
            quotient = tl.div_rn(-bias, divisor)
        return tl.where(weight == 0, float("inf"), quotient)

    @triton.jit
    def _intervals_kernel(
        weight1, bias1, breakpoints, first, last,
        D,
        UNITS: tl.constexpr, D_BLOCK: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
        weight = tl.load(weight1 + unit, mask=unit < D, other=0).to(ACC)
        bias = tl.load(bias1 + unit, mask=unit < D, other=0).to(ACC)
        own = _breakpoint(weight, bias, ACC)
        other = tl.arange(0, D_BLOCK)
        other_weight = tl.load(weight1 + other, mask=other < D, other=0).to(ACC)
        others = _breakpoint(other_weight, tl.load(bias1 + other, mask=other < D, other=0).to(ACC), ACC)
        counted = (other < D)[None, :]
        below = tl.sum((counted & (others[None, :] < own[:, None])).to(tl.int32), axis=1)
        not_above = tl.sum((counted & (others[None, :] <= own[:, None])).to(tl.int32), axis=1)
        never = (weight == 0) & (bias <= 0)
        tl.store(breakpoints + unit, own, mask=unit < D)
        tl.store(first + unit, tl.where(weight > 0, 2 * not_above, 0), mask=unit < D)
        tl.store(last + unit, tl.where(never, -1, tl.where(weight < 0, 2 * below, 2 * D)), mask=unit < D)

    @triton.jit
    def _pieces_kernel(
        weight1, bias1, weight2, bias2, first, last, pieces,
        D,
        ROWS: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        slope = tl.zeros([ROWS, UNITS], ACC)
        intercept = tl.zeros([ROWS, UNITS], ACC)
        for start in range(0, D, UNITS):
            unit = start + tl.arange(0, UNITS)
            low = tl.load(first + unit, mask=unit < D, other=0)
            high = tl.load(last + unit, mask=unit < D, other=-1)
            active = (low[None, :] <= 2 * row[:, None]) & (2 * row[:, None] <= high[None, :])
            weight = tl.load(weight1 + unit, mask=unit < D, other=0).to(ACC)
            bias = tl.load(bias1 + unit, mask=unit < D, other=0).to(ACC)
            mask = (unit < D)[:, None] & (column < D)[None, :]
            output = tl.load(weight2 + column[None, :] * D + unit[:, None], mask=mask, other=0).to(ACC)
            slope += tl.dot(tl.where(active, weight[None, :], 0), output, input_precision="ieee", out_dtype=ACC)
            intercept += tl.dot(tl.where(active, bias[None, :], 0), output, input_precision="ieee", out_dtype=ACC)
        intercept += tl.load(bias2 + column, mask=column < D, other=0).to(ACC)[None, :]
        mask = (row <= D)[:, None] & (column < D)[None, :]
        place = pieces + row[:, None] * 2 * D + column[None, :]
        tl.store(place, slope, mask=mask)
        tl.store(place + D, intercept, mask=mask)

    @triton.jit
    def _forward_kernel(
        genes, values, table, breakpoints, pieces, out, buckets,
        n_tokens, D,
        ROWS: tl.constexpr, D_BLOCK: tl.constexpr, SAVE: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, D_BLOCK)
        token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = token < n_tokens
        mask = inside[:, None] & (column < D)[None, :]
        value = tl.load(values + token, mask=inside, other=0).to(ACC)
        gene = tl.load(genes + token, mask=inside, other=0).to(tl.int64)
        breakpoint = tl.load(breakpoints + column, mask=column < D, other=float("inf"))
        below = tl.sum((breakpoint[None, :] < value[:, None]).to(tl.int32), axis=1)
        if SAVE:
            not_above = tl.sum(((breakpoint[None, :] <= value[:, None]) & (column < D)[None, :]).to(tl.int32), axis=1)
            tl.store(buckets + token, below + not_above, mask=inside)
        piece = pieces + below[:, None] * 2 * D + column[None, :]
        line = tl.load(piece, mask=mask, other=0) * value[:, None] + tl.load(piece + D, mask=mask, other=0)
        row = tl.load(table + gene[:, None] * D + column[None, :], mask=mask, other=0).to(ACC)
        tl.store(out + token[:, None] * D + column[None, :], (row + line).to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _add_up_buckets(
        grad, values, buckets, order, partials, partial_buckets,
        chunk, first_column, n_tokens, D,
        CHUNK: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        """Some columns of one chunk's sums: partial number chunk + bucket, G₀ then G₁."""
        column = first_column + tl.arange(0, COLUMNS)
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = place < n_tokens
        bucket = tl.load(buckets + place, mask=inside, other=NOTHING)
        token = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        value = tl.load(values + token, mask=inside, other=0).to(ACC)
        mask = inside[:, None] & (column < D)[None, :]
        rows = tl.load(grad + token[:, None] * D + column[None, :], mask=mask, other=0).to(ACC)
        current = tl.min(bucket, axis=0)
        while current < NOTHING:
            part = tl.where((bucket == current)[:, None], rows, 0)
            sums = partials + (chunk + current).to(tl.int64) * 2 * D + column
            tl.store(sums, tl.sum(part, axis=0), mask=column < D)
            tl.store(sums + D, tl.sum(part * value[:, None], axis=0), mask=column < D)
            if first_column == 0:
                tl.store(partial_buckets + chunk + current, current)
            current = tl.min(tl.where(bucket > current, bucket, NOTHING), axis=0)

    @triton.jit
    def _backward_kernel(
        grad, genes, values, gene_order, grad_table, buckets, bucket_order, partials, partial_buckets,
        n_tokens, n_genes, search_steps, D, first_column, n_chunks,
        KEYS: tl.constexpr, SLAB: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        bucket_programs = n_chunks * (SLAB // COLUMNS)
        program = tl.program_id(0)
        if program < bucket_programs:
            part = first_column + program // n_chunks * COLUMNS
            _add_up_buckets(
                grad, values, buckets, bucket_order, partials, partial_buckets,
                program % n_chunks, part, n_tokens, D, CHUNK, COLUMNS, ACC,
            )  # fmt: skip
        else:
            column = first_column + tl.arange(0, SLAB)
            add_up_segments(
                grad, genes, gene_order, None, None, None, None, grad_table,
                (program - bucket_programs) * KEYS, n_tokens, n_genes, search_steps, column, column < D, D, KEYS, False, ACC,
            )  # fmt: skip

    @triton.jit
    def _units_kernel(
        weight1, bias1, weight2, first, last, partials, partial_buckets, grad_weight2, grad_bias2, grad_units,
        n_partials, D,
        UNITS: tl.constexpr, PARTIALS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
        column = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        low = tl.load(first + unit, mask=unit < D, other=0)
        high = tl.load(last + unit, mask=unit < D, other=-1)
        sums0 = tl.zeros([UNITS, UNITS], ACC)  # F₀ [unit, column]
        sums1 = tl.zeros([UNITS, UNITS], ACC)
        total = tl.zeros([UNITS], ACC)
        for start in range(0, n_partials, PARTIALS):
            partial = start + tl.arange(0, PARTIALS)
            bucket = tl.load(partial_buckets + partial, mask=partial < n_partials, other=-1)
            if tl.max(bucket, axis=0) >= 0:
                mask = (bucket >= 0)[:, None] & (column < D)[None, :]
                place = partials + partial.to(tl.int64)[:, None] * 2 * D + column[None, :]
                part0 = tl.load(place, mask=mask, other=0)
                part1 = tl.load(place + D, mask=mask, other=0)
                active = ((low[:, None] <= bucket[None, :]) & (bucket[None, :] <= high[:, None])).to(ACC)
                sums0 += tl.dot(active, part0, input_precision="ieee", out_dtype=ACC)
                sums1 += tl.dot(active, part1, input_precision="ieee", out_dtype=ACC)
                total += tl.sum(part0, axis=0)
        weight = tl.load(weight1 + unit, mask=unit < D, other=0).to(ACC)
        bias = tl.load(bias1 + unit, mask=unit < D, other=0).to(ACC)
        mask = (unit < D)[:, None] & (column < D)[None, :]
        place = column[None, :] * D + unit[:, None]
        grad = weight[:, None] * sums1 + bias[:, None] * sums0
        tl.store(grad_weight2 + place, grad.to(grad_weight2.dtype.element_ty), mask=mask)
        output = tl.load(weight2 + place, mask=mask, other=0).to(ACC)
        own = grad_units + tl.program_id(1) * 2 * D + unit
        tl.store(own, tl.sum(output * sums1, axis=1), mask=unit < D)
        tl.store(own + D, tl.sum(output * sums0, axis=1), mask=unit < D)
        if tl.program_id(0) == 0:
            tl.store(grad_bias2 + column, total.to(grad_bias2.dtype.element_ty), mask=column < D)


def launch_forward(genes, values, table, weight1, bias1, weight2, bias2, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(states [T, D], buckets int32 [T] if `save`, intervals' first and last bucket int32 [D]).

    Tile: half of TILE of whole rows, because three operands are gathered; 4 warps.
    """
    (width, n_tokens), device, dtype = (table.shape[1], len(genes)), table.device, accumulator(table.dtype)
    breakpoints = torch.empty(width, dtype=dtype, device=device)
    first, last = torch.empty(2, width, dtype=torch.int32, device=device)
    pieces = torch.empty(width + 1, 2, width, dtype=dtype, device=device)
    out = torch.empty(n_tokens, width, dtype=table.dtype, device=device)
    buckets = torch.empty(n_tokens if save else 0, dtype=torch.int32, device=device)
    acc, rows = triton_accumulator(table.dtype), rows_of_tile(width, TILE // 2)
    units = rows_of_tile(width, TILE // 4)  # of comparisons
    _intervals_kernel[(triton.cdiv(width, units),)](
        weight1, bias1, breakpoints, first, last, width, UNITS=units, D_BLOCK=row_block(width), ACC=acc, num_warps=4
    )
    _pieces_kernel[(triton.cdiv(width + 1, ROWS), triton.cdiv(width, UNITS))](
        weight1, bias1, weight2, bias2, first, last, pieces, width, ROWS=ROWS, UNITS=UNITS, ACC=acc, num_warps=4
    )
    _forward_kernel[(triton.cdiv(n_tokens, rows),)](
        genes, values, table, breakpoints, pieces, out, buckets, n_tokens, width,
        ROWS=rows, D_BLOCK=row_block(width), SAVE=save, ACC=acc, num_warps=4,
    )  # fmt: skip
    return out, buckets, first, last


def launch_backward(
    grad, genes, values, gene_order, buckets, first, last, table_shape, weight1, bias1, weight2
) -> tuple[Tensor, ...]:
    """(∂table, ∂weight1, ∂bias1, ∂weight2, ∂bias2).

    Columns a launch: as many as leave ∂out's part in the cache, at least COLUMNS; the segments' tile is `tile_elements`.
    """
    (n_genes, width), n_tokens, device, dtype = table_shape, len(genes), grad.device, accumulator(grad.dtype)
    acc, n_chunks = triton_accumulator(grad.dtype), triton.cdiv(n_tokens, CHUNK)
    grad_table = torch.empty(n_genes, width, dtype=grad.dtype, device=device)
    buckets, bucket_order = torch.sort(buckets, stable=True)
    n_partials = n_chunks + 2 * width
    partials = torch.empty(n_partials, 2, width, dtype=dtype, device=device)
    partial_buckets = torch.full((n_partials,), -1, dtype=torch.int32, device=device)
    slab = max(COLUMNS, row_block(width))
    while slab > COLUMNS and n_tokens * slab * grad.element_size() > cache_bytes(grad):
        slab //= 2
    keys = max(1, tile_elements(grad) // slab)
    for first_column in range(0, width, slab):
        _backward_kernel[(n_chunks * (slab // COLUMNS) + triton.cdiv(n_genes, keys),)](
            grad, genes, values, gene_order, grad_table, buckets, bucket_order, partials, partial_buckets,
            n_tokens, n_genes, n_tokens.bit_length(), width, first_column, n_chunks,
            KEYS=keys, SLAB=slab, CHUNK=CHUNK, COLUMNS=COLUMNS, ACC=acc, num_warps=4,
        )  # fmt: skip
    grad_weight2 = torch.empty(width, width, dtype=weight2.dtype, device=device)
    grad_bias2 = torch.empty(width, dtype=weight2.dtype, device=device)
    blocks = triton.cdiv(width, UNITS)
    grad_units = torch.empty(blocks, 2 * width, dtype=dtype, device=device)
    _units_kernel[(blocks, blocks)](
        weight1, bias1, weight2, first, last, partials, partial_buckets, grad_weight2, grad_bias2, grad_units,
        n_partials, width, UNITS=UNITS, PARTIALS=PARTIALS, ACC=acc, num_warps=4,
    )  # fmt: skip
    grad_weight1, grad_bias1 = column_sums(grad_units).split(width)
    return grad_table, grad_weight1[:, None].to(weight1.dtype), grad_bias1.to(bias1.dtype), grad_weight2, grad_bias2
