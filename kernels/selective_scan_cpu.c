/* Mamba's selective scan inside each cell, forward and backward: the work of kernels/selective_scan_cpu.py. x, the gate and their
   gradients are bf16 or fp32, so is a step that is to become positive here; everything else and all arithmetic fp32.

   A cell's tokens are gone through one after the other, LANES channels at a time, their states in registers. The backward pass
   first computes the states again, and keeps them, their factors and the steps for these channels only.

   Threads take cells; sums over cells are left to the caller, one row a cell: the same bits whatever the threads. */

#include <stdatomic.h>

#include "lanes.h"

#define MOST_STATES 16
#define USUAL_STATES 4 /* Mamba's here; with them and whole vectors of bf16 all states are registers */

struct job {
    const void *x, *grad, *step;                  /* [T, E] */
    const void *gate;                             /* [T, gate_row], its first E columns; NULL: none */
    void *out, *grad_x, *grad_step, *grad_gate;   /* [T, E] */
    const float *step_bias;                       /* [E]: the step is softplus(step + step_bias). NULL: it is `step`, fp32 */
    const float *decay, *b, *c, *skip;            /* [N, E], [T, N], [T, N], [E] */
    float *grad_b, *grad_c;                       /* [T, N] */
    float *sums;                                  /* [cells, N + 2, E]: gradients of decay, skip and step_bias */
    const int64_t *offsets;                       /* [cells + 1] */
    int64_t cells, channels, states, gate_row;
    void *scratch;                                /* scratch_vectors(longest cell, N) a thread, of 64 bytes each */
    int64_t scratch_vectors;
    int32_t bf16;
    _Atomic int32_t threads; /* that began */
    _Atomic int64_t taken;   /* cells that were begun */
};

int64_t scratch_vectors(int64_t longest, int64_t states) { return longest * (4 * states + 2); }

/* Columns e to e + n of row t: the step, and what it changes by where its argument does. */
ALWAYS lanes positive_step(const struct job *job, int bf16, int64_t t, int64_t e, int64_t n, lanes *slope) {
    lanes x = load(job->step, job->step_bias && bf16, t * job->channels + e, n), zero = {0};
    *slope = zero + 1.0f;
    if (!job->step_bias) return x;
    x += load(job->step_bias, 0, e, n);
    lanes decay = decayed(x);
    *slope = sigmoid(x, decay);
    return softplus(x, decay);
}

/* A cell's columns e to e + n. */
ALWAYS void forward_block(const struct job *job, int64_t cell, int64_t e, int64_t n, int64_t states, int bf16) {
    int64_t channels = job->channels;
    lanes a[MOST_STATES], h[MOST_STATES] = {{0}}, skip = load(job->skip, 0, e, n);
    for (int64_t s = 0; s < states; s++) a[s] = load(job->decay, 0, s * channels + e, n) * LOG2_E;
    for (int64_t t = job->offsets[cell]; t < job->offsets[cell + 1]; t++) {
        lanes slope, u = load(job->x, bf16, t * channels + e, n), delta = positive_step(job, bf16, t, e, n, &slope);
        lanes y = skip * u, input = delta * u;
        for (int64_t s = 0; s < states; s++) {
            h[s] = power_of_two(delta * a[s]) * h[s] + job->b[t * states + s] * input;
            y += job->c[t * states + s] * h[s];
        }
        if (job->gate) {
            lanes z = load(job->gate, bf16, t * job->gate_row + e, n);
            y *= z * sigmoid(z, decayed(z));
        }
        store(job->out, bf16, t * channels + e, n, y);
    }
}

