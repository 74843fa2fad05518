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

static inline void fill(struct gpv_queue *q, struct gpv_packed_desc *d, uint64_t addr, uint32_t len, uint32_t id,
                        uint32_t flags)
{
    (void)q;
    GPV_STORE(q, &d->addr, addr);
    GPV_STORE_DESC_TAIL(q, d, gpv_word(len, id, flags));
}

/* 2.8.7: entries follow each other without NEXT, only WRITE counts. */
static void fill_table(struct gpv_queue *q, uint32_t id, const struct gpv_rows *rows)
{
    struct gpv_packed_desc *table = P(q)->tables + (size_t)id * q->table_entries;
    uint32_t i;

    for (i = 0; i < rows->elements; i++)
        fill(q, &table[i], gpv_address(rows, i), gpv_length(rows, i), 0, i >= rows->writable_from ? GPV_DESC_F_WRITE : 0);
}

/* 2.8.21.1. The head's flags are stored after the rest of its list. The head of the first unpublished buffer gets its flags
 * in gpv_packed_publish only: the device looks at one position (2.8.2), so it sees nothing of the burst before that. */
static int32_t add_rows(struct gpv_queue *q, struct gpv_rows rows, uint32_t count, const uint64_t *cookies,
                        uint32_t *ids)
{
    struct gpv_packed_desc *const desc = P(q)->desc;
    struct gpv_slot *const slots = q->slots;
    const uint16_t *const next = q->next;
    const uint32_t size = q->size, tables = gpv_tables_for(q, rows.elements), in_order = q->in_order;
    const uint64_t published = q->turn_published;
    struct gpv_place place = P(q)->next_avail;
    uint32_t room = q->free, id = in_order ? place.offset : q->free_head, n, i;
    uint64_t turn = q->turn_added;
    int32_t error = 0;

    for (n = 0; n < count; n++, turn++, gpv_next_row(&rows)) {
        const uint32_t head = place.offset;
        const uint32_t taken = id < tables ? 1 : rows.elements;
        struct gpv_slot *slot = &slots[id];
        uint32_t writable, len, flags;
        uint64_t addr;

        error = room < taken ? GPV_EFULL : gpv_check_row(&rows, &writable);
        if (error)
            break;
        if (id < tables) {
            fill_table(q, id, &rows);
            addr = q->tables_bus + (uint64_t)id * q->table_entries * 16;
            len = rows.elements * 16;
            flags = available(place.wrap) | GPV_DESC_F_INDIRECT;
        } else {
            addr = gpv_address(&rows, 0);
            len = gpv_length(&rows, 0);
            flags = available(place.wrap) | gpv_element_flags(&rows, 0);
        }
        place = gpv_place_after(place, 1, size);
        for (i = 1; i < taken; i++) {
            fill(q, &desc[place.offset], gpv_address(&rows, i), gpv_length(&rows, i), id,
                 available(place.wrap) | gpv_element_flags(&rows, i));
            place = gpv_place_after(place, 1, size);
        }
        if (turn == published) {
            P(q)->held_offset = (uint16_t)head;
            P(q)->held_flags = (uint16_t)flags;
            flags ^= USED_AND_AVAIL; /* available in the lap before, which means nothing in this one */
        }
        fill(q, &desc[head], addr, len, id, flags);
        slot->cookie = cookies ? cookies[n] : 0;
        slot->turn = turn;
        slot->use = gpv_word(writable, taken, id);
        if (ids)
            ids[n] = id;
        room -= taken;
        id = in_order ? place.offset : next[id];
    }
    P(q)->added = (uint16_t)(P(q)->added + q->free - room);
    P(q)->next_avail = place;
    q->free = room;
    q->free_head = (uint16_t)id;
    q->turn_added = turn;
    return n ? (int32_t)n : error;
}

/* The same for what most bursts are, single elements from two arrays, with little enough in hand for a CPU's registers. With
 * IN_ORDER the free list was never changed, so it is the ring order itself. */
