/* Softmax attention inside each cell in bf16, forward and backward: the work of kernels/attention_cpu.py.

   One item is one head of one cell. Its keys and values are packed once as words, pairs of bf16 that one instruction
   multiplies and adds up (vdpbf16ps); its queries then come BLOCK at a time, so that their scores, in fp32, and their
   probabilities, in bf16, stay in the second-level cache. Nothing of size n x n is ever in memory.

   Every item writes its own rows and heads of the results: the same bits whatever the threads. */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

struct tensor { uint16_t *data; int64_t row, head; }; /* bf16 [T, H, width]: elements from a token, a head, to the next */

struct job {
    struct tensor query, key, value, out, grad, grad_query, grad_key, grad_value; /* forward: the first four */
    const int64_t *starts, *stops, *key_stops;                                      /* of the cells */
    int64_t cells, heads, width, value_width;
    float scale;
    _Atomic int32_t threads; /* that began */
    _Atomic int64_t taken;   /* items that were begun */
    char *scratch;           /* scratch_bytes a thread, 64-byte aligned */
    int64_t scratch_bytes;
};

#ifndef __AVX512BF16__

int64_t scratch_bytes(int64_t longest, int64_t width, int64_t value_width) { return 0; } /* not on this processor */
void forward(void *given) {}
void backward(void *given) {}

#else

#include <immintrin.h>

#define BLOCK 48        /* queries whose scores are in the cache; a multiple of all tiles' rows */
#define LANES 16        /* words, or floats, of a vector */
#define TILE_ROWS 12    /* the most rows of a tile: what every matrix here is padded to */
#define ABSENT (-1e30f) /* the score of a key that is none */
#define INLINE static inline __attribute__((always_inline))

typedef uint32_t word; /* two bf16, the first in the low half */

static inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* A tile of C (+)= A B: `rows` x `vectors` sums stay in registers. */
INLINE void tile(const int rows, const int vectors, int64_t steps, const word *a, int64_t a_row, int64_t a_step,
                 const word *b, int64_t b_step, float *c, int64_t c_row, int add) {
    __m512 sum[TILE_ROWS][4];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * c_row + j * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < steps; p++, a += a_step, b += b_step) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) right[j] = _mm512_loadu_si512(b + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            __m512i left = _mm512_set1_epi32((int)a[i * a_row]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) _mm512_storeu_ps(c + i * c_row + j * LANES, sum[i][j]);
}

/* C (+)= A B: C [rows, vectors of floats]; A's word (i, p) is at i a_row + p a_step, B's vectors of words at p b_step.
   Rows are a multiple of TILE_ROWS. */
static void multiply(int64_t rows, int64_t vectors, int64_t steps, const word *a, int64_t a_row, int64_t a_step,
                     const word *b, int64_t b_step, float *c, int64_t c_row, int add) {
    while (vectors > 0) {
        int width = vectors < 4 ? (int)vectors : 4, high = width > 2 ? 6 : 12;
        for (int64_t i = 0; i < rows; i += high) {
            const word *left = a + i * a_row;
            float *to = c + i * c_row;
            if (width == 4) tile(6, 4, steps, left, a_row, a_step, b, b_step, to, c_row, add);
            else if (width == 3) tile(6, 3, steps, left, a_row, a_step, b, b_step, to, c_row, add);
            else if (width == 2) tile(12, 2, steps, left, a_row, a_step, b, b_step, to, c_row, add);
            else tile(12, 1, steps, left, a_row, a_step, b, b_step, to, c_row, add);
        }
        b += width * LANES;
        c += width * LANES;
        vectors -= width;
    }
}

/* 2^x for x <= 0: 2^round(x) times Taylor's polynomial of what is left, in [-1/2, 1/2]; relative error 3e-6 */
INLINE __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.9314718e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f)), whole);
}

/* Scores of a query to exp(scale (score - largest)), zeros behind the keys; returns their sum. */
static float exponentials(float *scores, int64_t keys, int64_t padded, float scale) {
    for (int64_t k = keys; k < padded; k++) scores[k] = ABSENT;
    __m512 most = _mm512_set1_ps(ABSENT), factor = _mm512_set1_ps(scale * 1.44269504f), sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < padded; k += LANES) most = _mm512_max_ps(most, _mm512_load_ps(scores + k));
    __m512 level = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), factor);
    for (int64_t k = 0; k < padded; k += LANES) {
        __m512 p = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + k), factor, level));
        _mm512_store_ps(scores + k, p);
        sum = _mm512_add_ps(sum, p);
    }
    return _mm512_reduce_add_ps(sum);
}

