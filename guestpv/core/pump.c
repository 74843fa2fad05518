#include "pump.h"
#include "clock.h"
#include "count.h"
#include "frame.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    STUCK_MS = 200, /* how long sent frames may stay with the device before it is reminded */
    HELD_BYTES = 4096,  /* of frames to send that may wait for others while frames come in, */
    HELD_BUFFERS = 4 * GPV_PORT_BURST, /* and for how many receive buffers */
    NO_NEWS = -2,
};

struct gpv_pump {
    struct gpv_pump_config c;
    struct gpv_pump_counters n;
    uint64_t back;     /* sent frames that had come back when somebody last looked, */
    int64_t waiting;   /* and since when they have been that many */
    uint64_t held;     /* bytes to send that the device does not know of yet, */
    uint32_t since;    /* and receive buffers that came in since it was told of the last ones */
    int32_t capture_next; /* what capture_fd is to become: left by another thread, NO_NEWS once taken */
    int32_t capture_fd;   /* the pump's thread's own, -1: nobody captures */
};

struct gpv_pump *gpv_pump_new(const struct gpv_pump_config *config)
{
    struct gpv_pump *p = calloc(1, sizeof *p);
    if (p) {
        p->c = *config;
        p->capture_next = NO_NEWS;
        p->capture_fd = -1;
    }
    return p;
}

static void end_capture(struct gpv_pump *p)
{
    if (p->capture_fd >= 0)
        close(p->capture_fd);
    p->capture_fd = -1;
}

void gpv_pump_free(struct gpv_pump *p)
{
    if (p) {
        gpv_pump_capture(p, NO_NEWS);
        end_capture(p);
        free(p);
    }
}

void gpv_pump_capture(struct gpv_pump *p, int32_t fd)
{
    /* Only the thread that writes to a descriptor closes it, or its number could be somebody else's by then. */
    int32_t untaken = __atomic_exchange_n(&p->capture_next, fd, __ATOMIC_ACQ_REL);
    if (untaken >= 0)
        close(untaken);
}

