/* Mamba's selective scan inside each cell, forward and backward: the work of kernels/selective_scan_cpu.py. x and its gradients
   are bf16 or fp32, everything else and all arithmetic fp32.

   A cell's tokens are gone through one after the other, LANES channels at a time, their states in registers. The backward pass
   first computes the states again, and keeps them and their factors for these channels only.

   Threads take cells; sums over cells are left to the caller, one row a cell: the same bits whatever the threads. */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MOST_STATES 16
#define LOG2_E 1.44269504f

typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t whole_lanes __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * 2)));

struct job {
    const void *x, *grad;                         /* [T, E] */
    void *out, *grad_x;                           /* [T, E] */
    const float *step, *decay, *b, *c, *skip;     /* [T, E], [N, E], [T, N], [T, N], [E] */
    float *grad_step, *grad_b, *grad_c;           /* [T, E], [T, N], [T, N] */
    float *sums;                                  /* [cells, N + 1, E]: gradients of decay and of skip */
    const int64_t *offsets;                       /* [cells + 1] */
    int64_t cells, channels, states;
    float *scratch;                               /* scratch_floats(longest cell, N) a thread, 64-byte aligned */
    int64_t scratch_floats;
    int32_t bf16;
    _Atomic int32_t threads; /* that began */
    _Atomic int64_t taken;   /* cells that were begun */
};

int64_t scratch_floats(int64_t longest, int64_t states) { return 4 * longest * states * LANES; } /* a multiple of LANES */

/* Some channels of a row, n of LANES, the others 0. */
static inline lanes load(const void *tensor, int bf16, int64_t place, int64_t n) {
    lanes x = {0};
    half_lanes half = {0};
    if (!bf16) {
        if (n == LANES) memcpy(&x, (const float *)tensor + place, sizeof x);
        else memcpy(&x, (const float *)tensor + place, (size_t)n * 4);
        return x;
    }
    if (n == LANES) memcpy(&half, (const uint16_t *)tensor + place, sizeof half);
    else memcpy(&half, (const uint16_t *)tensor + place, (size_t)n * 2);
    return (lanes)(__builtin_convertvector(half, whole_lanes) << 16);
}

static inline void store(void *tensor, int bf16, int64_t place, int64_t n, lanes x) {
    if (!bf16) {
        if (n == LANES) memcpy((float *)tensor + place, &x, sizeof x);
        else memcpy((float *)tensor + place, &x, (size_t)n * 4);
        return;
    }
    whole_lanes bits = (whole_lanes)x, nan = x != x;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
    half_lanes half = __builtin_convertvector((bits & ~nan) | (0x7fc0 & nan), half_lanes);
    if (n == LANES) memcpy((uint16_t *)tensor + place, &half, sizeof half);
    else memcpy((uint16_t *)tensor + place, &half, (size_t)n * 2);
}

/* 2^x for x <= 0, by Taylor's polynomial of what is left of x in [-1/2, 1/2]; relative error 2e-7. NaN stays NaN. */
static inline lanes power_of_two(lanes x) {
    const lanes least = {0};
    whole_lanes low = x < -126.0f;
    x = (lanes)(((whole_lanes)x & ~low) | ((whole_lanes)(least - 126.0f) & low));
    lanes shifted = x + 12582912.0f; /* 1.5 2^23: whole numbers are left */
    lanes part = x - (shifted - 12582912.0f), power = (lanes)(((whole_lanes)shifted - 0x4b400000 + 127) << 23);
    lanes p = 1.5403530e-4f * part + 1.3333558e-3f;
    p = p * part + 9.6181291e-3f;
    p = p * part + 5.5504109e-2f;
    p = p * part + 2.4022651e-1f;
    p = p * part + 6.9314718e-1f;
    return (p * part + 1.0f) * power;
}

static void forward_cell(const struct job *job, float *scratch, int64_t cell) {
    int64_t channels = job->channels, states = job->states;
    int bf16 = job->bf16;
    (void)scratch;
    for (int64_t e = 0; e < channels; e += LANES) {
        int64_t n = channels - e < LANES ? channels - e : LANES;
        lanes a[MOST_STATES], h[MOST_STATES] = {{0}}, skip = load(job->skip, 0, e, n);
        for (int64_t s = 0; s < states; s++) a[s] = load(job->decay, 0, s * channels + e, n) * LOG2_E;
        for (int64_t t = job->offsets[cell]; t < job->offsets[cell + 1]; t++) {
            lanes u = load(job->x, bf16, t * channels + e, n), delta = load(job->step, 0, t * channels + e, n);
            lanes y = skip * u, input = delta * u;
            for (int64_t s = 0; s < states; s++) {
                h[s] = power_of_two(delta * a[s]) * h[s] + job->b[t * states + s] * input;
                y += job->c[t * states + s] * h[s];
            }
            store(job->out, bf16, t * channels + e, n, y);
        }
    }
}

static void backward_cell(const struct job *job, float *scratch, int64_t cell) {
    int64_t channels = job->channels, states = job->states, start = job->offsets[cell], tokens = job->offsets[cell + 1] - start;
    int64_t size = tokens * states;
    int bf16 = job->bf16;
    lanes *factors = (lanes *)scratch, *after = factors + size, *grad_b = after + size, *grad_c = grad_b + size;
    memset(grad_b, 0, (size_t)size * 2 * sizeof *grad_b); /* and grad_c: sums over the channels, LANES parts each */
    for (int64_t e = 0; e < channels; e += LANES) {
        int64_t n = channels - e < LANES ? channels - e : LANES;
        lanes a[MOST_STATES], h[MOST_STATES] = {{0}}, grad_a[MOST_STATES] = {{0}}, carried[MOST_STATES] = {{0}};
        lanes skip = load(job->skip, 0, e, n), grad_skip = {0};
        for (int64_t s = 0; s < states; s++) a[s] = load(job->decay, 0, s * channels + e, n);
        for (int64_t t = 0; t < tokens; t++) {
            lanes delta = load(job->step, 0, (start + t) * channels + e, n);
            lanes input = load(job->x, bf16, (start + t) * channels + e, n) * delta;
            for (int64_t s = 0; s < states; s++) {
                factors[t * states + s] = power_of_two(delta * (a[s] * LOG2_E));
                h[s] = factors[t * states + s] * h[s] + job->b[(start + t) * states + s] * input;
                after[t * states + s] = h[s];
            }
        }
        for (int64_t t = tokens - 1; t >= 0; t--) {
            int64_t place = (start + t) * channels + e;
            lanes u = load(job->x, bf16, place, n), delta = load(job->step, 0, place, n), g = load(job->grad, bf16, place, n);
            lanes input = delta * u, grad_input = {0}, grad_delta = {0};
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
            store(job->grad_step, 0, place, n, grad_delta + grad_input * u);
        }
        float *sums = job->sums + cell * (states + 1) * channels;
        for (int64_t s = 0; s < states; s++) store(sums, 0, s * channels + e, n, grad_a[s]);
        store(sums, 0, states * channels + e, n, grad_skip);
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
static void work(struct job *job, void (*work_cell)(const struct job *, float *, int64_t)) {
    float *scratch = job->scratch + atomic_fetch_add(&job->threads, 1) * job->scratch_floats;
    for (int64_t cell; (cell = atomic_fetch_add(&job->taken, 1)) < job->cells;) work_cell(job, scratch, cell);
}

void forward(void *job) { work(job, forward_cell); }
void backward(void *job) { work(job, backward_cell); }
