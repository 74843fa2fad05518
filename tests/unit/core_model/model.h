/* The model build of the core's access macros: every shared access becomes one of relacy's atomics, which may read any value
 * that the C++11 memory model allows. One order, named by file and line, can be weakened to find out whether a test notices. */
#ifndef GPV_MODEL_H
#define GPV_MODEL_H

#include <relacy/relacy.hpp>

#include <cstring>

extern const char *gpv_weak_file;
extern int gpv_weak_line;

static inline bool gpv_is_weak(const char *file, int line)
{
    const char *name = std::strrchr(file, '/');

    return gpv_weak_line == line && gpv_weak_file && !std::strcmp(name ? name + 1 : file, gpv_weak_file);
}

#define GPV_SHARED(type) rl::atomic<type>
#define GPV_LOAD(q, p) (p)->load(rl::mo_relaxed, RL_INFO)
#define GPV_STORE(q, p, v) (p)->store((v), rl::mo_relaxed, RL_INFO)
#define GPV_STORE_DESC_TAIL(q, d, v)                        \
    do {                                                    \
        const uint64_t tail_ = (v);                         \
        GPV_STORE(q, &(d)->len, (uint32_t)tail_);           \
        GPV_STORE(q, &(d)->id, (uint16_t)(tail_ >> 32));    \
        GPV_STORE(q, &(d)->flags, (uint16_t)(tail_ >> 48)); \
    } while (0)
#define GPV_OPAQUE(v) (v)
#define GPV_LOAD_ACQUIRE(q, p) (p)->load(gpv_is_weak(__FILE__, __LINE__) ? rl::mo_relaxed : rl::mo_acquire, RL_INFO)
#define GPV_STORE_RELEASE(q, p, v) (p)->store((v), gpv_is_weak(__FILE__, __LINE__) ? rl::mo_relaxed : rl::mo_release, RL_INFO)
#define GPV_FENCE_FULL(q)                                       \
    do {                                                        \
        if (!gpv_is_weak(__FILE__, __LINE__))                   \
            rl::atomic_thread_fence(rl::mo_seq_cst, RL_INFO);   \
    } while (0)

#endif
