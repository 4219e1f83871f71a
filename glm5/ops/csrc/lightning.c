/* The lightning indexer's selection on a CPU: scores, ReLU, weighted head sum and top-k in one pass.
 *
 * score[t, s] = sum over heads of w[t, h] * max(0, q[t, h] . k[s]) (DeepSeek-V3.2 report, equation 1) for the keys
 * lo[t] <= s < hi[t]; the k best positions of every query come out ascending, padded with -1. The lowest position wins
 * a tie; a score of -inf or NaN is never chosen. `select` in ../reference.py is the truth, ../lightning.py the caller.
 *
 * The keys are packed once into panels of 48 keys, transposed, so that a vector register holds 16 keys (or 8, or 4);
 * for a few queries (decoding) no copy is made: with AVX2 and AVX-512 the keys are read as they lie and a lane is a
 * head, elsewhere each panel is packed on the fly. Either way a score is the same sum in the same order.
 * A thread takes a block of queries, multiplies it with one panel after another while the scores stay in the first
 * cache, and keeps at most 2k candidates per query. No T x S array exists. Threads take the next free block from a
 * shared counter, because causal rows differ in length; POSIX threads rather than OpenMP, which Apple's compiler lacks
 * and which would bring a second OpenMP runtime beside PyTorch's.
 *
 * Where keys lie in the blocks of a paged pool (decoding), every query has its own: `lightning_paged.h`.
 *
 * Left out: bf16 keys (the caller widens them), batches (one call per row), gradients (a selection has none).
 */

#include <Python.h>

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    INTERFACE = 2,          /* counts changes of what Python calls: an older build is not used */
    PANEL = 48,             /* keys per panel: three AVX-512 registers */
    TILE = 8,               /* (query, head) rows that are multiplied with a panel together */
    MOST_QUERIES = 16,      /* queries per block: each reads every panel while it is in the first cache */
    BLOCK_FLOATS = 1 << 15, /* of a block's packed queries: 128 KiB, well inside the second cache */
    MOST_THREADS = 256,
};

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL16 UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL16 _Pragma("GCC unroll 16")
#endif

typedef struct { /* the candidates of one query, in order of position */
    float *value;
    int32_t *place;
    int64_t count;
    float floor; /* k earlier candidates are at least this good */
} candidates;

typedef struct { /* the keys of one query in a paged pool: blocks of `block` slots, of which `length` hold keys */
    const int64_t *table;
    int64_t blocks, length;
} sequence;

typedef struct { /* what one thread owns */
    float *queries; /* [rows / TILE][width][TILE] */
    float *weights; /* [rows] */
    float *panel; /* [width][PANEL], when keys are packed on the fly */
    float *rows; /* [PANEL][width], when keys are collected from blocks */
    float **targets; /* [rows] the score row that a row adds to */
    float *scores; /* [queries + 1][PANEL]; rows that only fill the last tile add to the last one */
    candidates *best; /* [queries] */
    int64_t room; /* of each candidate list */
    char *memory;
} scratch;

typedef struct job {
    const float *q, *k, *w;        /* [T, H, I], [S, I], [T, H] */
    const float *panels;           /* [ceil(S / PANEL), I, PANEL], or NULL: pack on the fly */
    const int64_t *lo, *hi;        /* [T] */
    int64_t *chosen;               /* [T, best] */
    int64_t tokens, keys, heads, width;
    int64_t best;                  /* how many keys a query chooses */
    int64_t block;                 /* queries per block */
    const struct kernel *use;
    const sequence *where;         /* [T], if the keys lie in blocks of a pool; the choices are then slots of it */
    int64_t page;                  /* slots per block of the pool */
    int64_t parts;                 /* of every query's keys, for as many threads */
    candidates *partial;           /* [T, parts], if there are several */
    atomic_llong next;
    atomic_int out_of_memory;
} job;

typedef struct kernel { /* one instruction set */
    void (*select_block)(const job *, scratch *, int64_t first, int64_t last);
    void (*select_part)(const job *, scratch *, int64_t unit);
    void (*keep_best)(candidates *, int64_t k);
} kernel;

/* The visible interval of a query, cut to the keys that exist. */
static inline int64_t low_of(const job *work, int64_t t) {
    return work->lo[t] > 0 ? work->lo[t] : 0;
}

