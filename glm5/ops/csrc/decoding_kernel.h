/* The arithmetic of decoding.c, written once and compiled once per instruction set. decoding.c defines before each inclusion:
 *
 *   NAME(x)   the function's name in this variant        TARGET   the function attribute that allows the instructions
 *   LANES     floats in one vector register
 */

typedef float NAME(vector) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(integers) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define VECTOR NAME(vector)
#define LOAD(p) (*(const VECTOR *)(p))
#define STORE(p, v) (*(VECTOR *)(p) = (v))

/* Halves are added until one is left: the same order for every length. */
TARGET static inline float NAME(total)(VECTOR v) {
    float part[LANES];
    memcpy(part, &v, sizeof part);
    UNROLL for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) part[i] += part[i + step];
    return part[0];
}

TARGET static inline float NAME(dot)(const float *a, const float *b, int64_t count) {
    const int64_t vectors = count / LANES * LANES;
    VECTOR sum = {0};
    for (int64_t i = 0; i < vectors; i += LANES) sum += LOAD(a + i) * LOAD(b + i);
    float result = NAME(total)(sum);
    for (int64_t i = vectors; i < count; i++) result += a[i] * b[i];
    return result;
}

/* y += a * x */
TARGET static inline void NAME(add_scaled)(float *y, float a, const float *x, int64_t count) {
    const int64_t vectors = count / LANES * LANES;
    for (int64_t i = 0; i < vectors; i += LANES) STORE(y + i, LOAD(y + i) + a * LOAD(x + i));
    for (int64_t i = vectors; i < count; i++) y[i] += a * x[i];
}

TARGET static void NAME(rms_norm)(matrix y, matrix x, matrix weight, float eps) {
    for (int64_t r = 0; r < y.rows; r++) {
        const float *from = row(x, r);
        float *to = row(y, r);
        const float scale = 1.0f / sqrtf(NAME(dot)(from, from, y.columns) / (float)y.columns + eps);
        for (int64_t i = 0; i < y.columns; i++) to[i] = from[i] * scale * weight.at[i];
    }
}

TARGET static void NAME(layer_norm)(matrix y, matrix x, matrix weight, matrix bias, float eps) {
    for (int64_t r = 0; r < y.rows; r++) {
        const float *from = row(x, r);
        float *to = row(y, r), mean = 0, variance = 0;
        for (int64_t i = 0; i < y.columns; i++) mean += from[i];
        mean /= (float)y.columns;
        for (int64_t i = 0; i < y.columns; i++) variance += (from[i] - mean) * (from[i] - mean);
        const float scale = 1.0f / sqrtf(variance / (float)y.columns + eps);
        for (int64_t i = 0; i < y.columns; i++) to[i] = (from[i] - mean) * scale * weight.at[i] + bias.at[i];
    }
}

/* Dot products of x with OUTPUTS rows of a weight, each added up as `dot` does. */
TARGET static inline void NAME(dots)(float *y, const float *x, const float *weight, int64_t stride, int64_t count) {
    const int64_t vectors = count / LANES * LANES;
    VECTOR sum[OUTPUTS] = {{0}};
    for (int64_t i = 0; i < vectors; i += LANES) {
        const VECTOR value = LOAD(x + i);
        UNROLL for (int o = 0; o < OUTPUTS; o++) sum[o] += value * LOAD(weight + o * stride + i);
    }
    UNROLL for (int o = 0; o < OUTPUTS; o++) y[o] = NAME(total)(sum[o]);
    for (int64_t i = vectors; i < count; i++)
        for (int o = 0; o < OUTPUTS; o++) y[o] += x[i] * weight[o * stride + i];
}

TARGET static void NAME(linear)(matrix y, matrix x, matrix weight, float scale, int add) {
    for (int64_t first = 0; first < weight.rows; first += OUTPUTS) {
        const int count = weight.rows - first < OUTPUTS ? (int)(weight.rows - first) : OUTPUTS;
        for (int64_t r = 0; r < x.rows; r++) {
            float part[OUTPUTS], *to = row(y, r) + first;
            if (count == OUTPUTS) {
                NAME(dots)(part, row(x, r), row(weight, first), weight.stride, x.columns);
            } else {
                for (int o = 0; o < count; o++) part[o] = NAME(dot)(row(x, r), row(weight, first + o), x.columns);
            }
            for (int o = 0; o < count; o++) to[o] = add ? to[o] + scale * part[o] : scale * part[o];
        }
    }
}

TARGET static void NAME(combine_heads)(matrix y, matrix x, matrix weight, int64_t heads, int64_t step) {
    for (int64_t r = 0; r < y.rows; r++) {
        const float *from = row(x, r), *w = weight.at + r % heads * step * weight.stride;
        float *to = row(y, r);
        memset(to, 0, sizeof(float) * (size_t)y.columns);
        for (int64_t n = 0; n < x.columns; n++) NAME(add_scaled)(to, from[n], w + n * weight.stride, y.columns);
    }
}

