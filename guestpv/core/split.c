/* Split virtqueues, driver side (2.7). */
#include "ring.h"

#define S(q) (&(q)->u.split)

static inline void fill(struct gpv_queue *q, struct gpv_split_desc *d, uint64_t addr, uint32_t len, uint32_t flags,
                        uint32_t next)
{
    (void)q;
    GPV_STORE(q, &d->addr, addr);
    GPV_STORE(q, &d->len_flags_next, gpv_word(len, flags, next));
}

/* 2.7.5.3: one table per descriptor, its entries in order from 0. */
static void fill_table(struct gpv_queue *q, uint32_t id, const struct gpv_rows *rows)
{
    const size_t first = (size_t)id * q->table_entries;
    struct gpv_split_desc *table = S(q)->tables + first;
    uint32_t i;

    for (i = 0; i < rows->elements; i++)
        fill(q, &table[i], gpv_address(rows, i), gpv_length(rows, i), gpv_element_flags(rows, i),
             i + 1 < rows->elements ? i + 1 : 0);
    fill(q, &S(q)->desc[id], q->tables_bus + first * 16, rows->elements * 16, GPV_DESC_F_INDIRECT, 0);
}

/* 2.7.13.1 and 2.7.13.2. With IN_ORDER the free list is the ring order itself, as 2.7.5 asks. */
GPV_SPECIALIZED int32_t add_rows(struct gpv_queue *q, struct gpv_rows rows, uint32_t count, const uint64_t *cookies,
                                 uint32_t *ids)
{
    struct gpv_split_desc *const desc = S(q)->desc;
    GPV_SHARED(uint16_t) *const avail_ring = S(q)->avail_ring;
    struct gpv_slot *const slots = q->slots;
    const uint16_t *const next = q->next;
    const uint32_t mask = q->size - 1, tables = gpv_tables_for(q, rows.elements);
    uint32_t room = q->free, id = q->free_head, n, i;
    uint64_t turn = q->turn_added;
    int32_t error = 0;

    for (n = 0; n < count; n++, turn++, gpv_next_row(&rows)) {
        struct gpv_slot *slot = &slots[id];
        const uint32_t taken = id < tables ? 1 : rows.elements;
        uint32_t last = id, following, writable;

        error = room < taken ? GPV_EFULL : gpv_check_row(&rows, &writable);
        if (error)
            break;
        following = next[id];
        if (id < tables) {
            fill_table(q, id, &rows);
        } else {
            for (i = 0;; i++) {
                fill(q, &desc[last], gpv_address(&rows, i), gpv_length(&rows, i), gpv_element_flags(&rows, i),
                     i + 1 < rows.elements ? following : 0);
                if (i + 1 == rows.elements)
                    break;
                last = following;
                following = next[last];
            }
        }
        slot->cookie = cookies ? cookies[n] : 0;
        slot->turn = turn;
        slot->use = gpv_word(writable, taken, last);
        GPV_STORE(q, &avail_ring[turn & mask], (uint16_t)id);
        if (ids)
            ids[n] = id;
        room -= taken;
        id = following;
    }
    q->free = room;
    q->free_head = (uint16_t)id;
    q->turn_added = turn;
    return n ? (int32_t)n : error;
}

int32_t gpv_split_add(struct gpv_queue *q, struct gpv_rows rows, uint32_t count, const uint64_t *cookies, uint32_t *ids)
{
    if (rows.elements == 1) /* known here, so this one is compiled without loops over elements */
        return add_rows(q, rows, count, cookies, ids);
    return add_rows(q, rows, count, cookies, ids);
}

/* 2.7.13.3 and 2.7.13.4. Returns whether the device asks for a notification. */
int32_t gpv_split_publish(struct gpv_queue *q)
{
    uint16_t old_index = (uint16_t)q->turn_published, new_index = (uint16_t)q->turn_added, word;

    /* Descriptors and ring entries before idx (2.7.13.3.1). Pairs with the device's acquire load of avail idx. */
    GPV_STORE_RELEASE(q, S(q)->avail_idx, new_index);
    q->turn_published = q->turn_added;
    /* idx before the suppression word (2.7.13.4.1). Pairs with the device's full fence between its store of avail_event or
     * used flags and its second look at avail idx: one of the two sides sees what the other wrote. */
    GPV_FENCE_FULL(q);
    if (q->event_idx) {
        word = GPV_LOAD(q, S(q)->avail_event);
        return gpv_crossed(word, new_index, old_index);
    }
    word = GPV_LOAD(q, S(q)->used_flags);
    if (word > 1) /* DEV-SPLIT-18 */
        return gpv_violate(q, GPV_BAD_EVENT_FLAGS, 0, 0, word, 1);
    return !word;
}

