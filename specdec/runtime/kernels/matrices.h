/* The two products of attention with AMX's matrices: tiles of 16 rows of 64 bytes, of bf16 summed up in fp32.

   Each head sums up for itself, in order of the dimensions or positions: how many heads there are shows in no bit. */

#ifndef SPECDEC_MATRICES_H
#define SPECDEC_MATRICES_H

#include "amx.h"
#include "attention.h"

/* Queries [heads, width] are in bf16, 16 heads in a tile, and a block of keys [2, width / 2, 16] in pairs of
   dimensions. Tiles 0 to 4 have 16 rows; 5 to 7 have those of the last heads of one row. */
INLINE_AMX void begin_matrices(int64_t fold) {
    int64_t last = (fold - 1) % 16 + 1;
    configure_tiles((const int64_t[]){16, 16, 16, 16, 16, last, last, last});
}

INLINE_AMX void end_matrices(void) { _tile_release(); }

INLINE_AMX void lay_query_matrices(void *queries, int64_t head, const bf16 *from, int64_t dim, int64_t width) {
    for (int64_t i = 0; i < width; i += WIDTH) copy_width((bf16 *)queries + head * width + i, from, i, dim);
}

INLINE_AMX void lay_keys_matrices(float *block, const bf16 *const *keys, int64_t dim, int64_t width) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t i = 0; i < width; i += WIDTH)
            transpose(keys + half * LANES, i, dim, (words *)block + (half * width + i) / 2);
}

#define SCORE(queries, keys, scores, QUERIES, ONE, OTHER)              \
    do {                                                               \
        _tile_zero(ONE);                                               \
        _tile_zero(OTHER);                                             \
        for (int64_t i = 0; i < width; i += WIDTH) {                   \
            _tile_loadd(QUERIES, (queries) + i, width * 2);            \
            _tile_loadd(3, (keys) + i / 2 * LANES, 64);                \
            _tile_loadd(4, (keys) + (width + i) / 2 * LANES, 64);      \
            _tile_dpbf16ps(ONE, QUERIES, 3);                           \
            _tile_dpbf16ps(OTHER, QUERIES, 4);                         \
        }                                                              \
        _tile_stored(ONE, (scores), most_keys * 4);                    \
        _tile_stored(OTHER, (scores) + LANES, most_keys * 4);          \
    } while (0)

/* `is_row`: of the heads of one row, and of no head behind them. Else heads are filled up to a multiple of 16. */
INLINE_AMX void score_matrices(
    int is_row, int64_t heads, const void *queries, int64_t first_head, const float *block, int64_t width,
    float *scores, int64_t most_keys) {
    const bf16 *from = (const bf16 *)queries + first_head * width;
    const uint32_t *keys = (const uint32_t *)block;
    scores += first_head * most_keys;
    MEMORY;
    int64_t head = 0;
    for (; head < heads - 16 * is_row; head += 16) SCORE(from + head * width, keys, scores + head * most_keys, 2, 0, 1);
    if (is_row) SCORE(from + head * width, keys, scores + head * most_keys, 7, 5, 6);
    MEMORY;
}

/* A block of values [16 pairs of positions, width]. Returns whether all are finite. */
INLINE_AMX int lay_values_matrices(float *block, const bf16 *const *values, int64_t dim, int64_t width) {
    words is_infinite = {0};
    for (int64_t pair = 0; pair < 16; pair++)
        for (int64_t i = 0; i < width; i += WIDTH) {
            bf16 one[WIDTH], other[WIDTH];
            copy_width(one, values[2 * pair], i, dim);
            copy_width(other, values[2 * pair + 1], i, dim);
            for (int half = 0; half < WIDTH; half += LANES) {
                words low = widen_half(one + half), high = widen_half(other + half);
                is_infinite |= (words)((low & 0x7f80) == 0x7f80) | (words)((high & 0x7f80) == 0x7f80);
                ((words *)block)[(pair * width + i + half) / LANES] = low | high << 16;
            }
        }
    uint32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= is_infinite[lane];
    return !any;
}

#define ADD(weights, values, sums, WEIGHTS, ONE, OTHER)                \
    do {                                                               \
        _tile_loadd(WEIGHTS, (weights), most_keys * 4);                \
        for (int64_t i = 0; i < width; i += WIDTH) {                   \
            _tile_loadd(ONE, (sums) + i, width * 4);                   \
            _tile_loadd(OTHER, (sums) + i + LANES, width * 4);         \
            _tile_loadd(3, (values) + i, width * 4);                   \
            _tile_loadd(4, (values) + i + LANES, width * 4);           \
            _tile_dpbf16ps(ONE, WEIGHTS, 3);                           \
            _tile_dpbf16ps(OTHER, WEIGHTS, 4);                         \
            _tile_stored(ONE, (sums) + i, width * 4);                  \
            _tile_stored(OTHER, (sums) + i + LANES, width * 4);        \
        }                                                              \
    } while (0)

/* Weights are in bf16, each row's in the first half of its scores. Those outside first and stop are 0. */
INLINE_AMX void add_matrices(
    int is_row, int64_t heads, int64_t first_head, const float *weights, int64_t most_keys, int64_t at,
    const float *block, int64_t first, int64_t stop, int64_t width, float *sums) {
    (void)first, (void)stop;
    const bf16 *from = (const bf16 *)(weights + first_head * most_keys) + at;
    const uint32_t *values = (const uint32_t *)block;
    sums += first_head * width;
    MEMORY;
    int64_t head = 0;
    for (; head < heads - 16 * is_row; head += 16) ADD(from + head * most_keys * 2, values, sums + head * width, 2, 0, 1);
    if (is_row) ADD(from + head * most_keys * 2, values, sums + head * width, 7, 5, 6);
    MEMORY;
}

#endif