static int32_t add_plain(struct gpv_queue *q, const uint64_t *addresses, const uint32_t *lengths, uint32_t count,
                         uint32_t write, const uint64_t *cookies, uint32_t *ids)
{
    struct gpv_slot *const slots = q->slots;
    const uint16_t *const next = q->next;
    const uint32_t limit = count < q->free ? count : q->free;
    struct gpv_place place = P(q)->next_avail;
    struct gpv_packed_desc *d = &P(q)->desc[place.offset], *const end = &P(q)->desc[q->size];
    uint32_t id = q->in_order ? place.offset : q->free_head, flags = available(place.wrap) | write, hold = 0, n;
    uint64_t turn = q->turn_added;

    if (turn == q->turn_published) {
        P(q)->held_offset = (uint16_t)place.offset;
        P(q)->held_flags = (uint16_t)flags;
        hold = USED_AND_AVAIL;
    }
    for (n = 0; n < limit && lengths[n]; n++) {
        struct gpv_slot *slot = &slots[id];

        fill(q, d, addresses[n], lengths[n], id, flags ^ hold);
        hold = 0;
        slot->cookie = cookies ? cookies[n] : 0;
        slot->turn = turn++;
        slot->use = gpv_word(write ? lengths[n] : 0, 1, id);
        if (ids)
            ids[n] = id;
        id = next[id];
        if (++d == end) {
            d = P(q)->desc;
            flags ^= USED_AND_AVAIL;
        }
    }
    P(q)->added = (uint16_t)(P(q)->added + n);
    P(q)->next_avail = gpv_place_after(place, n, q->size);
    q->free -= n;
    q->free_head = (uint16_t)id;
    q->turn_added = turn;
    return n ? (int32_t)n : limit ? GPV_ELENGTH : GPV_EFULL;
}

int32_t gpv_packed_add(struct gpv_queue *q, struct gpv_rows rows, uint32_t count, const uint64_t *cookies, uint32_t *ids)
{
    if (rows.elements == 1 && (count == 1 || (rows.address_step == 1 && rows.length_step == 1)))
        return add_plain(q, rows.addresses, rows.lengths, count, rows.writable_from ? 0 : GPV_DESC_F_WRITE, cookies,
                         ids);
    return add_rows(q, rows, count, cookies, ids);
}

/* 2.8.21.1.1 and 2.8.21.2. Returns whether the device asks for a notification. */
int32_t gpv_packed_publish(struct gpv_queue *q)
{
    const struct gpv_place now = P(q)->next_avail;
    const uint32_t added = P(q)->added;
    uint16_t flags, event;
    int32_t back;

    /* Everything of the burst before the flags of its first head (2.8.21.1.1). Pairs with the device's acquire load of the
     * flags at the position it polls. */
    GPV_STORE_RELEASE(q, &P(q)->desc[P(q)->held_offset].flags, P(q)->held_flags);
    q->turn_published = q->turn_added;
    P(q)->added = 0;
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
    return back > 0 && (uint32_t)back <= added;
}

int32_t gpv_packed_pending(struct gpv_queue *q)
{
    /* Relaxed: what was used is read in gpv_packed_reap, behind its own acquire. */
    uint32_t flags = GPV_LOAD(q, &P(q)->desc[P(q)->next_used.offset].flags) & USED_AND_AVAIL;

    return flags == used(P(q)->next_used.wrap) || (gpv_waiting(q) && flags != available(P(q)->next_used.wrap));
}

