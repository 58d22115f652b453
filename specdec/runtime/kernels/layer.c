/* What a decoder layer computes between its matrix products, on a CPU in bf16: one pass over memory each.

   torch needs five to fifteen operations for each of these, which cost more by being called than by what they
   compute. Rows are independent of one another, and a row is computed in the same order however many there are:
   its bits depend on nothing else. Sums and products are in fp32, and a result is rounded to bf16 once.

   Built as a plain shared library and called through ctypes (library.py): it needs neither Python nor torch. */

#include "bf16.h"

#define LANES 32

/* Of these functions' parameters: library.py uses no library that was built with others. */
const int32_t kernels_version = 3;

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
   normed = norm(sum). */
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
        norm_row(sum, weight, normed + row * size, size, epsilon);
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

/* activation(gate) * up of rows that have both side by side [rows, 2 * size]. */
FOR_EACH_CPU void gated(const bf16 *restrict gate_up, bf16 *restrict out, int64_t rows, int64_t size, int64_t gate) {
    for (int64_t row = 0; row < rows; row++, gate_up += 2 * size, out += size) {
        const bf16 *up = gate_up + size;
        if (gate == GELU)
            for (int64_t i = 0; i < size; i++) out[i] = narrow(gelu(widen(gate_up[i])) * widen(up[i]));
        else
            for (int64_t i = 0; i < size; i++) out[i] = narrow(silu(widen(gate_up[i])) * widen(up[i]));
    }
}
