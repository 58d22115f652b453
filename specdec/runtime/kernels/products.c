/* Products with a weight in bf16, by AMX: as fast as the weight can be read, for up to some 32 rows.

   A number of the result is summed up by itself, in order of the inputs: how many rows there are shows in no bit.
   The weight is packed (products.py): for each 32 outputs and 32 inputs two tiles, one after the other, of 16 pairs
   of inputs by 16 outputs. */

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
} Product;

#ifdef HAS_AMX

/* Of 16 gates and 16 numbers the products, after the activation. */
INLINE_AMX void gate_some(const float *sums, bf16 *out, int64_t gate) {
    if (gate == GELU)
        for (int i = 0; i < 16; i++) out[i] = narrow(gelu(sums[i]) * sums[16 + i]);
    else
        for (int i = 0; i < 16; i++) out[i] = narrow(silu(sums[i]) * sums[16 + i]);
}

/* Results of up to 32 rows and the chunk of outputs from `output` on. */
INLINE_AMX void multiply_chunk(const Product *product, int64_t row, int64_t output) {
    int64_t inputs = product->inputs, num_rows = MIN(MOST_ROWS, product->num_rows - row);
    const bf16 *x = product->x + row * inputs, *weight = product->weight + output * inputs;
    float sums[MOST_ROWS * OUTPUTS];
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
    if (product->gate != NO_GATE) {
        for (int64_t at = 0; at < num_rows; at++)
            gate_some(
                sums + at * OUTPUTS, product->out + ((row + at) * product->outputs + output) / 2, product->gate);
        return;
    }
    int64_t width = MIN(OUTPUTS, product->outputs - output);
    for (int64_t at = 0; at < num_rows; at++) {
        bf16 *out = product->out + (row + at) * product->outputs + output;
        for (int64_t i = 0; i < width; i++)
            out[i] = narrow(sums[at * OUTPUTS + i] + (product->bias ? product->bias[output + i] : 0));
    }
}

/* The chunks from `from` to `to`, for all rows. Tiles 0 and 1 are results of the first 16 rows, 2 and 3 of the
   others, 4 and 5 weights, 6 and 7 inputs. */
WITH_AMX static void multiply_chunks(const Product *product, int64_t from, int64_t to) {
    int64_t configured = 0;
    for (int64_t turn = 0; turn < product->num_rows; turn += TURN_ROWS)
        for (int64_t chunk = from; chunk < to; chunk++)
            for (int64_t row = turn; row < MIN(turn + TURN_ROWS, product->num_rows); row += MOST_ROWS) {
                int64_t num_rows = MIN(MOST_ROWS, product->num_rows - row);
                if (num_rows != configured) {
                    int64_t first = MIN(16, num_rows), second = num_rows - first;
                    configure_tiles((const int64_t[]){first, first, second, second, 16, 16, first, second});
                    configured = num_rows;
                }
                multiply_chunk(product, row, chunk * OUTPUTS);
            }
    _tile_release();
}

/* x times a packed weight, and a bias or a gate. Threads have neighbouring outputs, so that each reads on and on. */
void multiply(
    const bf16 *x, const bf16 *weight, const float *bias, bf16 *out, int64_t num_rows, int64_t inputs,
    int64_t outputs, int64_t gate, int64_t num_threads) {
    Product product = {x, weight, bias, out, num_rows, inputs, outputs, gate};
    int64_t num_chunks = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) if (num_threads > 1)
    for (int64_t part = 0; part < num_threads; part++)
        multiply_chunks(&product, num_chunks * part / num_threads, num_chunks * (part + 1) / num_threads);
}

#else

void multiply(
    const bf16 *x, const bf16 *weight, const float *bias, bf16 *out, int64_t num_rows, int64_t inputs,
    int64_t outputs, int64_t gate, int64_t num_threads) {
    /* Is not called where there is no AMX. */
    (void)x, (void)weight, (void)bias, (void)out, (void)num_rows, (void)inputs, (void)outputs, (void)gate;
    (void)num_threads;
}

#endif
