/* What waits for what in the NBD export: requests for others before the device is told, and the thread for either side. */
#define _GNU_SOURCE
#include "nbd_inside.h"
#include "clock.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

enum {
    LOOK_NS = 20000,
    LEAST_SPIN_NS = 10000,
};

/* A client that keeps 32 requests open brings them one by one, as answers reach it; told of each, the device would be
 * notified 32 times. So some are gathered. The device does not know of them until then (2.7.13, 2.8), so nothing lacks its
 * notification. A device that has less than half of them waits for the client anyway, and gets half of them at once. One
 * that has more is what the client waits for: no more than a quarter is kept from it. */
static uint32_t enough(const struct gpv_nbd *e)
{
    uint32_t with_device = e->busy > e->added ? e->busy - e->added : 0;
    return with_device * 2 < e->depth ? (e->depth + 1) / 2 : e->depth / 4;
}

int gpv_nbd_gather(struct gpv_nbd *e)
{
    if (e->busy > e->depth)
        e->depth = e->busy;
    return e->added && e->added < enough(e) && !e->urgent && !e->blocked && !e->ending;
}

/* Looks for completions, and now and then for requests, before sleeping: to go to sleep and be woken costs a virtual
 * processor far more than a fast disk or a busy client takes. Returns whether there is something. */
static int32_t spin(struct gpv_nbd *e, int64_t start)
{
    struct pollfd fds[] = {
        { .fd = e->ending || e->blocked ? -1 : e->c.socket, .events = POLLIN },
        { .fd = e->c.stop_fd, .events = POLLIN },
    };
    int64_t now = start, look = start;
    while (now < start + e->spin_ns) {
        int32_t pending = gpv_pending(e->c.queue);
        if (pending)
            return pending;
        if (now >= look) {
            look = now + LOOK_NS;
            if (poll(fds, 2, 0) > 0)
                return fds[0].revents != 0; /* who asks us to stop is heard where we sleep */
        }
        now = now_ns();
    }
    return 0;
}

/* The next look lasts longer where it would have found something in time, and shorter where it would not: when the disk
 * is slow, nobody asks, or the host has too few processors and the look keeps the others from running. */
static void learn(struct gpv_nbd *e, int64_t waited)
{
    if (waited > e->c.spin_ns)
        e->spin_ns = e->spin_ns / 2 < LEAST_SPIN_NS ? 0 : e->spin_ns / 2;
    else
        e->spin_ns = e->spin_ns * 2 < LEAST_SPIN_NS ? LEAST_SPIN_NS : e->spin_ns * 2;
    if (e->spin_ns > e->c.spin_ns)
        e->spin_ns = e->c.spin_ns;
}

int32_t gpv_nbd_wait(struct gpv_nbd *e, int held)
{
    int64_t start = now_ns();
    int32_t found = spin(e, start);
    if (found == 0 && held) {
        /* The client asks for less than it did. Not the whole way: one pause of a busy one does not count for all. */
        e->depth -= (e->depth - e->busy + 3) / 4;
        e->urgent = 1;
        return 0;
    }
    if (found == 0 && e->busy && e->c.queue_fd >= 0)
        found = gpv_arm(e->c.queue);
    if (found == 0) {
        struct pollfd fds[] = {
            { .fd = e->c.stop_fd, .events = POLLIN },
            { .fd = e->ending || e->blocked ? -1 : e->c.socket, .events = POLLIN },
            { .fd = e->busy ? e->c.queue_fd : -1, .events = POLLIN },
        };
        if (poll(fds, 3, e->busy && e->c.queue_fd < 0 ? 0 : -1) < 0 && errno != EINTR)
            return GPV_NBD_ERRNO - errno;
        count(&e->n.wakeups, 1);
        uint64_t events;
        if (fds[0].revents & POLLIN && read(e->c.stop_fd, &events, sizeof events) == sizeof events
            && !__atomic_load_n(&e->paused, __ATOMIC_ACQUIRE))
            e->ending = 1;
        if (fds[2].revents & POLLIN && read(e->c.queue_fd, &events, sizeof events) == sizeof events)
            count(&e->n.interrupts, events);
    }
    learn(e, now_ns() - start);
    if (e->c.queue_fd >= 0)
        gpv_disarm(e->c.queue);
    return found < 0 ? found : 0;
}
