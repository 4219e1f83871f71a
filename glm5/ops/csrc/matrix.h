/* Matrices and stores as they travel from Python to decoding.c, and how they are read: tuples (address, rows, columns,
 * stride) and (address, rows, columns, format, address of the scales). */

typedef struct {
    float *at;
    int64_t rows, columns, stride;
} matrix;

static inline float *row(matrix m, int64_t r) { return m.at + r * m.stride; }

static int takes(Py_ssize_t given, int wanted) {
    if (given != wanted) PyErr_Format(PyExc_TypeError, "expected %d arguments, not %zd", wanted, given);
    return given == wanted;
}

static int whole(PyObject *value, int64_t *to) {
    *to = PyLong_AsLongLong(value);
    return !(*to == -1 && PyErr_Occurred());
}

static int real(PyObject *value, float *to) {
    const double wide = PyFloat_AsDouble(value);
    *to = (float)wide;
    return !(wide == -1.0 && PyErr_Occurred());
}

static int read_matrix(PyObject *tuple, matrix *to) {
    int64_t address;
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 4) {
        PyErr_SetString(PyExc_TypeError, "a matrix is a tuple (address, rows, columns, stride)");
        return 0;
    }
    if (!whole(PyTuple_GetItem(tuple, 0), &address) || !whole(PyTuple_GetItem(tuple, 1), &to->rows) ||
        !whole(PyTuple_GetItem(tuple, 2), &to->columns) || !whole(PyTuple_GetItem(tuple, 3), &to->stride))
        return 0;
    to->at = (float *)(uintptr_t)address;
    return 1;
}

static int read_store(PyObject *tuple, store *to) {
    int64_t address, scales;
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 5) {
        PyErr_SetString(PyExc_TypeError, "a store is a tuple (address, rows, columns, format, scales)");
        return 0;
    }
    if (!whole(PyTuple_GetItem(tuple, 0), &address) || !whole(PyTuple_GetItem(tuple, 1), &to->rows) ||
        !whole(PyTuple_GetItem(tuple, 2), &to->columns) || !whole(PyTuple_GetItem(tuple, 3), &to->format) ||
        !whole(PyTuple_GetItem(tuple, 4), &scales))
        return 0;
    to->at = (char *)(uintptr_t)address;
    to->scales = (uint8_t *)(uintptr_t)scales;
    if (to->format < FP32 || to->format >= FORMATS || (to->format == FP8) != (scales != 0)) {
        PyErr_SetString(PyExc_ValueError, "a store has no such format, or lacks its scales");
        return 0;
    }
    return 1;
}

/* Reads `count` matrices, then numbers; false with an exception set when something is amiss. */
static int read_all(PyObject *const *args, Py_ssize_t given, int matrices, matrix *m, int numbers, PyObject *const **rest) {
    if (!takes(given, matrices + numbers)) return 0;
    for (int i = 0; i < matrices; i++)
        if (!read_matrix(args[i], &m[i])) return 0;
    *rest = args + matrices;
    return 1;
}

static int fits(int holds) {
    if (!holds) PyErr_SetString(PyExc_ValueError, "the matrices do not fit together");
    return holds;
}

/* Other Python threads may run during long work; handing over for short work would cost more than it takes. */
enum { LONG_WORK = 1 << 21 }; /* multiplications: about 0.1 ms */

static PyThreadState *let_others_run(double products) { return products < LONG_WORK ? NULL : PyEval_SaveThread(); }

static PyObject *done(PyThreadState *own) {
    if (own) PyEval_RestoreThread(own);
    Py_RETURN_NONE;
}

static double size_of(matrix m) { return (double)m.rows * (double)m.columns; }

static int same_shape(matrix a, matrix b) { return a.rows == b.rows && a.columns == b.columns; }

static int vector_of(matrix a, int64_t columns) { return a.rows == 1 && a.columns == columns; }
