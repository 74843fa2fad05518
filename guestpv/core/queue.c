/* One queue over both formats: life, ownership, dispatch. The formats are in split.c and packed.c. */
#include "ring.h"

#include <stdlib.h>
#include <string.h>

static inline uintptr_t this_thread(void)
{
    return (uintptr_t)__builtin_thread_pointer(); /* what pthread_self returns, without the call */
}

/* Every entry that uses the queue: it is there, and the caller's. */
#define ENTER(q)                                      \
    do {                                              \
        if (!(q))                                     \
            return GPV_ECLOSED;                       \
        if ((q)->owner != this_thread())  \
            return GPV_ETHREAD;                       \
    } while (0)

/* And the device has kept the rules so far. */
#define ENTER_UNBROKEN(q)        \
    ENTER(q);                    \
    if ((q)->violation.kind)     \
        return GPV_EBROKEN

static void start(struct gpv_queue *q)
{
    uint32_t i;

    memset(q->desc, 0, q->desc_size);
    memset(q->driver, 0, q->driver_size);
    memset(q->device, 0, q->device_size);
    for (i = 0; i < q->size; i++) {
        q->slots[i].turn = GPV_NEVER;
        q->slots[i].count = 0;
        q->next[i] = (uint16_t)(i + 1 < q->size ? i + 1 : 0);
    }
    q->free = q->size;
    q->free_head = q->oldest = 0;
    q->batch_left = q->returned = 0;
    q->turn_added = q->turn_published = q->turn_reaped = 0;
    q->armed = 1; /* what zeroed areas say */
    memset(&q->violation, 0, sizeof q->violation);
    if (q->packed) {
        q->u.ring.next_avail.offset = q->u.ring.next_used.offset = 0;
        q->u.ring.next_avail.wrap = q->u.ring.next_used.wrap = 1;
        q->u.ring.event = q->u.ring.event_flags = q->u.ring.added = 0;
    } else {
        q->u.split.event = 0;
    }
}

static void place_split(struct gpv_queue *q, const struct gpv_queue_config *config)
{
    struct gpv_split *s = &q->u.split;
    uint8_t *avail = config->driver, *used = config->device;

    q->driver_size = 6 + 2 * (size_t)q->size;
    q->device_size = 6 + 8 * (size_t)q->size;
    s->desc = config->desc;
    s->avail_flags = (void *)avail;
    s->avail_idx = (void *)(avail + 2);
    s->avail_ring = (void *)(avail + 4);
    s->used_event = (void *)(avail + 4 + 2 * (size_t)q->size);
    s->used_flags = (void *)used;
    s->used_idx = (void *)(used + 2);
    s->used_ring = (void *)(used + 4);
    s->avail_event = (void *)(used + 4 + 8 * (size_t)q->size);
    s->tables = config->tables;
}

static void place_packed(struct gpv_queue *q, const struct gpv_queue_config *config)
{
    struct gpv_packed *p = &q->u.ring;
    uint8_t *driver = config->driver, *device = config->device;

    q->driver_size = q->device_size = 4;
    p->desc = config->desc;
    p->driver_event = (void *)driver;
    p->driver_flags = (void *)(driver + 2);
    p->device_event = (void *)device;
    p->device_flags = (void *)(device + 2);
    p->tables = config->tables;
}

struct gpv_queue *gpv_queue_new(const struct gpv_queue_config *config)
{
    struct gpv_queue *q;
    uint32_t options = config->options;

