/* What decoding.c does with the rows of a cache, which storage.h reads and writes. */

ENTRY(scatter) {
    matrix rows, places; /* places: int64 */
    store pool;
    if (!takes(given, 3) || !read_matrix(args[0], &rows) || !read_store(args[1], &pool) || !read_matrix(args[2], &places))
        return NULL;
    const int64_t *at = (const int64_t *)(const void *)places.at;
    if (!fits(rows.columns == pool.columns && vector_of(places, rows.rows))) return NULL;
    for (int64_t r = 0; r < rows.rows; r++) {
        if (!fits(at[r] >= 0 && at[r] < pool.rows)) return NULL;
        narrow(&pool, at[r], row(rows, r));
    }
    Py_RETURN_NONE;
}

/* Reads places (int64, -1 padded) of a pool's rows; false with an exception set for one outside. */
static int read_places(PyObject *tuple, const store *pool, matrix *to) {
    if (!read_matrix(tuple, to) || !fits(to->columns >= 0)) return 0;
    const int64_t *at = (const int64_t *)(const void *)to->at;
    for (int64_t t = 0; t < to->rows; t++)
        for (int64_t i = 0; i < to->columns && at[t * to->stride + i] >= 0; i++)
            if (!fits(at[t * to->stride + i] < pool->rows)) return 0;
    return 1;
}

/* Attention of the heads of every token (rows of q follow each other) to the rows of the pool that its places name. */
ENTRY(attend) {
    matrix y, q, places;
    store pool;
    float scale;
    if (!takes(given, 5) || !read_matrix(args[0], &y) || !read_matrix(args[1], &q) || !read_store(args[2], &pool) ||
        !read_places(args[3], &pool, &places) || !real(args[4], &scale))
        return NULL;
    if (!fits(y.rows == q.rows && q.columns == pool.columns && y.columns <= pool.columns)) return NULL;
    if (!fits(places.rows > 0 && y.rows % places.rows == 0)) return NULL;
    const int64_t heads = y.rows / places.rows, most = places.columns + 1;
    const int64_t wide = pool.format == FP32 ? 0 : most * pool.columns; /* rows in fewer bits are widened first */
    char *memory = PyMem_Malloc((size_t)most * (sizeof(float *) + sizeof(float)) + sizeof(float) * (size_t)wide);
    if (!memory) return PyErr_NoMemory();
    const float **keys = (const float **)(void *)memory;
    float *p = (float *)(void *)(keys + most), *widened = p + most;
    PyThreadState *own = let_others_run(2 * size_of(places) * (double)heads * (double)q.columns);
    for (int64_t t = 0; t < places.rows; t++) {
        const int64_t *mine = (const int64_t *)(const void *)places.at + t * places.stride;
        const matrix y_t = {row(y, t * heads), heads, y.columns, y.stride};
        const matrix q_t = {row(q, t * heads), heads, q.columns, q.stride};
        int64_t count = 0;
        for (; count < places.columns && mine[count] >= 0; count++) {
            float *to = widened + count * pool.columns;
            keys[count] = wide ? to : (const float *)(const void *)stored_row(&pool, mine[count]);
            if (wide) use->widen(to, &pool, mine[count]);
        }
        use->attend(y_t, q_t, keys, count, p, scale);
    }
    if (own) PyEval_RestoreThread(own);
    PyMem_Free(memory);
    Py_RETURN_NONE;
}
