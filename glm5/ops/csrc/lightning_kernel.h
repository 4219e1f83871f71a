/* The scores of the fused indexer and its passes over the keys, written once and compiled once per instruction set by
 * lightning_variants.h, which defines before each inclusion:
 *
 *   NAME(x)   the function's name in this variant        TARGET   the function attribute that allows the instructions
 *   LANES     floats in one vector register              ROWS     (query, head) rows held in registers at once
 *   RELU(v)   max(0, v), a NaN stays a NaN               COMPRESS defined where AVX-512 can squeeze out lanes
 *   KEYS, VECTORS   keys and vectors of heads that are multiplied together where keys are read without packing;
 *                   undefined: they are always packed. TRANSPOSE(v) turns over LANES vectors: lane j of v[i] becomes
 *                   lane i of v[j].
 *
 * ROWS x 3 accumulators fill the register file, so every loaded value feeds several multiply-adds. A score is always
 * the same sum in the same order (width first, then heads) whatever tile it falls into: that is what makes a query's
 * result independent of its neighbours.
 */

#include "lightning_best.h"

typedef float NAME(vector) __attribute__((vector_size(4 * LANES), may_alias));

/* scores[row's query] += weight * ReLU(query row . key) for TILE rows and PANEL keys. */
TARGET static void NAME(score_tile)(const float *queries, const float *weights, float *const *scores,
                                    const float *panel, int64_t width) {
    for (int row = 0; row < TILE; row += ROWS) {
        for (int column = 0; column < PANEL; column += 3 * LANES) {
            NAME(vector) dot[ROWS][3] = {{{0}}};
            for (int64_t i = 0; i < width; i++) {
                const NAME(vector) *key = (const NAME(vector) *)(panel + i * PANEL + column);
                const NAME(vector) a = key[0], b = key[1], c = key[2];
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const float q = queries[i * TILE + row + r];
                    dot[r][0] += q * a;
                    dot[r][1] += q * b;
                    dot[r][2] += q * c;
                }
            }
            /* Rows of one query follow each other: their sum stays in registers until the query changes. */
            NAME(vector) *sum = (NAME(vector) *)(scores[row] + column), a = sum[0], b = sum[1], c = sum[2];
            UNROLL for (int r = 0; r < ROWS; r++) {
                if (r && scores[row + r] != scores[row + r - 1]) {
                    sum[0] = a, sum[1] = b, sum[2] = c;
                    sum = (NAME(vector) *)(scores[row + r] + column);
                    a = sum[0], b = sum[1], c = sum[2];
                }
                const float w = weights[row + r];
                a += w * RELU(dot[r][0]);
                b += w * RELU(dot[r][1]);
                c += w * RELU(dot[r][2]);
            }
            sum[0] = a, sum[1] = b, sum[2] = c;
        }
    }
}

#ifdef KEYS
/* Scores of a panel of keys that lie as the caller stored them, for one query: a lane is a head, and every value of a
 * key meets all heads at once. Turned over, a lane is a key, and the heads are added in the order of `score_tile`. */