static inline int64_t high_of(const job *work, int64_t t) {
    return work->hi[t] < work->keys ? work->hi[t] : work->keys;
}

/* A float's place in the order of all floats, and back. */
static inline int32_t rank_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

static inline float float_of(int64_t rank) {
    const int32_t bits = rank < 0 ? (int32_t)rank ^ 0x7fffffff : (int32_t)rank;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* [queries, heads, width] to [rows / TILE][width][TILE]; zero rows with zero weight fill the last tile. */
static void load_queries(const job *work, scratch *own, int64_t first, int64_t last) {
    const int64_t rows = (last - first) * work->heads, width = work->width;
    for (int64_t row = 0; row < (rows + TILE - 1) / TILE * TILE; row++) {
        const int real = row < rows;
        const float *q = work->q + (first * work->heads + row) * width;
        float *packed = own->queries + row / TILE * TILE * width + row % TILE;
        for (int64_t i = 0; i < width; i++) packed[i * TILE] = real ? q[i] : 0.0f;
        own->weights[row] = real ? work->w[first * work->heads + row] : 0.0f;
        own->targets[row] = own->scores + (real ? row / work->heads : last - first) * PANEL;
    }
}

/* The panel of keys that begins at `start`: [PANEL, width] to [width, PANEL], zeros beyond the last key. */
static void pack_panel(const float *keys, float *panel, int64_t start, int64_t count, int64_t width) {
    const int64_t real = count - start < PANEL ? count - start : PANEL;
    int64_t whole_keys = 0, whole_width = 0; /* what 4 x 4 blocks cover */
    keys += start * width;
    if (real < PANEL) memset(panel, 0, sizeof(float) * PANEL * (size_t)width);
#if defined(__x86_64__)
    whole_keys = real / 4 * 4, whole_width = width / 4 * 4;
    for (int64_t s = 0; s < whole_keys; s += 4) {
        for (int64_t i = 0; i < whole_width; i += 4) {
            const float *from = keys + s * width + i;
            float *to = panel + i * PANEL + s;
            __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + width);
            __m128 c = _mm_loadu_ps(from + 2 * width), d = _mm_loadu_ps(from + 3 * width);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to, a), _mm_storeu_ps(to + PANEL, b);
            _mm_storeu_ps(to + 2 * PANEL, c), _mm_storeu_ps(to + 3 * PANEL, d);
        }
    }
#endif
    for (int64_t s = 0; s < real; s++)
        for (int64_t i = s < whole_keys ? whole_width : 0; i < width; i++) panel[i * PANEL + s] = keys[s * width + i];
}

#include "lightning_paged.h"

#if defined(__x86_64__)

#include "transpose.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx2,fma,popcnt")))
#define LANES 16
#define ROWS 8
#define RELU(v) ((vector_avx512)_mm512_max_ps(_mm512_setzero_ps(), (__m512)(v)))
#define COMPRESS
#define KEYS 16
#define VECTORS 1
#define TRANSPOSE(v) transpose_16((__m512 *)(v))
#include "lightning_kernel.h"
#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef RELU
#undef COMPRESS
#undef KEYS
#undef VECTORS
#undef TRANSPOSE

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 4
#define RELU(v) ((vector_avx2)_mm256_max_ps(_mm256_setzero_ps(), (__m256)(v)))
#define KEYS 6
#define VECTORS 2
#define TRANSPOSE(v) transpose_8((__m256 *)(v))
#include "lightning_kernel.h"
#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef RELU
#undef KEYS
#undef VECTORS
#undef TRANSPOSE

#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#define ROWS 4
#define RELU(v) ((vector_plain)_mm_max_ps(_mm_setzero_ps(), (__m128)(v)))
#include "lightning_kernel.h"

#else

typedef int32_t bits4 __attribute__((vector_size(16)));
#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#define ROWS 8
#define RELU(v) ((vector_plain)((bits4)(v) & ~(bits4)((v) < 0)))
#include "lightning_kernel.h"

#endif

/* The variants that this processor runs, the widest first. Returns how many. */
static int find_variants(const kernel *found[3]) {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found[count++] = &kernel_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &kernel_avx2;
#endif
    found[count++] = &kernel_plain;
    return count;
}

