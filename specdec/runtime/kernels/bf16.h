/* Numbers of the kernels: bf16 in memory, fp32 in between. */

#ifndef SPECDEC_BF16_H
#define SPECDEC_BF16_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Compiled once for each level of vector instructions; the loader takes the best one that the machine has. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

INLINE float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* To the nearest, ties to even. A NaN stays one. */
INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* exp(x), to 2 units in the last place: 2^n * exp(rest), the latter by a polynomial (Cephes' expf). */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x; /* false for a NaN, which goes on */
    x = x > 88.0f ? 88.0f : x;
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to an integer */
    float shifted = x * 1.44269504088896341f + to_integer;
    float n = shifted - to_integer;
    float rest = x - n * 0.693359375f + n * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23; /* the integer is in the low bits */
    float power;
    memcpy(&power, &bits, sizeof power);
    return (sum * rest * rest + rest + 1.0f) * power;
}

/* Activations of gates: which `gate` is which. Both are the input times a sigmoid: SiLU that of the input, GELU's tanh
   form that of 2 * sqrt(2 / pi) * (x + 0.044715 x^3). */
enum { NO_GATE = -1, SILU, GELU };

INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

INLINE float gelu(float x) {
    return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

#endif
