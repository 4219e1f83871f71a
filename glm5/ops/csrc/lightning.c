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
 * Where keys lie in the blocks of a paged pool (decoding), every query has its own, in fp32, bf16 or fp8.
 *
 *   storage.h             rows of a cache in the three formats
 *   lightning_job.h       what a call computes with, and what each thread owns
 *   lightning_kernel.h    scores and passes over the keys, once per instruction set; lightning_best.h: top-k
 *   lightning_paged.h     keys in the blocks of a pool; choices that several threads share
 *   lightning_sieve.h     which keys need a score at all, where the processor multiplies bf16 (AVX512_BF16)
 *   lightning_variants.h  the instruction sets
 *
 * Left out: bf16 keys without blocks (the caller widens them), batches (one call per row), gradients (there are none).
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

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL16 UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL16 _Pragma("GCC unroll 16")
#endif

#include "storage.h"

#include "lightning_job.h"

#include "lightning_paged.h"

#include "lightning_variants.h"

enum {
    INTERFACE = 3, /* counts changes of what Python calls: an older build is not used */
    MOST_THREADS = 256,
};

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
        if (work->where) run_part(work, &own, first);
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
    const kernel *found[VARIANTS];
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
    unsigned long long q, w, pool, scales, where, chosen, ask;
    long long ask_bytes, format, tokens, slots, page, heads, width, best;
    int threads, variant;
    if (!PyArg_ParseTuple(args, "KKKKKKKLLLLLLLLii", &q, &w, &pool, &scales, &where, &chosen, &ask, &ask_bytes, &format, &tokens,
                          &slots, &page, &heads, &width, &best, &threads, &variant))
        return NULL;
    const kernel *use = kernel_of(variant, &threads, (const int64_t[]){tokens, page, heads, width, best}, 5);
    if (!use) return NULL;
    if (format < FP32 || format >= FORMATS || (format == FP8) != (scales != 0)) {
        PyErr_SetString(PyExc_ValueError, "the pool has no such format, or lacks its scales");
        return NULL;
    }
    job work = {
        .q = (const float *)(uintptr_t)q, .w = (const float *)(uintptr_t)w,
        .pool = {(char *)(uintptr_t)pool, (uint8_t *)(uintptr_t)scales, slots, width, format},
        .where = (const sequence *)(uintptr_t)where, .chosen = (int64_t *)(uintptr_t)chosen,
        .tokens = tokens, .heads = heads, .width = width, .best = best, .page = page, .block = 1, .use = use,
    };
    const double products = check_sequences(&work);
    if (products < 0) return NULL;
    work.parts = products < LONG_WORK ? 1 : (threads + tokens - 1) / tokens;
    if (work.parts > 1 && !open_partial(&work)) return PyErr_NoMemory();
    PyThreadState *own = products < LONG_WORK ? NULL : PyEval_SaveThread();
    run(&work, products < LONG_WORK ? 1 : threads);
    if (own) PyEval_RestoreThread(own);
    const int failed = atomic_load(&work.out_of_memory);
    if (work.parts > 1) join_parts(&work, failed);
    const store rows = {(char *)(uintptr_t)ask, NULL, slots, ask_bytes, FP8}; /* a column being a byte */
    for (int64_t i = 0; ask && !failed && i < tokens * best; i++)
        if (work.chosen[i] >= 0) fetch(&rows, work.chosen[i]);
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
    const kernel *variants[VARIANTS];
    return PyLong_FromLong(find_variants(variants));
}

static PyMethodDef methods[] = {
    {"pack", py_pack, METH_VARARGS, "pack(keys, panels, count, width): [S, I] to [ceil(S / PANEL), I, PANEL]."},
    {"select", py_select, METH_VARARGS,
     "select(q, k, panels, w, lo, hi, chosen, tokens, keys, heads, width, best, threads, variant): seven addresses, "
     "then sizes. panels may be 0."},
    {"select_paged", py_select_paged, METH_VARARGS,
     "select_paged(q, w, pool, scales, where, chosen, ask, bytes, format, tokens, slots, page, heads, width, best, "
     "threads, variant): seven addresses, then sizes. where: (address of a block table, blocks, length) of every query."},
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
