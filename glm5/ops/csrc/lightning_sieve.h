/* A sieve before the scores of one query: products in bf16, twice as fast, say which keys may be chosen at all.
 *
 * In fp32 the products of 16 heads take longer than the memory takes to bring a key. So every key first gets a bound that
 * its score cannot exceed, and only keys whose bound is above the floor of the candidates get a score, in fp32 and by the
 * instructions that score every other key: the choice is that of the plain pass, to the bit. The bound is the same sum
 * over q and k rounded to bf16 (q', k'), plus what rounding can have taken away,
 *
 *     |q . k - q' . k'| <= sum over i of (|q_i - q'_i| (1 + 2^-8) + |q'_i| 2^-8) |k'_i|     (keys kept in bf16: no 2^-8),
 *
 * which, weighted with |w| and added up over the heads, is one more product with |k'|: the margin. A head with a negative
 * weight only lowers a score, so those come last, and only while more than FEW keys of a panel pass without them.
 *
 * The margin also covers the rounding of all sums. Bounds that are no numbers pass, and so does -inf, where a sum may have
 * left fp32. The instruction takes numbers below 2^-126 for zero; `slack` covers them. At worst, if most keys pass, the
 * sieve costs half of what the scores cost.
 */

#define SIFTS __attribute__((target("avx512f,avx512bw,avx512bf16,avx2,fma,popcnt")))
#define ALWAYS inline __attribute__((always_inline))
enum {
    FEW = 2,   /* keys of a panel: to score them costs less than to multiply all with more heads */
    AHEAD = 2, /* panels: the memory is asked for keys that long before they are read */
};
#define ROUNDING 0x1p-8f /* of a bf16, at most, relative to the rounded value */

/* Two values as a number of the panel or of a query, the first in the low half. */
static inline int32_t pair_of(uint16_t first, uint16_t second) { return (int32_t)(first | (uint32_t)second << 16); }

static inline uint16_t rounded_up(float value) {
    return value != value ? 0x7fc0 : (uint16_t)((bits_of_float(value < 0x1p-100f ? 0x1p-100f : value) + 0xffff) >> 16);
}

/* Adds a head's share to the margin of value `i` and gives its query's value in bf16. */
static inline uint16_t sift_value(const job *work, float q, float weight, float *margin) {
    const float relative = (work->pool.format == FP32 ? ROUNDING : 0) + 0x1p-22f * (float)(work->width + work->heads + 64);
    uint16_t half = bf16_of(q);
    if (!(half & 0x7f80)) half &= 0x8000;
    const float kept = float_of_bits((uint32_t)half << 16);
    *margin += fabsf(weight) * (fabsf(q - kept) * (1 + 2 * ROUNDING) + fabsf(kept) * relative) * (1 + 4 * ROUNDING);
    return half;
}

/* Query `t` in bf16, heads with a positive weight first, and its margin. */
static void load_sieve(const job *work, scratch *own, int64_t t) {
    sieve *sift = &own->sieve;
    const float *w = work->w + t * work->heads;
    int64_t used = 0;
    double sizes = 1;
    memset(sift->queries, 0, sizeof(int32_t) * (size_t)(padded_heads(work->heads) * sift->pairs));
    memset(sift->weights, 0, sizeof(float) * (size_t)padded_heads(work->heads));
    memset(sift->margin, 0, sizeof(float) * (size_t)(2 * sift->pairs));
    for (int lowering = 0; lowering < 2; lowering++) {
        for (int64_t h = 0; h < work->heads; h++) {
            if ((w[h] > 0) == lowering) continue;
            const float *q = work->q + (t * work->heads + h) * work->width;
            uint16_t *to = (uint16_t *)(sift->queries + used / SIEVE_ROWS * SIEVE_ROWS * sift->pairs + used % SIEVE_ROWS);
            for (int64_t i = 0; i < work->width; i++) {
                to[i / 2 * 2 * SIEVE_ROWS + i % 2] = sift_value(work, q[i], w[h], &sift->margin[i]);
                sizes += fabs((double)w[h]) * (1 + fabs((double)q[i]));
            }
            sift->weights[used++] = w[h];
        }
        if (!lowering) sift->raising = (used + SIEVE_ROWS - 1) / SIEVE_ROWS;
    }
    for (int64_t i = 0; i < sift->pairs; i++)
        sift->margin_pairs[i] = pair_of(rounded_up(sift->margin[2 * i]), rounded_up(sift->margin[2 * i + 1]));
    sift->slack = (float)(0x1p-120 * sizes * (double)(work->width + 1));
    sift->tiles = padded_heads(work->heads) / SIEVE_ROWS;
    const int64_t shares = work->pool.format == FP32 ? 2 : 1, steps = shares * sift->raising * sift->pairs;
    const int64_t lines = SIEVE_KEYS * row_bytes(&work->pool) / 64;
    sift->at_once = steps ? (lines + steps - 1) / steps : 0;
}

