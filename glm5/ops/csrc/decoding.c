/* The steps of a layer on a few rows (tokens): norms, products with a weight, rotation, attention, experts, in fp32.
 *
 * A decode step of a small model does little arithmetic in many operators, and starting one of PyTorch's takes longer
 * than most of this arithmetic. These functions have no more to start than one call from Python. ../decoding.py is the
 * caller and says what each computes; glm5/model/decode.py strings them together. Rows are computed one after another
 * on one core, each by the same instructions whatever rows stand beside it.
 *
 * A matrix travels as a tuple (address, rows, columns, stride); sizes that do not fit together raise ValueError.
 */

#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "storage.h"

#include "matrix.h"

enum {
    INTERFACE = 3, /* counts changes of what Python calls: an older build is not used */
    OUTPUTS = 8, /* rows of a weight that are multiplied together: enough sums to hide the latency of an addition */
};

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

typedef struct { /* one instruction set */
    void (*rms_norm)(matrix y, matrix x, matrix weight, float eps);
    void (*layer_norm)(matrix y, matrix x, matrix weight, matrix bias, float eps);
    void (*linear)(matrix y, matrix x, matrix weight, float scale, int add);
    void (*combine_heads)(matrix y, matrix x, matrix weight, int64_t heads, int64_t step);
    void (*split_heads)(matrix y, matrix x, matrix weight, int64_t heads, int64_t step);
    void (*swiglu)(matrix y, matrix gate, matrix up);
    void (*attend)(matrix y, matrix q, const float *const *keys, int64_t count, float *p, float scale);
    void (*sigmoid)(float *x, int64_t count);
    void (*widen)(float *to, const store *from, int64_t r);
} kernels;

#if defined(__x86_64__)

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define LANES 16
#include "decoding_kernel.h"
#undef NAME
#undef TARGET
#undef LANES

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#include "decoding_kernel.h"
#undef NAME
#undef TARGET
#undef LANES

#endif

#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#include "decoding_kernel.h"

/* The instruction sets of this processor, widest first. */
static int find_variants(const kernels **found) {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found[count++] = &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &kernels_avx2;
#endif
    found[count++] = &kernels_plain;
    return count;
}

static const kernels *use; /* the chosen variant; set when the module is made, and by tests */

#define ENTRY(name) static PyObject *py_##name(PyObject *self, PyObject *const *args, Py_ssize_t given)

/* ---- functions of the module ----------------------------------------------------------------------------------- */
ENTRY(copy) {
    matrix m[2];
    if (!read_all(args, given, 2, m, 0, &args) || !fits(same_shape(m[0], m[1]))) return NULL;
    for (int64_t r = 0; r < m[0].rows; r++) memmove(row(m[0], r), row(m[1], r), sizeof(float) * (size_t)m[0].columns);
    Py_RETURN_NONE;
}

ENTRY(gather) {
    matrix m[3]; /* rows, table, places (int64) */
    if (!read_all(args, given, 3, m, 0, &args)) return NULL;
    const int64_t *places = (const int64_t *)(const void *)m[2].at;
    if (!fits(m[0].columns == m[1].columns && vector_of(m[2], m[0].rows))) return NULL;
    for (int64_t r = 0; r < m[0].rows; r++) {
        if (!fits(places[r] >= 0 && places[r] < m[1].rows)) return NULL;
        memmove(row(m[0], r), row(m[1], places[r]), sizeof(float) * (size_t)m[0].columns);
    }
    Py_RETURN_NONE;
}

ENTRY(rms_norm) {
    matrix m[3];
    float eps;
    if (!read_all(args, given, 3, m, 1, &args) || !real(args[0], &eps)) return NULL;
    if (!fits(same_shape(m[0], m[1]) && vector_of(m[2], m[1].columns))) return NULL;
    use->rms_norm(m[0], m[1], m[2], eps);
    Py_RETURN_NONE;
}

ENTRY(layer_norm) {
    matrix m[4];
    float eps;
    if (!read_all(args, given, 4, m, 1, &args) || !real(args[0], &eps)) return NULL;
    if (!fits(same_shape(m[0], m[1]) && vector_of(m[2], m[1].columns) && vector_of(m[3], m[1].columns))) return NULL;
    use->layer_norm(m[0], m[1], m[2], m[3], eps);
    Py_RETURN_NONE;
}

ENTRY(linear) {
    matrix m[3];
    float scale;
    int64_t add;
    if (!read_all(args, given, 3, m, 2, &args) || !real(args[0], &scale) || !whole(args[1], &add)) return NULL;
    if (!fits(m[0].rows == m[1].rows && m[0].columns == m[2].rows && m[1].columns == m[2].columns)) return NULL;
    PyThreadState *own = let_others_run(size_of(m[2]) * (double)m[0].rows);
    use->linear(m[0], m[1], m[2], scale, add != 0);
    return done(own);
}

