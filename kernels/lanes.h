/* LANES neighbouring columns of a row as one fp32 vector: loads, stores, and what functions of them the C files here share. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define LOG2_E 1.44269504f
#define ALWAYS static inline __attribute__((always_inline)) /* what is compiled once more for constant arguments */

typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t whole_lanes __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * 2)));

/* Some channels of a row, n of LANES, the others 0. */
ALWAYS lanes load(const void *tensor, int bf16, int64_t place, int64_t n) {
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

ALWAYS void store(void *tensor, int bf16, int64_t place, int64_t n, lanes x) {
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
ALWAYS lanes power_of_two(lanes x) {
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

/* Where `choice` is all ones, a, else b. */
ALWAYS lanes choose(whole_lanes choice, lanes a, lanes b) {
    return (lanes)(((whole_lanes)a & choice) | ((whole_lanes)b & ~choice));
}

/* exp(-|x|); NaN stays NaN. */
ALWAYS lanes decayed(lanes x) { return power_of_two((lanes)((whole_lanes)x | INT32_MIN) * LOG2_E); }

/* 1 / (1 + exp(-x)), of which `decay` is exp(-|x|). */
ALWAYS lanes sigmoid(lanes x, lanes decay) { return choose(x < 0.0f, decay, decay * 0.0f + 1.0f) / (decay + 1.0f); }

/* log(1 + exp(x)), of which `decay` is exp(-|x|): max(x, 0) + 2 artanh(decay / (2 + decay)), a series. */
ALWAYS lanes softplus(lanes x, lanes decay) {
    lanes s = decay / (decay + 2.0f), square = s * s;
    lanes series = square * (1.0f / 15) + 1.0f / 13;
    series = series * square + 1.0f / 11;
    series = series * square + 1.0f / 9;
    series = series * square + 1.0f / 7;
    series = series * square + 1.0f / 5;
    series = series * square + 1.0f / 3;
    series = series * square + 1.0f;
    return choose(x < 0.0f, decay * 0.0f, x) + 2.0f * s * series;
}