static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int open_scratch(const job *work, scratch *own) {
    const int64_t queries = work->block, rows = queries * ((work->heads + 15) / 16 * 16);
    own->room = padded(4 * (2 * work->best + 2 * PANEL + 16)) / 4; /* both lists begin on a cache line */
    const int64_t sizes[] = {
        padded(4 * rows * work->width),
        padded(4 * rows),
        padded(4 * work->width * PANEL),
        padded(4 * work->width * PANEL),
        padded((int64_t)sizeof(float *) * rows),
        padded(4 * (queries + 1) * PANEL),
        padded((int64_t)sizeof(candidates) * queries),
        padded(8 * own->room) * queries,
    };
    int64_t total = 0;
    for (int i = 0; i < 8; i++) total += sizes[i];
    void *memory;
    if (posix_memalign(&memory, 64, (size_t)total)) return 0;
    char *at = own->memory = memory;
    own->queries = (float *)at, at += sizes[0];
    own->weights = (float *)at, at += sizes[1];
    own->panel = (float *)at, at += sizes[2];
    own->rows = (float *)at, at += sizes[3];
    own->targets = (float **)at, at += sizes[4];
    own->scores = (float *)at, at += sizes[5];
    own->best = (candidates *)at, at += sizes[6];
    for (int64_t t = 0; t < queries; t++, at += padded(8 * own->room)) {
        own->best[t].value = (float *)at;
        own->best[t].place = (int32_t *)at + own->room;
    }
    return 1;
}

static void *worker(void *shared) {
    job *work = shared;
    scratch own;
    if (!open_scratch(work, &own)) {
        atomic_store(&work->out_of_memory, 1);
        return NULL;
    }
    for (;;) {
        const int64_t first = (int64_t)atomic_fetch_add(&work->next, work->block);
        if (first >= work->tokens * work->parts) break;
        const int64_t last = first + work->block < work->tokens ? first + work->block : work->tokens;
        if (work->where) work->use->select_part(work, &own, first);
        else work->use->select_block(work, &own, first, last);
    }
    free(own.memory);
    return NULL;
}

static void run(job *work, int threads) {
    pthread_t others[MOST_THREADS];
    const int64_t blocks = (work->tokens * work->parts + work->block - 1) / work->block;
    int started = 0;
    if (threads > blocks) threads = (int)blocks;
    while (started < threads - 1 && !pthread_create(&others[started], NULL, worker, work)) started++;
    worker(work);
    while (started) pthread_join(others[--started], NULL);
}

/* Blocks small enough that every thread gets several, whose queries stay in the second cache. Keys that are packed on
 * the fly are packed anew by every block: then one per thread. */
static int64_t block_size(const job *work, int threads) {
    if (!work->panels) return (work->tokens + threads - 1) / threads;
    int64_t block = BLOCK_FLOATS / (work->heads * work->width);
    if (block > work->tokens / (4 * threads)) block = work->tokens / (4 * threads);
    if (block > MOST_QUERIES) block = MOST_QUERIES;
    return block < 1 ? 1 : block;
}

/* The kernel of a call, or NULL with an exception set: for a variant that is not there, or sizes that cannot be. */
static const kernel *kernel_of(int variant, int *threads, const int64_t *sizes, int count) {
    const kernel *found[3];
    if (variant < 0 || variant >= find_variants(found)) {
        PyErr_SetString(PyExc_ValueError, "this processor has no such variant");
        return NULL;
    }
    for (int i = 0; i < count; i++) {
        if (sizes[i] < 1 || sizes[i] >= INT32_MAX) {
            PyErr_SetString(PyExc_ValueError, "a size is not positive, or too large");
            return NULL;
        }
    }
    if (*threads < 1) *threads = 1;
    if (*threads > MOST_THREADS) *threads = MOST_THREADS;
    return found[variant];
}

