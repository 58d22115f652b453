/* Rows: which number of each is the largest, and moving them from slot to slot. */

#include "bf16.h"

#define LANES 32
#define PART (8 * LANES) /* numbers that are searched for the largest once more */

typedef int16_t ranks __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Numbers as integers of the same order, by which all NaNs are the largest and both zeros the same. */
INLINE ranks rank(ranks x) {
    ranks size = x & 0x7fff, sign = x >> 15, is_nan = size > 0x7f80;
    return (is_nan & 0x7fff) | (~is_nan & ((size ^ sign) - sign));
}

/* Those of up to 32 numbers, then the least. */
INLINE ranks rank_some(const bf16 *x, int64_t count) {
    bf16 some[LANES];
    for (int lane = 0; lane < LANES; lane++) some[lane] = lane < count ? x[lane] : 0xff80; /* -infinity */
    return rank(*(const ranks *)some);
}

INLINE ranks rank_at(const bf16 *x, int64_t at, int64_t size) {
    return at + LANES <= size ? rank(*(const ranks *)(x + at)) : rank_some(x + at, size - at);
}

/* The first of the largest numbers of each row [rows, size], or of its NaNs. */
FOR_EACH_CPU void arg_max(const bf16 *x, int64_t *index, int64_t rows, int64_t size) {
    for (int64_t row = 0; row < rows; row++, x += size) {
        int largest = -0x8000;
        int64_t first = 0;
        for (int64_t part = 0; part < size; part += PART) {
            ranks most = rank_at(x, part, size);
            for (int64_t at = part + LANES; at < MIN(part + PART, size); at += LANES) {
                ranks own = rank_at(x, at, size), is_more = own > most;
                most = (is_more & own) | (~is_more & most);
            }
            ranks is_more = most > (int16_t)largest;
            uint64_t any[sizeof(ranks) / 8], some = 0;
            memcpy(any, &is_more, sizeof any);
            for (size_t i = 0; i < sizeof any / 8; i++) some |= any[i];
            if (!some) continue;
            first = part;
            for (int lane = 0; lane < LANES; lane++) largest = MAX(largest, most[lane]);
        }
        index[row] = first;
        for (int64_t at = first; at < MIN(first + PART, size); at += LANES) {
            ranks own = rank_at(x, at, size);
            int lane = 0;
            while (lane < LANES && own[lane] != largest) lane++;
            if (lane == LANES) continue;
            index[row] = at + lane;
            break;
        }
    }
}

/* Copies rows of `row_bytes` each of several tensors from slots to others. All are read before one is written;
   `room` has num_rows * row_bytes of the largest. */
void move(
    char *const *tensors, const int64_t *row_bytes, int64_t num_tensors, const int64_t *sources,
    const int64_t *targets, int64_t num_rows, char *room) {
    for (int64_t tensor = 0; tensor < num_tensors; tensor++) {
        size_t size = (size_t)row_bytes[tensor];
        for (int64_t row = 0; row < num_rows; row++)
            memcpy(room + row * size, tensors[tensor] + sources[row] * size, size);
        for (int64_t row = 0; row < num_rows; row++)
            memcpy(tensors[tensor] + targets[row] * size, room + row * size, size);
    }
}