INLINE __m512i round_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); } /* 32 bf16 */

/* A row of floats to bf16. */
static void round_row(const float *from, int64_t n, float scale, uint16_t *to) {
    __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += LANES) {
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + i), factor));
        _mm256_mask_storeu_epi16(to + i, n - i < LANES ? (__mmask16)((1 << (n - i)) - 1) : (__mmask16)-1, rounded);
    }
}

/* Rows of a head to words along the row: [rows, padded / 2], zeros where there is nothing. */
static void pack_rows(const struct tensor *x, int64_t start, int64_t head, int64_t n, int64_t width, int64_t rows,
                      int64_t padded, word *to) {
    memset(to, 0, (size_t)(rows * padded) * 2);
    for (int64_t i = 0; i < n; i++)
        memcpy(to + i * padded / 2, x->data + (start + i) * x->row + head * x->head, (size_t)width * 2);
}

/* Packed rows [rows, words] to their transpose [words, rows]; both multiples of 16. */
static void transpose(const word *from, int64_t rows, int64_t words, word *to) {
    __m512i place = _mm512_mullo_epi32(_mm512_set1_epi32((int)words),
                                       _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < words; j++)
            _mm512_storeu_si512(to + j * rows + i, _mm512_i32gather_epi32(place, from + i * words + j, 4));
}

/* Packed rows [rows, padded / 2] to words along the column: [rows / 2, padded]. */
static void pair_rows(const word *from, int64_t rows, int64_t padded, word *to) {
    for (int64_t i = 0; i < rows; i += 2) {
        const uint16_t *low = (const uint16_t *)(from + i * padded / 2), *high = low + padded;
        for (int64_t j = 0; j < padded; j++) to[i / 2 * padded + j] = low[j] | (word)high[j] << 16;
    }
}

/* The scratch memory of a thread. Widths are padded to 32, keys to 32 and queries to BLOCK. */
struct scratch {
    int64_t keys, queries, width, value_width;          /* padded */
    word *rows;                                          /* [keys or queries, width / 2]: what is being packed */
    word *query, *grad;                                  /* [queries, width / 2] */
    word *key_columns, *value_columns;                   /* [width / 2, keys] */
    word *key_pairs, *value_pairs, *query_pairs, *grad_pairs; /* [rows / 2, width] */
    float *scores, *grad_scores;                         /* [BLOCK, keys] */
    word *row_words;                                     /* [BLOCK, keys / 2]: probabilities, or the scores' gradient */
    word *pairs, *grad_score_pairs;                      /* [BLOCK / 2, keys]: both, along the column */
    float *sums;                                         /* [BLOCK, width]: rows of a result */
    float *grad_key, *grad_value;                        /* [keys, width] */
};

/* An array's place in the scratch memory: `pointer` is set, the bytes used so far are returned. */
static int64_t place(char *memory, int64_t used, void *pointer, int64_t elements) {
    char *start = memory + used;
    memcpy(pointer, &start, sizeof start);
    return used + up_to(elements * 4, 64) + 64 * TILE_ROWS; /* tiles read, not use, some words behind the last row */
}

/* Lay the arrays out; returns their bytes. */
static int64_t lay_out(struct scratch *s, char *memory, int64_t longest, int64_t width, int64_t value_width) {
    int64_t w = s->width = up_to(width, 32), v = s->value_width = up_to(value_width, 32), wide = w > v ? w : v;
    int64_t k = s->keys = up_to(longest, 32), q = s->queries = up_to(longest, BLOCK), most = k > q ? k : q;
    int64_t used = place(memory, 0, &s->rows, most * wide / 2);
    used = place(memory, used, &s->query, q * w / 2);
    used = place(memory, used, &s->grad, q * v / 2);
    used = place(memory, used, &s->key_columns, k * w / 2);
    used = place(memory, used, &s->value_columns, k * v / 2);
    used = place(memory, used, &s->key_pairs, k * w / 2);
    used = place(memory, used, &s->value_pairs, k * v / 2);
    used = place(memory, used, &s->query_pairs, q * w / 2);
    used = place(memory, used, &s->grad_pairs, q * v / 2);
    used = place(memory, used, &s->scores, BLOCK * k);
    used = place(memory, used, &s->grad_scores, BLOCK * k);
    used = place(memory, used, &s->row_words, BLOCK * k / 2);
    used = place(memory, used, &s->pairs, BLOCK * k / 2);
    used = place(memory, used, &s->grad_score_pairs, BLOCK * k / 2);
    used = place(memory, used, &s->sums, BLOCK * wide);
    used = place(memory, used, &s->grad_key, (k + TILE_ROWS) * w);
    return place(memory, used, &s->grad_value, (k + TILE_ROWS) * v);
}