/* In whatever order the device sees position and flags: gpv_packed_arm has a fence and another look behind both. */
static void set_event(struct gpv_queue *q, uint16_t flags)
{
    const uint16_t event = flags == 2 ? gpv_place_pack(P(q)->next_used) : P(q)->event;

    if (event != P(q)->event)
        GPV_STORE(q, P(q)->driver_event, event);
    if (flags != P(q)->event_flags)
        GPV_STORE(q, P(q)->driver_flags, flags);
    P(q)->event = event;
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

/* Looks at the descriptor that the device uses next. 1: used, and what it says was checked; 0: not used; or GPV_EBROKEN. */
GPV_SPECIALIZED int32_t next_entry(struct gpv_queue *q, struct gpv_place place, uint32_t waiting, uint32_t *id,
                                   uint32_t *len)
{
    struct gpv_packed_desc *d = &P(q)->desc[place.offset];
    /* id and len, and the buffer's data, behind flags. Pairs with the device's release store of them (2.8.22). */
    const uint32_t flags = GPV_LOAD_ACQUIRE(q, &d->flags);

    if ((flags & USED_AND_AVAIL) != used(place.wrap)) {
        if (waiting && (flags & USED_AND_AVAIL) != available(place.wrap))
            return gpv_violate(q, GPV_BAD_WRAP, place.offset, 0, flags, used(place.wrap));
        return 0;
    }
    *id = GPV_LOAD(q, &d->id);
    *len = GPV_LOAD(q, &d->len);
    /* Without WRITE len is reserved (2.8.4, DEV-PACKED-21). QEMU never sets WRITE there and means its len all the same;
     * one that cannot be meant counts as nothing written. */
    if (!(flags & GPV_DESC_F_WRITE) && (*id >= q->size || *len > q->slots[*id].writable))
        *len = 0;
    if (!waiting)
        return gpv_violate(q, GPV_USED_UNASKED, place.offset, *id, flags, 0);
    return gpv_check_used(q, place.offset, *id, *len) ? GPV_EBROKEN : 1;
}

/* IN_ORDER: reads the next used descriptor, which may stand for a batch. Returns whether there was one. */
static int next_batch(struct gpv_queue *q)
{
    uint32_t id;

    if (next_entry(q, P(q)->next_used, gpv_waiting(q), &id, &q->batch_len) <= 0)
        return 0;
    q->batch_left = (uint32_t)(q->slots[id].turn - q->turn_reaped + 1);
    return 1;
}

int32_t gpv_packed_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max)
{
    struct gpv_slot *const slots = q->slots;
    uint16_t *const next = q->next;
    const uint32_t size = q->size;
    struct gpv_place place = P(q)->next_used;
    uint32_t n = 0, waiting = gpv_waiting(q), freed = 0, step = 1, head, id, len;

    if (q->in_order) {
        while (n < max && (q->batch_left || next_batch(q))) {
            freed = q->free;
            n += gpv_reap_batch(q, ids ? ids + n : 0, lengths ? lengths + n : 0, cookies ? cookies + n : 0, max - n);
            P(q)->next_used = gpv_place_after(P(q)->next_used, q->free - freed, size);
        }
    } else {
        const uint32_t limit = max < waiting ? max : waiting;

        for (head = q->free_head; n < limit && next_entry(q, place, 1, &id, &len) > 0; n++) {
            if (ids)
                ids[n] = id;
            if (lengths)
                lengths[n] = len;
            if (cookies)
                cookies[n] = slots[id].cookie;
            if (slots[id].count != step)
                step = GPV_OPAQUE(slots[id].count); /* a branch lets the CPU look ahead before it knows the count */
            place = gpv_place_after(place, step, size);
            freed += step;
            slots[id].count = 0;
            next[id] = (uint16_t)head;
            head = id;
        }
        if (n == waiting && n < max)
            next_entry(q, place, 0, &id, &len); /* whether the device used more than it was given */
        P(q)->next_used = place;
        q->free_head = (uint16_t)head;
        q->free += freed;
        q->turn_reaped += n;
    }
    if (n > 0 && q->armed && q->event_idx)
        gpv_packed_arm(q); /* the position has moved on; whoever reaps until nothing is left then misses nothing */
    return n > 0 || !q->violation.kind ? (int32_t)n : GPV_EBROKEN;
}

uint16_t gpv_packed_place(const struct gpv_queue *q)
{
    return gpv_place_pack(P(q)->next_avail);
}
