/* Queries whose keys lie in blocks of a pool: which memory a panel of keys is, and choices that several threads share.
 *
 * Position p of a sequence lies in slot table[p / page] * page + p % page. fp32 keys that follow each other in the pool
 * are read where they lie; a panel that jumps from one block to another, or is kept in fewer bits, is collected first. A
 * query of at most `best` keys takes them all, whatever its scores are. With more threads than queries the keys of each
 * are cut into parts; the best of the parts' best are the best of all, so the choice does not depend on the number of
 * threads.
 */

enum { LONG_WORK = 1 << 21 }; /* multiplications, about 0.1 ms: less is not worth a thread, nor handing over to others */

static inline int64_t slot_of(const job *work, int64_t t, int64_t position) {
    return work->where[t].table[position / work->page] * work->page + position % work->page;
}

/* The slots of the positions from `begin` to `end`; how many there are. */
static inline int64_t slots_of(const job *work, int64_t t, int64_t begin, int64_t end, int64_t *slots) {
    for (int64_t at = begin, next; at < end; at = next) {
        const int64_t first = slot_of(work, t, at) - at, page_end = at - at % work->page + work->page;
        next = page_end < end ? page_end : end;
        for (int64_t i = at; i < next; i++) slots[i - begin] = first + i;
    }
    return end > begin ? end - begin : 0;
}

/* The products that all queries need, or -1 with an exception set for a sequence that leaves the pool. */
static double check_sequences(const job *work) {
    double products = 0;
    for (int64_t t = 0; t < work->tokens; t++) {
        const sequence from = work->where[t];
        int holds = from.length >= 0 && from.length < INT32_MAX && from.length <= from.blocks * work->page;
        for (int64_t i = 0; holds && i * work->page < from.length; i++)
            holds = from.table[i] >= 0 && from.table[i] < work->pool.rows / work->page;
        if (from.length > work->best) holds = holds && work->q;
        if (!holds) {
            PyErr_SetString(PyExc_ValueError, "a sequence's blocks do not lie in the pool, or it lacks its query");
            return -1;
        }
        if (from.length > work->best) products += (double)from.length * (double)work->heads * (double)work->width;
    }
    return products;
}

/* PANEL keys of a query from position `start` on, [PANEL, width], zeros beyond the last. */
static const float *panel_of(const job *work, scratch *own, int64_t t, int64_t start) {
    int64_t slots[PANEL];
    const int64_t length = work->where[t].length, end = length - start < PANEL ? length : start + PANEL;
    const int64_t count = slots_of(work, t, start, end, slots);
    int together = count == PANEL && work->pool.format == FP32 && slots[PANEL - 1] - slots[0] == PANEL - 1;
    for (int64_t i = 1; together && i < PANEL; i++) together = slots[i] == slots[0] + i;
    if (together) return (const float *)(const void *)stored_row(&work->pool, slots[0]);
    for (int64_t i = 0; i < count; i++) widen(own->rows + i * work->width, &work->pool, slots[i]);
    memset(own->rows + count * work->width, 0, sizeof(float) * (size_t)((PANEL - count) * work->width));
    return own->rows;
}

/* Asks the memory for the keys of the panel after the next one: blocks lie anywhere, which no processor foresees. */
static void fetch_ahead(const job *work, int64_t t, int64_t start) {
    int64_t slots[PANEL];
    const int64_t begin = start + 2 * PANEL, length = work->where[t].length;
    const int64_t count = slots_of(work, t, begin, begin + PANEL < length ? begin + PANEL : length, slots);
    for (int64_t i = 0; i < count; i++) fetch(&work->pool, slots[i]);
}

static void write_slots(const job *work, int64_t t, const candidates *best) {
    int64_t *chosen = work->chosen + t * work->best;
    for (int64_t i = 0; i < work->best; i++) chosen[i] = i < best->count ? slot_of(work, t, best->place[i]) : -1;
}

static void write_everything(const job *work, int64_t t) {
    int64_t *chosen = work->chosen + t * work->best;
    for (int64_t i = 0; i < work->best; i++) chosen[i] = i < work->where[t].length ? slot_of(work, t, i) : -1;
}

/* Select for one part of the keys of one query. */
static void run_part(const job *work, scratch *own, int64_t unit) {
    const int64_t t = unit / work->parts, part = unit % work->parts, length = work->where[t].length;
    if (length <= work->best) {
        if (!part) write_everything(work, t);
        return;
    }
    const int64_t panels = (length + PANEL - 1) / PANEL, last = panels * (part + 1) / work->parts * PANEL;
    candidates *best = own->best;
    best->count = 0;
    best->floor = -INFINITY;
    work->use->select_part(work, own, t, panels * part / work->parts * PANEL, last < length ? last : length);
    if (best->count > work->best) work->use->keep_best(best, work->best);
    if (work->parts == 1) {
        write_slots(work, t, best);
        return;
    }
    candidates *kept = work->partial + unit;
    kept->count = best->count;
    memcpy(kept->value, best->value, sizeof(float) * (size_t)best->count);
    memcpy(kept->place, best->place, sizeof(int32_t) * (size_t)best->count);
}

/* Room for the best of every part, two lists of `best` one behind the other so that a query's can be joined in place. */
static int open_partial(job *work) {
    const int64_t lists = work->tokens * work->parts, room = (2 * work->best + 31) / 16 * 16; /* whole cache lines */
    void *memory;
    if (posix_memalign(&memory, 64, (size_t)(lists * (8 * room + 64)))) return 0;
    work->partial = memory;
    char *at = (char *)memory + (lists * (int64_t)sizeof(candidates) + 63) / 64 * 64;
    for (int64_t i = 0; i < lists; i++, at += 8 * room) {
        work->partial[i] = (candidates){.value = (float *)at, .place = (int32_t *)at + room};
    }
    return 1;
}

/* The best of the parts' best, part after part: they stay in order of position. Then the lists are given back. */
static void join_parts(job *work, int failed) {
    for (int64_t t = 0; t < work->tokens && !failed; t++) {
        candidates *all = work->partial + t * work->parts;
        if (work->where[t].length <= work->best) continue;
        for (int64_t part = 1; part < work->parts; part++) {
            const candidates *more = all + part;
            memcpy(all->value + all->count, more->value, sizeof(float) * (size_t)more->count);
            memcpy(all->place + all->count, more->place, sizeof(int32_t) * (size_t)more->count);
            all->count += more->count;
            if (all->count > work->best) work->use->keep_best(all, work->best);
        }
        write_slots(work, t, all);
    }
    free(work->partial);
}
