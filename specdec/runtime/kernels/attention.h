/* What a pass tells its attention (attention.py fills it in), and 32 keys at a time of a paged pool. */

#ifndef SPECDEC_ATTENTION_H
#define SPECDEC_ATTENTION_H

#include "bf16.h"

#define LANES 16 /* fp32 numbers of a vector */
#define BLOCK 32 /* positions, from a multiple on, whose keys are computed with at once */
#define AHEAD (2 * BLOCK) /* positions from what is read to what is asked for: a head's rows lie apart in memory */
#define WIDTH 32 /* dimensions are filled up to a multiple with zeros, which add nothing */
#define UP_TO(multiple, x) (((x) + (multiple) - 1) / (multiple) * (multiple))

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

/* Rows that are computed together: neighbours in one session. */
typedef struct {
    int64_t num_rows;
    int64_t first_row;  /* of all rows of the pass */
    int64_t table;      /* where the session's block table begins */
    int64_t num_shared; /* its rows read keys of the positions before this one from where they are */
} Tile;

/* Keys of a row: those from first to stop that its tile shares, then those of its tail. */
typedef struct {
    int64_t token; /* which row of queries and output it is */
    int64_t first;
    int64_t stop;
    int64_t tail; /* where its tail begins in `places`: keys of the positions from num_shared on */
    int64_t num_tail;
} Row;

typedef struct {
    const bf16 *queries; /* [tokens, stride, dim] */
    const bf16 *keys;    /* [slots, num_kv_heads, dim] */
    const bf16 *values;
    bf16 *out; /* [tokens and rows that fill up, num_heads, dim] */
    const Tile *tiles;
    const Row *rows;
    const int64_t *tables; /* blocks of each session */
    const int64_t *places; /* of keys that are elsewhere than their position says */
    char *scratch;
    int64_t scratch_bytes; /* of a thread */
    int64_t num_tokens;
    int64_t num_fill; /* rows of the output behind the tokens, which become 0 */
    int64_t num_tiles;
    int64_t most_keys; /* of a row, a multiple of BLOCK */
    int64_t block_tokens;
    int64_t stride;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t dim;
    int64_t num_threads;
    int64_t has_matrices; /* whether to multiply with AMX */
    double scaling;
    double softcap; /* 0: none */
} Layer;

INLINE floats load(const float *from) { return *(const floats *)from; }
INLINE void save(float *to, floats x) { *(floats *)to = x; }
INLINE words widen_half(const bf16 *from) { return __builtin_convertvector(*(const halves *)from, words); }
INLINE floats choose(words mask, floats yes, floats no) {
    return (floats)((mask & (words)yes) | (~mask & (words)no));
}

/* `exponential` of a vector, but 0 below -87. */
INLINE floats exponentials(floats x) {
    words is_nothing = (words)(x < -87.0f);
    x = choose(is_nothing, (floats){0}, x);
    floats shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    floats rest = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    floats power = (floats)(((words)shifted + 127) << 23);
    return choose(is_nothing, (floats){0}, (sum * rest * rest + rest + 1.0f) * power);
}

/* Finds the keys or values of a block in the pool of one head, NULL behind the last one. `places` NULL: they are
   where their positions say. */
INLINE void find(
    const Layer *layer, const Tile *tile, const bf16 *pool, const int64_t *places, int64_t at, int64_t stop,
    const bf16 **found) {
    int64_t size = layer->block_tokens, count = MIN(BLOCK, stop - at), slot_size = layer->num_kv_heads * layer->dim;
    for (int64_t lane = 0; lane < count; lane++) {
        /* Blocks of the pool consist of whole blocks of ours: in those one place leads to the next. */
        int64_t place = places ? places[at + lane] : at;
        if (places || !lane)
            found[lane] = pool + (layer->tables[tile->table + place / size] * size + place % size) * slot_size;
        else
            found[lane] = found[lane - 1] + slot_size;
    }
    for (int64_t lane = count; lane < BLOCK; lane++) found[lane] = NULL;
}

/* Asks for the keys or values of a block before they are read. */
INLINE void ask_for(
    const Layer *layer, const Tile *tile, const bf16 *pool, const int64_t *places, int64_t at, int64_t stop) {
    const bf16 *found[BLOCK];
    if (at >= stop) return;
    find(layer, tile, pool, places, at, stop, found);
    for (int64_t lane = 0; lane < MIN(BLOCK, stop - at); lane++)
        for (int64_t i = 0; i < layer->dim; i += 32) __builtin_prefetch(found[lane] + i, 0, 2);
}

/* Dimensions of a row from i on, WIDTH of them: those that there are, then zeros. */
INLINE void copy_width(bf16 *to, const bf16 *from, int64_t i, int64_t dim) {
    if (from && i + WIDTH <= dim) {
        memcpy(to, from + i, WIDTH * sizeof(bf16));
    } else {
        memset(to, 0, WIDTH * sizeof(bf16));
        if (from) memcpy(to, from + i, (size_t)(dim - i) * sizeof(bf16));
    }
}

#define EXCHANGE(distance, ...)                                          \
    UNROLL for (int i = 0; i < 16; i++) if (!(i & distance)) {           \
        words one = rows[i], other = rows[i + distance];                 \
        const words low = {__VA_ARGS__};                                 \
        rows[i] = __builtin_shuffle(one, other, low);                    \
        rows[i + distance] = __builtin_shuffle(one, other, low + distance); \
    }

/* Of 16 keys the dimensions i to i + WIDTH, two in each word, turned into rows: [16 pairs of dimensions, 16]. */
INLINE void transpose(const bf16 *const *keys, int64_t i, int64_t dim, words *rows) {
    for (int lane = 0; lane < 16; lane++) copy_width((bf16 *)&rows[lane], keys[lane], i, dim);
    EXCHANGE(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
    EXCHANGE(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
    EXCHANGE(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
    EXCHANGE(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
}

#endif
