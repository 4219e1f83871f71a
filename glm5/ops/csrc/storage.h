/* Rows of numbers as a cache keeps them: fp32, bf16, or fp8 with a power of two per GROUP columns, kept as a byte.
 *
 * The formats are those of glm5/engine/pool.py, which is the truth: writing and reading agree with its `to_fp8` and
 * `from_fp8` (and with PyTorch's casts to and from bf16) to the bit, but for what is written of a group that is not
 * finite, which reads as NaN either way. */

enum { FP32, BF16, FP8, FORMATS, GROUP = 64 };

typedef struct {
    char *at;
    uint8_t *scales; /* [rows, groups] of fp8 */
    int64_t rows, columns, format;
} store;

static inline int64_t row_bytes(const store *s) {
    return s->columns * (s->format == FP32 ? 4 : s->format == BF16 ? 2 : 1);
}

static inline char *stored_row(const store *s, int64_t r) { return s->at + r * row_bytes(s); }

static inline int64_t groups_of(const store *s) { return (s->columns + GROUP - 1) / GROUP; }

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* What a scale byte stands for: 2^(byte - 127), or NaN. */
static inline float scale_of(uint8_t byte) { return byte == 255 ? NAN : float_of_bits((uint32_t)byte << 23); }

/* One row in fp32. Inlined: each caller's instruction set is used. */
static inline __attribute__((always_inline)) void widen(float *to, const store *from, int64_t r) {
    const char *at = stored_row(from, r);
    if (from->format == FP32) {
        memcpy(to, at, sizeof(float) * (size_t)from->columns);
    } else if (from->format == BF16) {
        const uint16_t *half = (const uint16_t *)(const void *)at;
        for (int64_t i = 0; i < from->columns; i++) to[i] = float_of_bits((uint32_t)half[i] << 16);
    } else { /* moved into an fp32, a byte is its value times 2^-120 */
        const int8_t *byte = (const int8_t *)at;
        for (int64_t g = 0; g < groups_of(from); g++) {
            const float scale = scale_of(from->scales[r * groups_of(from) + g]);
            const int64_t end = (g + 1) * GROUP < from->columns ? (g + 1) * GROUP : from->columns;
            for (int64_t i = g * GROUP; i < end; i++)
                to[i] = float_of_bits(((uint32_t)(int32_t)byte[i] << 20) & 0x87f00000u) * 0x1p120f * scale;
        }
    }
}

/* To the nearest bf16, the even one of two. */
static inline uint16_t bf16_of(float value) {
    const uint32_t bits = bits_of_float(value);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* To the nearest e4m3, the even one of two, for values of at most 448. */
static inline uint8_t e4m3_of(float value) {
    const uint32_t bits = bits_of_float(value), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size < 0x3c800000u) /* below 2^-6 codes are 2^-9 apart, as floats are beside 2^14 */
        return (uint8_t)(sign | (bits_of_float(float_of_bits(size) + 0x1p14f) - bits_of_float(0x1p14f)));
    return (uint8_t)(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

/* The least power of two that brings the largest of some values to 448 or less, as a scale byte. */
static inline uint8_t scale_byte(const float *x, int64_t count) {
    float largest = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(x[i])) return 255;
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    }
    int exponent;
    const float mantissa = frexpf(largest / 448.0f, &exponent);
    exponent -= mantissa == 0.5f;
    return (uint8_t)(127 + (exponent < -126 ? -126 : exponent));
}

/* Stores one row. */
static inline void narrow(const store *to, int64_t r, const float *from) {
    char *at = stored_row(to, r);
    if (to->format == FP32) {
        memcpy(at, from, sizeof(float) * (size_t)to->columns);
    } else if (to->format == BF16) {
        uint16_t *half = (uint16_t *)(void *)at;
        for (int64_t i = 0; i < to->columns; i++) half[i] = bf16_of(from[i]);
    } else {
        for (int64_t g = 0; g < groups_of(to); g++) {
            const int64_t first = g * GROUP, left = to->columns - first, count = left < GROUP ? left : GROUP;
            const uint8_t byte = scale_byte(from + first, count);
            const float inverse = byte == 255 ? 0.0f : float_of_bits((uint32_t)(254 - byte) << 23);
            to->scales[r * groups_of(to) + g] = byte;
            for (int64_t i = first; i < first + count; i++) {
                const float scaled = from[i] * inverse, cut = scaled > 448.0f ? 448.0f : scaled;
                at[i] = (char)e4m3_of(cut < -448.0f ? -448.0f : cut);
            }
        }
    }
}

/* Asks the memory for a row, to come into the second cache: more requests may be under way there than in the first, and
 * rows that lie anywhere arrive twice as fast. */
static inline void fetch(const store *s, int64_t r) {
    const uintptr_t first = (uintptr_t)stored_row(s, r), last = first + (uintptr_t)row_bytes(s) - 1;
    for (uintptr_t line = first & ~(uintptr_t)63; line <= last; line += 64) __builtin_prefetch((const void *)line, 0, 2);
}
