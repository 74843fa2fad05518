/* What the two formats share inside the core: the private shadow of a queue. Nothing in here is visible to the device, and
 * nothing the device can write is ever read back to decide what is in flight. */
#ifndef GPV_RING_H
#define GPV_RING_H

#include <stddef.h>
#include <stdint.h>

#include "access.h"
#include "queue.h"

#define GPV_DESC_F_NEXT 1u
#define GPV_DESC_F_WRITE 2u
#define GPV_DESC_F_INDIRECT 4u
#define GPV_DESC_F_AVAIL (1u << 7)
#define GPV_DESC_F_USED (1u << 15)

/* 2.7.5: le64 addr, then le32 len, le16 flags and le16 next, which the core writes as one word. */
struct gpv_split_desc {
    GPV_SHARED(uint64_t) addr;
    GPV_SHARED(uint64_t) len_flags_next;
};

struct gpv_used_elem {
    GPV_SHARED(uint32_t) id;
    GPV_SHARED(uint32_t) len;
};

/* 2.8.13. Where the flags need not wait for the rest, the core writes le32 len, le16 id and le16 flags as one word. */
struct gpv_packed_desc {
    GPV_SHARED(uint64_t) addr;
    GPV_SHARED(uint32_t) len;
    GPV_SHARED(uint16_t) id;
    GPV_SHARED(uint16_t) flags;
};

/* A position in a packed ring. On the wire: offset in bits 0-14, wrap in bit 15 (2.8.14, 2.9). */
struct gpv_place {
    uint32_t offset;
    uint32_t wrap; /* 0 or 1 */
};

#define GPV_NEVER UINT64_MAX

/* A buffer in flight; the index is its id. Three words, because a store a cycle is what limits adding. */
struct gpv_slot {
    uint64_t cookie;
    uint64_t turn; /* how many buffers were added before it; GPV_NEVER: the slot was not in use yet */
    union {
        struct {
            uint32_t writable; /* bytes the device may write; 2^32 is kept as 2^32 - 1, which no used length exceeds */
            uint16_t count;    /* ring descriptors it occupies; 0: not in flight */
            uint16_t last;     /* the last of the free-list entries it took */
        };
        uint64_t use;
    };
};

struct gpv_split {
    struct gpv_split_desc *desc;
    GPV_SHARED(uint16_t) *avail_flags;
    GPV_SHARED(uint16_t) *avail_idx;
    GPV_SHARED(uint16_t) *avail_ring;
    GPV_SHARED(uint16_t) *used_event;
    GPV_SHARED(uint16_t) *used_flags;
    GPV_SHARED(uint16_t) *used_idx;
    struct gpv_used_elem *used_ring;
    GPV_SHARED(uint16_t) *avail_event;
    struct gpv_split_desc *tables;
    uint16_t event; /* last value stored to used_event */
};

struct gpv_packed {
    struct gpv_packed_desc *desc;
    GPV_SHARED(uint16_t) *driver_event;
    GPV_SHARED(uint16_t) *driver_flags;
    GPV_SHARED(uint16_t) *device_event;
    GPV_SHARED(uint16_t) *device_flags;
    struct gpv_packed_desc *tables;
    struct gpv_place next_avail; /* where the next descriptor goes */
    struct gpv_place next_used;  /* where the device writes the next used descriptor */
    uint16_t held_offset;        /* head of the first unpublished buffer, its flags not stored yet */
    uint16_t held_flags;
    uint16_t added;              /* descriptors added since the last publish */
    uint16_t event;              /* last values stored to the driver event suppression structure */
    uint16_t event_flags;
};