TARGET static void NAME(split_heads)(matrix y, matrix x, matrix weight, int64_t heads, int64_t step) {
    for (int64_t r = 0; r < y.rows; r++) {
        const matrix to = {row(y, r), 1, y.columns, 0}, from = {row(x, r), 1, x.columns, 0};
        const matrix w = {weight.at + r % heads * step * weight.stride, weight.rows, weight.columns, weight.stride};
        NAME(linear)(to, from, w, 1.0f, 0);
    }
}

/* The lanes of `a` where `mask` is set, of `b` elsewhere. */
TARGET static inline VECTOR NAME(pick)(NAME(integers) mask, VECTOR a, VECTOR b) {
    NAME(integers) from_a, from_b;
    memcpy(&from_a, &a, sizeof a), memcpy(&from_b, &b, sizeof b);
    from_a = (from_a & mask) | (from_b & ~mask);
    memcpy(&a, &from_a, sizeof a);
    return a;
}

/* e^x within two units in the last place (Cephes: x = n ln 2 + r, a polynomial in r); below -87 about 1e-38. */
TARGET static inline VECTOR NAME(exp)(VECTOR x) {
    const VECTOR zero = {0}, low = zero - 87.3f, high = zero + 88.3f, round = zero + 12582912.0f; /* 1.5 * 2^23 */
    x = NAME(pick)(x < low, low, x); /* a NaN stays a NaN */
    x = NAME(pick)(x > high, high, x);
    const VECTOR shifted = x * 1.44269504f + round; /* its low bits hold n */
    const VECTOR n = shifted - round;
    const VECTOR r = x - n * 0.693359375f + n * 2.12194440e-4f;
    VECTOR p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    NAME(integers) bits, base;
    memcpy(&bits, &shifted, sizeof bits), memcpy(&base, &round, sizeof base);
    bits = (bits - base + 127) << 23;
    VECTOR power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* x = 1 / (1 + e^-x); lanes beyond `count` are computed and thrown away. */
TARGET static void NAME(sigmoid)(float *x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const size_t size = sizeof(float) * (size_t)(count - i < LANES ? count - i : LANES);
        VECTOR v = {0};
        memcpy(&v, x + i, size);
        v = 1.0f / (1.0f + NAME(exp)(-v));
        memcpy(x + i, &v, size);
    }
}

TARGET static void NAME(swiglu)(matrix y, matrix gate, matrix up) {
    for (int64_t r = 0; r < y.rows; r++) {
        for (int64_t i = 0; i < y.columns; i += LANES) {
            const size_t size = sizeof(float) * (size_t)(y.columns - i < LANES ? y.columns - i : LANES);
            VECTOR g = {0}, u = {0};
            memcpy(&g, row(gate, r) + i, size), memcpy(&u, row(up, r) + i, size);
            g = g / (1.0f + NAME(exp)(-g)) * u;
            memcpy(row(y, r) + i, &g, size);
        }
    }
}

/* p = softmax(p); its sum runs over LANES partial sums. `p` has room for whole vectors. */
TARGET static void NAME(softmax)(float *p, int64_t count) {
    float most = p[0];
    for (int64_t i = 1; i < count; i++) most = p[i] > most ? p[i] : most;
    VECTOR sum = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t real = count - i < LANES ? count - i : LANES;
        VECTOR v = {0};
        memcpy(&v, p + i, sizeof(float) * (size_t)real);
        v = NAME(exp)(v - most);
        for (int64_t lane = real; lane < LANES; lane++) v[lane] = 0.0f;
        memcpy(p + i, &v, sizeof(float) * (size_t)real);
        sum += v;
    }
    const float scale = 1.0f / NAME(total)(sum);
    for (int64_t i = 0; i < count; i++) p[i] *= scale;
}

TARGET static void NAME(attend)(matrix y, matrix q, const float *const *keys, int64_t count, float *p, float scale) {
    for (int64_t h = 0; h < q.rows; h++) {
        float *to = row(y, h);
        memset(to, 0, sizeof(float) * (size_t)y.columns);
        if (!count) continue; /* what selected nothing attends to nothing */
        for (int64_t i = 0; i < count; i++) p[i] = scale * NAME(dot)(row(q, h), keys[i], q.columns);
        NAME(softmax)(p, count);
        for (int64_t i = 0; i < count; i++) NAME(add_scaled)(to, p[i], keys[i], y.columns);
    }
}

/* `widen` of storage.h by these instructions. */
TARGET static void NAME(widen_row)(float *to, const store *from, int64_t r) { widen(to, from, r); }

static const kernels NAME(kernels) = {
    NAME(rms_norm), NAME(layer_norm), NAME(linear),  NAME(combine_heads), NAME(split_heads),
    NAME(swiglu),   NAME(attend),     NAME(sigmoid), NAME(widen_row),
};

#undef VECTOR
#undef LOAD
#undef STORE