/* Both: weight[h] is some rows, the same in every head's share of the rows of `weight`, from row `first` of it on. */
typedef void (*heads_kernel)(matrix y, matrix x, matrix weight, int64_t heads, int64_t step);

static PyObject *by_head(PyObject *const *args, Py_ssize_t given, int combine, heads_kernel run) {
    matrix m[3];
    int64_t heads, first;
    if (!read_all(args, given, 3, m, 2, &args) || !whole(args[0], &heads) || !whole(args[1], &first)) return NULL;
    if (!fits(heads > 0 && m[0].rows == m[1].rows && m[0].rows % heads == 0 && m[2].rows % heads == 0)) return NULL;
    const int64_t step = m[2].rows / heads, used = m[combine ? 1 : 0].columns;
    if (!fits(m[combine ? 0 : 1].columns == m[2].columns && first >= 0 && used <= step - first)) return NULL;
    const matrix weight = {row(m[2], first), used, m[2].columns, m[2].stride};
    PyThreadState *own = let_others_run(size_of(weight) * (double)m[0].rows);
    run(m[0], m[1], weight, heads, step);
    return done(own);
}

ENTRY(combine_heads) { return by_head(args, given, 1, use->combine_heads); }

ENTRY(split_heads) { return by_head(args, given, 0, use->split_heads); }

ENTRY(rotate) {
    matrix m[4];
    int64_t interleaved;
    if (!read_all(args, given, 4, m, 1, &args) || !whole(args[0], &interleaved)) return NULL;
    const int64_t width = m[0].columns, next = interleaved ? 1 : width / 2, angles = m[2].rows;
    if (!fits(same_shape(m[0], m[1]) && same_shape(m[2], m[3]) && m[2].columns == width && width % 2 == 0)) return NULL;
    if (!fits(angles > 0 && m[0].rows % angles == 0)) return NULL;
    const int64_t heads = m[0].rows / angles;
    for (int64_t r = 0; r < m[0].rows; r++) {
        float *y = row(m[0], r);
        const float *x = row(m[1], r), *cos = row(m[2], r / heads), *sin = row(m[3], r / heads);
        for (int64_t i = 0; i < width / 2; i++) {
            const int64_t a = interleaved ? 2 * i : i, b = a + next;
            const float first = x[a], second = x[b];
            y[a] = first * cos[a] + second * sin[a];
            y[b] = second * cos[b] + first * sin[b];
        }
    }
    Py_RETURN_NONE;
}

ENTRY(swiglu) {
    matrix m[3];
    if (!read_all(args, given, 3, m, 0, &args) || !fits(same_shape(m[0], m[1]) && same_shape(m[0], m[2]))) return NULL;
    use->swiglu(m[0], m[1], m[2]);
    Py_RETURN_NONE;
}

#include "decoding_cache.h"

/* The best of what is left; a NaN counts as largest, so that an expert is found whatever the scores are. */
static int64_t best_of(const float *choice, const char *taken, int64_t count) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; e++)
        if (!taken[e] && (best < 0 || choice[e] > choice[best] || (isnan(choice[e]) && !isnan(choice[best])))) best = e;
    return best;
}

/* Sigmoid scores (written over the logits), the best by score + bias, and their weights. */
ENTRY(route) {
    matrix m[4]; /* chosen (int64), weights, scores, bias */
    int64_t normalise;
    float factor;
    if (!read_all(args, given, 4, m, 2, &args) || !whole(args[0], &normalise) || !real(args[1], &factor)) return NULL;
    const int64_t experts = m[2].columns, per_token = m[0].columns;
    if (!fits(same_shape(m[0], m[1]) && m[0].rows == m[2].rows && vector_of(m[3], experts) && per_token <= experts))
        return NULL;
    float *choice = PyMem_Malloc((sizeof(float) + 1) * (size_t)experts);
    if (!choice) return PyErr_NoMemory();
    char *taken = (char *)(choice + experts);
    for (int64_t r = 0; r < m[0].rows; r++) {
        float *scores = row(m[2], r), *weights = row(m[1], r), total = 0;
        int64_t *chosen = (int64_t *)(void *)m[0].at + r * m[0].stride;
        use->sigmoid(scores, experts);
        for (int64_t e = 0; e < experts; e++) choice[e] = scores[e] + m[3].at[e];
        memset(taken, 0, (size_t)experts);
        for (int64_t k = 0; k < per_token; k++) {
            chosen[k] = best_of(choice, taken, experts);
            taken[chosen[k]] = 1;
            total += weights[k] = scores[chosen[k]];
        }
        for (int64_t k = 0; k < per_token; k++)
            weights[k] = (normalise ? weights[k] / (total + 1e-20f) : weights[k]) * factor;
    }
    PyMem_Free(choice);
    Py_RETURN_NONE;
}

