/* Dropout, ReLU + dropout, dropout + residual + LayerNorm, LayerNorm + GELU + dropout + residual, and RMSNorm, each in one pass
   over the rows: the work of kernels/add_norm_cpu.py. Elements are bf16 or fp32, arithmetic and statistics fp32.

   Threads take CHUNK rows at a time. A row's results depend on that row alone, and the sums over rows are made chunk by chunk:
   the same bits whatever the threads. Loops are plain so that the compiler makes vectors of them; a sum has LANES parts because
   the compiler may not reorder it. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

#define CHUNK 64
#define LANES 16
#define WIDEST 16384 /* columns */
#ifdef __FMA__ /* the compiler itself may not contract (native.py) */
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

struct job {
    const char *x, *residual, *grad, *kept; /* [rows, width]; `kept`: relu_dropout's output */
    char *out, *grad_x, *grad_residual;
    const float *weight, *bias; /* [width] */
    float *sums;                /* [chunks, 2, width]: gradients of weight and bias; RMSNorm: [chunks, width] */
    const uint64_t *keys;       /* [rows]; NULL: nothing is dropped */
    int64_t rows, width;
    float scale, eps;
    int32_t threshold, bf16;
    _Atomic int64_t taken; /* chunks that were begun */
};

/* What a thread has of the row at hand. */
struct row {
    uint64_t words[WIDEST / 4]; /* random.keep_torch: the lanes in the order of the columns */
    float x[WIDEST], y[WIDEST], z[WIDEST];
};

/* Dropout of x, its decisions made of the row's key. */
static void drop(const struct job *job, struct row *row, int64_t r, float *restrict x) {
    uint64_t key = job->keys[r], *restrict words = row->words;
    int64_t n = job->width, some = (n + 3) / 4;
    for (int64_t i = 0; i < some; i++) { /* random.bits */
        uint64_t z = (uint64_t)(i + 1) * 0x9E3779B97F4A7C15u + key;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        words[i] = z ^ (z >> 31);
    }
    const int16_t *restrict lanes = (const int16_t *)words; /* little-endian, as everywhere here */
    int16_t threshold = (int16_t)job->threshold;
    float scale = job->scale;
    for (int64_t c = 0; c < n; c++) x[c] = lanes[c] >= threshold ? x[c] * scale : 0;
}

static float product(const float *restrict a, const float *restrict b, int64_t n) {
    float parts[LANES] = {0}, sum = 0;
    int64_t whole = n / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES)
        for (int i = 0; i < LANES; i++) parts[i] += a[c + i] * b[c + i];
    for (int64_t c = whole; c < n; c++) parts[0] += a[c] * b[c];
    for (int i = 0; i < LANES; i++) sum += parts[i];
    return sum;
}

static float total(const float *restrict a, int64_t n) {
    float parts[LANES] = {0}, sum = 0;
    int64_t whole = n / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES)
        for (int i = 0; i < LANES; i++) parts[i] += a[c + i];
    for (int64_t c = whole; c < n; c++) parts[0] += a[c];
    for (int i = 0; i < LANES; i++) sum += parts[i];
    return sum;
}

/* z becomes (z - mean z) rstd; returns rstd. */
static float standardise(const struct job *job, float *restrict z) {
    int64_t n = job->width;
    float mean = total(z, n) / (float)n;
    for (int64_t c = 0; c < n; c++) z[c] -= mean;
    float rstd = 1 / sqrtf(product(z, z, n) / (float)n + job->eps);
    for (int64_t c = 0; c < n; c++) z[c] *= rstd;
    return rstd;
}

/* row->z = standardised residual + dropout(x); returns rstd. */
static float normalise(const struct job *job, struct row *row, int64_t r) {
    int64_t n = job->width;
    float *restrict x = row->x, *restrict z = row->z;
    load_row(job->x, job->bf16, r, job->width, x);
    load_row(job->residual, job->bf16, r, job->width, z);
    if (job->keys) drop(job, row, r, x);
    for (int64_t c = 0; c < n; c++) z[c] += x[c];
    return standardise(job, z);
}

/* The normal law's distribution function at x, to 1e-7, and *density = its density (Abramowitz and Stegun 7.1.26). Without
   a branch on a float, which would keep the compiler from making vectors. */
