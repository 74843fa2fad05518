/* Packed virtqueues, driver side (2.8). */
#include "ring.h"

#define P(q) (&(q)->u.ring)
#define USED_AND_AVAIL (GPV_DESC_F_AVAIL | GPV_DESC_F_USED)

/* 2.8.1: AVAIL equals the wrap counter of the driver, USED is its inverse. */
static inline uint32_t available(uint32_t wrap)
{
    return wrap ? GPV_DESC_F_AVAIL : GPV_DESC_F_USED;
}

/* 2.8.1: both equal the wrap counter of the device. */
static inline uint32_t used(uint32_t wrap)
{
    return wrap ? USED_AND_AVAIL : 0;
}

static inline void fill(struct gpv_queue *q, struct gpv_packed_desc *d, uint64_t addr, uint32_t len, uint32_t id)
{
    (void)q;
    GPV_STORE(q, &d->addr, addr);
    GPV_STORE(q, &d->len, len);
    GPV_STORE(q, &d->id, (uint16_t)id);
}

/* 2.8.7: entries follow each other without NEXT, only WRITE counts. */
static void fill_table(struct gpv_queue *q, uint32_t id, const uint64_t *addresses, uint32_t address_step,
                       const uint32_t *lengths, uint32_t length_step, uint32_t elements, uint32_t writable_from)
{
    struct gpv_packed_desc *table = P(q)->tables + (size_t)id * q->table_entries;
    uint32_t i;

    for (i = 0; i < elements; i++) {
        fill(q, &table[i], addresses[(size_t)i * address_step], lengths[(size_t)i * length_step], 0);
        GPV_STORE(q, &table[i].flags, (uint16_t)(i >= writable_from ? GPV_DESC_F_WRITE : 0));
    }
}

/* 2.8.21.1. The head's flags are stored after the rest of its list. The head of the first unpublished buffer gets its flags
 * in gpv_packed_publish only: the device looks at one position (2.8.2), so it sees nothing of the burst before that. */
int32_t gpv_packed_add(struct gpv_queue *q, const uint64_t *addresses, uint32_t address_step, const uint32_t *lengths,
                       uint32_t length_step, uint32_t elements, uint32_t writable_from, uint64_t cookie)
{
    struct gpv_place place = P(q)->next_avail;
    uint32_t id = q->in_order ? place.offset : q->free_head, head = place.offset, head_flags, i, count, writable;
    struct gpv_slot *slot = &q->slots[id];
    int32_t error = gpv_check_buffer(q, lengths, length_step, elements, writable_from, &writable);
    int table = gpv_takes_table(q, id, elements);

    if (error)
        return error;
    count = table ? 1 : elements;
    if (q->free < count)
        return GPV_EFULL;
    if (table) {
        fill_table(q, id, addresses, address_step, lengths, length_step, elements, writable_from);
        fill(q, &P(q)->desc[head], q->tables_bus + (uint64_t)id * q->table_entries * 16, elements * 16, id);
        head_flags = available(place.wrap) | GPV_DESC_F_INDIRECT;
        place = gpv_place_after(place, 1, q->size);
    } else {
        head_flags = 0;
        for (i = 0; i < elements; i++) {
            struct gpv_packed_desc *d = &P(q)->desc[place.offset];
            uint32_t flags = available(place.wrap) | (i + 1 < elements ? GPV_DESC_F_NEXT : 0) |
                             (i >= writable_from ? GPV_DESC_F_WRITE : 0);

            fill(q, d, addresses[(size_t)i * address_step], lengths[(size_t)i * length_step], id);
            if (i == 0)
                head_flags = flags;
            else
                GPV_STORE(q, &d->flags, (uint16_t)flags);
            place = gpv_place_after(place, 1, q->size);
        }
    }
    if (q->turn_added == q->turn_published) {
        P(q)->held_offset = (uint16_t)head;
        P(q)->held_flags = (uint16_t)head_flags;
        P(q)->added = 0;
    } else {
        GPV_STORE(q, &P(q)->desc[head].flags, (uint16_t)head_flags);
    }
    P(q)->next_avail = place;
    P(q)->added += (uint16_t)count;
    if (!q->in_order)
        q->free_head = q->next[id];
    slot->cookie = cookie;
    slot->turn = q->turn_added;
    slot->writable = writable;
    slot->count = (uint16_t)count;
    slot->last = (uint16_t)id;
    q->free -= count;
    q->turn_added++;
    return (int32_t)id;
}

