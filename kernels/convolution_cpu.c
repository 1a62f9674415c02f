/* The largest of each pair of rows, and the gradient of a convolution's weights in bf16: the work of
   kernels/convolution_cpu.py.

   Pairs of rows. Threads take CHUNK rows of the output at a time; a row belongs to one thread. Elements are bf16 or fp32.

   Weights. For tap k the gradient [E, D] is the product of the output's gradient, transposed [E, tokens], and the rows that
   the tap saw [tokens, D]: a sum over tokens, two of them a word for vdpbf16ps. All cells are one stream of pairs of tokens;
   behind each cell stand pairs whose gradient is zero, so that what a tap sees of a pair is always as far from it. An item is
   some rows by COLUMNS columns of the result, for all taps: its sums, in fp32, stay in the second-level cache, what a tap sees
   of PAIRS pairs in the first. One thread makes an item's sums in the stream's order: the same bits whatever the threads and
   the items' size. */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

#define CHUNK 64
#define WIDEST 16384 /* columns */

struct job {
    const char *x, *grad;   /* [cells, rows, width], [cells, out_rows, width or out_width] */
    char *out;              /* pool: [cells, out_rows, width]; pool_backward: x's gradient, added to; else the weight's */
    char *grad_bias;        /* weight_gradient: [E] */
    const int64_t *lengths; /* [cells]: the rows of a cell that count; NULL: all */
    int64_t cells, rows, out_rows, width, out_width, stride, taps;
    int64_t item_rows;      /* of the weight's gradient: a multiple of TILE_ROWS, at most ITEM_ROWS */
    int32_t bf16;
    _Atomic int32_t threads; /* that began */
    _Atomic int64_t taken;   /* chunks, or items, that were begun */
    char *scratch;           /* scratch_bytes a thread, 64-byte aligned */
    int64_t scratch_bytes;
};

/* What a thread has of the rows at hand. */
struct row {
    float first[WIDEST], second[WIDEST], grad[WIDEST], sum[WIDEST];
};

/* Row p of a cell's output from its rows 2 p and 2 p + 1; of equals the first is taken, NaN before all numbers. */
static void pool_row(const struct job *job, struct row *row, int64_t cell, int64_t p, int64_t length) {
    int64_t n = job->width, from = cell * job->rows + 2 * p;
    float *restrict a = row->first, *restrict b = row->second;
    if (2 * p >= length) memset(a, 0, (size_t)n * sizeof *a);
    else load_row(job->x, job->bf16, from, job->width, a);
    if (2 * p + 1 < length) {
        load_row(job->x, job->bf16, from + 1, job->width, b);
        for (int64_t c = 0; c < n; c++) a[c] = b[c] > a[c] || b[c] != b[c] ? b[c] : a[c];
    }
    store_row(job->out, job->bf16, cell * job->out_rows + p, job->width, a);
}

/* The gradient of row p of a cell's output, added to that of the rows it was made of. */
static void pool_backward_row(const struct job *job, struct row *row, int64_t cell, int64_t p, int64_t length) {
    int64_t n = job->width, stride = job->stride, to = cell * job->rows + stride * p;
    float *restrict a = row->first, *restrict b = row->second, *restrict g = row->grad, *restrict s = row->sum;
    int pair = stride == 2 && 2 * p + 1 < length;
    load_row(job->grad, job->bf16, cell * job->out_rows + p, job->width, g);
    if (pair) {
        load_row(job->x, job->bf16, to, job->width, a);
        load_row(job->x, job->bf16, to + 1, job->width, b);
        for (int64_t c = 0; c < n; c++) a[c] = b[c] > a[c] || b[c] != b[c] ? 1.0f : 0.0f; /* a becomes: is it the second */
    }
    for (int64_t r = 0; r < stride && stride * p + r < length; r++) {
        load_row(job->out, job->bf16, to + r, job->width, s);
        if (pair)
            for (int64_t c = 0; c < n; c++) s[c] += a[c] == (float)r ? g[c] : 0;
        else
            for (int64_t c = 0; c < n; c++) s[c] += g[c];
        store_row(job->out, job->bf16, to + r, job->width, s);
    }
}

/* What each thread runs over the rows of the pool's output. */
static void work(struct job *job, void (*work_row)(const struct job *, struct row *, int64_t, int64_t, int64_t)) {
    struct row row;
    int64_t all = job->cells * job->out_rows;
    for (int64_t chunk; (chunk = atomic_fetch_add(&job->taken, 1)) * CHUNK < all;)
        for (int64_t r = chunk * CHUNK; r < (chunk + 1) * CHUNK && r < all; r++) {
            int64_t cell = r / job->out_rows;
            work_row(job, &row, cell, r % job->out_rows, job->lengths ? job->lengths[cell] : job->rows);
        }
}

void pool(void *job) { work(job, pool_row); }
void pool_backward(void *job) { work(job, pool_backward_row); }

#ifndef __AVX512BF16__

