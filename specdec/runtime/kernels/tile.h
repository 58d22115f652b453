/* Attention of one tile's rows from the heads that read one head of keys and values. Included once for each kind of
   products: PRODUCT(name) is its function of that name, IS_PACKED whether it takes weights in bf16. */

TARGET static void PRODUCT(attend_tile)(const Layer *layer, const Tile *tile, int64_t kv_head, char *memory) {
    int64_t dim = layer->dim, width = UP_TO(WIDTH, dim), most_keys = layer->most_keys, shared = tile->num_shared;
    int64_t fold = layer->num_heads / layer->num_kv_heads, heads = tile->num_rows * fold;
    const Row *rows = layer->rows + tile->first_row;
    const bf16 *keys = layer->keys + kv_head * dim, *values = layer->values + kv_head * dim, *found[BLOCK];
    Scratch scratch = divide(memory, UP_TO(16, heads), width);
    float *block = scratch.block, *scores = scratch.scores, *sums = scratch.sums;
    int64_t begin = shared, end = UP_TO(BLOCK, shared);
    int64_t first = 0, whole = shared; /* all rows attend to the keys from first to whole */

    PRODUCT(begin)(fold);
    for (int64_t row = 0; row < tile->num_rows; row++) {
        begin = MIN(begin, rows[row].first / BLOCK * BLOCK);
        first = MAX(first, rows[row].first);
        whole = MIN(whole, rows[row].stop);
        const bf16 *from = layer->queries + (rows[row].token * layer->stride + kv_head * fold) * dim;
        for (int64_t head = 0; head < fold; head++)
            PRODUCT(lay_query)(scratch.queries, row * fold + head, from + head * dim, dim, width);
    }

    for (int64_t at = begin; at < begin + AHEAD; at += BLOCK) ask_for(layer, tile, keys, NULL, at, shared);
    for (int64_t at = begin; at < shared; at += BLOCK) {
        ask_for(layer, tile, keys, NULL, at + AHEAD, shared);
        find(layer, tile, keys, NULL, at, shared, found);
        PRODUCT(lay_keys)(block, found, dim, width);
        PRODUCT(score)(0, heads, scratch.queries, 0, block, width, scores + at, most_keys);
    }
    for (int64_t at = begin; at < begin + AHEAD; at += BLOCK) ask_for(layer, tile, values, NULL, at, shared);
    for (int64_t row = 0; row < tile->num_rows; row++) {
        const int64_t *places = layer->places + rows[row].tail;
        int64_t num_tail = rows[row].num_tail, stop = num_tail ? shared + num_tail : rows[row].stop;
        for (int64_t at = 0; at < num_tail; at += BLOCK) {
            find(layer, tile, keys, places, at, num_tail, found);
            PRODUCT(lay_keys)(block, found, dim, width);
            PRODUCT(score)(1, fold, scratch.queries, row * fold, block, width, scores + shared + at, most_keys);
        }
        for (int64_t head = row * fold; head < (row + 1) * fold; head++)
            scratch.inverse[head] = softmax(
                IS_PACKED, scores + head * most_keys, begin, rows[row].first, stop, MAX(end, UP_TO(BLOCK, stop)),
                (float)layer->scaling, (float)layer->softcap);
    }

    memset(sums, 0, (size_t)(UP_TO(16, heads) * width) * sizeof(float));
    for (int64_t at = begin; at < shared; at += BLOCK) {
        ask_for(layer, tile, values, NULL, at + AHEAD, shared);
        find(layer, tile, values, NULL, at, shared, found);
        int is_finite = PRODUCT(lay_values)(block, found, dim, width);
        if ((first <= at && at + BLOCK <= whole) || is_finite) {
            PRODUCT(add)(0, heads, 0, scores, most_keys, at, block, 0, BLOCK, width, sums);
            continue;
        }
        /* Weights of 0 keep out no value that is infinite: such a row gets its own values only. */
        for (int64_t row = 0; row < tile->num_rows; row++) {
            int64_t from = MAX(rows[row].first - at, 0), to = MIN(rows[row].stop - at, BLOCK);
            if (from >= to) continue;
            if (IS_PACKED) {
                find(layer, tile, values, NULL, at, rows[row].stop, found);
                for (int64_t lane = 0; lane < from; lane++) found[lane] = NULL;
                PRODUCT(lay_values)(block, found, dim, width);
            }
            PRODUCT(add)(1, fold, row * fold, scores, most_keys, at, block, from, to, width, sums);
        }
    }
    for (int64_t row = 0; row < tile->num_rows; row++) {
        const int64_t *places = layer->places + rows[row].tail;
        for (int64_t at = 0; at < rows[row].num_tail; at += BLOCK) {
            int64_t from = MAX(rows[row].first - shared - at, 0), to = MIN(BLOCK, rows[row].num_tail - at);
            if (from >= to) continue;
            find(layer, tile, values, places, at, rows[row].num_tail, found);
            for (int64_t lane = 0; lane < from; lane++) found[lane] = NULL;
            PRODUCT(lay_values)(block, found, dim, width);
            PRODUCT(add)(1, fold, row * fold, scores, most_keys, shared + at, block, from, to, width, sums);
        }
        bf16 *to = layer->out + (rows[row].token * layer->num_heads + kv_head * fold) * dim;
        for (int64_t head = row * fold; head < (row + 1) * fold; head++, to += dim)
            for (int64_t i = 0; i < dim; i++) to[i] = narrow(sums[head * width + i] * scratch.inverse[head]);
    }
    PRODUCT(end)();
}
