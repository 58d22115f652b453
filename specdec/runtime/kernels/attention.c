/* Attention of the rows of a pass over a paged pool of keys and values, on a CPU in bf16.

   Every row attends to its own keys in order of their positions, a block of 32 positions after the other. So a row's
   bits depend on its own keys alone, whether it is computed alone or beside others, in a chain or in a tree, and
   wherever its keys lie. What rows share is the work of laying out the keys that they have in common. */

#include "amx.h"
#include "attention.h"
#include "vectors.h"

#ifdef HAS_AMX
#include "matrices.h"
#endif

int omp_get_thread_num(void);

/* Memory of a thread; heads are filled up to a multiple of 16. */
typedef struct {
    float *block;   /* of keys or values, at most [32, width] in fp32 */
    float *queries; /* [heads, width] */
    float *sums;    /* [heads, width] */
    float *inverse; /* 1 / the sum of a head's weights */
    float *scores;  /* [heads, most_keys], then the weights */
} Scratch;

INLINE Scratch divide(char *memory, int64_t heads, int64_t width) {
    Scratch scratch = {.block = (float *)memory};
    scratch.queries = scratch.block + BLOCK * width;
    scratch.sums = scratch.queries + heads * width;
    scratch.inverse = scratch.sums + heads * width;
    scratch.scores = scratch.inverse + heads;
    return scratch;
}

/* Scores become softcap * tanh(scores * scaling / softcap); tanh(x) is 1 - 2 / (exp(2 x) + 1). */
INLINE void cap(float *scores, int64_t begin, int64_t end, float scaling, float softcap) {
    for (int64_t at = begin; at < end; at += LANES) {
        floats x = load(scores + at) * (2 * scaling / softcap);
        x = choose((words)(x > 80.0f), (floats){0} + 80.0f, x);
        save(scores + at, softcap * (1.0f - 2.0f / (exponentials(x) + 1.0f)));
    }
}

/* Scores [begin, end), of which those from first to stop count, to weights; the others become 0. Returns 1 / the sum
   of the weights. `is_packed`: weights are rounded to bf16, and lie side by side from the first score's place on. */
INLINE float softmax(
    int is_packed, float *scores, int64_t begin, int64_t first, int64_t stop, int64_t end, float scaling,
    float softcap) {
    int64_t from = first / BLOCK * BLOCK, to = UP_TO(BLOCK, stop);
    bf16 *packed = (bf16 *)scores;
    if (softcap > 0) {
        cap(scores, from, to, scaling, softcap);
        scaling = 1;
    }
    for (int64_t at = from; at < first; at++) scores[at] = -INFINITY;
    for (int64_t at = stop; at < to; at++) scores[at] = -INFINITY;
    floats most = load(scores + from), sums = {0};
    for (int64_t at = from + LANES; at < to; at += LANES) {
        floats x = load(scores + at);
        most = choose((words)(x > most), x, most);
    }
    float largest = most[0], total = 0;
    for (int lane = 1; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
    for (int64_t at = begin; at < from; at++) is_packed ? (packed[at] = 0) : (scores[at] = 0);
    for (int64_t at = from; at < to; at += LANES) {
        floats weights = exponentials((load(scores + at) - largest) * scaling);
        sums += weights;
        if (is_packed)
            for (int lane = 0; lane < LANES; lane++) packed[at + lane] = narrow(weights[lane]);
        else
            save(scores + at, weights);
    }
    for (int64_t at = to; at < end; at++) is_packed ? (packed[at] = 0) : (scores[at] = 0);
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return 1.0f / total;
}

#define PRODUCT(name) name##_vectors
#define TARGET FOR_EACH_CPU
#define IS_PACKED 0
#include "tile.h"
#undef PRODUCT
#undef TARGET
#undef IS_PACKED

#ifdef HAS_AMX
#define PRODUCT(name) name##_matrices
#define TARGET WITH_AMX
#define IS_PACKED 1
#include "tile.h"
#else
#define attend_tile_matrices attend_tile_vectors
#endif

/* Attention of all rows. Threads are those of torch: OpenMP's functions are found in the library that it uses. */
void attend(const Layer *layer) {
    int64_t num_tasks = layer->num_tiles * layer->num_kv_heads, row_size = layer->num_heads * layer->dim;
    memset(layer->out + layer->num_tokens * row_size, 0, (size_t)(layer->num_fill * row_size) * sizeof(bf16));
#pragma omp parallel for schedule(dynamic) num_threads(layer->num_threads) if (num_tasks > 1 && layer->num_threads > 1)
    for (int64_t task = 0; task < num_tasks; task++)
        (layer->has_matrices ? attend_tile_matrices : attend_tile_vectors)(
            layer, layer->tiles + task / layer->num_kv_heads, task % layer->num_kv_heads,
            layer->scratch + omp_get_thread_num() * layer->scratch_bytes);
}
