/* Reuse of descriptors that are written already (2.7.5: the device only reads them). */
#include "again.h"

#include "ring.h"

int32_t gpv_again(struct gpv_queue *q, uint32_t id, uint64_t cookie)
{
    return gpv_again_moved(q, id, cookie, 0, 0);
}

int32_t gpv_again_moved(struct gpv_queue *q, uint32_t id, uint64_t cookie, uint32_t element, uint64_t address)
{
    struct gpv_slot *slot;
    uint32_t taken = 1, entry, at;

    if (!q)
        return GPV_ECLOSED;
    if (q->owner != (uintptr_t)__builtin_thread_pointer())
        return GPV_ETHREAD;
    if (q->violation.kind)
        return GPV_EBROKEN;
    /* The free list gives back first what was freed last, so the chain behind its head is the buffer's, and untouched. */
    if (q->packed || q->in_order || !q->returned || id != q->free_head)
        return GPV_ECHAIN;
    slot = &q->slots[id];
    for (entry = at = id; entry != slot->last; entry = q->next[entry]) {
        if (taken++ <= element)
            at = q->next[entry];
    }
    if (element && taken > element)
        GPV_STORE(q, &q->u.split.desc[at].addr, address);
    else if (element && taken == 1 && id < q->table_count && element < q->table_entries)
        GPV_STORE(q, &q->u.split.tables[(size_t)id * q->table_entries + element].addr, address);
    else if (element)
        return GPV_ECHAIN;
    slot->cookie = cookie;
    slot->turn = q->turn_added;
    slot->count = (uint16_t)taken;
    GPV_STORE(q, &q->u.split.avail_ring[q->turn_added & (q->size - 1)], (uint16_t)id);
    q->free -= taken;
    q->free_head = q->next[slot->last];
    q->turn_added++;
    q->returned--;
    return (int32_t)id;
}