struct gpv_queue {
    uint32_t size;
    uint32_t free;          /* free descriptors */
    uint8_t packed, event_idx, in_order, notification_data, order_platform;
    uint8_t armed;          /* the device may send used buffer notifications */
    uint16_t free_head;     /* first free id; IN_ORDER: the next position in ring order */
    uint16_t oldest;        /* IN_ORDER: id of the buffer that comes back next */
    uint32_t batch_left;    /* IN_ORDER: buffers that the last used entry returned and that are not reaped yet */
    uint32_t batch_len;     /* IN_ORDER: used length of the last of them */
    uint64_t turn_added;    /* buffers added, published and reaped since the start */
    uint64_t turn_published;
    uint64_t turn_reaped;
    uint32_t returned;      /* buffers reaped since the last one was added: the first of the free list, last one first */
    struct gpv_slot *slots;
    /* Free list, the slot freed last first: so a queue with few buffers in flight stays within few cache lines, however
     * large it is. IN_ORDER: simply the following position. */
    uint16_t *next;
    union {
        struct gpv_split split;
        struct gpv_packed ring;
    } u;
    uint64_t tables_bus;
    uint32_t table_entries;
    uint32_t table_count;
    struct gpv_violation violation; /* kind other than GPV_NO_VIOLATION: broken */
    struct gpv_kick kick;
    uintptr_t owner;
    size_t desc_size, driver_size, device_size;
    void *desc, *driver, *device;
#ifdef GPV_OBSERVING
    gpv_hook hook, trace;
    void *hook_user, *trace_user;
#endif
};

/* Three little-endian fields of 4, 2 and 2 bytes as one word. */
static inline uint64_t gpv_word(uint32_t low, uint32_t middle, uint32_t high)
{
    return low | (uint64_t)middle << 32 | (uint64_t)high << 48;
}

/* 2.7.10, 2.8.10: does moving an index from old to new pass event, all modulo 65536? */
static inline int gpv_crossed(uint16_t event, uint16_t new_index, uint16_t old_index)
{
    return (uint16_t)(new_index - event - 1) < (uint16_t)(new_index - old_index);
}

static inline struct gpv_place gpv_place_after(struct gpv_place place, uint32_t count, uint32_t size)
{
    uint32_t offset = place.offset + count;

    if (offset >= size) {
        offset -= size;
        place.wrap ^= 1;
    }
    place.offset = offset;
    return place;
}

static inline uint16_t gpv_place_pack(struct gpv_place place)
{
    return (uint16_t)(place.offset | place.wrap << 15);
}

static inline uint32_t gpv_waiting(const struct gpv_queue *q)
{
    return (uint32_t)(q->turn_published - q->turn_reaped);
}

/* Out of the way of the loops that call it. */
static __attribute__((cold, noinline, unused)) void gpv_note(struct gpv_queue *q, int32_t kind, uint32_t position,
                                                             uint32_t id, uint64_t got, uint64_t expected)
{
    q->violation.kind = kind;
    q->violation.position = position;
    q->violation.id = id;
    q->violation.got = got;
    q->violation.expected = expected;
}

static inline int32_t gpv_violate(struct gpv_queue *q, int32_t kind, uint32_t position, uint32_t id, uint64_t got,
                                  uint64_t expected)
{
    gpv_note(q, kind, position, id, got, expected);
    return GPV_EBROKEN;
}

/* Checks what the device said before anything is done with it. 0: the buffer is outstanding and the length possible. */
static inline int32_t gpv_check_used(struct gpv_queue *q, uint32_t position, uint32_t id, uint32_t len)
{
    const struct gpv_slot *slot;

    if (id >= q->size)
        return gpv_violate(q, GPV_BAD_ID, position, id, id, q->size);
    slot = &q->slots[id];
    if (slot->count == 0)
        return gpv_violate(q, slot->turn == GPV_NEVER ? GPV_ID_NOT_AVAILABLE : GPV_ID_REPEATED, position, id, id, 0);
    if (slot->turn >= q->turn_published)
        return gpv_violate(q, GPV_ID_NOT_AVAILABLE, position, id, id, 0);
    if (len > slot->writable)
        return gpv_violate(q, GPV_BAD_LENGTH, position, id, len, slot->writable);
    return 0;
}

/* Inlined wherever it is used: each loop is compiled with what is known there. */
#define GPV_SPECIALIZED static inline __attribute__((always_inline))

