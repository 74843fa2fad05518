#include "blk.h"

#include <string.h>
#include <time.h>

enum { BATCH = 64 };

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void put_le(uint8_t *to, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        to[i] = (uint8_t)(value >> 8 * i);
}

/* Adds as many as there is room for. Returns how many, or a negative code. */
static int32_t fill(struct gpv_blk_burst *b)
{
    int32_t added = 0;
    uint64_t start = b->latencies && b->next < b->count ? now_ns() : 0;
    while (b->flying < b->depth && b->next < b->count) {
        uint32_t slot = b->free_slots[b->depth - b->flying - 1];
        uint8_t *memory = b->slots + (size_t)slot * b->stride;
        put_le(memory, b->kind, 4);
        put_le(memory + 4, 0, 4);
        put_le(memory + 8, b->sectors[b->next], 8);
        memory[GPV_BLK_STATUS] = GPV_BLK_UNKNOWN;
        struct gpv_segment segments[] = {
            { b->header_bus[slot], 16 },
            { b->data_bus[b->next], b->nbytes },
            { b->status_bus[slot], 1 },
        };
        uint64_t cookie = (uint64_t)b->next << 32 | slot;
        int32_t id = gpv_add(b->queue, segments, b->writable ? 1 : 2, b->writable ? 2 : 1, cookie);
        if (id == GPV_EFULL && b->flying)
            break;
        if (id < 0)
            return id;
        if (b->latencies)
            b->latencies[b->next] = start;
        b->next++;
        b->flying++;
        added++;
    }
    return added;
}

static int32_t reap(struct gpv_blk_burst *b)
{
    uint32_t lengths[BATCH];
    uint64_t cookies[BATCH];
    int32_t got = gpv_reap(b->queue, NULL, lengths, cookies, BATCH);
    uint64_t end = b->latencies && got > 0 ? now_ns() : 0;
    for (int32_t i = 0; i < got; i++) {
        uint32_t slot = (uint32_t)cookies[i], request = (uint32_t)(cookies[i] >> 32);
        uint8_t status = b->slots[(size_t)slot * b->stride + GPV_BLK_STATUS];
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
    while (b->next < b->count || b->flying) {
        int32_t result = fill(b);
        if (result > 0)
            result = gpv_publish(b->queue);
        if (result < 0)
            return result;
        result = reap(b);
        if (result < 0)
            return result;
        if (result)
            continue;
        result = gpv_wait(b->queue, b->fd, b->timeout_ns, b->spin_ns);
        if (result < 0)
            return result;
        if (result == 0)
            return 1;
        gpv_disarm(b->queue);
    }
    return 0;
}
