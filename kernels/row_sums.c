/* Sums of rows that share a key, for all keys: the work of kernels/row_sums.py. Rows are bf16 or fp32, sums fp32.

   Threads take CHUNK keys at a time; a key's rows are added up in their order, by one thread. Rows without an element are
   written as zeros in the same pass: most of a gene table's gradient. */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

#define CHUNK 256
#define WIDEST 16384 /* columns */

struct job {
    const char *rows;     /* [n, width] */
    const int64_t *keys;  /* [n], ascending, in 0 .. n_keys - 1 */
    const int64_t *order; /* [n]: the row of each */
    char *out;            /* [n_keys, width] */
    int64_t n, n_keys, width;
    int32_t rows_bf16, out_bf16;
    _Atomic int64_t taken; /* chunks that were begun */
};

static void add_row(const struct job *job, int64_t row, float *restrict sum) {
    int64_t width = job->width;
    if (job->rows_bf16) {
        const uint16_t *restrict from = (const uint16_t *)job->rows + row * width;
        for (int64_t c = 0; c < width; c++) sum[c] += of_bf16(from[c]);
    } else {
        const float *restrict from = (const float *)job->rows + row * width;
        for (int64_t c = 0; c < width; c++) sum[c] += from[c];
    }
}

/* How many keys are smaller. */
static int64_t first_place(const struct job *job, int64_t key) {
    int64_t low = 0, high = job->n;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (job->keys[middle] < key) low = middle + 1;
        else high = middle;
    }
    return low;
}

void sum_rows(struct job *job) {
    float sum[WIDEST];
    int64_t row_bytes = job->width * (job->out_bf16 ? 2 : 4);
    for (int64_t chunk; (chunk = atomic_fetch_add(&job->taken, 1)) * CHUNK < job->n_keys;) {
        int64_t key = chunk * CHUNK, stop = key + CHUNK < job->n_keys ? key + CHUNK : job->n_keys;
        memset(job->out + key * row_bytes, 0, (size_t)((stop - key) * row_bytes));
        for (int64_t i = first_place(job, key); i < job->n && (key = job->keys[i]) < stop;) {
            memset(sum, 0, (size_t)job->width * sizeof *sum);
            for (; i < job->n && job->keys[i] == key; i++) add_row(job, job->order[i], sum);
            store_row(job->out, job->out_bf16, key, job->width, sum);
        }
    }
}
