/* The observing build's way out; see observe.h. */
#include "ring.h"

#ifdef GPV_OBSERVING
void gpv_hook_set(struct gpv_queue *q, gpv_hook hook, void *user)
{
    q->hook = hook;
    q->hook_user = user;
}

void gpv_observe(struct gpv_queue *q, int32_t what, const volatile void *where, uint32_t width, uint64_t value)
{
    const struct gpv_access access = {what, width, (uintptr_t)where, value};

    if (q->hook)
        q->hook(q->hook_user, &access);
}
#endif