TARGET static void NAME(score_rows)(const float *queries, const float *weights, float *scores, const float *keys,
                                    int64_t heads, int64_t width) {
    memset(scores, 0, sizeof(float) * PANEL);
    for (int64_t first = 0; first < heads; first += VECTORS * LANES, queries += VECTORS * LANES * width) {
        NAME(vector) dot[VECTORS][PANEL];
        for (int key = 0; key < PANEL; key += KEYS) {
            NAME(vector) part[VECTORS][KEYS] = {{{0}}};
            const float *row = keys + key * width;
            for (int64_t i = 0; i < width; i++, row++) {
                const NAME(vector) *q = (const NAME(vector) *)(queries + i * VECTORS * LANES);
                UNROLL for (int s = 0; s < KEYS; s += 2) {
                    const float a = row[s * width], b = row[(s + 1) * width];
                    UNROLL for (int v = 0; v < VECTORS; v++) {
                        part[v][s] += q[v] * a;
                        part[v][s + 1] += q[v] * b;
                    }
                }
            }
            UNROLL for (int v = 0; v < VECTORS; v++) UNROLL16 for (int s = 0; s < KEYS; s++) dot[v][key + s] = part[v][s];
        }
        for (int key = 0; key < PANEL; key += LANES) {
            NAME(vector) sum = *(NAME(vector) *)(scores + key);
            UNROLL for (int v = 0; v < VECTORS; v++) {
                const int64_t head = first + v * LANES;
                TRANSPOSE(dot[v] + key);
                UNROLL16 for (int h = 0; h < LANES; h++)
                    if (head + h < heads) sum += weights[head + h] * RELU(dot[v][key + h]);
            }
            *(NAME(vector) *)(scores + key) = sum;
        }
    }
}

/* [queries, heads, width] to [queries][heads / (VECTORS * LANES)][width][VECTORS * LANES], zeros beyond the last head. */
TARGET static void NAME(load_rows)(const job *work, scratch *own, int64_t first, int64_t last) {
    const int64_t heads = work->heads, width = work->width, wide = VECTORS * LANES, lanes = (heads + wide - 1) / wide * wide;
    memset(own->queries, 0, sizeof(float) * (size_t)((last - first) * lanes * width));
    for (int64_t t = first; t < last; t++) {
        for (int64_t h = 0; h < heads; h++) {
            const float *q = work->q + (t * heads + h) * width;
            float *packed = own->queries + ((t - first) * lanes + h / wide * wide) * width + h % wide;
            for (int64_t i = 0; i < width; i++) packed[i * wide] = q[i];
        }
    }
    memcpy(own->weights, work->w + first * heads, sizeof(float) * (size_t)((last - first) * heads));
}

/* Scores of one panel of keys for one query, without packing. */
TARGET static void NAME(score_unpacked)(const job *work, scratch *own, int64_t t, int64_t start) {
    const int64_t heads = work->heads, width = work->width, wide = VECTORS * LANES, lanes = (heads + wide - 1) / wide * wide;
    const float *keys = work->k + start * width;
    if (start + PANEL > work->keys) { /* the last keys: read no further */
        memset(own->panel, 0, sizeof(float) * PANEL * (size_t)width);
        keys = memcpy(own->panel, keys, sizeof(float) * (size_t)((work->keys - start) * width));
    }
    NAME(score_rows)(own->queries + t * lanes * width, own->weights + t * heads, own->scores + t * PANEL, keys, heads, width);
}
#endif

/* Scores of one panel of keys for all queries of a block, a tile of rows at a time. */
TARGET static void NAME(score_panel)(const job *work, scratch *own, int64_t first, int64_t queries, int64_t start) {
    const int64_t heads = work->heads, width = work->width, rows = queries * heads;
    const float *panel = work->panels ? work->panels + start * width : own->panel;
    const char *next = (const char *)(panel + PANEL * width); /* is fetched piece by piece, one per tile */
    const int64_t piece = work->panels ? (int64_t)sizeof(float) * PANEL * width * TILE / rows : 0;
    if (!work->panels) pack_panel(work->k, own->panel, start, work->keys, width);
    memset(own->scores, 0, sizeof(float) * PANEL * (size_t)queries);
    for (int64_t row = 0, t = 0; row < rows; row += TILE) {
        int seen = 0;
        while ((t + 1) * heads <= row) t++;
        for (int64_t u = t; u < queries && u * heads < row + TILE; u++)
            seen |= low_of(work, first + u) < start + PANEL && high_of(work, first + u) > start;
        if (!seen) continue;
        for (const char *end = next + piece; next < end; next += 64) __builtin_prefetch(next);
        NAME(score_tile)(own->queries + row * width, own->weights + row, own->targets + row, panel, width);
    }
}

