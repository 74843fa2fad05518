/* The observing build's way out; see observe.h. */
#include "ring.h"

#ifdef GPV_OBSERVING
void gpv_hook_set(struct gpv_queue *q, gpv_hook hook, void *user)
{
    q->hook = hook;
    q->hook_user = user;
}

void gpv_trace_set(struct gpv_queue *q, gpv_hook trace, void *user)
{
    q->trace = trace;
    q->trace_user = user;
}

void gpv_observe(struct gpv_queue *q, int32_t what, const volatile void *where, uint32_t width, uint64_t value)
{
    const struct gpv_access access = {what, width, (uintptr_t)where, value};

    if (q->hook)
        q->hook(q->hook_user, &access);
    if (q->trace && what != GPV_SAW_LOAD && what != GPV_SAW_LOAD_ACQUIRE)
        q->trace(q->trace_user, &access);
}

void gpv_observe_loaded(struct gpv_queue *q, int32_t what, const volatile void *where, uint32_t width, uint64_t value)
{
    const struct gpv_access access = {what, width, (uintptr_t)where, value};

    if (q->trace)
        q->trace(q->trace_user, &access);
}
#endif
