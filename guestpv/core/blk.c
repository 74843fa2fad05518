#include "blk.h"
#include "clock.h"

#include "again.h"
#include "barrier.h"


enum { BATCH = 256, DEEP = 16, POLLING_MOST = 1 << 16, SLEEPING_MOST = 512 };

/* Who spins for so long does not mean to sleep. */
enum { LONG_SPIN = 1000000 };

static void put_le(uint8_t *to, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        to[i] = (uint8_t)(value >> 8 * i);
}

/* Adds as many as there is room for. Returns how many, or a negative code.
 *
 * A device on another core pays for each cache line that is written here. So descriptors stay as they are where a slot is
 * used again, but for the place of the data; headers share lines; status bytes are only read. */
static int32_t fill(struct gpv_blk_burst *b)
{
    int32_t added = 0;
    uint64_t start = b->latencies && b->next < b->count ? (uint64_t)now_ns() : 0;
    while (b->flying < b->depth && b->next < b->count) {
        uint32_t slot = b->free_slots[b->depth - b->flying - 1];
        uint64_t data = b->data_bus[b->data_per_slot ? slot : b->next];
        uint64_t cookie = (uint64_t)b->next << 32 | slot;
        int32_t id = b->slot_ids[slot];
        put_le(b->headers + (size_t)slot * GPV_BLK_HEADER + 8, b->sectors[b->next], 8);
        if (id == GPV_BLK_NO_ID)
            id = GPV_ECHAIN;
        else if (b->data_per_slot)
            id = gpv_again(b->queue, (uint32_t)id, cookie);
        else
            id = gpv_again_moved(b->queue, (uint32_t)id, cookie, 1, data);
        if (id == GPV_ECHAIN) {
            struct gpv_segment segments[] = {
                { b->header_bus[slot], GPV_BLK_HEADER },
                { data, b->nbytes },
                { b->done_bus[slot], 1 },
            };
            id = gpv_add(b->queue, segments, b->writable ? 1 : 2, b->writable ? 2 : 1, cookie);
        }
        if (id == GPV_EFULL && b->flying)
            break;
        if (id < 0)
            return id;
        b->slot_ids[slot] = id;
        if (b->latencies)
            b->latencies[b->next] = start;
        b->next++;
        b->flying++;
        added++;
    }
    return added;
}

/* Leaves a device alone that has much to do: each look at its ring takes a cache line away from it. How long, is learnt
 * from how many came back: about half of what is in flight is worth a look, and the device is never idle meanwhile. */
static void let_work(const struct gpv_blk_burst *b)
{
    for (uint32_t i = 0; i < b->pause; i++)
        GPV_RELAX();
}

static void learn(struct gpv_blk_burst *b, uint32_t got, uint32_t flying)
{
    const uint32_t want = flying >= DEEP ? flying / 2 : 0;
    const uint32_t most = b->fd < 0 || b->spin_ns >= LONG_SPIN ? POLLING_MOST : SLEEPING_MOST;
    if (got < want)
        b->pause += b->pause < most ? 1 + b->pause / 8 : 0;
    else if (got > want + want / 2)
        b->pause -= b->pause ? 1 + b->pause / 8 : 0;
}

static int32_t reap(struct gpv_blk_burst *b)
{
    uint32_t lengths[BATCH];
    uint64_t cookies[BATCH];
    int32_t got = gpv_reap(b->queue, NULL, lengths, cookies, BATCH);
    uint64_t end = b->latencies && got > 0 ? (uint64_t)now_ns() : 0;
    for (int32_t i = 0; i < got; i++) {
        uint32_t slot = (uint32_t)cookies[i], request = (uint32_t)(cookies[i] >> 32);
        uint8_t status = b->done[slot];
        if (status == 0 && lengths[i] < (b->writable ? b->nbytes : 0) + 1)
            status = GPV_BLK_SHORT;
        b->statuses[request] = status;
        if (b->latencies)
            b->latencies[request] = end - b->latencies[request];
        b->flying--;
        b->free_slots[b->depth - b->flying - 1] = slot;
    }
    return got;
}

int32_t gpv_blk_burst_run(struct gpv_blk_burst *b)
{
    gpv_disarm(b->queue);
    while (b->next < b->count || b->flying) {
        int32_t result = fill(b);
        if (result > 0)
            result = gpv_publish(b->queue);
        if (result < 0)
            return result;
        const uint32_t flying = b->flying;
        if (b->next < b->count)
            let_work(b);
        result = reap(b);
        if (result < 0)
            return result;
        if (result) {
            learn(b, (uint32_t)result, flying);
            continue;
        }
        result = gpv_wait(b->queue, b->fd, b->timeout_ns, b->spin_ns);
        if (result < 0)
            return result;
        if (result == 0)
            return 1;
        gpv_disarm(b->queue);
    }
    return 0;
}