/* The same back; `scratch`: of this thread, as backward_cell lays it out. */
ALWAYS void backward_block(
    const struct job *job, lanes *scratch, int64_t cell, int64_t e, int64_t n, int64_t states, int bf16
) {
    int64_t channels = job->channels, start = job->offsets[cell], tokens = job->offsets[cell + 1] - start;
    int64_t size = tokens * states;
    lanes *factors = scratch, *after = factors + size, *grad_b = after + size, *grad_c = grad_b + size;
    lanes *steps = grad_c + size, *slopes = steps + tokens;
    lanes a[MOST_STATES], h[MOST_STATES] = {{0}}, grad_a[MOST_STATES] = {{0}}, carried[MOST_STATES] = {{0}};
    lanes skip = load(job->skip, 0, e, n), grad_skip = {0}, grad_bias = {0};
    for (int64_t s = 0; s < states; s++) a[s] = load(job->decay, 0, s * channels + e, n);
    for (int64_t t = 0; t < tokens; t++) {
        lanes delta = steps[t] = positive_step(job, bf16, start + t, e, n, &slopes[t]);
        lanes input = load(job->x, bf16, (start + t) * channels + e, n) * delta;
        for (int64_t s = 0; s < states; s++) {
            factors[t * states + s] = power_of_two(delta * (a[s] * LOG2_E));
            h[s] = factors[t * states + s] * h[s] + job->b[(start + t) * states + s] * input;
            after[t * states + s] = h[s];
        }
    }
    for (int64_t t = tokens - 1; t >= 0; t--) {
        int64_t place = (start + t) * channels + e;
        lanes u = load(job->x, bf16, place, n), g = load(job->grad, bf16, place, n), delta = steps[t];
        lanes input = delta * u, grad_input = {0}, grad_delta = {0};
        if (job->gate) {
            lanes z = load(job->gate, bf16, (start + t) * job->gate_row + e, n), below = sigmoid(z, decayed(z)), y = skip * u;
            for (int64_t s = 0; s < states; s++) y += job->c[(start + t) * states + s] * after[t * states + s];
            store(job->grad_gate, bf16, place, n, g * y * below * (1.0f + z * (1.0f - below)));
            g *= z * below;
        }
        for (int64_t s = 0; s < states; s++) {
            int64_t i = t * states + s;
            lanes grad_state = job->c[(start + t) * states + s] * g + carried[s], before = {0};
            if (t > 0) before = after[i - states];
            grad_c[i] += after[i] * g;
            grad_b[i] += grad_state * input;
            grad_input += job->b[(start + t) * states + s] * grad_state;
            carried[s] = factors[i] * grad_state;
            lanes grad_exponent = carried[s] * before; /* of delta a */
            grad_delta += grad_exponent * a[s];
            grad_a[s] += grad_exponent * delta;
        }
        grad_skip += g * u;
        store(job->grad_x, bf16, place, n, g * skip + grad_input * delta);
        grad_delta = (grad_delta + grad_input * u) * slopes[t];
        grad_bias += grad_delta;
        store(job->grad_step, job->step_bias && bf16, place, n, grad_delta);
    }
    float *sums = job->sums + cell * (states + 2) * channels;
    for (int64_t s = 0; s < states; s++) store(sums, 0, s * channels + e, n, grad_a[s]);
    store(sums, 0, states * channels + e, n, grad_skip);
    store(sums, 0, (states + 1) * channels + e, n, grad_bias);
}

static void forward_cell(const struct job *job, lanes *scratch, int64_t cell) {
    int64_t channels = job->channels, states = job->states;
    (void)scratch;
    for (int64_t e = 0; e < channels; e += LANES) {
        if (channels - e >= LANES && states == USUAL_STATES && job->bf16) forward_block(job, cell, e, LANES, USUAL_STATES, 1);
        else forward_block(job, cell, e, channels - e < LANES ? channels - e : LANES, states, job->bf16);
    }
}

static void backward_cell(const struct job *job, lanes *scratch, int64_t cell) {
    int64_t channels = job->channels, states = job->states, start = job->offsets[cell];
    int64_t size = (job->offsets[cell + 1] - start) * states;
    lanes *grad_b = scratch + 2 * size, *grad_c = grad_b + size; /* sums over the channels, LANES parts each */
    memset(grad_b, 0, (size_t)size * 2 * sizeof *grad_b);
    for (int64_t e = 0; e < channels; e += LANES) {
        if (channels - e >= LANES && states == USUAL_STATES && job->bf16)
            backward_block(job, scratch, cell, e, LANES, USUAL_STATES, 1);
        else backward_block(job, scratch, cell, e, channels - e < LANES ? channels - e : LANES, states, job->bf16);
    }
    for (int64_t i = 0; i < size; i++) {
        float of_b = 0, of_c = 0;
        for (int lane = 0; lane < LANES; lane++) {
            of_b += grad_b[i][lane];
            of_c += grad_c[i][lane];
        }
        job->grad_b[start * states + i] = of_b;
        job->grad_c[start * states + i] = of_c;
    }
}

/* What each thread runs. */
static void work(struct job *job, void (*work_cell)(const struct job *, lanes *, int64_t)) {
    lanes *scratch = (lanes *)job->scratch + atomic_fetch_add(&job->threads, 1) * job->scratch_vectors;
    for (int64_t cell; (cell = atomic_fetch_add(&job->taken, 1)) < job->cells;) work_cell(job, scratch, cell);
}

void forward(void *job) { work(job, forward_cell); }
void backward(void *job) { work(job, backward_cell); }