static PyObject *py_select(PyObject *self, PyObject *args) {
    unsigned long long q, k, panels, w, lo, hi, chosen;
    long long tokens, keys, heads, width, best;
    int threads, variant;
    if (!PyArg_ParseTuple(args, "KKKKKKKLLLLLii", &q, &k, &panels, &w, &lo, &hi, &chosen, &tokens, &keys, &heads,
                          &width, &best, &threads, &variant))
        return NULL;
    const kernel *use = kernel_of(variant, &threads, (const int64_t[]){tokens, keys, heads, width, best}, 5);
    if (!use) return NULL;
    job work = {
        .q = (const float *)(uintptr_t)q, .k = (const float *)(uintptr_t)k, .w = (const float *)(uintptr_t)w,
        .panels = (const float *)(uintptr_t)panels,
        .lo = (const int64_t *)(uintptr_t)lo, .hi = (const int64_t *)(uintptr_t)hi,
        .chosen = (int64_t *)(uintptr_t)chosen,
        .tokens = tokens, .keys = keys, .heads = heads, .width = width, .best = best, .parts = 1, .use = use,
    };
    work.block = block_size(&work, threads);
    Py_BEGIN_ALLOW_THREADS
    run(&work, threads);
    Py_END_ALLOW_THREADS
    if (atomic_load(&work.out_of_memory)) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_select_paged(PyObject *self, PyObject *args) {
    unsigned long long q, w, pool, where, chosen;
    long long tokens, slots, page, heads, width, best;
    int threads, variant;
    if (!PyArg_ParseTuple(args, "KKKKKLLLLLLii", &q, &w, &pool, &where, &chosen, &tokens, &slots, &page, &heads,
                          &width, &best, &threads, &variant))
        return NULL;
    const kernel *use = kernel_of(variant, &threads, (const int64_t[]){tokens, page, heads, width, best}, 5);
    if (!use) return NULL;
    job work = {
        .q = (const float *)(uintptr_t)q, .k = (const float *)(uintptr_t)pool, .w = (const float *)(uintptr_t)w,
        .where = (const sequence *)(uintptr_t)where, .chosen = (int64_t *)(uintptr_t)chosen,
        .tokens = tokens, .heads = heads, .width = width, .best = best, .page = page, .block = 1, .use = use,
    };
    const double products = check_sequences(&work, slots);
    if (products < 0) return NULL;
    work.parts = products < LONG_WORK ? 1 : (threads + tokens - 1) / tokens;
    if (work.parts > 1 && !open_partial(&work)) return PyErr_NoMemory();
    PyThreadState *own = products < LONG_WORK ? NULL : PyEval_SaveThread();
    run(&work, products < LONG_WORK ? 1 : threads);
    if (own) PyEval_RestoreThread(own);
    const int failed = atomic_load(&work.out_of_memory);
    if (work.parts > 1) join_parts(&work, failed);
    return failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

static PyObject *py_pack(PyObject *self, PyObject *args) {
    unsigned long long keys, panels;
    long long count, width;
    if (!PyArg_ParseTuple(args, "KKLL", &keys, &panels, &count, &width)) return NULL;
    if (width < 1) {
        PyErr_SetString(PyExc_ValueError, "a size is not positive");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    for (int64_t start = 0; start < count; start += PANEL)
        pack_panel((const float *)(uintptr_t)keys, (float *)(uintptr_t)panels + start * width, start, count, width);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_variants(PyObject *self, PyObject *none) {
    const kernel *variants[3];
    return PyLong_FromLong(find_variants(variants));
}

static PyMethodDef methods[] = {
    {"pack", py_pack, METH_VARARGS, "pack(keys, panels, count, width): [S, I] to [ceil(S / PANEL), I, PANEL]."},
    {"select", py_select, METH_VARARGS,
     "select(q, k, panels, w, lo, hi, chosen, tokens, keys, heads, width, best, threads, variant): seven addresses, "
     "then sizes. panels may be 0."},
    {"select_paged", py_select_paged, METH_VARARGS,
     "select_paged(q, w, pool, where, chosen, tokens, slots, page, heads, width, best, threads, variant): five "
     "addresses, then sizes. where: (address of a block table, blocks, length) of every query."},
    {"variants", py_variants, METH_NOARGS, "How many instruction sets this processor runs; variant 0 is the widest."},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) {
    if (PyModule_AddIntConstant(module, "INTERFACE", INTERFACE)) return -1;
    return PyModule_AddIntConstant(module, "PANEL", PANEL);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_lightning", "Fused lightning-indexer selection; see lightning.py.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__lightning(void) { return PyModuleDef_Init(&definition); }
