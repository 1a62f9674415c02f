/* Depthwise causal convolution and SiLU inside each cell, forward and backward: the work of kernels/causal_conv_cpu.py. x, the
   result and their gradients are bf16 or fp32, the parameters and all arithmetic fp32.

   A cell's rows are gone through one after the other; the K rows that a result needs are in the cache. The backward pass goes from
   the last row to the first, computes each sum again, and keeps the gradients of K of them.

   Threads take cells; sums over cells are left to the caller, one row a cell: the same bits whatever the threads. */

#include <stdatomic.h>

#include "lanes.h"

#define USUAL_TAPS 4 /* Mamba's here; with them and whole vectors of bf16 nothing is decided inside the loop */

struct job {
    const void *x, *grad;         /* [T, x_row], its first E columns, and [T, E] */
    void *out, *grad_x;           /* [T, E] */
    const float *weight, *bias;   /* [K, E], the last for the token itself, and [E] */
    float *sums;                  /* [cells, K + 1, E]: gradients of both */
    const int64_t *offsets;       /* [cells + 1] */
    int64_t cells, channels, taps, x_row;
    float *scratch;               /* [K, E rounded up to LANES] a thread, 64-byte aligned */
    int64_t scratch_floats;
    int32_t bf16;
    _Atomic int32_t threads; /* that began */
    _Atomic int64_t taken;   /* cells that were begun */
};

/* Columns e to e + n of the convolution at row t of the cell that begins at row `start`. */
ALWAYS lanes convolved(const struct job *job, int64_t start, int64_t t, int64_t e, int64_t n, int64_t taps, int bf16) {
    lanes sum = load(job->bias, 0, e, n);
    for (int64_t k = 0; k < taps; k++) {
        int64_t row = t - taps + 1 + k;
        if (row >= start) sum += load(job->weight, 0, k * job->channels + e, n) * load(job->x, bf16, row * job->x_row + e, n);
    }
    return sum;
}

ALWAYS void forward_block(const struct job *job, int64_t start, int64_t t, int64_t e, int64_t n, int64_t taps, int bf16) {
    lanes sum = convolved(job, start, t, e, n, taps, bf16);
    store(job->out, bf16, t * job->channels + e, n, sum * sigmoid(sum, decayed(sum)));
}

/* `grads` [K, width]: gradients of the sums of K rows; `sums`: of the cell. */
ALWAYS void backward_block(
    const struct job *job, float *grads, float *sums, int64_t start, int64_t stop, int64_t t, int64_t e, int64_t n, int64_t taps,
    int bf16
) {
    int64_t channels = job->channels, width = job->scratch_floats / taps;
    lanes sum = convolved(job, start, t, e, n, taps, bf16), below = sigmoid(sum, decayed(sum)), grad_x = {0};
    lanes g = load(job->grad, bf16, t * channels + e, n) * below * (1.0f + sum * (1.0f - below));
    store(grads, 0, t % taps * width + e, LANES, g);
    store(sums, 0, taps * channels + e, n, load(sums, 0, taps * channels + e, n) + g);
    for (int64_t k = 0; k < taps; k++) {
        int64_t before = t - taps + 1 + k, after = t + taps - 1 - k, place = k * channels + e;
        if (before >= start)
            store(sums, 0, place, n, load(sums, 0, place, n) + g * load(job->x, bf16, before * job->x_row + e, n));
        if (after < stop) grad_x += load(job->weight, 0, place, n) * load(grads, 0, after % taps * width + e, LANES);
    }
    store(job->grad_x, bf16, t * channels + e, n, grad_x);
}

static void forward_cell(const struct job *job, float *scratch, int64_t cell) {
    int64_t channels = job->channels, taps = job->taps, start = job->offsets[cell];
    (void)scratch;
    for (int64_t t = start; t < job->offsets[cell + 1]; t++)
        for (int64_t e = 0; e < channels; e += LANES) {
            if (channels - e >= LANES && taps == USUAL_TAPS && job->bf16)
                forward_block(job, start, t, e, LANES, USUAL_TAPS, 1);
            else forward_block(job, start, t, e, channels - e < LANES ? channels - e : LANES, taps, job->bf16);
        }
}

static void backward_cell(const struct job *job, float *scratch, int64_t cell) {
    int64_t channels = job->channels, taps = job->taps, start = job->offsets[cell], stop = job->offsets[cell + 1];
    float *sums = job->sums + cell * (taps + 1) * channels;
    memset(sums, 0, (size_t)((taps + 1) * channels) * sizeof *sums);
    for (int64_t t = stop - 1; t >= start; t--)
        for (int64_t e = 0; e < channels; e += LANES) {
            if (channels - e >= LANES && taps == USUAL_TAPS && job->bf16)
                backward_block(job, scratch, sums, start, stop, t, e, LANES, USUAL_TAPS, 1);
            else
                backward_block(job, scratch, sums, start, stop, t, e, channels - e < LANES ? channels - e : LANES, taps, job->bf16);
        }
}

/* What each thread runs. */
static void work(struct job *job, void (*work_cell)(const struct job *, float *, int64_t)) {
    float *scratch = job->scratch + atomic_fetch_add(&job->threads, 1) * job->scratch_floats;
    for (int64_t cell; (cell = atomic_fetch_add(&job->taken, 1)) < job->cells;) work_cell(job, scratch, cell);
}

void forward(void *job) { work(job, forward_cell); }
void backward(void *job) { work(job, backward_cell); }