    if (config->size == 0 || config->size > 32768 || (!(options & GPV_PACKED) && (config->size & (config->size - 1))))
        return NULL;
    q = calloc(1, sizeof *q);
    if (q) {
        q->slots = calloc(config->size, sizeof *q->slots);
        q->next = calloc(config->size, sizeof *q->next);
    }
    if (!q || !q->slots || !q->next) {
        gpv_queue_free(q);
        return NULL;
    }
    q->size = config->size;
    q->packed = !!(options & GPV_PACKED);
    q->event_idx = !!(options & GPV_EVENT_IDX);
    q->in_order = !!(options & GPV_IN_ORDER);
    q->notification_data = !!(options & GPV_NOTIFICATION_DATA);
    q->order_platform = !!(options & GPV_ORDER_PLATFORM);
    q->kick = config->kick;
    if (options & GPV_INDIRECT) {
        q->tables_bus = config->tables_bus;
        q->table_count = config->table_count;
        q->table_entries = config->table_entries;
    }
    q->desc = config->desc;
    q->driver = config->driver;
    q->device = config->device;
    q->desc_size = 16 * (size_t)q->size;
    (q->packed ? place_packed : place_split)(q, config);
    gpv_queue_own(q);
    start(q);
    return q;
}

void gpv_queue_free(struct gpv_queue *q)
{
    if (!q)
        return;
    free(q->next);
    free(q->slots);
    free(q);
}

void gpv_queue_own(struct gpv_queue *q)
{
    q->owner = this_thread();
}

int32_t gpv_add(struct gpv_queue *q, const struct gpv_segment *segments, uint32_t readable, uint32_t writable,
                uint64_t cookie)
{
    const uint64_t elements = (uint64_t)readable + writable;
    struct gpv_rows rows;
    uint32_t id;
    int32_t added;

    ENTER_UNBROKEN(q);
    if (elements == 0 || elements > q->size)
        return GPV_ECHAIN;
    rows = (struct gpv_rows){&segments->address, &segments->length, sizeof *segments / 8, sizeof *segments / 4,
                             (uint32_t)elements, readable};
    q->returned = 0;
    added = (q->packed ? gpv_packed_add : gpv_split_add)(q, rows, 1, &cookie, &id);
    return added < 0 ? added : (int32_t)id;
}

int32_t gpv_add_burst(struct gpv_queue *q, const uint64_t *addresses, const uint32_t *lengths, uint32_t count,
                      uint32_t elements, uint32_t writable_from, const uint64_t *cookies, uint32_t *ids)
{
    const struct gpv_rows rows = {addresses, lengths, 1, 1, elements, writable_from};
    int32_t added;

    ENTER_UNBROKEN(q);
    if (elements == 0 || elements > q->size || writable_from > elements)
        return GPV_ECHAIN;
    q->returned = 0;
    added = (q->packed ? gpv_packed_add : gpv_split_add)(q, rows, count, cookies, ids);
    return added == GPV_EFULL ? 0 : added;
}

static int32_t notify(struct gpv_queue *q)
{
    uint32_t value = q->kick.value;

    if (q->notification_data) { /* 2.9: next_off in bits 16 to 30, next_wrap in bit 31 */
        uint32_t place = q->packed ? gpv_packed_place(q) : gpv_split_place(q);

        value = (value & 0xffffu) | place << 16;
    }
    return gpv_kick_send(&q->kick, value) ? GPV_EKICK : 1;
}

int32_t gpv_publish(struct gpv_queue *q)
{
    int32_t wanted;

    ENTER_UNBROKEN(q);
    if (q->turn_added == q->turn_published)
        return 0;
    wanted = q->packed ? gpv_packed_publish(q) : gpv_split_publish(q);
    return wanted > 0 ? notify(q) : wanted;
}

int32_t gpv_notify(struct gpv_queue *q)
{
    ENTER_UNBROKEN(q);
    return notify(q);
}

int32_t gpv_remind(const struct gpv_queue *q)
{
    /* Counters are the owner's; everything else in here never changes. */
    struct gpv_kick bell = {
        .kind = q->kick.kind, .fd = q->kick.fd, .doorbell = q->kick.doorbell, .value = q->kick.value,
        .call = q->kick.call, .user = q->kick.user,
    };

    return !q->notification_data && gpv_kick_send(&bell, bell.value) ? GPV_EKICK : 0;
}

void gpv_fence(void)
{
    GPV_DEVICE_MB();
}

