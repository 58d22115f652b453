/* Products with a weight in bf16: as fast as the weight can be read, for up to some 32 rows with AMX, fewer with
   vectors.

   A number of the result is summed up by itself, in order of the inputs: how many rows there are shows in no bit.
   The weight is packed (products.py): for each 32 outputs and 32 inputs two tiles, one after the other, of 16 pairs
   of inputs by 16 outputs. A row of a tile is what AVX512-BF16 multiplies with a pair of inputs at once. */

#include "amx.h"

#define OUTPUTS 32   /* of a chunk */
#define MOST_ROWS 32 /* that read a chunk's weight at once */
#define TURN_ROWS 512 /* whose inputs stay in a core's cache */

typedef struct {
    const bf16 *x; /* [num_rows, inputs] */
    const bf16 *weight;
    const float *bias; /* [outputs], or NULL */
    bf16 *out;         /* [num_rows, outputs] */
    int64_t num_rows;
    int64_t inputs; /* a multiple of 32 */
    int64_t outputs;
    int64_t gate; /* NO_GATE, or which activation gates: a chunk is 16 gates and what they are for, and 16 outputs */
    int64_t has_matrices; /* whether to multiply with AMX */
} Product;

#ifdef HAS_AMX

/* Sums [num_rows, OUTPUTS] of up to 32 rows and a chunk's outputs, by tiles. Tiles 0 and 1 are sums of the first 16
   rows, 2 and 3 of the others, 4 and 5 weights, 6 and 7 inputs. */
WITH_AMX static void sum_by_tiles(
    const bf16 *x, int64_t num_rows, int64_t inputs, const bf16 *weight, float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    if (num_rows <= 16) {
        for (int64_t i = 0; i < inputs; i += 32, weight += 2 * 16 * 32) {
            _tile_loadd(6, x + i, inputs * 2);
            _tile_loadd(4, weight, 64);
            _tile_dpbf16ps(0, 6, 4);
            _tile_loadd(5, weight + 16 * 32, 64);
            _tile_dpbf16ps(1, 6, 5);
        }
    } else {
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < inputs; i += 32, weight += 2 * 16 * 32) {
            _tile_loadd(6, x + i, inputs * 2);
            _tile_loadd(7, x + 16 * inputs + i, inputs * 2);
            _tile_loadd(4, weight, 64);
            _tile_dpbf16ps(0, 6, 4);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, weight + 16 * 32, 64);
            _tile_dpbf16ps(1, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
        _tile_stored(2, sums + 16 * OUTPUTS, OUTPUTS * 4);
        _tile_stored(3, sums + 16 * OUTPUTS + 16, OUTPUTS * 4);
    }
    _tile_stored(0, sums, OUTPUTS * 4);
    _tile_stored(1, sums + 16, OUTPUTS * 4);
    MEMORY;
}

WITH_AMX static void begin_tiles(int64_t num_rows) {
    int64_t first = MIN(16, num_rows), second = num_rows - first;
    configure_tiles((const int64_t[]){first, first, second, second, 16, 16, first, second});
}

WITH_AMX static void end_tiles(void) { _tile_release(); }

#define AHEAD 8192     /* numbers of the weight from what is read to what is asked for */
#define VECTOR_ROWS 12 /* at once; registers would do for 14, which was not faster */
#define WITH_PAIRS __attribute__((target("arch=x86-64-v4,avx512bf16")))

/* The same of a constant number of rows, by vectors: a pair of a row's inputs times that of 16 outputs. */
WITH_PAIRS INLINE void sum_rows(int rows, const bf16 *x, int64_t inputs, const bf16 *weight, float *sums) {
    __m512 parts[VECTOR_ROWS][2];
    UNROLL for (int row = 0; row < rows; row++) parts[row][0] = parts[row][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += 32, weight += 2 * 16 * 32)
        for (int pair = 0; pair < 16; pair++) {
            __m512bh left = (__m512bh)_mm512_loadu_si512(weight + pair * 32);
            __m512bh right = (__m512bh)_mm512_loadu_si512(weight + (16 + pair) * 32);
            _mm_prefetch(weight + pair * 32 + AHEAD, _MM_HINT_T1);
            _mm_prefetch(weight + (16 + pair) * 32 + AHEAD, _MM_HINT_T1);
            UNROLL for (int row = 0; row < rows; row++) {
                int32_t both;
                memcpy(&both, x + row * inputs + i + 2 * pair, sizeof both);
                __m512bh inputs_of_row = (__m512bh)_mm512_set1_epi32(both);
                parts[row][0] = _mm512_dpbf16_ps(parts[row][0], inputs_of_row, left);
                parts[row][1] = _mm512_dpbf16_ps(parts[row][1], inputs_of_row, right);
            }
        }
    UNROLL for (int row = 0; row < rows; row++) {
        _mm512_storeu_ps(sums + row * OUTPUTS, parts[row][0]);
        _mm512_storeu_ps(sums + row * OUTPUTS + 16, parts[row][1]);
    }
}