/* Shows a frame with its header to whoever captures, and waits for nobody: what finds no room is lost, and counted. */
static void show(struct gpv_pump *p, uint32_t way, const struct iovec *frame, uint32_t fragments, uint32_t bytes)
{
    if (__atomic_load_n(&p->capture_next, __ATOMIC_RELAXED) != NO_NEWS) {
        end_capture(p);
        p->capture_fd = __atomic_exchange_n(&p->capture_next, NO_NEWS, __ATOMIC_ACQ_REL);
    }
    if (p->capture_fd < 0)
        return;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct gpv_captured said = {
        .nanoseconds = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec,
        .way = way, .header = p->c.header, .bytes = bytes, .pair = p->c.rx_number / 2,
    };
    struct iovec parts[1 + GPV_PORT_FRAGMENTS] = { { &said, sizeof said } };
    memcpy(parts + 1, frame, fragments * sizeof *frame);
    struct msghdr message = { .msg_iov = parts, .msg_iovlen = 1 + fragments };
    if (sendmsg(p->capture_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return;
    if (errno == EAGAIN || errno == ENOBUFS || errno == EMSGSIZE || errno == EINTR)
        count(&p->n.capture_lost, 1);
    else
        end_capture(p);
}

const struct gpv_pump_counters *gpv_pump_counters(const struct gpv_pump *p)
{
    return &p->n;
}

/* A whole frame goes to the TAP in one call. */
static enum gpv_fate into_tap(void *user, struct iovec *frame, uint32_t fragments, uint32_t bytes)
{
    struct gpv_pump *p = user;
    uint8_t *header = frame[0].iov_base;
    ssize_t written;
    show(p, GPV_CAPTURED_RX, frame, fragments, bytes);
    if (gpv_leave_checksum_open(header, header + p->c.header, (uint32_t)frame[0].iov_len - p->c.header) < 0)
        return GPV_MALFORMED;
    gpv_forget_wrong_length(header, bytes - p->c.header);
    do
        written = writev(p->c.tap_fd, frame, (int)fragments);
    while (written < 0 && errno == EINTR);
    if (written >= 0)
        return GPV_DELIVERED;
    /* The kernel does not like the header; or the link is down or its queue full, where a network loses frames. */
    return errno == EINVAL ? GPV_MALFORMED : GPV_DROPPED;
}

/* What a stream that comes in makes us send are acknowledgements, a few after each batch. They go out together, once the
 * batches pause or four of them are in; anything longer goes out at once, and what it finds waiting with it. */
static int hold(const struct gpv_pump *p, int32_t in)
{
    return in && p->since < HELD_BUFFERS && p->held <= HELD_BYTES;
}

/* After so many receive buffers came in. Returns how many frames were taken, or a negative code. One kick at most,
 * whatever the burst. */
static int32_t transmit(struct gpv_pump *p, int32_t in)
{
    uint32_t size = gpv_port_buffer_size(p->c.port);
    int32_t status = gpv_port_reclaim(p->c.port), sent = 0;
    uint8_t *memory;
    if (status < 0)
        return status;
    for (int32_t reads = 0; reads < GPV_PORT_BURST && (memory = gpv_port_buffer(p->c.port)); reads++) {
        ssize_t length = read(p->c.tap_fd, memory, size);
        if (length < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN)
                break;
            return GPV_PUMP_ERRNO - errno;
        }
        /* The TAP cuts off what does not fit, and says nothing: buffers are longer than anything that may be sent. */
        status = gpv_port_give(p->c.port, (uint32_t)length);
        if (status < 0)
            return status;
        if (status) {
            struct iovec whole = { memory, (size_t)length };
            show(p, GPV_CAPTURED_TX, &whole, 1, (uint32_t)length);
        }
        sent += status;
        p->held += (uint64_t)length;
    }
    p->since += (uint32_t)in;
    uint32_t waiting = gpv_unpublished(p->c.tx);
    if (waiting && !hold(p, in)) {
        if (gpv_outstanding(p->c.tx) == waiting)
            p->waiting = now_ms();
        p->held = p->since = 0;
        status = gpv_publish(p->c.tx);
        if (status < 0)
            return status;
    }
    return sent;
}

static void take_interrupts(int32_t fd, uint64_t *counter)
{
    uint64_t events;
    if (fd >= 0 && read(fd, &events, sizeof events) == sizeof events)
        count(counter, events);
}

static int stop_asked(const struct gpv_pump *p)
{
    struct pollfd stop = { .fd = p->c.stop_fd, .events = POLLIN };
    return poll(&stop, 1, 0) > 0;
}

/* Frames that the device has had for long: remind it, whatever else goes on. QEMU 7.2 leaves a stale event position behind
 * when its back end was congested, after which the standard forbids the kick that would make it go on (packed ring,
 * EVENT_IDX). */
static int32_t unstick(struct gpv_pump *p)
{
    int32_t status = gpv_port_reclaim(p->c.port);
    if (status < 0)
        return status;
    uint32_t out = gpv_outstanding(p->c.tx);
    uint64_t back = gpv_turns(p->c.tx) - out;
    int64_t now = now_ms();
    if (out && back == p->back && now - p->waiting < STUCK_MS)
        return 0;
    int stuck = out && back == p->back;
    p->back = back;
    p->waiting = now;
    if (!stuck)
        return 0;
    count(&p->n.tx_reminders, 1);
    status = gpv_notify(p->c.tx);
    return status < 0 ? status : 0;
}

/* Sleep until somebody has something to do. Returns 0, or a negative code. */
static int32_t sleep_until_work(struct gpv_pump *p)
{
    int full = gpv_port_buffer(p->c.port) == NULL;
    int32_t ready = gpv_arm(p->c.rx);
    if (ready == 0 && full)
        ready = gpv_arm(p->c.tx);
    if (ready == 0) {
        struct pollfd fds[] = {
            { .fd = p->c.stop_fd, .events = POLLIN },
            { .fd = p->c.rx_fd, .events = POLLIN },
            { .fd = full ? p->c.tx_fd : p->c.tap_fd, .events = POLLIN },
        };
        int limit = gpv_port_patience(p->c.port);
        if (gpv_outstanding(p->c.tx) && (limit < 0 || limit > STUCK_MS))
            limit = STUCK_MS;
        int woken = poll(fds, 3, limit);
        if (woken < 0 && errno != EINTR)
            return GPV_PUMP_ERRNO - errno;
        ready = unstick(p);
        count(&p->n.wakeups, 1);
        take_interrupts(p->c.rx_fd, &p->n.rx_interrupts);
        take_interrupts(p->c.tx_fd, &p->n.tx_interrupts);
    }
    gpv_disarm(p->c.rx);
    if (full)
        gpv_disarm(p->c.tx);
    return ready < 0 ? ready : 0;
}

int32_t gpv_pump_run(struct gpv_pump *p)
{
    gpv_queue_own(p->c.rx);
    gpv_queue_own(p->c.tx);
    gpv_disarm(p->c.rx);
    gpv_disarm(p->c.tx);
    int32_t started = gpv_port_start(p->c.port);
    if (started < 0)
        return started;
    for (uint32_t round = 0;; round++) {
        /* Under load there is no sleep to be woken from; a look now and then is enough. */
        if (round % GPV_PORT_BURST == 0) {
            if (stop_asked(p))
                return 0;
            int32_t stuck = unstick(p);
            if (stuck < 0)
                return stuck;
        }
        int32_t in = gpv_port_take(p->c.port, GPV_PORT_BURST, into_tap, p);
        if (in < 0)
            return in;
        int32_t out = transmit(p, in);
        if (out < 0)
            return out;
        if (in || out || p->c.rx_fd < 0)
            continue;
        int32_t status = sleep_until_work(p);
        if (status < 0)
            return status;
        if (stop_asked(p))
            return 0;
    }
}
