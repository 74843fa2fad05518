/* Split virtqueues, driver side (2.7). */
#include "ring.h"

#define S(q) (&(q)->u.split)

static inline void fill(struct gpv_queue *q, struct gpv_split_desc *d, uint64_t addr, uint32_t len, uint32_t flags,
                        uint32_t next)
{
    (void)q;
    GPV_STORE(q, &d->addr, addr);
    GPV_STORE(q, &d->len, len);
    GPV_STORE(q, &d->flags, (uint16_t)flags);
    GPV_STORE(q, &d->next, (uint16_t)next);
}

/* 2.7.5.3: one table per descriptor, its entries in order from 0. */
static void fill_table(struct gpv_queue *q, uint32_t id, const uint64_t *addresses, uint32_t address_step,
                       const uint32_t *lengths, uint32_t length_step, uint32_t elements, uint32_t writable_from)
{
    struct gpv_split_desc *table = S(q)->tables + (size_t)id * q->table_entries;
    uint32_t i;

    for (i = 0; i < elements; i++) {
        uint32_t flags = (i + 1 < elements ? GPV_DESC_F_NEXT : 0) | (i >= writable_from ? GPV_DESC_F_WRITE : 0);

        fill(q, &table[i], addresses[(size_t)i * address_step], lengths[(size_t)i * length_step], flags,
             i + 1 < elements ? i + 1 : 0);
    }
    fill(q, &S(q)->desc[id], q->tables_bus + (uint64_t)id * q->table_entries * 16, elements * 16, GPV_DESC_F_INDIRECT,
         0);
}

/* 2.7.13.1 and 2.7.13.2. With IN_ORDER the free list is the ring order itself, as 2.7.5 asks. */
int32_t gpv_split_add(struct gpv_queue *q, const uint64_t *addresses, uint32_t address_step, const uint32_t *lengths,
                      uint32_t length_step, uint32_t elements, uint32_t writable_from, uint64_t cookie)
{
    uint32_t id = q->free_head, last = id, i, writable;
    struct gpv_slot *slot = &q->slots[id];
    int32_t error = gpv_check_buffer(q, lengths, length_step, elements, writable_from, &writable);
    int table = gpv_takes_table(q, id, elements);

    if (error)
        return error;
    if (q->free < (table ? 1 : elements))
        return GPV_EFULL;
    if (table) {
        fill_table(q, id, addresses, address_step, lengths, length_step, elements, writable_from);
    } else {
        uint32_t here = id;

        for (i = 0; i < elements; i++) {
            uint32_t flags = (i + 1 < elements ? GPV_DESC_F_NEXT : 0) | (i >= writable_from ? GPV_DESC_F_WRITE : 0);

            last = here;
            here = q->next[last];
            fill(q, &S(q)->desc[last], addresses[(size_t)i * address_step], lengths[(size_t)i * length_step], flags,
                 i + 1 < elements ? here : 0);
        }
    }
    q->free_head = q->next[last];
    slot->cookie = cookie;
    slot->turn = q->turn_added;
    slot->writable = writable;
    slot->count = (uint16_t)(table ? 1 : elements);
    slot->last = (uint16_t)last;
    q->free -= slot->count;
    GPV_STORE(q, &S(q)->avail_ring[q->turn_added & (q->size - 1)], (uint16_t)id);
    q->turn_added++;
    return (int32_t)id;
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

int32_t gpv_split_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max)
{
    const uint32_t mask = q->size - 1;
    uint32_t n = 0, ready, id, len;
    /* Used ring entries and the buffers' data behind idx. Pairs with the device's release store of used idx (2.7.8.2). */
    uint16_t idx = GPV_LOAD_ACQUIRE(q, S(q)->used_idx);

    ready = (uint16_t)(idx - (uint16_t)q->turn_reaped);
    if (ready > gpv_waiting(q))
        return gpv_violate(q, GPV_BAD_USED_INDEX, 0, 0, idx, (uint16_t)q->turn_published);
    if (max > ready)
        max = ready;
    while (n < max) {
        uint32_t position = (uint32_t)q->turn_reaped & mask;

        if (q->batch_left) {
            n += gpv_reap_batch(q, ids ? ids + n : 0, lengths ? lengths + n : 0, cookies ? cookies + n : 0, max - n);
            continue;
        }
        id = GPV_LOAD(q, &S(q)->used_ring[position].id);
        len = GPV_LOAD(q, &S(q)->used_ring[position].len);
        if (gpv_check_used(q, position, id, len))
            break;
        if (q->in_order) {
            uint64_t batch = q->slots[id].turn - q->turn_reaped + 1;

            if (batch > ready - n) {
                gpv_violate(q, GPV_BAD_ORDER, position, id, id, q->oldest);
                break;
            }
            q->batch_left = (uint32_t)batch;
            q->batch_len = len;
            continue;
        }
        if (ids)
            ids[n] = id;
        if (lengths)
            lengths[n] = len;
        if (cookies)
            cookies[n] = q->slots[id].cookie;
        gpv_release(q, id);
        n++;
    }
    if (n > 0 && q->armed && q->event_idx)
        gpv_split_arm(q); /* the index has moved on; whoever reaps until nothing is left then misses nothing */
    return n > 0 || !q->violation.kind ? (int32_t)n : GPV_EBROKEN;
}

uint16_t gpv_split_place(const struct gpv_queue *q)
{
    return (uint16_t)q->turn_published;
}