WITH_PAIRS static void sum_by_vectors(
    const bf16 *x, int64_t num_rows, int64_t inputs, const bf16 *weight, float *sums) {
    int64_t num_parts = (num_rows + VECTOR_ROWS - 1) / VECTOR_ROWS;
    for (int64_t part = 0; part < num_parts; part++) {
        int64_t row = num_rows * part / num_parts, rows = num_rows * (part + 1) / num_parts - row;
        switch (rows) {
#define CASE(count) case count: sum_rows(count, x + row * inputs, inputs, weight, sums + row * OUTPUTS); break
            CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
            CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
#undef CASE
        }
    }
}

#else /* is not called where there is neither */
static void sum_by_tiles(const bf16 *x, int64_t num_rows, int64_t inputs, const bf16 *weight, float *sums) {
    (void)x, (void)num_rows, (void)inputs, (void)weight, (void)sums;
}
static void begin_tiles(int64_t num_rows) { (void)num_rows; }
static void end_tiles(void) {}
#define sum_by_vectors sum_by_tiles
#endif

/* Of sums the results: with a bias, or of 16 gates and 16 numbers the products after the activation. */
FOR_EACH_CPU static void finish(
    const Product *product, const float *sums, int64_t row, int64_t num_rows, int64_t output) {
    if (product->gate != NO_GATE) {
        bf16 *out = product->out + (row * product->outputs + output) / 2;
        for (int64_t at = 0; at < num_rows; at++, sums += OUTPUTS, out += product->outputs / 2)
            if (product->gate == GELU)
                for (int i = 0; i < 16; i++) out[i] = narrow(gelu(sums[i]) * sums[16 + i]);
            else
                for (int i = 0; i < 16; i++) out[i] = narrow(silu(sums[i]) * sums[16 + i]);
        return;
    }
    int64_t width = MIN(OUTPUTS, product->outputs - output);
    bf16 *out = product->out + row * product->outputs + output;
    for (int64_t at = 0; at < num_rows; at++, sums += OUTPUTS, out += product->outputs)
        for (int64_t i = 0; i < width; i++)
            out[i] = narrow(sums[i] + (product->bias ? product->bias[output + i] : 0));
}

/* The chunks from `from` to `to`, for all rows. */
static void multiply_chunks(const Product *product, int64_t from, int64_t to) {
    float sums[MOST_ROWS * OUTPUTS];
    int64_t configured = 0, inputs = product->inputs;
    for (int64_t turn = 0; turn < product->num_rows; turn += TURN_ROWS)
        for (int64_t chunk = from; chunk < to; chunk++)
            for (int64_t row = turn; row < MIN(turn + TURN_ROWS, product->num_rows); row += MOST_ROWS) {
                int64_t num_rows = MIN(MOST_ROWS, product->num_rows - row);
                const bf16 *x = product->x + row * inputs, *weight = product->weight + chunk * OUTPUTS * inputs;
                if (product->has_matrices && num_rows != configured) begin_tiles(configured = num_rows);
                (product->has_matrices ? sum_by_tiles : sum_by_vectors)(x, num_rows, inputs, weight, sums);
                finish(product, sums, row, num_rows, chunk * OUTPUTS);
            }
    if (configured) end_tiles();
}

/* x times a packed weight, and a bias or a gate. Threads have neighbouring outputs, so that each reads on and on. */
void multiply(
    const bf16 *x, const bf16 *weight, const float *bias, bf16 *out, int64_t num_rows, int64_t inputs,
    int64_t outputs, int64_t gate, int64_t has_matrices, int64_t num_threads) {
    Product product = {x, weight, bias, out, num_rows, inputs, outputs, gate, has_matrices};
    int64_t num_chunks = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) if (num_threads > 1)
    for (int64_t part = 0; part < num_threads; part++)
        multiply_chunks(&product, num_chunks * part / num_threads, num_chunks * (part + 1) / num_threads);
}