int64_t scratch_bytes(int64_t taps, int64_t stride) { return 0; } /* not on this processor */
void weight_gradient(void *given) {}

#else

#include <immintrin.h>

#define LANES 16        /* words, or floats, of a vector */
#define TILE_ROWS 6     /* of the result, whose sums are in registers */
#define ITEM_ROWS 264   /* at most: a multiple of TILE_ROWS */
#define PADDED_ROWS 304 /* words from a pair's gradients to the next's: ITEM_ROWS in 32s, and no power of two */
#define COLUMNS 64      /* four vectors */
#define PAIRS 96        /* pairs of tokens at a time */
#define INLINE static inline __attribute__((always_inline))

typedef uint32_t word; /* two bf16, the first in the low half */

/* A thread's scratch memory, and how the stream of pairs goes through the cells. */
struct scratch {
    int64_t spread, phase_rows, pairs_of_cell; /* rows of x from a pair to the next; rows of a phase; with the empty ones */
    word *grads;                               /* [PAIRS, PADDED_ROWS] */
    word *seen;  /* [spread, phase rows, COLUMNS]: each row with the one `stride` rows on; rows p spread + k are one phase */
    float *sums; /* [taps, ITEM_ROWS, COLUMNS] */
};

/* Lay the arrays out; returns their bytes. */
static int64_t lay_out(struct scratch *s, char *memory, int64_t taps, int64_t stride) {
    s->spread = 2 * stride;
    s->phase_rows = PAIRS + (taps - 1) / s->spread + 1;
    int64_t seen = PAIRS * PADDED_ROWS * 4, sums = seen + s->spread * s->phase_rows * COLUMNS * 4; /* where they begin */
    s->grads = (word *)memory;
    s->seen = (word *)(memory + seen);
    s->sums = (float *)(memory + sums);
    return sums + taps * ITEM_ROWS * COLUMNS * 4;
}

int64_t scratch_bytes(int64_t taps, int64_t stride) {
    struct scratch s;
    return lay_out(&s, NULL, taps, stride);
}

/* 32 bf16 of each of two rows, of which the first `some` exist (NULL: none), to 32 words. */
INLINE void pair_rows(const uint16_t *low, const uint16_t *high, int64_t some, word *to) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    __mmask32 mask = some >= 32 ? 0xffffffffu : some <= 0 ? 0 : (1u << some) - 1;
    __m512i a = low ? _mm512_maskz_loadu_epi16(mask, low) : _mm512_setzero_si512();
    __m512i b = high ? _mm512_maskz_loadu_epi16(mask, high) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(to + LANES, _mm512_permutex2var_epi16(a, second, b));
}

/* Row r of a cell from column `start`, NULL where there is none. */
INLINE const uint16_t *row_at(const char *tensor, int64_t cell, int64_t r, int64_t rows, int64_t width, int64_t start) {
    return r < 0 || r >= rows ? NULL : (const uint16_t *)tensor + (cell * rows + r) * width + start;
}

