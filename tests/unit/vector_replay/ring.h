/* A driver's half of a virtqueue, written from VIRTIO 1.4 alone, to find out whether the vectors are of use to one.
 * One thread, no barriers: nothing else looks at this memory. BUG=n builds one of the classic mistakes in. */
#ifndef RING_H
#define RING_H

#include <stdint.h>
#include <string.h>

#ifndef BUG
#define BUG 0
#endif

#define MOST 256
enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 1 << 7, USED = 1 << 15 };
#define F_INDIRECT_DESC 28
#define F_EVENT_IDX 29
#define F_RING_PACKED 34
#define F_IN_ORDER 35
#define F_NOTIFICATION_DATA 38

struct element {
    uint64_t address;
    uint32_t length;
};

struct done {
    uint32_t id, length;
};

struct ring {
    uint64_t features, tables_bus;
    uint32_t size, index, table_entries, table_count;
    uint8_t *desc, *driver, *device, *tables;
    /* private: what the device must not be able to change */
    uint16_t next[MOST], head, last[MOST], count[MOST], order[MOST];
    uint32_t writable[MOST];
    uint16_t added, published, reaped; /* buffers; the 16-bit indices of a split ring */
    uint16_t place, wrap, used_place, used_wrap, batch; /* packed: positions, wrap counters, descriptors in the batch */
    uint16_t held_place, held_flags;
    int armed;
};

static int has(const struct ring *r, int bit)
{
    return (int)(r->features >> bit & 1);
}

static void put(uint8_t *at, int width, uint64_t value)
{
    for (; width--; value >>= 8)
        *at++ = (uint8_t)value;
}

static uint32_t get(const uint8_t *at, int width)
{
    uint32_t value = 0;

    while (width--)
        value = value << 8 | at[width];
    return value;
}

static void ring_start(struct ring *r)
{
    uint32_t i;

    for (i = 0; i < r->size; i++)
        r->next[i] = (uint16_t)((i + 1) % r->size);
    r->wrap = r->used_wrap = r->armed = 1;
}

/* 2.7.5; next keeps what was there where NEXT is not set. */
static void split_desc(uint8_t *d, const struct element *e, uint32_t flags, uint32_t next)
{
    put(d, 8, e->address);
    put(d + 8, 4, e->length);
    put(d + 12, 2, flags);
    if (flags & NEXT)
        put(d + 14, 2, next);
}

/* 2.8.13 */
static void packed_desc(uint8_t *d, const struct element *e, uint32_t id, uint32_t flags)
{
    put(d, 8, e->address);
    put(d + 8, 4, e->length);
    put(d + 12, 2, id);
    put(d + 14, 2, flags);
}

/* 2.7.13.1, 2.8.21.1. The first `readable` elements are device-readable. Returns the id. */
static uint32_t ring_add(struct ring *r, const struct element *e, uint32_t readable, uint32_t n)
{
    const int packed = has(r, F_RING_PACKED);
    uint32_t i, at, id = packed && has(r, F_IN_ORDER) ? r->place : r->head, taken = n, flags;
    uint8_t *table = r->tables + (size_t)id * r->table_entries * 16;
    struct element whole = {r->tables_bus + (uint64_t)id * r->table_entries * 16, n * 16};

    r->writable[id] = 0;
    for (i = readable; i < n; i++)
        r->writable[id] += e[i].length;
    if (has(r, F_INDIRECT_DESC) && n > 1 && n <= r->table_entries && id < r->table_count) { /* 2.7.5.3, 2.8.7 */
        for (i = 0; i < n; i++) {
            flags = i < readable ? 0 : WRITE;
            if (packed)
                packed_desc(table + 16 * i, e + i, 0, flags);
            else
                split_desc(table + 16 * i, e + i, flags | (i + 1 < n ? NEXT : 0), i + 1);
        }
        e = &whole;
        taken = 1;
    }
    for (i = 0, at = id; i < taken; i++) {
        flags = e == &whole ? INDIRECT : i < readable ? 0 : WRITE;
        flags |= i + 1 < taken && BUG != 3 ? NEXT : 0;
        if (packed) { /* 2.8.1 */
            flags |= r->wrap ? AVAIL : USED;
            if (!i && r->added == r->published) { /* nothing of a batch is visible before this one's flags are */
                r->held_place = r->place;
                r->held_flags = (uint16_t)flags;
                flags = get(r->desc + 16 * r->place + 14, 2);
            }
            packed_desc(r->desc + 16 * r->place, e + i, id, flags);
            r->place = (uint16_t)((r->place + 1) % r->size);
            r->wrap ^= !r->place && BUG != 2;
            r->batch++;
        } else {
            split_desc(r->desc + 16 * at, e + i, flags, r->next[at]);
        }
        r->last[id] = (uint16_t)at;
        at = r->next[at];
    }
    r->count[id] = (uint16_t)taken;
    r->order[r->added % r->size] = (uint16_t)id;
    if (packed) {
        r->last[id] = (uint16_t)id;
        r->head = r->next[id];
    } else {
        put(r->driver + 4 + 2 * (r->added % r->size), 2, id);
        r->head = (uint16_t)at;
    }
    r->added++;
    return id;
}