/* Buffers to add: rows of elements, wherever their addresses and lengths lie. */
struct gpv_rows {
    const uint64_t *addresses;
    const uint32_t *lengths;
    uint32_t address_step; /* from one element to the next, in units of uint64_t */
    uint32_t length_step;  /* in units of uint32_t */
    uint32_t elements;
    uint32_t writable_from;
};

static inline uint64_t gpv_address(const struct gpv_rows *rows, uint32_t element)
{
    return rows->addresses[(size_t)element * rows->address_step];
}

static inline uint32_t gpv_length(const struct gpv_rows *rows, uint32_t element)
{
    return rows->lengths[(size_t)element * rows->length_step];
}

static inline uint32_t gpv_element_flags(const struct gpv_rows *rows, uint32_t element)
{
    return (element + 1 < rows->elements ? GPV_DESC_F_NEXT : 0) |
           (element >= rows->writable_from ? GPV_DESC_F_WRITE : 0);
}

static inline void gpv_next_row(struct gpv_rows *rows)
{
    rows->addresses += (size_t)rows->elements * rows->address_step;
    rows->lengths += (size_t)rows->elements * rows->length_step;
}

/* Adds up the lengths of a buffer before anything is written. Returns 0 or a gpv_error. */
static inline int32_t gpv_check_row(const struct gpv_rows *rows, uint32_t *writable)
{
    uint64_t readable = 0, total = 0;
    uint32_t i;

    for (i = 0; i < rows->elements; i++) {
        uint32_t length = gpv_length(rows, i);

        if (length == 0)
            return GPV_ELENGTH;
        total += length;
        readable += i < rows->writable_from ? length : 0;
    }
    if (total > (uint64_t)1 << 32) /* 2.7.5.2 */
        return GPV_ELENGTH;
    total -= readable;
    *writable = total > UINT32_MAX ? UINT32_MAX : (uint32_t)total;
    return 0;
}

/* Buffers with an id below this go into an indirect table. */
static inline uint32_t gpv_tables_for(const struct gpv_queue *q, uint32_t elements)
{
    return elements > 1 && elements <= q->table_entries ? q->table_count : 0;
}

/* IN_ORDER (2.7.9, 2.8.8): hands out the buffers of one used entry, up to max. Those that the device skipped count as used
 * completely; the last has the length of the entry. */
static inline uint32_t gpv_reap_batch(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies,
                                      uint32_t max)
{
    uint32_t n;

    for (n = 0; n < max && q->batch_left > 0; n++) {
        uint32_t id = q->oldest, next = id + q->slots[id].count;

        if (ids)
            ids[n] = id;
        if (lengths)
            lengths[n] = q->batch_left == 1 ? q->batch_len : q->slots[id].writable;
        if (cookies)
            cookies[n] = q->slots[id].cookie;
        q->oldest = (uint16_t)(next >= q->size ? next - q->size : next);
        q->free += q->slots[id].count;
        q->slots[id].count = 0;
        q->turn_reaped++;
        q->batch_left--;
    }
    return n;
}

/* Adds up to `count` rows. Returns how many found room, or the gpv_error that the first one met. */
int32_t gpv_split_add(struct gpv_queue *q, struct gpv_rows rows, uint32_t count, const uint64_t *cookies, uint32_t *ids);
int32_t gpv_split_publish(struct gpv_queue *q);
int32_t gpv_split_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max);
int32_t gpv_split_pending(struct gpv_queue *q);
void gpv_split_disarm(struct gpv_queue *q);
void gpv_split_arm(struct gpv_queue *q);
uint16_t gpv_split_place(const struct gpv_queue *q);

int32_t gpv_packed_add(struct gpv_queue *q, struct gpv_rows rows, uint32_t count, const uint64_t *cookies, uint32_t *ids);
int32_t gpv_packed_publish(struct gpv_queue *q);
int32_t gpv_packed_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max);
int32_t gpv_packed_pending(struct gpv_queue *q);
void gpv_packed_disarm(struct gpv_queue *q);
void gpv_packed_arm(struct gpv_queue *q);
uint16_t gpv_packed_place(const struct gpv_queue *q);

#endif