#if !defined(KEYS) || defined(COMPRESS) /* the sieve of AVX-512 packs what passed */
/* Scores of `count` keys [count, width] for the one query that was loaded, packed first. */
TARGET static void NAME(score_collected)(const job *work, scratch *own, const float *keys, int64_t count) {
    pack_panel(keys, own->panel, 0, count, work->width);
    memset(own->scores, 0, sizeof(float) * PANEL);
    for (int64_t row = 0; row < work->heads; row += TILE)
        NAME(score_tile)(own->queries + row * work->width, own->weights + row, own->targets + row, own->panel, work->width);
}
#endif

/* Adds the scores of PANEL keys to the candidates of a query, of those keys that lie before `end`. */
TARGET static void NAME(offer)(const job *work, scratch *own, candidates *best, float *scores, int64_t start, int64_t end) {
    for (int64_t s = end - start; s < PANEL; s++) scores[s] = -INFINITY;
    if (best->count > own->room - PANEL - 16) NAME(keep_best)(best, work->best);
    NAME(push)(best, scores, start);
}

/* Select for the queries `first` to `last`, panel of keys after panel of keys. */
TARGET static void NAME(select_block)(const job *work, scratch *own, int64_t first, int64_t last) {
    const int64_t queries = last - first;
    int64_t lowest = work->keys, highest = 0;
#ifdef KEYS
    const int unpacked = !work->panels;
    if (unpacked) NAME(load_rows)(work, own, first, last);
    else load_queries(work, own, first, last);
#else
    const int unpacked = 0;
    load_queries(work, own, first, last);
#endif
    for (int64_t t = 0; t < queries; t++) {
        const int64_t lo = low_of(work, first + t), hi = high_of(work, first + t);
        own->best[t].count = 0;
        own->best[t].floor = -INFINITY;
        if (lo < hi && lo < lowest) lowest = lo;
        if (lo < hi && hi > highest) highest = hi;
    }
    for (int64_t start = lowest / PANEL * PANEL; start < highest; start += PANEL) {
        if (!unpacked) NAME(score_panel)(work, own, first, queries, start);
        for (int64_t t = 0; t < queries; t++) {
            const int64_t lo = low_of(work, first + t) - start, hi = high_of(work, first + t) - start;
            float *scores = own->scores + t * PANEL;
            if (lo >= hi || lo >= PANEL || hi <= 0) continue;
#ifdef KEYS
            if (unpacked) NAME(score_unpacked)(work, own, t, start);
#endif
            for (int64_t s = 0; s < lo; s++) scores[s] = -INFINITY;
            NAME(offer)(work, own, &own->best[t], scores, start, start + hi);
        }
    }
    for (int64_t t = 0; t < queries; t++) {
        candidates *best = &own->best[t];
        int64_t *chosen = work->chosen + (first + t) * work->best;
        if (best->count > work->best) NAME(keep_best)(best, work->best);
        for (int64_t i = 0; i < work->best; i++) chosen[i] = i < best->count ? best->place[i] : -1;
    }
}

/* Selects for one query among its keys from position `begin` to `end`, which lie in blocks of a pool. */
TARGET static void NAME(select_part)(const job *work, scratch *own, int64_t t, int64_t begin, int64_t end) {
#ifdef KEYS
    NAME(load_rows)(work, own, t, t + 1);
#else
    load_queries(work, own, t, t + 1);
#endif
    for (int64_t start = begin; start < end; start += PANEL) {
        const float *keys = panel_of(work, own, t, start);
        fetch_ahead(work, t, start);
#ifdef KEYS
        NAME(score_rows)(own->queries, own->weights, own->scores, keys, work->heads, work->width);
#else
        NAME(score_collected)(work, own, keys, PANEL);
#endif
        NAME(offer)(work, own, own->best, own->scores, start, end);
    }
}

static const kernel NAME(kernel) = {NAME(select_block), NAME(select_part), NAME(keep_best)};