/* 2.8.21.1.1 and 2.8.21.2. Returns whether the device asks for a notification. */
int32_t gpv_packed_publish(struct gpv_queue *q)
{
    const struct gpv_place now = P(q)->next_avail;
    uint16_t flags, event;
    int32_t back;

    /* Everything of the burst before the flags of its first head (2.8.21.1.1). Pairs with the device's acquire load of the
     * flags at the position it polls. */
    GPV_STORE_RELEASE(q, &P(q)->desc[P(q)->held_offset].flags, P(q)->held_flags);
    q->turn_published = q->turn_added;
    /* Flags before the event suppression structure (2.8.21.3.1). Pairs with the device's full fence between its store to
     * that structure and its second look at the next descriptor's flags. */
    GPV_FENCE_FULL(q);
    flags = GPV_LOAD(q, P(q)->device_flags);
    if (flags == 0) /* RING_EVENT_FLAGS_ENABLE */
        return 1;
    if (flags == 1) /* RING_EVENT_FLAGS_DISABLE */
        return 0;
    if (flags != 2 || !q->event_idx) /* 2.8.10, DEV-PACKED-27 */
        return gpv_violate(q, GPV_BAD_EVENT_FLAGS, 0, 0, flags, q->event_idx ? 2 : 1);
    event = GPV_LOAD(q, P(q)->device_event);
    if ((event & 0x7fffu) >= q->size)
        return gpv_violate(q, GPV_BAD_EVENT_OFFSET, 0, 0, event & 0x7fffu, q->size);
    /* How many descriptors ago the named one was made available; with another wrap value it lies a lap back. */
    back = (int32_t)now.offset - (int32_t)(event & 0x7fffu) + (event >> 15 != now.wrap ? (int32_t)q->size : 0);
    return back > 0 && back <= P(q)->added;
}

int32_t gpv_packed_pending(struct gpv_queue *q)
{
    /* Relaxed: what was used is read in gpv_packed_reap, behind its own acquire. */
    uint32_t flags = GPV_LOAD(q, &P(q)->desc[P(q)->next_used.offset].flags) & USED_AND_AVAIL;

    return flags == used(P(q)->next_used.wrap) || (gpv_waiting(q) && flags != available(P(q)->next_used.wrap));
}

static void set_event(struct gpv_queue *q, uint16_t flags)
{
    if (flags == 2) {
        uint16_t event = gpv_place_pack(P(q)->next_used);

        if (event != P(q)->event)
            GPV_STORE(q, P(q)->driver_event, event);
        P(q)->event = event;
    }
    if (flags != P(q)->event_flags)
        /* The position before the flags that make it count. Pairs with the device's acquire load of the flags (2.8.10). */
        GPV_STORE_RELEASE(q, P(q)->driver_flags, flags);
    P(q)->event_flags = flags;
}

void gpv_packed_disarm(struct gpv_queue *q)
{
    q->armed = 0;
    set_event(q, 1);
}

void gpv_packed_arm(struct gpv_queue *q)
{
    q->armed = 1;
    set_event(q, q->event_idx ? 2 : 0);
    /* The wish for a notification before the next look at the descriptor (2.8.22). Pairs with the device's full fence
     * between its store of used flags and its load of the driver event suppression structure. */
    GPV_FENCE_FULL(q);
}

int32_t gpv_packed_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max)
{
    uint32_t n = 0;

    while (n < max) {
        const struct gpv_place place = P(q)->next_used;
        struct gpv_packed_desc *d = &P(q)->desc[place.offset];
        uint32_t flags, id, len, count;

        if (q->batch_left) {
            count = q->free;
            n += gpv_reap_batch(q, ids ? ids + n : 0, lengths ? lengths + n : 0, cookies ? cookies + n : 0, max - n);
            P(q)->next_used = gpv_place_after(place, q->free - count, q->size);
            continue;
        }
        /* id and len, and the buffer's data, behind flags. Pairs with the device's release store of them (2.8.22). */
        flags = GPV_LOAD_ACQUIRE(q, &d->flags);
        if ((flags & USED_AND_AVAIL) != used(place.wrap)) {
            if (gpv_waiting(q) && (flags & USED_AND_AVAIL) != available(place.wrap))
                gpv_violate(q, GPV_BAD_WRAP, place.offset, 0, flags, used(place.wrap));
            break;
        }
        id = GPV_LOAD(q, &d->id);
        len = GPV_LOAD(q, &d->len);
        /* Without WRITE len is reserved (2.8.5, DEV-PACKED-21). QEMU never sets WRITE there and means what it writes
         * to len all the same; a value that cannot be meant counts as nothing written. */
        if (!(flags & GPV_DESC_F_WRITE) && (id >= q->size || len > q->slots[id].writable))
            len = 0;
        if (!gpv_waiting(q)) {
            gpv_violate(q, GPV_USED_UNASKED, place.offset, id, flags, 0);
            break;
        }
        if (gpv_check_used(q, place.offset, id, len))
            break;
        if (q->in_order) {
            q->batch_left = (uint32_t)(q->slots[id].turn - q->turn_reaped + 1);
            q->batch_len = len;
            continue;
        }
        count = q->slots[id].count;
        if (ids)
            ids[n] = id;
        if (lengths)
            lengths[n] = len;
        if (cookies)
            cookies[n] = q->slots[id].cookie;
        gpv_release(q, id);
        P(q)->next_used = gpv_place_after(place, count, q->size);
        n++;
    }
    if (n > 0 && q->armed && q->event_idx)
        gpv_packed_arm(q); /* the position has moved on; whoever reaps until nothing is left then misses nothing */
    return n > 0 || !q->violation.kind ? (int32_t)n : GPV_EBROKEN;
}

uint16_t gpv_packed_place(const struct gpv_queue *q)
{
    return gpv_place_pack(P(q)->next_avail);
}