static inline float normal(float x, float *density) {
    const int32_t farthest = 0x41500000; /* 13, behind which nothing is left */
    int32_t magnitude;
    memcpy(&magnitude, &x, 4);
    magnitude &= 0x7fffffff;
    int32_t near = magnitude < farthest ? magnitude : farthest; /* NaN too */
    float far, factor;
    memcpy(&far, &near, 4);
    float power = far * far * -0.72134752f; /* exp(-x^2 / 2) = 2^power */
    int32_t whole = (int32_t)(power - 0.5f);
    float rest = (power - (float)whole) * 0.69314718f;
    uint32_t bits = (uint32_t)(whole + 127) << 23; /* whole >= -122 */
    memcpy(&factor, &bits, 4);
    float series = FMA(rest, 1.3888889e-3f, 8.3333333e-3f);
    series = FMA(rest, series, 4.1666667e-2f);
    series = FMA(rest, series, 1.6666667e-1f);
    series = FMA(rest, series, 0.5f);
    series = FMA(rest, series, 1.0f);
    float exponential = factor * FMA(rest, series, 1.0f);
    *density = exponential * 0.39894228f;
    float t = 1 / FMA(0.2316419f, far, 1.0f);
    series = FMA(t, 1.061405429f, -1.453152027f);
    series = FMA(t, series, 1.421413741f);
    series = FMA(t, series, -0.284496736f);
    series = FMA(t, series, 0.254829592f);
    float tail = 0.5f * exponential * t * series;
    return 0.5f + copysignf(0.5f - tail, x);
}

static void dropout_row(const struct job *job, struct row *row, int64_t r) {
    load_row(job->x, job->bf16, r, job->width, row->x);
    drop(job, row, r, row->x);
    store_row(job->out, job->bf16, r, job->width, row->x);
}

static void relu_dropout_row(const struct job *job, struct row *row, int64_t r) {
    int64_t n = job->width;
    float *restrict x = row->x;
    load_row(job->x, job->bf16, r, job->width, x);
    for (int64_t c = 0; c < n; c++) x[c] = x[c] <= 0 ? 0 : x[c];
    drop(job, row, r, x);
    store_row(job->out, job->bf16, r, job->width, x);
}

/* Where the output is positive, x was and is kept: the scale is at least 1, so nothing underflows. */
static void relu_dropout_backward_row(const struct job *job, struct row *row, int64_t r) {
    int64_t n = job->width;
    float *restrict x = row->x, *restrict y = row->y, scale = job->scale;
    load_row(job->kept, job->bf16, r, job->width, x);
    load_row(job->grad, job->bf16, r, job->width, y);
    for (int64_t c = 0; c < n; c++) y[c] = x[c] <= 0 ? 0 : y[c] * scale;
    store_row(job->grad_x, job->bf16, r, job->width, y);
}

static void norm_row(const struct job *job, struct row *row, int64_t r) {
    normalise(job, row, r);
    int64_t n = job->width;
    const float *restrict weight = job->weight, *restrict bias = job->bias;
    float *restrict z = row->z;
    for (int64_t c = 0; c < n; c++) z[c] = z[c] * weight[c] + bias[c];
    store_row(job->out, job->bf16, r, job->width, z);
}

/* row->y from the gradient of a norm's output to that of its input; the parameters' gradients are added up. */
static void through_norm(const struct job *job, struct row *row, int64_t r, float rstd) {
    int64_t n = job->width;
    const float *restrict weight = job->weight;
    float *restrict y = row->y, *restrict z = row->z, *restrict sums = job->sums + r / CHUNK * 2 * n;
    if (r % CHUNK == 0) memset(sums, 0, (size_t)n * 2 * sizeof *sums);
    for (int64_t c = 0; c < n; c++) {
        sums[c] += y[c] * z[c];
        sums[n + c] += y[c];
        y[c] *= weight[c];
    }
    float along = product(y, z, n) / (float)n, level = total(y, n) / (float)n;
    for (int64_t c = 0; c < n; c++) y[c] = (y[c] - z[c] * along - level) * rstd;
}

static void norm_backward_row(const struct job *job, struct row *row, int64_t r) {
    float rstd = normalise(job, row, r), *y = row->y;
    load_row(job->grad, job->bf16, r, job->width, y);
    through_norm(job, row, r, rstd);
    store_row(job->grad_residual, job->bf16, r, job->width, y);
    if (!job->keys) return; /* x has the same gradient, and the same tensor for it */
    drop(job, row, r, y);
    store_row(job->grad_x, job->bf16, r, job->width, y);
}

