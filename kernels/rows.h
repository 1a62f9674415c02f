/* Rows of bf16 or fp32 elements as fp32, and back: what C files here share. native.py knows a library by its headers too. */

#include <stdint.h>
#include <string.h>

static inline float of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Row r of a tensor [rows, n]. */
static inline void load_row(const char *tensor, int bf16, int64_t r, int64_t n, float *restrict to) {
    if (!bf16) {
        memcpy(to, tensor + r * n * 4, (size_t)n * 4);
        return;
    }
    const uint16_t *restrict from = (const uint16_t *)tensor + r * n;
    for (int64_t c = 0; c < n; c++) to[c] = of_bf16(from[c]);
}

static inline void store_row(char *tensor, int bf16, int64_t r, int64_t n, const float *restrict from) {
    if (!bf16) {
        memcpy(tensor + r * n * 4, from, (size_t)n * 4);
        return;
    }
    uint16_t *restrict to = (uint16_t *)tensor + r * n;
    for (int64_t c = 0; c < n; c++) to[c] = to_bf16(from[c]);
}
