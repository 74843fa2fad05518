#ifndef GPV_COUNT_H
#define GPV_COUNT_H

#include <stdint.h>

/* One writer; the store is atomic so that a reader in another thread never sees half of it. */
static inline void count(uint64_t *counter, uint64_t by)
{
    __atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}

#endif
