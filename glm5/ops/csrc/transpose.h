/* Square blocks of floats turned over in registers: lane j of v[i] becomes lane i of v[j]. Needs UNROLL, UNROLL16. */

/* Turn over 16 x 16 floats. */
__attribute__((target("avx512f"))) static inline void transpose_16(__m512 *v) {
    __m512 a[16], b[16];
    UNROLL16 for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) { /* b[i + j] holds column j of every quarter of the rows i to i + 3 */
        for (int j = 0; j < 2; j++) {
            const __m512d low = (__m512d)a[i + j], high = (__m512d)a[i + j + 2];
            b[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
            b[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    }
    UNROLL for (int j = 0; j < 4; j++) { /* quarters 0 and 2, then 1 and 3, of eight rows each */
        const __m512 even = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
        const __m512 even_below = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
        const __m512 odd_below = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
        v[j] = _mm512_shuffle_f32x4(even, even_below, 0x88);
        v[j + 4] = _mm512_shuffle_f32x4(odd, odd_below, 0x88);
        v[j + 8] = _mm512_shuffle_f32x4(even, even_below, 0xdd);
        v[j + 12] = _mm512_shuffle_f32x4(odd, odd_below, 0xdd);
    }
}

/* Turn over 8 x 8 floats. */
__attribute__((target("avx2"))) static inline void transpose_8(__m256 *v) {
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) { /* b[i + j] holds column j of both halves of the rows i to i + 3 */
        for (int j = 0; j < 2; j++) {
            const __m256d low = (__m256d)a[i + j], high = (__m256d)a[i + j + 2];
            b[i + 2 * j] = (__m256)_mm256_unpacklo_pd(low, high);
            b[i + 2 * j + 1] = (__m256)_mm256_unpackhi_pd(low, high);
        }
    }
    UNROLL for (int j = 0; j < 4; j++) {
        v[j] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
        v[j + 4] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
    }
}