/* 2.7.13.3 and 2.7.13.4; 2.8.21.1.1 and 2.8.21.2. Returns whether to notify. */
static int ring_publish(struct ring *r, uint32_t *notification)
{
    const uint16_t old = r->published, new = r->added, batch = r->batch;
    uint16_t event, flags;
    int ahead;

    r->published = r->added;
    r->batch = 0;
    *notification = r->index;
    if (!has(r, F_RING_PACKED)) {
        put(r->driver + 2, 2, new);
        if (has(r, F_NOTIFICATION_DATA)) /* 2.9 */
            *notification |= (uint32_t)new << 16;
        event = (uint16_t)get(r->device + 4 + 8 * r->size, 2);
        if (!has(r, F_EVENT_IDX))
            return !(get(r->device, 2) & 1);
        return BUG == 1 ? new > event && event >= old : (uint16_t)(new - event - 1) < (uint16_t)(new - old);
    }
    put(r->desc + 16 * r->held_place + 14, 2, r->held_flags);
    if (has(r, F_NOTIFICATION_DATA))
        *notification |= (uint32_t)(r->place | r->wrap << 15) << 16;
    event = (uint16_t)get(r->device, 2);
    flags = (uint16_t)get(r->device + 2, 2);
    if (flags != 2) /* 2.8.10 */
        return flags == 0;
    ahead = r->place - (event & 0x7fff) + (event >> 15 != r->wrap ? (int)r->size : 0);
    return ahead > 0 && ahead <= batch;
}

/* 2.7.7, 2.8.10 */
static void ring_arm(struct ring *r, int on)
{
    r->armed = on;
    if (has(r, F_RING_PACKED)) {
        if (on && has(r, F_EVENT_IDX))
            put(r->driver, 2, (uint32_t)(r->used_place | r->used_wrap << 15));
        put(r->driver + 2, 2, !on ? 1 : has(r, F_EVENT_IDX) ? 2 : 0);
    } else if (has(r, F_EVENT_IDX)) {
        put(r->driver + 4 + 2 * r->size, 2, (uint16_t)(r->reaped - !on));
    } else {
        put(r->driver, 2, !on);
    }
}

static int ring_pending(const struct ring *r)
{
    uint32_t flags = get(r->desc + 16 * r->used_place + 14, 2) & (AVAIL | USED);

    if (!has(r, F_RING_PACKED))
        return get(r->device + 2, 2) != r->reaped;
    return r->reaped != r->published && flags == (r->used_wrap ? AVAIL | USED : 0u);
}

static void ring_return(struct ring *r, uint32_t id)
{
    uint32_t place = r->used_place + r->count[id];

    r->used_wrap ^= place >= r->size;
    r->used_place = (uint16_t)(place % r->size);
    if (!has(r, F_IN_ORDER)) { /* what came back last goes out first */
        r->next[r->last[id]] = r->head;
        r->head = (uint16_t)id;
    }
    r->reaped++;
}

/* 2.7.14, 2.8.22; 2.7.9 and 2.8.8 for IN_ORDER. Returns how many came back. */
static uint32_t ring_reap(struct ring *r, struct done *done)
{
    uint32_t n = 0;

    while (ring_pending(r)) {
        const uint8_t *e = has(r, F_RING_PACKED) ? r->desc + 16 * r->used_place
                                                 : r->device + 4 + 8 * (r->reaped % r->size);
        const uint32_t id = has(r, F_RING_PACKED) ? get(e + 12, 2) : get(e, 4);
        const uint32_t length = get(e + (has(r, F_RING_PACKED) ? 8 : 4), 4);

        for (;;) {
            const uint32_t first = has(r, F_IN_ORDER) ? r->order[r->reaped % r->size] : id;

            done[n].id = first;
            done[n++].length = first == id ? length : r->writable[first];
            ring_return(r, first);
            if (first == id)
                break;
        }
    }
    if (n && r->armed && has(r, F_EVENT_IDX))
        ring_arm(r, 1);
    return n;
}

#endif