/* y += the weighted sum over the chosen experts of down(silu(gate(x)) * up(x)). */
ENTRY(experts) {
    matrix m[7]; /* y, x, chosen (int64), weights, gate_up [E * 2I, D], down [E * D, I], hidden [1, 2I] */
    if (!read_all(args, given, 7, m, 0, &args)) return NULL;
    matrix y = m[0], x = m[1], hidden = m[6];
    const int64_t width = y.columns, inner = m[5].columns, per_token = m[2].columns;
    if (!fits(width > 0 && same_shape(y, x) && m[2].rows == y.rows && same_shape(m[2], m[3]))) return NULL;
    const int64_t count = m[5].rows / width;
    if (!fits(vector_of(hidden, 2 * inner) && m[4].columns == width && m[4].rows == count * 2 * inner &&
              m[5].rows == count * width))
        return NULL;
    for (int64_t i = 0; i < y.rows * per_token; i++) {
        const int64_t e = ((const int64_t *)(const void *)m[2].at)[i / per_token * m[2].stride + i % per_token];
        if (!fits(e >= 0 && e < count)) return NULL;
    }
    PyThreadState *own = let_others_run(3 * size_of(m[2]) * (double)width * (double)inner);
    for (int64_t r = 0; r < y.rows; r++) {
        const int64_t *chosen = (const int64_t *)(const void *)m[2].at + r * m[2].stride;
        const matrix y_r = {row(y, r), 1, width, 0}, x_r = {row(x, r), 1, width, 0};
        const matrix gate = {hidden.at, 1, inner, 0}, up = {hidden.at + inner, 1, inner, 0};
        for (int64_t k = 0; k < per_token; k++) {
            const int64_t e = chosen[k];
            const matrix gate_up = {row(m[4], e * 2 * inner), 2 * inner, width, m[4].stride};
            const matrix down = {row(m[5], e * width), width, inner, m[5].stride};
            use->linear(hidden, x_r, gate_up, 1.0f, 0);
            use->swiglu(gate, gate, up);
            use->linear(y_r, gate, down, row(m[3], r)[k], 1);
        }
    }
    return done(own);
}

static PyObject *py_variants(PyObject *self, PyObject *none) {
    const kernels *found[3];
    return PyLong_FromLong(find_variants(found));
}

static PyObject *py_use_variant(PyObject *self, PyObject *index) {
    const kernels *found[3];
    int64_t variant;
    if (!whole(index, &variant) || !fits(variant >= 0 && variant < find_variants(found))) return NULL;
    use = found[variant];
    Py_RETURN_NONE;
}

#define FAST(name, text) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, text}

static PyMethodDef methods[] = {
    FAST(copy, "copy(y, x)"),
    FAST(gather, "gather(y, table, places): y[r] = table[places[r]]"),
    FAST(scatter, "scatter(x, pool, places): pool[places[r]] = x[r]; the pool is a store"),
    FAST(rms_norm, "rms_norm(y, x, weight, eps)"),
    FAST(layer_norm, "layer_norm(y, x, weight, bias, eps)"),
    FAST(linear, "linear(y, x, weight, scale, add): y (+)= scale * x @ weight.T"),
    FAST(combine_heads, "combine_heads(y, x, weight, heads, first): y[h] = x[h] @ weight[h]"),
    FAST(split_heads, "split_heads(y, x, weight, heads, first): y[h] = weight[h] @ x[h]"),
    FAST(rotate, "rotate(y, x, cos, sin, interleaved): rows of angles serve equal runs of rows"),
    FAST(swiglu, "swiglu(y, gate, up)"),
    FAST(attend, "attend(y, q, pool, places, scale): the pool is a store"),
    FAST(route, "route(chosen, weights, scores, bias, normalise, factor)"),
    FAST(experts, "experts(y, x, chosen, weights, gate_up, down, hidden)"),
    {"variants", py_variants, METH_NOARGS, "How many instruction sets this processor runs; variant 0 is the widest."},
    {"use_variant", py_use_variant, METH_O, "Choose one of them (for tests)."},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) {
    const kernels *found[3];
    find_variants(found);
    use = found[0];
    return PyModule_AddIntConstant(module, "INTERFACE", INTERFACE);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_decoding", "Rows through a layer; see decoding.py.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__decoding(void) { return PyModuleDef_Init(&definition); }