int64_t scratch_bytes(int64_t longest, int64_t width, int64_t value_width) {
    struct scratch s;
    char nothing[1];
    return up_to(lay_out(&s, nothing, longest, width, value_width), 4096);
}

/* Scores of a block of queries with all keys. */
static void score(const struct scratch *s, const word *rows, const word *columns, int64_t n, int64_t keys, int64_t width,
                  float *to) {
    multiply(up_to(n, TILE_ROWS), (keys + LANES - 1) / LANES, width / 2, rows, width / 2, 1, columns, s->keys, to, s->keys, 0);
}

static void forward_item(const struct job *job, struct scratch *s, int64_t cell, int64_t head) {
    int64_t start = job->starts[cell], n = job->stops[cell] - start, keys = job->key_stops[cell] - start;
    int64_t w = s->width, v = s->value_width, padded = up_to(keys, 32);
    s->keys = padded;
    pack_rows(&job->key, start, head, keys, job->width, padded, w, s->rows);
    transpose(s->rows, padded, w / 2, s->key_columns);
    pack_rows(&job->value, start, head, keys, job->value_width, padded, v, s->rows);
    pair_rows(s->rows, padded, v, s->value_pairs);
    pack_rows(&job->query, start, head, n, job->width, up_to(n, TILE_ROWS), w, s->query);
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t some = n - first < BLOCK ? n - first : BLOCK;
        float sums[BLOCK];
        score(s, s->query + first * w / 2, s->key_columns, some, keys, w, s->scores);
        for (int64_t i = 0; i < some; i++) {
            float *row = s->scores + i * padded;
            sums[i] = exponentials(row, keys, padded, job->scale);
            for (int64_t k = 0; k < padded; k += 32)
                _mm512_storeu_si512(s->row_words + (i * padded + k) / 2,
                                    round_pair(_mm512_load_ps(row + k), _mm512_load_ps(row + k + LANES)));
        }
        multiply(up_to(some, TILE_ROWS), v / LANES, (keys + 1) / 2, s->row_words, padded / 2, 1, s->value_pairs, v, s->sums, v, 0);
        for (int64_t i = 0; i < some; i++)
            round_row(s->sums + i * v, job->value_width, 1 / sums[i],
                      job->out.data + (start + first + i) * job->out.row + head * job->out.head);
    }
}

/* Two rows of exponentials and of the probabilities' gradients to probabilities and the scores' gradients in bf16. */
static void grad_scores(const struct scratch *s, int64_t i, const float *sums, float scale) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    float *p[2], *g[2], factor[2], level[2];
    for (int r = 0; r < 2; r++) {
        p[r] = s->scores + (i + r) * s->keys;
        g[r] = s->grad_scores + (i + r) * s->keys;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < s->keys; k += LANES)
            sum = _mm512_fmadd_ps(_mm512_load_ps(p[r] + k), _mm512_load_ps(g[r] + k), sum);
        factor[r] = 1 / sums[i + r];
        level[r] = _mm512_reduce_add_ps(sum) * factor[r];
    }
    for (int64_t k = 0; k < s->keys; k += 32) {
        __m512 probability[2][2], grad[2][2];
        for (int r = 0; r < 2; r++)
            for (int half = 0; half < 2; half++) {
                probability[r][half] = _mm512_mul_ps(_mm512_load_ps(p[r] + k + half * LANES), _mm512_set1_ps(factor[r]));
                __m512 above = _mm512_sub_ps(_mm512_load_ps(g[r] + k + half * LANES), _mm512_set1_ps(level[r]));
                grad[r][half] = _mm512_mul_ps(_mm512_mul_ps(probability[r][half], above), _mm512_set1_ps(scale));
            }
        for (int r = 0; r < 2; r++)
            _mm512_storeu_si512(s->row_words + ((i + r) * s->keys + k) / 2, round_pair(grad[r][0], grad[r][1]));
        for (int half = 0; half < 2; half++) {
            int64_t to = i / 2 * s->keys + k + half * LANES;
            _mm512_storeu_si512(s->pairs + to, _mm512_permutexvar_epi16(interleave, round_pair(probability[0][half],
                                                                                               probability[1][half])));
            _mm512_storeu_si512(s->grad_score_pairs + to,
                                _mm512_permutexvar_epi16(interleave, round_pair(grad[0][half], grad[1][half])));
        }
    }
}