/* A tile of C += A B: TILE_ROWS x COLUMNS sums stay in registers. */
static void tile(int64_t pairs, const word *a, const word *b, float *c) {
    __m512 sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = _mm512_load_ps(c + i * COLUMNS + j * LANES);
    for (int64_t p = 0; p < pairs; p++, a += PADDED_ROWS, b += COLUMNS) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) right[j] = _mm512_load_si512(b + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < TILE_ROWS; i++) {
            __m512i left = _mm512_set1_epi32((int)a[i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_store_ps(c + i * COLUMNS + j * LANES, sum[i][j]);
}

/* A row of sums to bf16, in its place. */
INLINE void round_row(float *row) {
    for (int64_t c = 0; c < COLUMNS; c += LANES)
        _mm256_storeu_si256((__m256i *)((uint16_t *)row + c), (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(row + c)));
}

/* Gradients of `pairs` pairs from `start` as words, `some` of them from `row`, and their sums unless `biases` is NULL. */
INLINE void pack_gradients(const struct job *job, struct scratch *s, int64_t start, int64_t pairs, int64_t row, int64_t some,
                           float *biases) {
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    for (int64_t p = 0; p < pairs; p++) {
        int64_t cell = (start + p) / s->pairs_of_cell, r = (start + p) % s->pairs_of_cell * 2;
        const uint16_t *low = row_at(job->grad, cell, r, job->out_rows, job->out_width, row);
        const uint16_t *high = row_at(job->grad, cell, r + 1, job->out_rows, job->out_width, row);
        word *to = s->grads + p * PADDED_ROWS;
        for (int64_t e = 0; e < some; e += 32) pair_rows(low ? low + e : low, high ? high + e : high, some - e, to + e);
        for (int64_t e = 0; biases && e < some; e += LANES)
            _mm512_store_ps(biases + e, _mm512_dpbf16_ps(_mm512_load_ps(biases + e), (__m512bh)_mm512_load_si512(to + e),
                                                         (__m512bh)ones));
    }
}

/* The rows that the taps of these pairs see as words, `some` columns from `column`. */
INLINE void pack_seen(const struct job *job, struct scratch *s, int64_t start, int64_t pairs, int64_t column, int64_t some) {
    int64_t rows_of_cell = s->spread * s->pairs_of_cell;
    for (int64_t q = 0; q < s->spread * pairs + job->taps - 1; q++) {
        int64_t place = s->spread * start + q, cell = place / rows_of_cell, r = place % rows_of_cell - job->taps / 2;
        if (cell == job->cells) r = job->rows; /* there is none */
        const uint16_t *low = row_at(job->x, cell, r, job->rows, job->width, column);
        const uint16_t *high = row_at(job->x, cell, r + job->stride, job->rows, job->width, column);
        word *to = s->seen + (q % s->spread * s->phase_rows + q / s->spread) * COLUMNS;
        for (int64_t c = 0; c < COLUMNS; c += 32) pair_rows(low ? low + c : low, high ? high + c : high, some - c, to + c);
    }
}

/* Ask for what the pairs from `start` need, part k of all taps' parts, before it is packed. Not inlined it would be left out:
   it changes nothing. */
INLINE void ask_for(const struct job *job, const struct scratch *s, int64_t start, int64_t k, int64_t row, int64_t some_rows,
                    int64_t column, int64_t some) {
    int64_t first = start / s->pairs_of_cell * job->out_rows + start % s->pairs_of_cell * 2;
    int64_t from = first + 2 * PAIRS * k / job->taps, to = first + 2 * PAIRS * (k + 1) / job->taps;
    for (int64_t t = from; t < to && t < job->cells * job->out_rows; t++)
        for (int64_t e = 0; e < some_rows; e += 32) __builtin_prefetch(job->grad + (t * job->out_width + row + e) * 2, 0, 2);
    for (int64_t t = from * job->stride; t < to * job->stride && t < job->cells * job->rows; t++)
        for (int64_t c = 0; c < some; c += 32) __builtin_prefetch(job->x + (t * job->width + column + c) * 2, 0, 2);
}

/* The gradients of some rows of the weight, from `row`, and columns from `column`. */
static void item(const struct job *job, struct scratch *s, int64_t row, int64_t column) {
    int64_t taps = job->taps, all = job->cells * s->pairs_of_cell;
    int64_t some_rows = job->out_width - row < job->item_rows ? job->out_width - row : job->item_rows;
    int64_t some = job->width - column < COLUMNS ? job->width - column : COLUMNS;
    float biases[PADDED_ROWS] __attribute__((aligned(64))) = {0};
    memset(s->sums, 0, (size_t)(taps * ITEM_ROWS * COLUMNS) * 4);
    for (int64_t start = 0; start < all; start += PAIRS) {
        int64_t pairs = all - start < PAIRS ? all - start : PAIRS;
        pack_gradients(job, s, start, pairs, row, some_rows, column == 0 ? biases : NULL);
        pack_seen(job, s, start, pairs, column, some);
        for (int64_t k = 0; k < taps; k++) {
            const word *seen = s->seen + (k % s->spread * s->phase_rows + k / s->spread) * COLUMNS;
            ask_for(job, s, start + PAIRS, k, row, some_rows, column, some);
            for (int64_t e = 0; e < some_rows; e += TILE_ROWS)
                tile(pairs, s->grads + e, seen, s->sums + (k * ITEM_ROWS + e) * COLUMNS);
        }
    }
    for (int64_t e = 0; e < some_rows; e++) {
        uint16_t *to = (uint16_t *)job->out + ((row + e) * job->width + column) * taps;
        const uint16_t *from = (const uint16_t *)(s->sums + e * COLUMNS);
        for (int64_t k = 0; k < taps; k++) round_row(s->sums + (k * ITEM_ROWS + e) * COLUMNS);
        for (int64_t c = 0; c < some; c++)
            for (int64_t k = 0; k < taps; k++) to[c * taps + k] = from[k * 2 * ITEM_ROWS * COLUMNS + c];
        if (column == 0) ((uint16_t *)job->grad_bias)[row + e] = to_bf16(biases[e]);
    }
}

/* What each thread runs. */
void weight_gradient(void *given) {
    struct job *job = given;
    struct scratch s;
    lay_out(&s, job->scratch + atomic_fetch_add(&job->threads, 1) * job->scratch_bytes, job->taps, job->stride);
    s.pairs_of_cell = (job->out_rows + 1) / 2 + (job->taps + s.spread - 2) / s.spread;
    int64_t across = (job->width + COLUMNS - 1) / COLUMNS, down = (job->out_width + job->item_rows - 1) / job->item_rows;
    for (int64_t i; (i = atomic_fetch_add(&job->taken, 1)) < across * down;)
        item(job, &s, i / across * job->item_rows, i % across * COLUMNS);
}

#endif
