/* What a call of lightning.c computes with, and what each of its threads owns. */

enum {
    PANEL = 48,             /* keys per panel: three AVX-512 registers */
    TILE = 8,               /* (query, head) rows that are multiplied with a panel together */
    SIEVE_KEYS = 64,        /* keys that are sifted together: four registers of bf16 pairs */
    SIEVE_ROWS = 4,         /* heads that are multiplied with them together */
    MOST_QUERIES = 16,      /* queries per block: each reads every panel while it is in the first cache */
    BLOCK_FLOATS = 1 << 15, /* of a block's packed queries: 128 KiB, well inside the second cache */
};

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

typedef struct { /* heads of one query and some keys in bf16, a number being two values: see lightning_sieve.h */
    int32_t *queries; /* [tiles][pairs][SIEVE_ROWS] */
    float *weights; /* [tiles][SIEVE_ROWS], zeros beyond the last head */
    float *margin; /* [2 pairs] */
    int32_t *margin_pairs; /* [pairs], the margin in bf16 */
    int32_t *panel; /* [pairs][SIEVE_KEYS] */
    int64_t *slots; /* [SIEVE_KEYS], of this panel of keys */
    int64_t pairs, tiles;
    int64_t raising; /* tiles that hold all heads whose weight is positive */
    int64_t at_once; /* lines to ask the memory for with every pair of these tiles */
    float slack;
} sieve;

typedef struct { /* what one thread owns */
    float *queries; /* [rows / TILE][width][TILE] */
    float *weights; /* [rows] */
    float *panel; /* [width][PANEL], when keys are packed on the fly */
    float *rows; /* [PANEL][width], when keys are collected from blocks */
    int32_t *places; /* [PANEL], their positions */
    float **targets; /* [rows] the score row that a row adds to */
    float *scores; /* [queries + 1][PANEL]; rows that only fill the last tile add to the last one */
    candidates *best; /* [queries] */
    int64_t room; /* of each candidate list */
    sieve sieve;
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
    store pool;                    /* the keys [slots, I] */
    int64_t page;                  /* slots per block of the pool */
    int64_t parts;                 /* of every query's keys, for as many threads */
    candidates *partial;           /* [T, parts], if there are several */
    atomic_llong next;
    atomic_int out_of_memory;
} job;

typedef struct kernel { /* one instruction set */
    void (*select_block)(const job *, scratch *, int64_t first, int64_t last);
    void (*select_part)(const job *, scratch *, int64_t t, int64_t begin, int64_t end);
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

static inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static inline int64_t padded_heads(int64_t heads) { return (heads + SIEVE_ROWS - 1) / SIEVE_ROWS * SIEVE_ROWS; }

/* What a thread owns, in one piece; false when there is no memory for it. */
static int open_scratch(const job *work, scratch *own) {
    const int64_t queries = work->block, rows = queries * ((work->heads + 15) / 16 * 16);
    sieve *sift = &own->sieve;
    sift->pairs = (work->width + 31) / 32 * 16; /* whole registers */
    own->room = padded(4 * (2 * work->best + 2 * PANEL + 16)) / 4; /* both lists begin on a cache line */
    const struct {
        void *to;
        int64_t bytes;
    } parts[] = {
        {&own->queries, 4 * rows * work->width},
        {&own->weights, 4 * rows},
        {&own->panel, 4 * work->width * PANEL},
        {&own->rows, 4 * work->width * PANEL},
        {&own->places, 4 * PANEL},
        {&own->targets, (int64_t)sizeof(float *) * rows},
        {&own->scores, 4 * (queries + 1) * PANEL},
        {&own->best, (int64_t)sizeof(candidates) * queries},
        {&sift->queries, 4 * padded_heads(work->heads) * sift->pairs},
        {&sift->weights, 4 * padded_heads(work->heads)},
        {&sift->margin, 4 * 2 * sift->pairs},
        {&sift->margin_pairs, 4 * sift->pairs},
        {&sift->panel, 4 * sift->pairs * SIEVE_KEYS},
        {&sift->slots, 8 * SIEVE_KEYS},
    };
    enum { PARTS = sizeof parts / sizeof *parts };
    const int64_t list = padded(8 * own->room);
    int64_t total = list * queries;
    for (int i = 0; i < PARTS; i++) total += padded(parts[i].bytes);
    void *memory;
    if (posix_memalign(&memory, 64, (size_t)total)) return 0;
    char *at = own->memory = memory;
    for (int i = 0; i < PARTS; i++, at += padded(parts[i - 1].bytes)) memcpy(parts[i].to, &at, sizeof at);
    for (int64_t t = 0; t < queries; t++, at += list) {
        own->best[t].value = (float *)at;
        own->best[t].place = (int32_t *)at + own->room;
    }
    return 1;
}
