/* out[t] = table[genes[t]] + states[index[t]], the sum in fp32: the work of kernels/added_rows.py. Table and out are bf16 or
   fp32, states fp32. Threads take CHUNK tokens at a time; each row has one writer. */

#include <stdatomic.h>
#include <stdint.h>

#include "rows.h"

#define CHUNK 256

struct job {
    const char *table;    /* [V, width] */
    const int64_t *genes; /* [n] */
    const float *states;  /* [S, width] */
    const int64_t *index; /* [n] */
    char *out;            /* [n, width] */
    int64_t n, width;
    int32_t bf16;
    _Atomic int64_t taken; /* chunks that were begun */
};

static void add_bf16(const uint16_t *restrict row, const float *restrict state, uint16_t *restrict out, int64_t width) {
    for (int64_t c = 0; c < width; c++) out[c] = to_bf16(of_bf16(row[c]) + state[c]);
}

static void add_fp32(const float *restrict row, const float *restrict state, float *restrict out, int64_t width) {
    for (int64_t c = 0; c < width; c++) out[c] = row[c] + state[c];
}

void add_rows(struct job *job) {
    int64_t width = job->width;
    for (int64_t chunk; (chunk = atomic_fetch_add(&job->taken, 1)) * CHUNK < job->n;) {
        int64_t t = chunk * CHUNK, stop = t + CHUNK < job->n ? t + CHUNK : job->n;
        for (; t < stop; t++) {
            int64_t from = job->genes[t] * width, to = t * width;
            const float *state = job->states + job->index[t] * width;
            if (job->bf16) add_bf16((const uint16_t *)job->table + from, state, (uint16_t *)job->out + to, width);
            else add_fp32((const float *)job->table + from, state, (float *)job->out + to, width);
        }
    }
}
