/* AMX: eight tiles of up to 16 rows of 64 bytes, whose products in bf16 are summed up in fp32. */

#ifndef SPECDEC_AMX_H
#define SPECDEC_AMX_H

#include "bf16.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_AMX
#include <immintrin.h>

#define WITH_AMX __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16")))
#define INLINE_AMX WITH_AMX INLINE
#define MEMORY __asm__ volatile("" ::: "memory") /* the compiler does not know that tiles are read from memory */

/* Gives each tile its number of rows; of one with 0 no use is made. */
INLINE_AMX void configure_tiles(const int64_t rows[8]) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = rows[tile] ? 64 : 0;
        config.rows[tile] = (uint8_t)rows[tile];
    }
    MEMORY;
    _tile_loadconfig(&config);
}
#endif

#endif
