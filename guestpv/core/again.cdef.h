/* Makes the buffer that came back last available once more, as it was added: same elements, same id. Its descriptors are
 * not written again, so the device's cached copy of them stays good. After several buffers were reaped this goes in reverse
 * order; a buffer added in between ends it. Split rings without IN_ORDER; anything else, or another id, is GPV_ECHAIN. */
int32_t gpv_again(struct gpv_queue *q, uint32_t id, uint64_t cookie);
/* The same, with element `element` of it, not the first, at another bus address. */
int32_t gpv_again_moved(struct gpv_queue *q, uint32_t id, uint64_t cookie, uint32_t element, uint64_t address);
