/* Every access of the core to memory shared with the device, and every fence.
 *
 * Ordinary build: the orders are C11's, through the compiler's builtins; accesses without an order are volatile, which is
 * one access as well, and unlike a relaxed builtin lets GCC keep what it knows about other memory. With VIRTIO_F_ORDER_PLATFORM the device is hardware, which
 * C11 does not know: then the orders are made with device barriers (chapter 6: "barriers suitable for hardware devices").
 * Observing build (GPV_OBSERVING): the same, and each access is shown to hooks; see observe.h.
 * Model build (GPV_MODEL): model.h maps them to the checker's atomics. */
#ifndef GPV_ACCESS_H
#define GPV_ACCESS_H

#ifdef GPV_MODEL
#include "model.h"
#else

#include <stdint.h>

#include "barrier.h"

struct gpv_queue;

#define GPV_SHARED(type) type

#ifdef GPV_OBSERVING
#include "observe.h"
void gpv_observe(struct gpv_queue *q, int32_t what, const volatile void *where, uint32_t width, uint64_t value);
#define GPV_SEE(q, what, p, v) gpv_observe((q), (what), (p), sizeof *(p), (uint64_t)(v))
#define GPV_SEE_FENCE(q) gpv_observe((q), GPV_SAW_FENCE, 0, 0, 0)
void gpv_observe_loaded(struct gpv_queue *q, int32_t what, const volatile void *where, uint32_t width, uint64_t value);
#define GPV_LOADED(q, what, p, v) gpv_observe_loaded((q), (what), (p), sizeof *(p), (uint64_t)(v))
#else
#define GPV_LOADED(q, what, p, v) ((void)0)
#define GPV_SEE(q, what, p, v) ((void)0)
#define GPV_SEE_FENCE(q) ((void)0)
#endif

#ifdef GPV_OBSERVING
#define GPV_LOAD(q, p)                                                                      \
    __extension__({                                                                         \
        __typeof__(*(p)) loaded_;                                                           \
        GPV_SEE(q, GPV_SAW_LOAD, p, 0);                                                     \
        loaded_ = *(const volatile __typeof__(*(p)) *)(p);                                  \
        GPV_LOADED(q, GPV_SAW_LOAD, p, loaded_);                                            \
        loaded_;                                                                            \
    })
#else
#define GPV_LOAD(q, p) (*(const volatile __typeof__(*(p)) *)(p))
#endif

#define GPV_STORE(q, p, v) \
    (GPV_SEE(q, GPV_SAW_STORE, p, v), (void)(*(volatile __typeof__(*(p)) *)(p) = (v)))

/* len, id and flags of a packed descriptor at once. */
#define GPV_STORE_DESC_TAIL(q, d, v) GPV_STORE(q, (gpv_tail *)&(d)->len, v)
typedef uint64_t __attribute__((may_alias)) gpv_tail;

/* A value whose origin the compiler must not look through. */
#define GPV_OPAQUE(v)                               \
    __extension__({                                 \
        uint32_t opaque_ = (v);                     \
        __asm__ volatile("" : "+r"(opaque_));       \
        opaque_;                                    \
    })

/* Later accesses of this side stay behind the load. */
#define GPV_LOAD_ACQUIRE(q, p)                                                              \
    __extension__({                                                                         \
        __typeof__(*(p)) value_;                                                            \
        GPV_SEE(q, GPV_SAW_LOAD_ACQUIRE, p, 0);                                             \
        if ((q)->order_platform) {                                                          \
            value_ = *(const volatile __typeof__(*(p)) *)(p);                               \
            GPV_DEVICE_RMB();                                                               \
        } else {                                                                            \
            value_ = __atomic_load_n((p), __ATOMIC_ACQUIRE);                                \
        }                                                                                   \
        GPV_LOADED(q, GPV_SAW_LOAD_ACQUIRE, p, value_);                                     \
        value_;                                                                             \
    })

/* Earlier accesses of this side stay before the store. */
#define GPV_STORE_RELEASE(q, p, v)                                                          \
    do {                                                                                    \
        GPV_SEE(q, GPV_SAW_STORE_RELEASE, p, v);                                            \
        if ((q)->order_platform) {                                                          \
            GPV_DEVICE_WMB();                                                               \
            *(volatile __typeof__(*(p)) *)(p) = (v);                                        \
        } else {                                                                            \
            __atomic_store_n((p), (v), __ATOMIC_RELEASE);                                   \
        }                                                                                   \
    } while (0)

/* Earlier stores are visible before later loads are done. */
#define GPV_FENCE_FULL(q)                                                                   \
    do {                                                                                    \
        GPV_SEE_FENCE(q);                                                                   \
        if ((q)->order_platform)                                                            \
            GPV_DEVICE_MB();                                                                \
        else                                                                                \
            __atomic_thread_fence(__ATOMIC_SEQ_CST);                                        \
    } while (0)

#endif
#endif