int32_t gpv_notify_value(struct gpv_queue *q, uint32_t value)
{
    ENTER(q);
    GPV_FENCE_FULL(q); /* whatever was written to the rings, by whomever, before the notification */
    return gpv_kick_send(&q->kick, value) ? GPV_EKICK : 1;
}

int32_t gpv_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max)
{
    int32_t got;

    ENTER_UNBROKEN(q);
    got = (q->packed ? gpv_packed_reap : gpv_split_reap)(q, ids, lengths, cookies, max);
    q->returned += got > 0 ? (uint32_t)got : 0;
    return got;
}

int32_t gpv_pending(struct gpv_queue *q)
{
    ENTER(q);
    if (q->violation.kind || q->batch_left)
        return 1;
    return q->packed ? gpv_packed_pending(q) : gpv_split_pending(q);
}

int32_t gpv_disarm(struct gpv_queue *q)
{
    ENTER_UNBROKEN(q);
    (q->packed ? gpv_packed_disarm : gpv_split_disarm)(q);
    return 0;
}

int32_t gpv_arm(struct gpv_queue *q)
{
    ENTER_UNBROKEN(q);
    (q->packed ? gpv_packed_arm : gpv_split_arm)(q);
    return gpv_pending(q);
}

uint32_t gpv_free_slots(const struct gpv_queue *q)
{
    return q ? q->free : 0;
}

uint32_t gpv_outstanding(const struct gpv_queue *q)
{
    return q ? (uint32_t)(q->turn_added - q->turn_reaped) : 0;
}

uint32_t gpv_unpublished(const struct gpv_queue *q)
{
    return q ? (uint32_t)(q->turn_added - q->turn_published) : 0;
}

uint64_t gpv_kicks(const struct gpv_queue *q)
{
    return q ? q->kick.kicks : 0;
}

uint64_t gpv_turns(const struct gpv_queue *q)
{
    return q ? q->turn_published : 0;
}

uint32_t gpv_used_position(const struct gpv_queue *q)
{
    return q && q->packed ? gpv_place_pack(q->u.ring.next_used) : 0;
}

void gpv_violation_get(const struct gpv_queue *q, struct gpv_violation *violation)
{
    *violation = q->violation;
}

uint32_t gpv_drain(struct gpv_queue *q, uint32_t *ids, uint64_t *cookies)
{
    uint32_t n = 0, left = gpv_outstanding(q), id, i;

    for (id = 0; id < q->size && n < left; id++) {
        if (q->slots[id].count == 0)
            continue;
        /* insertion by turn: a drain is rare and mostly short */
        for (i = n++; i > 0 && q->slots[ids[i - 1]].turn > q->slots[id].turn; i--)
            ids[i] = ids[i - 1];
        ids[i] = id;
    }
    for (i = 0; cookies && i < n; i++)
        cookies[i] = q->slots[ids[i]].cookie;
    start(q);
    return n;
}

int64_t gpv_single_add(struct gpv_single *s)
{
    const uint64_t cookie = s->serial + 1;
    uint32_t id;
    int32_t added = gpv_add_burst(s->queue, s->addresses, s->lengths, 1, s->elements, s->writable_from, &cookie, &id);

    if (added <= 0)
        return added ? added : GPV_EFULL;
    s->serial = cookie;
    return (int64_t)(cookie << 16 | id);
}

int32_t gpv_burst_submit(struct gpv_burst *b)
{
    const uint32_t count = b->count < b->capacity ? b->count : b->capacity;
    int32_t added = gpv_add_burst(b->queue, b->addresses, b->lengths, count, b->elements, b->writable_from, NULL, b->ids);

    if (added < 0)
        return added;
    b->kicked = gpv_publish(b->queue);
    return b->kicked < 0 ? b->kicked : added;
}

int32_t gpv_burst_reap(struct gpv_burst *b)
{
    return gpv_reap(b->queue, b->used_ids, b->used_lengths, NULL, b->used_max);
}
