/* The device's half of the NBD export: virtio requests out of slots, and what becomes of them. */
#include "nbd_inside.h"

#include <errno.h>
#include <string.h>

enum {
    T_DISCARD = 11,
    T_WRITE_ZEROES = 13,
    S_UNSUPP = 2,
    RANGE_BYTES = 16,
    MOST_RANGES = SECTOR / RANGE_BYTES,
    UNMAP = 1,
};

static void put_le(uint8_t *to, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        to[i] = (uint8_t)(value >> 8 * i);
}

void gpv_nbd_take_slots(struct gpv_nbd *e, uint32_t op, uint32_t number)
{
    struct op *o = &e->ops[op];
    o->first_slot = NONE;
    while (number--) {
        uint32_t slot = e->free_slot;
        e->free_slot = e->slot_next[slot];
        e->free_slots--;
        e->slot_op[slot] = op;
        e->slot_next[slot] = NONE;
        if (o->first_slot == NONE)
            o->first_slot = slot;
        else
            e->slot_next[o->last_slot] = slot;
        o->last_slot = slot;
    }
}

void gpv_nbd_finish(struct gpv_nbd *e, struct op *o)
{
    uint32_t op = (uint32_t)(o - e->ops);
    o->next = NONE;
    if (e->finished == NONE)
        e->finished = op;
    else
        e->ops[e->finished_last].next = op;
    e->finished_last = op;
    if (o->error)
        count(&e->n.errors, 1);
    if (o->busy)
        e->busy--;
    o->busy = 0;
}

int32_t gpv_nbd_add(struct gpv_nbd *e, struct op *o, uint32_t slot, uint32_t type, uint64_t sector, uint32_t bytes)
{
    uint8_t *memory = e->c.slots + (size_t)slot * e->c.stride;
    put_le(memory, type, 4);
    put_le(memory + 4, 0, 4);
    put_le(memory + 8, sector, 8);
    memory[GPV_BLK_STATUS] = GPV_BLK_UNKNOWN;
    struct gpv_segment segments[3] = { { e->c.header_bus[slot], 16 } };
    uint32_t number = 1;
    if (bytes)
        segments[number++] = (struct gpv_segment){ e->c.data_bus[slot], bytes };
    /* A device that says it wrote what it did not must not show the client somebody else's data. */
    if (type == T_IN)
        memset(data_of(e, slot), 0, bytes);
    segments[number++] = (struct gpv_segment){ e->c.status_bus[slot], 1 };
    uint32_t writable = type == T_IN ? 2 : 1;
    uint64_t expected = type == T_IN ? bytes + 1 : 1;
    int32_t id = gpv_add(e->c.queue, segments, number - writable, writable, expected << 32 | slot);
    if (id < 0)
        return id;
    o->outstanding++;
    e->added++;
    e->urgent |= type == T_FLUSH;
    count(&e->n.requests, 1);
    return 0;
}

int32_t gpv_nbd_add_ranges(struct gpv_nbd *e, struct op *o)
{
    int discard = o->command == CMD_TRIM;
    uint32_t most = discard ? e->c.discard_ranges : e->c.zeroes_ranges;
    uint64_t longest = (uint64_t)(discard ? e->c.discard_sectors : e->c.zeroes_sectors) * SECTOR;
    uint32_t flags = !discard && !(o->flags & FLAG_NO_HOLE) ? UNMAP : 0;
    uint8_t *range = data_of(e, o->first_slot);
    uint32_t number = 0;
    for (; o->rest && number < most && number < MOST_RANGES; number++, range += RANGE_BYTES) {
        uint32_t bytes = o->rest < longest ? o->rest : (uint32_t)longest;
        put_le(range, o->offset / SECTOR, 8);
        put_le(range + 8, bytes / SECTOR, 4);
        put_le(range + 12, flags, 4);
        o->offset += bytes;
        o->rest -= bytes;
    }
    return gpv_nbd_add(e, o, o->first_slot, discard ? T_DISCARD : T_WRITE_ZEROES, 0, number * RANGE_BYTES);
}

/* Every virtio request of the op is back: go on with it, or put it among the finished. */
static int32_t proceed(struct gpv_nbd *e, struct op *o)
{
    if (!o->error && o->rest)
        return gpv_nbd_add_ranges(e, o);
    if (!o->error && o->flags & FLAG_FUA && e->c.volatile_cache && !o->flushing && o->command != CMD_READ
        && o->command != CMD_FLUSH) {
        o->flushing = 1;
        return gpv_nbd_add(e, o, o->first_slot, T_FLUSH, 0, 0);
    }
    gpv_nbd_finish(e, o);
    return 0;
}

int32_t gpv_nbd_reap(struct gpv_nbd *e)
{
    uint32_t lengths[BATCH];
    uint64_t cookies[BATCH];
    int32_t total = 0, got;
    do {
        got = gpv_reap(e->c.queue, NULL, lengths, cookies, BATCH);
        if (got < 0)
            return got;
        for (int32_t i = 0; i < got; i++) {
            uint32_t slot = (uint32_t)cookies[i];
            struct op *o = &e->ops[e->slot_op[slot]];
            uint8_t status = e->c.slots[(size_t)slot * e->c.stride + GPV_BLK_STATUS];
            if (status == 0 && lengths[i] < (uint32_t)(cookies[i] >> 32))
                status = GPV_BLK_SHORT;
            if (status && !o->error)
                o->error = status == S_UNSUPP ? EOPNOTSUPP : EIO;
            if (--o->outstanding == 0) {
                int32_t result = proceed(e, o);
                if (result < 0)
                    return result;
            }
        }
        total += got;
    } while (got == BATCH);
    return total;
}

void gpv_nbd_release(struct gpv_nbd *e, struct op *o)
{
    if (o->first_slot != NONE) {
        for (uint32_t slot = o->first_slot; slot != NONE; slot = e->slot_next[slot])
            e->free_slots++;
        e->slot_next[o->last_slot] = e->free_slot;
        e->free_slot = o->first_slot;
    }
    o->next = e->free_op;
    e->free_op = (uint32_t)(o - e->ops);
    e->blocked = 0;
}