/* Walks through the memory of a query's keys ahead of the panels. */
typedef struct {
    const job *work;
    int64_t t, position, limit; /* the next key to ask for, and where to stop */
    const char *line, *last;    /* what is left of the run of keys before it */
} walk;

/* Asks the memory for the next lines. A panel's are spread over all the work on an earlier one, of fp32 about half over the
 * products with heads, else all: at once they would wait for each other, and the memory would rest meanwhile. */
SIFTS static ALWAYS void ask(walk *ahead, const store *keys, int64_t lines) {
    for (; lines > 0; lines--, ahead->line += 64) {
        if (ahead->line >= ahead->last) {
            if (ahead->position >= ahead->limit) return;
            const int64_t page = ahead->work->page, page_end = ahead->position - ahead->position % page + page;
            const int64_t end = page_end < ahead->limit ? page_end : ahead->limit;
            ahead->line = stored_row(keys, slot_of(ahead->work, ahead->t, ahead->position));
            ahead->last = ahead->line + (end - ahead->position) * row_bytes(keys);
            ahead->line -= (uintptr_t)ahead->line % 64;
            ahead->position = end;
        }
        __builtin_prefetch(ahead->line, 0, 2); /* see `fetch` */
    }
}

/* 32 values of a key from `column` on in bf16, those of `mask`, zeros elsewhere. */
SIFTS static ALWAYS __m512 load_pairs(const store *keys, int64_t slot, int64_t column, __mmask32 mask) {
    const char *at = stored_row(keys, slot);
    if (keys->format == BF16) return (__m512)_mm512_maskz_loadu_epi16(mask, at + 2 * column);
    __m512 low, high;
    if (keys->format == FP32) {
        low = _mm512_maskz_loadu_ps((__mmask16)mask, at + 4 * column);
        high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), at + 4 * column + 64);
    } else { /* see `widen`; the columns of a register lie in one group */
        const __m512i bytes = _mm512_maskz_loadu_epi8(mask, at + column);
        const __m512i low_bits = _mm512_cvtepi8_epi32(_mm512_castsi512_si128(bytes));
        const __m512i high_bits = _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, 1));
        const __m512i kept = _mm512_set1_epi32((int32_t)0x87f00000u);
        const __m512 scale = _mm512_set1_ps(scale_of(keys->scales[slot * groups_of(keys) + column / GROUP]));
        const __m512 bias = _mm512_set1_ps(0x1p120f);
        low = _mm512_mul_ps(_mm512_mul_ps((__m512)_mm512_and_si512(_mm512_slli_epi32(low_bits, 20), kept), bias), scale);
        high = _mm512_mul_ps(_mm512_mul_ps((__m512)_mm512_and_si512(_mm512_slli_epi32(high_bits, 20), kept), bias), scale);
    }
    return (__m512)_mm512_cvtne2ps_pbh(high, low);
}

/* The keys at `count` slots to [pairs][SIEVE_KEYS], 16 at a time; beyond the last ones others stand. */
SIFTS static ALWAYS void pack_pairs(const store *keys, const sieve *sift, const int64_t *slots, int64_t count, walk *ahead) {
    for (int64_t first = 0; first < count; first += 16) {
        for (int64_t column = 0; column < keys->columns; column += 32) {
            const int64_t left = keys->columns - column;
            const __mmask32 mask = left < 32 ? (1u << left) - 1 : 0xffffffffu;
            __m512 v[16];
            UNROLL16 for (int s = 0; s < 16; s++) v[s] = load_pairs(keys, slots[first + s], column, mask);
            transpose_16(v);
            UNROLL16 for (int i = 0; i < 16; i++)
                _mm512_store_ps((float *)sift->panel + (column / 2 + i) * SIEVE_KEYS + first, v[i]);
            ask(ahead, keys, keys->format == FP32 ? 2 : 0);
        }
    }
}

/* Adds the share of some tiles of heads to the bounds of a panel. */
SIFTS static ALWAYS void raise_bounds(const sieve *sift, __m512 *bound, int64_t tile, int64_t end, const store *keys,
                                      walk *ahead) {
    const __m512 zero = _mm512_setzero_ps();
    const int32_t *q = sift->queries + tile * SIEVE_ROWS * sift->pairs;
    for (; tile < end; tile++) {
        __m512 dot[SIEVE_ROWS][4];
        UNROLL for (int r = 0; r < SIEVE_ROWS; r++) UNROLL for (int c = 0; c < 4; c++) dot[r][c] = zero;
        for (int64_t i = 0; i < sift->pairs; i++, q += SIEVE_ROWS) {
            __m512bh key[4];
            UNROLL for (int c = 0; c < 4; c++) key[c] = (__m512bh)_mm512_load_si512(sift->panel + i * SIEVE_KEYS + 16 * c);
            UNROLL for (int r = 0; r < SIEVE_ROWS; r++) {
                const __m512bh value = (__m512bh)_mm512_set1_epi32(q[r]);
                UNROLL for (int c = 0; c < 4; c++) dot[r][c] = _mm512_dpbf16_ps(dot[r][c], key[c], value);
            }
            ask(ahead, keys, sift->at_once);
        }
        UNROLL for (int r = 0; r < SIEVE_ROWS; r++) {
            const __m512 weight = _mm512_set1_ps(sift->weights[tile * SIEVE_ROWS + r]);
            UNROLL for (int c = 0; c < 4; c++) bound[c] = _mm512_fmadd_ps(_mm512_max_ps(zero, dot[r][c]), weight, bound[c]);
        }
    }
}