int32_t gpv_split_pending(struct gpv_queue *q)
{
    /* Relaxed: what was used is read in gpv_split_reap, behind its own acquire. */
    uint16_t idx = GPV_LOAD(q, S(q)->used_idx);

    return idx != (uint16_t)q->turn_reaped;
}

/* Without EVENT_IDX only flags count; with it flags stay 0 and an index that was passed just now is 65536 used buffers
 * away from the next notification (2.7.7.1). */
void gpv_split_disarm(struct gpv_queue *q)
{
    q->armed = 0;
    if (q->event_idx) {
        S(q)->event = (uint16_t)(q->turn_reaped - 1);
        GPV_STORE(q, S(q)->used_event, S(q)->event);
    } else {
        GPV_STORE(q, S(q)->avail_flags, 1);
    }
}

void gpv_split_arm(struct gpv_queue *q)
{
    if (q->event_idx) {
        S(q)->event = (uint16_t)q->turn_reaped;
        GPV_STORE(q, S(q)->used_event, S(q)->event);
    } else if (!q->armed) {
        GPV_STORE(q, S(q)->avail_flags, 0);
    }
    q->armed = 1;
    /* The wish for a notification before the next look at used idx (note in 2.7.14). Pairs with the device's full fence
     * between its store of used idx and its load of used_event or avail flags. */
    GPV_FENCE_FULL(q);
}

/* IN_ORDER: reads the next used entry, which may stand for a batch. */
static int32_t next_batch(struct gpv_queue *q, uint32_t ready)
{
    const uint32_t position = (uint32_t)q->turn_reaped & (q->size - 1);
    const uint32_t id = GPV_LOAD(q, &S(q)->used_ring[position].id);
    uint64_t batch;

    q->batch_len = GPV_LOAD(q, &S(q)->used_ring[position].len);
    if (gpv_check_used(q, position, id, q->batch_len))
        return GPV_EBROKEN;
    batch = q->slots[id].turn - q->turn_reaped + 1;
    if (batch > ready)
        return gpv_violate(q, GPV_BAD_ORDER, position, id, id, q->oldest);
    q->batch_left = (uint32_t)batch;
    return 0;
}

int32_t gpv_split_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max)
{
    struct gpv_used_elem *const used_ring = S(q)->used_ring;
    struct gpv_slot *const slots = q->slots;
    uint16_t *const next = q->next;
    const uint32_t mask = q->size - 1;
    uint32_t n = 0, ready, head, freed = 0, first = (uint32_t)q->turn_reaped;
    /* Used ring entries and the buffers' data behind idx. Pairs with the device's release store of used idx (2.7.8.2). */
    const uint16_t idx = GPV_LOAD_ACQUIRE(q, S(q)->used_idx);

    ready = (uint16_t)(idx - (uint16_t)first);
    if (ready > gpv_waiting(q))
        return gpv_violate(q, GPV_BAD_USED_INDEX, 0, 0, idx, (uint16_t)q->turn_published);
    if (q->in_order) {
        while (n < max && n < ready && (q->batch_left || !next_batch(q, ready - n)))
            n += gpv_reap_batch(q, ids ? ids + n : 0, lengths ? lengths + n : 0, cookies ? cookies + n : 0, max - n);
    } else {
        for (head = q->free_head; n < max && n < ready; n++) {
            const uint32_t position = (first + n) & mask;
            const uint32_t id = GPV_LOAD(q, &used_ring[position].id), len = GPV_LOAD(q, &used_ring[position].len);

            if (gpv_check_used(q, position, id, len))
                break;
            if (ids)
                ids[n] = id;
            if (lengths)
                lengths[n] = len;
            if (cookies)
                cookies[n] = slots[id].cookie;
            freed += slots[id].count;
            slots[id].count = 0;
            next[slots[id].last] = (uint16_t)head;
            head = id;
        }
        q->free_head = (uint16_t)head;
        q->free += freed;
        q->turn_reaped += n;
    }
    if (n > 0 && q->armed && q->event_idx)
        gpv_split_arm(q); /* the index has moved on; whoever reaps until nothing is left then misses nothing */
    return n > 0 || !q->violation.kind ? (int32_t)n : GPV_EBROKEN;
}

uint16_t gpv_split_place(const struct gpv_queue *q)
{
    return (uint16_t)q->turn_published;
}
