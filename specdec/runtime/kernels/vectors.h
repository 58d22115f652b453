/* The two products of attention with vectors of fp32.

   Each head sums up for itself, in order of the dimensions or positions: how many heads there are shows in no bit. */

#ifndef SPECDEC_VECTORS_H
#define SPECDEC_VECTORS_H

#include "attention.h"

#define MOST_HEADS 4 /* at once, as many as there are registers for */

/* Runs something for all heads, a constant number at a time. */
#define IN_PARTS(num_heads, RUN)                                                            \
    do {                                                                                    \
        int64_t head = 0;                                                                   \
        for (; head + MOST_HEADS <= (num_heads); head += MOST_HEADS) RUN(MOST_HEADS, head); \
        if ((num_heads) - head == 3) RUN(3, head);                                          \
        if ((num_heads) - head == 2) RUN(2, head);                                          \
        if ((num_heads) - head == 1) RUN(1, head);                                          \
    } while (0)

INLINE void begin_vectors(int64_t fold) { (void)fold; }
INLINE void end_vectors(void) {}

INLINE void widen_row(float *to, const bf16 *from, int64_t dim) {
    for (int64_t i = 0; i < dim; i += WIDTH) {
        bf16 part[WIDTH];
        copy_width(part, from, i, dim);
        save(to + i, (floats)(widen_half(part) << 16));
        save(to + i + LANES, (floats)(widen_half(part + LANES) << 16));
    }
}

/* Queries [heads, width]. */
INLINE void lay_query_vectors(void *queries, int64_t head, const bf16 *from, int64_t dim, int64_t width) {
    widen_row((float *)queries + head * width, from, dim);
}

/* A block of keys [2, width, 16]. */
INLINE void lay_keys_vectors(float *block, const bf16 *const *keys, int64_t dim, int64_t width) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t i = 0; i < width; i += WIDTH) {
            words rows[16];
            float *to = block + (half * width + i) * LANES;
            transpose(keys + half * LANES, i, dim, rows);
            UNROLL for (int word = 0; word < 16; word++) {
                save(to + 2 * word * LANES, (floats)(rows[word] << 16));
                save(to + (2 * word + 1) * LANES, (floats)(rows[word] & 0xffff0000));
            }
        }
}

INLINE void score_some(
    int heads, const float *queries, const float *keys, int64_t width, float *scores, int64_t most_keys) {
    floats sums[MOST_HEADS][2] = {{{0}}};
    for (int64_t i = 0; i < width; i++)
        UNROLL for (int head = 0; head < heads; head++)
            UNROLL for (int half = 0; half < 2; half++)
                sums[head][half] += queries[head * width + i] * load(keys + (half * width + i) * LANES);
    UNROLL for (int head = 0; head < heads; head++)
        UNROLL for (int half = 0; half < 2; half++)
            save(scores + head * most_keys + half * LANES, sums[head][half]);
}

/* Scores of heads, from `first_head` on, against a block. */
INLINE void score_vectors(
    int is_row, int64_t heads, const void *queries, int64_t first_head, const float *block, int64_t width,
    float *scores, int64_t most_keys) {
    (void)is_row;
#define RUN(count, head)                                                                       \
    score_some(                                                                                \
        count, (const float *)queries + (first_head + (head)) * width, block, width,           \
        scores + (first_head + (head)) * most_keys, most_keys)
    IN_PARTS(heads, RUN);
#undef RUN
}

/* A block of values [32, width]. Returns whether all are finite: it is not known. */
INLINE int lay_values_vectors(float *block, const bf16 *const *values, int64_t dim, int64_t width) {
    for (int64_t at = 0; at < BLOCK; at++) widen_row(block + at * width, values[at], dim);
    return 0;
}

INLINE void add_some(
    int heads, const float *weights, int64_t most_keys, const float *values, int64_t first, int64_t stop,
    int64_t width, float *sums) {
    for (int64_t i = 0; i < width; i += WIDTH, values += WIDTH, sums += WIDTH) {
        floats parts[MOST_HEADS][2];
        UNROLL for (int head = 0; head < heads; head++)
            UNROLL for (int half = 0; half < 2; half++)
                parts[head][half] = load(sums + head * width + half * LANES);
        for (int64_t at = first; at < stop; at++)
            UNROLL for (int head = 0; head < heads; head++)
                UNROLL for (int half = 0; half < 2; half++)
                    parts[head][half] += weights[head * most_keys + at] * load(values + at * width + half * LANES);
        UNROLL for (int head = 0; head < heads; head++)
            UNROLL for (int half = 0; half < 2; half++)
                save(sums + head * width + half * LANES, parts[head][half]);
    }
}

/* Adds the values from first to stop of a block, times the weights at its positions, to the sums of heads. */
INLINE void add_vectors(
    int is_row, int64_t heads, int64_t first_head, const float *weights, int64_t most_keys, int64_t at,
    const float *block, int64_t first, int64_t stop, int64_t width, float *sums) {
    (void)is_row;
#define RUN(count, head)                                                                       \
    add_some(                                                                                  \
        count, weights + (first_head + (head)) * most_keys + at, most_keys, block, first, stop, width, \
        sums + (first_head + (head)) * width)
    IN_PARTS(heads, RUN);
#undef RUN
}

#endif
