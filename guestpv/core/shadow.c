/* The private half of a queue, shown to whoever explains or checks it. */
#include "shadow.h"

#include "ring.h"

int32_t gpv_shadow_get(const struct gpv_queue *q, struct gpv_shadow *shadow, struct gpv_shadow_slot *slots)
{
    uint32_t id;

    if (!q)
        return GPV_ECLOSED;
    *shadow = (struct gpv_shadow){q->turn_added, q->turn_published, q->turn_reaped, q->free_head, q->batch_left, 0, 0, 0};
    if (q->packed) {
        shadow->next_avail = gpv_place_pack(q->u.ring.next_avail);
        shadow->next_used = gpv_place_pack(q->u.ring.next_used);
        shadow->unpublished = q->u.ring.added;
    }
    for (id = 0; id < q->size; id++) {
        const struct gpv_slot *slot = &q->slots[id];

        slots[id] = (struct gpv_shadow_slot){slot->turn, slot->count, slot->writable, q->next[id]};
    }
    return 0;
}
