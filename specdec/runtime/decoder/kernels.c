/* What a decoder layer computes between its matrix products, on a CPU in bf16: one pass over memory each.

   torch needs five to fifteen operations for each of these, which cost more by being called than by what they
   compute. Rows are independent of one another, and a row is computed in the same order however many there are:
   its bits depend on nothing else. Sums and products are in fp32, and a result is rounded to bf16 once.

   Built as a plain shared library and called through ctypes (kernels.py): it needs neither Python nor torch. */

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
#define INLINE static inline __attribute__((always_inline))
#define LANES 32

/* Of these functions' parameters: kernels.py uses no library that was built with others. */
const int32_t kernels_version = 1;

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

/* 1 / root mean square of a row. */
INLINE float inverse_length(const bf16 *x, int64_t size, float epsilon) {
    float sums[LANES] = {0};
    int64_t whole = size / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float wide = widen(x[i + lane]);
            sums[lane] += wide * wide;
        }
    for (int64_t i = whole; i < size; i++) sums[i - whole] += widen(x[i]) * widen(x[i]);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    return 1.0f / sqrtf(sums[0] / (float)size + epsilon);
}

INLINE void norm_row(
    const bf16 *restrict x, const float *restrict weight, bf16 *restrict out, int64_t size, float epsilon) {
    float scale = inverse_length(x, size, epsilon);
    if (weight)
        for (int64_t i = 0; i < size; i++) out[i] = narrow(widen(x[i]) * scale * weight[i]);
    else
        for (int64_t i = 0; i < size; i++) out[i] = narrow(widen(x[i]) * scale);
}

/* Norms of rows [rows, size]; weight: [size], or NULL. */
FOR_EACH_CPU void norm(const bf16 *x, const float *weight, bf16 *out, int64_t rows, int64_t size, float epsilon) {
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * size, weight, out + row * size, size, epsilon);
}

/* sum = x + added, rows [rows, size], the latter after a norm of its own if it has one (after not NULL), and
   normed = norm(sum), if that is wanted (weight not NULL). */
FOR_EACH_CPU void add_norm(
    const bf16 *restrict x,
    const bf16 *restrict added,
    const float *restrict after,
    const float *restrict weight,
    bf16 *restrict sum,
    bf16 *restrict normed,
    int64_t rows,
    int64_t size,
    float after_epsilon,
    float epsilon) {
    for (int64_t row = 0; row < rows; row++, x += size, added += size, sum += size) {
        if (after) {
            float scale = inverse_length(added, size, after_epsilon);
            for (int64_t i = 0; i < size; i++)
                sum[i] = narrow(widen(x[i]) + widen(narrow(widen(added[i]) * scale * after[i])));
        } else {
            for (int64_t i = 0; i < size; i++) sum[i] = narrow(widen(x[i]) + widen(added[i]));
        }
        if (weight) norm_row(sum, weight, normed + row * size, size, epsilon);
    }
}

/* Turns the first heads of each token by its position, after the norms of queries and keys if there are any.

   heads: [rows, stride, dim]; turned: [rows, queries + keys, dim]; cosine and signed sine: [rows, dim], or
   [1, dim] for all rows (table_stride 0); norms: weights [dim], or NULL. */
FOR_EACH_CPU void turn(
    const bf16 *restrict heads,
    const bf16 *restrict cosine,
    const bf16 *restrict sine,
    const float *restrict query_norm,
    const float *restrict key_norm,
    bf16 *restrict turned,
    int64_t rows,
    int64_t stride,
    int64_t queries,
    int64_t keys,
    int64_t dim,
    int64_t table_stride,
    float epsilon) {
    int64_t half = dim / 2;
    for (int64_t row = 0; row < rows; row++, cosine += table_stride, sine += table_stride) {
        const bf16 *from = heads + row * stride * dim;
        for (int64_t head = 0; head < queries + keys; head++, from += dim, turned += dim) {
            const float *weight = head < queries ? query_norm : key_norm;
            const bf16 *source = from;
            bf16 normed[dim];
            if (weight) {
                norm_row(from, weight, normed, dim, epsilon);
                source = normed;
            }
            for (int64_t i = 0; i < half; i++) {
                float first = widen(source[i]), second = widen(source[i + half]);
                turned[i] = narrow(first * widen(cosine[i]) + second * widen(sine[i]));
                turned[i + half] = narrow(second * widen(cosine[i + half]) + first * widen(sine[i + half]));
            }
        }
    }
}

/* Copies a row of keys and one of values [size] of each token to its slot: first + its row, or that of slots. */
void store(
    const bf16 *keys,
    const bf16 *values,
    bf16 *key_pool,
    bf16 *value_pool,
    const int64_t *slots,
    int64_t first,
    int64_t rows,
    int64_t size,
    int64_t key_stride,
    int64_t value_stride) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t slot = slots ? slots[row] : first + row;
        memcpy(key_pool + slot * size, keys + row * key_stride, (size_t)size * sizeof(bf16));
        memcpy(value_pool + slot * size, values + row * value_stride, (size_t)size * sizeof(bf16));
    }
}

/* activation(gate) * up of rows that have both side by side [rows, 2 * size]. Both activations are the input
   times a sigmoid: SiLU that of the input, GELU's tanh form that of 2 * sqrt(2 / pi) * (x + 0.044715 x^3). */
FOR_EACH_CPU void gated(const bf16 *restrict gate_up, bf16 *restrict out, int64_t rows, int64_t size, int64_t is_gelu) {
    for (int64_t row = 0; row < rows; row++, gate_up += 2 * size, out += size) {
        const bf16 *up = gate_up + size;
        if (is_gelu)
            for (int64_t i = 0; i < size; i++) {
                float x = widen(gate_up[i]);
                float turned = 1.5957691216057308f * (x + 0.044715f * x * x * x);
                out[i] = narrow(x / (1.0f + exponential(-turned)) * widen(up[i]));
            }
        else
            for (int64_t i = 0; i < size; i++) {
                float x = widen(gate_up[i]);
                out[i] = narrow(x / (1.0f + exponential(-x)) * widen(up[i]));
            }
    }
}
