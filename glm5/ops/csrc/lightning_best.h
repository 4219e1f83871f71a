/* The best of many scores, in order of position: part of lightning_kernel.h. */

#ifdef COMPRESS
/* Append those of 16 candidates that `mask` names and return the new count. Writes 16 places beyond the old one. */
TARGET static inline int64_t NAME(append)(candidates *to, int64_t count, __m512 value, __m512i place, __mmask16 mask) {
    _mm512_storeu_ps(to->value + count, _mm512_maskz_compress_ps(mask, value));
    _mm512_storeu_si512(to->place + count, _mm512_maskz_compress_epi32(mask, place));
    return count + __builtin_popcount(mask);
}
#endif

/* Cut the candidates to the `k` best. They stay in order of position, so among equals the first ones are kept. */
TARGET static void NAME(keep_best)(candidates *have, int64_t k) {
    const float *value = have->value;
    const int64_t count = have->count;
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < count; i++) {
        const int32_t rank = rank_of(value[i]);
        least = rank < least ? rank : least;
        most = rank > most ? rank : most;
    }
    /* Bisect over the representable floats for the largest bound that k candidates reach: counting is a vector loop. */
    int64_t low = least, high = most;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        const float bound = float_of(middle);
        int32_t reach = 0;
        for (int64_t i = 0; i < count; i++) reach += value[i] >= bound;
        if (reach < k) high = middle - 1;
        else low = middle;
        if (reach == k) break;
    }
    const float bound = float_of(low);
    int32_t above = 0;
    for (int64_t i = 0; i < count; i++) above += value[i] > bound;
    int64_t equals = k - above, kept = 0;
#ifdef COMPRESS
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 real = count - i < 16 ? (1u << (count - i)) - 1 : 0xffff;
        const __m512 v = _mm512_load_ps(value + i);
        const __mmask16 over = _mm512_mask_cmp_ps_mask(real, v, _mm512_set1_ps(bound), _CMP_GT_OQ);
        uint32_t equal = _mm512_mask_cmp_ps_mask(real, v, _mm512_set1_ps(bound), _CMP_EQ_OQ);
        while (__builtin_popcount(equal) > equals) equal ^= 1u << (31 - __builtin_clz(equal));
        equals -= __builtin_popcount(equal);
        kept = NAME(append)(have, kept, v, _mm512_load_si512(have->place + i), over | (__mmask16)equal);
    }
#else
    for (int64_t i = 0; i < count; i++) {
        const float v = value[i];
        const int equal = (v == bound) & (equals > 0);
        have->value[kept] = v;
        have->place[kept] = have->place[i];
        kept += (v > bound) | equal;
        equals -= equal;
    }
#endif
    have->count = kept;
    have->floor = bound;
}

/* Append the scores above the floor. NaN and -inf never are; an equal of the floor comes later and so loses the tie. */
TARGET static void NAME(push)(candidates *have, const float *scores, int64_t start) {
    const float floor = have->floor;
    int64_t count = have->count;
#ifdef COMPRESS
    __m512i place = _mm512_add_epi32(_mm512_set1_epi32((int32_t)start),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int s = 0; s < PANEL; s += 16) {
        const __m512 v = _mm512_load_ps(scores + s);
        const __mmask16 over = _mm512_cmp_ps_mask(v, _mm512_set1_ps(floor), _CMP_GT_OQ);
        if (over) count = NAME(append)(have, count, v, place, over);
        place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
#else
    for (int s = 0; s < PANEL; s += 16) {
        int over = 0;
        for (int j = s; j < s + 16; j++) over |= scores[j] > floor;
        if (!over) continue;
        for (int j = s; j < s + 16; j++) {
            have->value[count] = scores[j];
            have->place[count] = (int32_t)start + j;
            count += scores[j] > floor;
        }
    }
#endif
    have->count = count;
}
