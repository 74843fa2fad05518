/* Copies of the driver's private half of a queue, for whoever looks at it; nothing is decided with them. */
struct gpv_shadow {
    uint64_t added, published, reaped; /* buffers since the start */
    uint32_t free_head;                /* first free id; IN_ORDER: the next position in ring order */
    uint32_t batch_left;               /* IN_ORDER: buffers of the last used entry that are not reaped yet */
    uint16_t next_avail, next_used;    /* packed: offset in bits 0-14, wrap in bit 15 */
    uint16_t unpublished;              /* packed: descriptors added since the last publish */
};
struct gpv_shadow_slot {
    uint64_t turn;     /* how many buffers were added before this one */
    uint32_t count;    /* ring descriptors it occupies; 0: not in flight */
    uint32_t writable; /* bytes the device may write */
    uint32_t next;     /* the id behind it in the free list */
};
/* slots: one for each id. Returns 0, or GPV_ECLOSED. */
int32_t gpv_shadow_get(const struct gpv_queue *q, struct gpv_shadow *shadow, struct gpv_shadow_slot *slots);
