/* Waiting for used buffers: spin first, then sleep, and lose no wake-up between the two. */
#define _GNU_SOURCE /* ppoll */
#include "ring.h"
#include "clock.h"

#include <poll.h>
#include <time.h>
#include <unistd.h>

#define NAP_NS 50000 /* between looks at a queue that has no eventfd */

static struct timespec span(int64_t ns)
{
    struct timespec t;

    t.tv_sec = (time_t)(ns / 1000000000);
    t.tv_nsec = (long)(ns % 1000000000);
    return t;
}

int32_t gpv_interrupt_clear(int32_t fd)
{
    struct pollfd entry = {fd, POLLIN, 0};
    uint64_t count;

    /* poll first: whoever made the eventfd may have made it a blocking one */
    return poll(&entry, 1, 0) > 0 && read(fd, &count, sizeof count) == sizeof count;
}

/* One sleep of at most `left` (negative: no limit). 0: time or a nap is over, GPV_WOKEN, GPV_EINTR. */
static int32_t nap(int32_t fd, int64_t left)
{
    struct pollfd entry = {fd, POLLIN, 0};
    struct timespec limit;
    int ready;

    if (fd < 0) {
        limit = span(left < 0 || left > NAP_NS ? NAP_NS : left);
        return nanosleep(&limit, NULL) ? GPV_EINTR : 0;
    }
    limit = span(left < 0 ? 0 : left);
    ready = ppoll(&entry, 1, left < 0 ? NULL : &limit, NULL);
    if (ready < 0)
        return GPV_EINTR;
    return ready > 0 && gpv_interrupt_clear(fd) ? GPV_WOKEN : 0;
}

int32_t gpv_wait(struct gpv_queue *q, int32_t fd, int64_t timeout_ns, int64_t spin_ns)
{
    const int64_t start = now_ns();
    int64_t spent = 0;
    int32_t found, result;
    unsigned i;

    if (timeout_ns >= 0 && spin_ns > timeout_ns)
        spin_ns = timeout_ns;
    for (;;) {
        for (i = 0; i < 16; i++) {
            found = gpv_pending(q);
            if (found)
                return found;
            GPV_RELAX();
        }
        spent = now_ns() - start;
        if (spent >= spin_ns)
            break;
    }
    for (;;) {
        /* arm looks again behind its fence: what is used after that look makes the eventfd readable */
        found = gpv_arm(q);
        if (found)
            return found;
        if (timeout_ns >= 0 && spent >= timeout_ns)
            return 0;
        result = nap(fd, timeout_ns < 0 ? -1 : timeout_ns - spent);
        if (result)
            return result;
        spent = now_ns() - start;
    }
}