static void backward_item(const struct job *job, struct scratch *s, int64_t cell, int64_t head) {
    int64_t start = job->starts[cell], n = job->stops[cell] - start, keys = job->key_stops[cell] - start;
    int64_t w = s->width, v = s->value_width, padded = up_to(keys, 32), queries = up_to(n, BLOCK);
    int one = job->grad_query.data == job->grad_key.data; /* queries and keys are one tensor, with one gradient */
    s->keys = padded;
    pack_rows(&job->key, start, head, keys, job->width, padded, w, s->rows);
    transpose(s->rows, padded, w / 2, s->key_columns);
    pair_rows(s->rows, padded, w, s->key_pairs);
    pack_rows(&job->value, start, head, keys, job->value_width, padded, v, s->rows);
    transpose(s->rows, padded, v / 2, s->value_columns);
    pack_rows(&job->query, start, head, n, job->width, queries, w, s->query);
    pair_rows(s->query, queries, w, s->query_pairs);
    pack_rows(&job->grad, start, head, n, job->value_width, queries, v, s->grad);
    pair_rows(s->grad, queries, v, s->grad_pairs);
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t some = n - first < BLOCK ? n - first : BLOCK, even = up_to(some, 2);
        float sums[BLOCK];
        score(s, s->query + first * w / 2, s->key_columns, some, keys, w, s->scores);
        score(s, s->grad + first * v / 2, s->value_columns, some, keys, v, s->grad_scores);
        for (int64_t i = 0; i < even; i++) { /* the row that makes them even has no gradient */
            sums[i] = exponentials(s->scores + i * padded, keys, padded, job->scale);
            for (int64_t k = keys; k < padded; k++) s->grad_scores[i * padded + k] = 0;
        }
        for (int64_t i = 0; i < even; i += 2) grad_scores(s, i, sums, job->scale);
        multiply(up_to(some, TILE_ROWS), w / LANES, (keys + 1) / 2, s->row_words, padded / 2, 1, s->key_pairs, w, s->sums, w, 0);
        multiply(up_to(keys, TILE_ROWS), w / LANES, even / 2, s->grad_score_pairs, 1, padded,
                 s->query_pairs + first / 2 * w, w, s->grad_key, w, first > 0);
        for (int64_t i = 0; i < some; i++) {
            if (one && first + i < keys) { /* its gradient as a key takes it along */
                for (int64_t c = 0; c < w; c++) s->grad_key[(first + i) * w + c] += s->sums[i * w + c];
                continue;
            }
            round_row(s->sums + i * w, job->width, 1,
                      job->grad_query.data + (start + first + i) * job->grad_query.row + head * job->grad_query.head);
        }
        multiply(up_to(keys, TILE_ROWS), v / LANES, even / 2, s->pairs, 1, padded,
                 s->grad_pairs + first / 2 * v, v, s->grad_value, v, first > 0);
    }
    for (int64_t i = 0; i < keys; i++) {
        round_row(s->grad_key + i * w, job->width, 1,
                  job->grad_key.data + (start + i) * job->grad_key.row + head * job->grad_key.head);
        round_row(s->grad_value + i * v, job->value_width, 1,
                  job->grad_value.data + (start + i) * job->grad_value.row + head * job->grad_value.head);
    }
}

/* What each thread runs: takes items until there are none. */
static void work(struct job *job, void (*item)(const struct job *, struct scratch *, int64_t, int64_t)) {
    struct scratch s;
    int64_t longest = 0;
    for (int64_t cell = 0; cell < job->cells; cell++) {
        int64_t n = job->stops[cell] - job->starts[cell];
        longest = n > longest ? n : longest;
    }
    lay_out(&s, job->scratch + atomic_fetch_add(&job->threads, 1) * job->scratch_bytes, longest, job->width, job->value_width);
    for (int64_t i; (i = atomic_fetch_add(&job->taken, 1)) < job->cells * job->heads;)
        if (job->stops[i / job->heads] > job->starts[i / job->heads]) item(job, &s, i / job->heads, i % job->heads);
}

void forward(void *job) { work(job, forward_item); }
void backward(void *job) { work(job, backward_item); }

#endif