static void norm_gelu_row(const struct job *job, struct row *row, int64_t r) {
    int64_t n = job->width;
    const float *restrict weight = job->weight, *restrict bias = job->bias;
    float *restrict x = row->x, *restrict z = row->z, density;
    load_row(job->x, job->bf16, r, job->width, z);
    standardise(job, z);
    for (int64_t c = 0; c < n; c++) z[c] = z[c] * weight[c] + bias[c];
    for (int64_t c = 0; c < n; c++) z[c] *= normal(z[c], &density);
    if (job->keys) drop(job, row, r, z);
    load_row(job->residual, job->bf16, r, job->width, x);
    for (int64_t c = 0; c < n; c++) z[c] += x[c];
    store_row(job->out, job->bf16, r, job->width, z);
}

/* Gradients of x and of the parameters; the residual's is `grad` itself. */
static void norm_gelu_backward_row(const struct job *job, struct row *row, int64_t r) {
    int64_t n = job->width;
    const float *restrict weight = job->weight, *restrict bias = job->bias;
    float *restrict y = row->y, *restrict z = row->z;
    load_row(job->x, job->bf16, r, job->width, z);
    float rstd = standardise(job, z);
    load_row(job->grad, job->bf16, r, job->width, y);
    if (job->keys) drop(job, row, r, y);
    for (int64_t c = 0; c < n; c++) {
        float density, at = z[c] * weight[c] + bias[c], below = normal(at, &density);
        y[c] *= below + at * density;
    }
    through_norm(job, row, r, rstd);
    store_row(job->grad_x, job->bf16, r, job->width, y);
}

/* row->z = x / its root mean square; returns one over that. */
static float scale_row(const struct job *job, struct row *row, int64_t r) {
    int64_t n = job->width;
    float *restrict z = row->z;
    load_row(job->x, job->bf16, r, n, z);
    float rstd = 1 / sqrtf(product(z, z, n) / (float)n + job->eps);
    for (int64_t c = 0; c < n; c++) z[c] *= rstd;
    return rstd;
}

static void rms_norm_row(const struct job *job, struct row *row, int64_t r) {
    scale_row(job, row, r);
    int64_t n = job->width;
    const float *restrict weight = job->weight;
    float *restrict z = row->z;
    for (int64_t c = 0; c < n; c++) z[c] *= weight[c];
    store_row(job->out, job->bf16, r, n, z);
}

static void rms_norm_backward_row(const struct job *job, struct row *row, int64_t r) {
    float rstd = scale_row(job, row, r);
    int64_t n = job->width;
    const float *restrict weight = job->weight;
    float *restrict y = row->y, *restrict z = row->z, *restrict sums = job->sums + r / CHUNK * n;
    load_row(job->grad, job->bf16, r, n, y);
    if (r % CHUNK == 0) memset(sums, 0, (size_t)n * sizeof *sums);
    for (int64_t c = 0; c < n; c++) {
        sums[c] += y[c] * z[c];
        y[c] *= weight[c];
    }
    float along = product(y, z, n) / (float)n;
    for (int64_t c = 0; c < n; c++) y[c] = (y[c] - z[c] * along) * rstd;
    store_row(job->grad_x, job->bf16, r, n, y);
}

/* What each thread runs. */
static void work(struct job *job, void (*work_row)(const struct job *, struct row *, int64_t)) {
    struct row row;
    for (int64_t chunk; (chunk = atomic_fetch_add(&job->taken, 1)) * CHUNK < job->rows;)
        for (int64_t r = chunk * CHUNK; r < (chunk + 1) * CHUNK && r < job->rows; r++) work_row(job, &row, r);
}

void dropout(void *job) { work(job, dropout_row); }
void relu_dropout(void *job) { work(job, relu_dropout_row); }
void relu_dropout_backward(void *job) { work(job, relu_dropout_backward_row); }
void norm(void *job) { work(job, norm_row); }
void norm_backward(void *job) { work(job, norm_backward_row); }
void norm_gelu(void *job) { work(job, norm_gelu_row); }
void norm_gelu_backward(void *job) { work(job, norm_gelu_backward_row); }
void rms_norm(void *job) { work(job, rms_norm_row); }
void rms_norm_backward(void *job) { work(job, rms_norm_backward_row); }