SIFTS static ALWAYS uint64_t passing(const __m512 *bound, float floor) {
    uint64_t pass = 0;
    UNROLL for (int c = 0; c < 4; c++) {
        const __mmask16 over = _mm512_cmp_ps_mask(bound[c], _mm512_set1_ps(floor), _CMP_NLE_UQ);
        const __mmask16 lost = _mm512_cmp_ps_mask(bound[c], _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
        pass |= (uint64_t)(over | lost) << 16 * c;
    }
    return pass;
}

/* Which keys of the panel may be chosen, a bit each. */
SIFTS static ALWAYS uint64_t sift_panel(const sieve *sift, float floor, const store *keys, walk *ahead) {
    const __m512i size = _mm512_set1_epi32(0x7fff7fff);
    const __m512 zero = _mm512_setzero_ps();
    __m512 bound[4] = {zero, zero, zero, zero};
    for (int64_t i = 0; i < sift->pairs; i++) {
        const __m512bh margin = (__m512bh)_mm512_set1_epi32(sift->margin_pairs[i]);
        UNROLL for (int c = 0; c < 4; c++) {
            const __m512i key = _mm512_load_si512(sift->panel + i * SIEVE_KEYS + 16 * c);
            bound[c] = _mm512_dpbf16_ps(bound[c], (__m512bh)_mm512_and_si512(key, size), margin);
        }
        ask(ahead, keys, keys->format == FP32 ? 2 : 0);
    }
    raise_bounds(sift, bound, 0, sift->raising, keys, ahead);
    uint64_t pass = passing(bound, floor);
    if (__builtin_popcountll(pass) > FEW && sift->raising < sift->tiles) {
        raise_bounds(sift, bound, sift->raising, sift->tiles, keys, ahead);
        pass &= passing(bound, floor);
    }
    return pass;
}

/* Scores what passed in fp32 and gives what is above the floor to the candidates. */
static void score_passed(const job *work, scratch *own, int64_t count) {
    candidates *best = own->best;
    if (!count) return;
    score_collected_avx512(work, own, own->rows, count);
    if (best->count > own->room - PANEL - 16) keep_best_avx512(best, work->best);
    for (int64_t i = 0; i < count; i++) {
        best->value[best->count] = own->scores[i];
        best->place[best->count] = own->places[i];
        best->count += own->scores[i] > best->floor;
    }
}

/* `select_part` of lightning_kernel.h by way of the sieve; the format of the keys is known where it is compiled. */
SIFTS static ALWAYS void sift_part(const job *work, scratch *own, store keys, int64_t t, int64_t begin, int64_t end) {
    const sieve *sift = &own->sieve;
    walk ahead = {.work = work, .t = t, .position = begin};
    int64_t passed = 0;
    load_queries(work, own, t, t + 1);
    load_sieve(work, own, t);
    for (int64_t start = begin; start < end; start += SIEVE_KEYS) {
        const int64_t until = start + SIEVE_KEYS < end ? start + SIEVE_KEYS : end;
        int64_t *slots = sift->slots, count = slots_of(work, t, start, until, slots);
        for (int64_t i = count; i % 16; i++) slots[i] = slots[i - 1]; /* whole registers: the last key again */
        uint64_t pass = count < 64 ? (1ull << count) - 1 : ~0ull;
        ahead.limit = until + AHEAD * SIEVE_KEYS < end ? until + AHEAD * SIEVE_KEYS : end;
        if (own->best->floor > -INFINITY) {
            pack_pairs(&keys, sift, slots, count, &ahead);
            pass &= sift_panel(sift, own->best->floor - sift->slack, &keys, &ahead);
        }
        ask(&ahead, &keys, INT64_MAX); /* what is left, or all while there is no floor */
        for (; pass; pass &= pass - 1) {
            const int key = __builtin_ctzll(pass);
            widen(own->rows + passed * work->width, &keys, slots[key]);
            own->places[passed++] = (int32_t)(start + key);
            if (passed == PANEL) score_passed(work, own, passed), passed = 0;
        }
    }
    score_passed(work, own, passed);
}

SIFTS static void select_part_sifted(const job *work, scratch *own, int64_t t, int64_t begin, int64_t end) {
    store keys = work->pool;
    if (keys.format == FP32) keys.format = FP32, sift_part(work, own, keys, t, begin, end);
    else if (keys.format == BF16) keys.format = BF16, sift_part(work, own, keys, t, begin, end);
    else keys.format = FP8, sift_part(work, own, keys, t, begin, end);
}

static const kernel kernel_sifted = {select_block_avx512, select_part_sifted, keep_best_avx512};
