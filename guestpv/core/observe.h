/* The observing build (GPV_OBSERVING): each access of the core to shared memory and each full fence is shown to two hooks.
 * The first sees it just before it is done, loads therefore without their value; the second, the trace, sees stores and
 * fences just before and loads just after, with what was loaded. */
#ifndef GPV_OBSERVE_H
#define GPV_OBSERVE_H
#include <stdint.h>

enum gpv_saw { GPV_SAW_LOAD, GPV_SAW_LOAD_ACQUIRE, GPV_SAW_STORE, GPV_SAW_STORE_RELEASE, GPV_SAW_FENCE };

struct gpv_access {
    int32_t what;
    uint32_t width;   /* bytes; 0 for a fence */
    uint64_t address; /* CPU address */
    uint64_t value;   /* what a store stores; for the trace also what a load loaded */
};

struct gpv_queue;
typedef void (*gpv_hook)(void *user, const struct gpv_access *access);
/* NULL: none. Called in the thread that uses the queue. */
void gpv_hook_set(struct gpv_queue *q, gpv_hook hook, void *user);
void gpv_trace_set(struct gpv_queue *q, gpv_hook trace, void *user);
#endif
