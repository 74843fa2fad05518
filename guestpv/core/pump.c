#include "pump.h"
#include "frame.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    BURST = 64,
    MAX_FRAGMENTS = 64,      /* 64 KiB in the smallest receive buffers that we make, and some */
    NUM_BUFFERS_OFFSET = 10, /* le16 num_buffers in struct virtio_net_hdr (5.1.6) */
    STUCK_MS = 200,          /* how long sent frames may stay with the device before it is reminded */
    STUCK_ROUNDS = 1 << 17,  /* the same when spinning */
};

struct gpv_pump {
    struct gpv_pump_config c;
    struct gpv_pump_counters n;
    uint32_t *tx_free; /* stack of transmit buffers that the device does not have */
    uint32_t tx_free_count;
    /* A received frame that has not come in whole yet. */
    struct iovec frame[MAX_FRAGMENTS];
    uint32_t frame_buffers[MAX_FRAGMENTS];
    uint32_t frame_have, frame_want;
};

static void count(uint64_t *counter, uint64_t by)
{
    /* One writer; the store is atomic so that a reader in another thread never sees half of it. */
    __atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}

static uint8_t *at(const struct gpv_pump_buffers *buffers, uint32_t number)
{
    return (uint8_t *)(uintptr_t)buffers->memory[number];
}

static int32_t give_receive_buffer(struct gpv_pump *p, uint32_t buffer)
{
    struct gpv_segment segment = { p->c.rx_buffers.bus[buffer], p->c.rx_buffers.size };
    int32_t slot = gpv_add(p->c.rx, &segment, 0, 1, buffer);
    return slot < 0 ? slot : 0;
}

struct gpv_pump *gpv_pump_new(const struct gpv_pump_config *config)
{
    struct gpv_pump *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->c = *config;
    p->tx_free = calloc(config->tx_buffers.count, sizeof *p->tx_free);
    if (!p->tx_free) {
        free(p);
        return NULL;
    }
    /* Last one in, first one out: the buffer used next is the one still in the cache. */
    for (uint32_t i = config->tx_buffers.count; i-- > 0;)
        p->tx_free[p->tx_free_count++] = i;
    return p;
}

void gpv_pump_free(struct gpv_pump *p)
{
    if (p) {
        free(p->tx_free);
        free(p);
    }
}

const struct gpv_pump_counters *gpv_pump_counters(const struct gpv_pump *p)
{
    return &p->n;
}

/* The frame is complete: hand it to the TAP in one call, then give its buffers back to the device. */
static int32_t deliver(struct gpv_pump *p, int drop)
{
    ssize_t written = -1;
    if (!drop) {
        /* receive() saw to it that the header is there. */
        uint8_t *first = p->frame[0].iov_base;
        gpv_leave_checksum_open(first, first + p->c.header, (uint32_t)p->frame[0].iov_len - p->c.header);
        do
            written = writev(p->c.tap_fd, p->frame, (int)p->frame_have);
        while (written < 0 && errno == EINTR);
    }
    if (written < 0) {
        /* The link is down, its queue is full, or the kernel does not like the header: lose the frame
         * as a network does, and say so in the counter. */
        count(&p->n.rx_dropped, 1);
    } else {
        count(&p->n.rx_packets, 1);
        count(&p->n.rx_bytes, (uint64_t)written - p->c.header);
    }
    int32_t status = 0;
    for (uint32_t i = 0; i < p->frame_have && status == 0; i++)
        status = give_receive_buffer(p, p->frame_buffers[i]);
    p->frame_have = p->frame_want = 0;
    return status;
}

static uint32_t fragments_of(const struct gpv_pump *p, const uint8_t *header)
{
    if (!p->c.mergeable)
        return 1;
    return (uint32_t)header[NUM_BUFFERS_OFFSET] | (uint32_t)header[NUM_BUFFERS_OFFSET + 1] << 8;
}

/* Returns how many buffers came in, or a negative code. */
static int32_t receive(struct gpv_pump *p)
{
    uint32_t ids[BURST], lengths[BURST];
    uint64_t cookies[BURST];
    int32_t got = gpv_reap(p->c.rx, ids, lengths, cookies, BURST);
    if (got <= 0)
        return got;
    for (int32_t i = 0; i < got; i++) {
        uint32_t buffer = (uint32_t)cookies[i];
        uint8_t *memory = at(&p->c.rx_buffers, buffer);
        if (p->frame_have == 0) {
            p->frame_want = lengths[i] < p->c.header ? 0 : fragments_of(p, memory);
            if (p->frame_want == 0 || p->frame_want > MAX_FRAGMENTS) {
                /* Shorter than its header, or made of an impossible number of buffers. */
                p->frame_buffers[p->frame_have++] = buffer;
                int32_t status = deliver(p, 1);
                if (status < 0)
                    return status;
                continue;
            }
        }
        p->frame[p->frame_have].iov_base = memory;
        p->frame[p->frame_have].iov_len = lengths[i];
        p->frame_buffers[p->frame_have++] = buffer;
        if (p->frame_have == p->frame_want) {
            int32_t status = deliver(p, 0);
            if (status < 0)
                return status;
        }
    }
    gpv_publish(p->c.rx);
    return got;
}

static int32_t reap_transmitted(struct gpv_pump *p)
{
    uint32_t ids[BURST], lengths[BURST];
    uint64_t cookies[BURST];
    int32_t got;
    do {
        got = gpv_reap(p->c.tx, ids, lengths, cookies, BURST);
        if (got < 0)
            return got;
        for (int32_t i = 0; i < got; i++)
            p->tx_free[p->tx_free_count++] = (uint32_t)cookies[i];
    } while (got == BURST);
    return 0;
}

/* Returns how many frames went out, or a negative code. One kick at most, whatever the burst. */
static int32_t transmit(struct gpv_pump *p)
{
    const struct gpv_pump_buffers *buffers = &p->c.tx_buffers;
    int32_t status = reap_transmitted(p);
    if (status < 0)
        return status;
    int32_t sent = 0;
    while (sent < BURST && p->tx_free_count) {
        uint32_t buffer = p->tx_free[p->tx_free_count - 1];
        uint8_t *memory = at(buffers, buffer);
        ssize_t length = read(p->c.tap_fd, memory, buffers->size);
        if (length < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN)
                break;
            return GPV_PUMP_ERRNO - errno;
        }
        if (length <= (ssize_t)p->c.header) {
            count(&p->n.tx_dropped, 1);
            continue;
        }
        /* The kernel leaves num_buffers as it was, and it belongs to received frames only. */
        memset(memory + NUM_BUFFERS_OFFSET, 0, 2);
        struct gpv_segment segment = { buffers->bus[buffer], (uint32_t)length };
        int32_t slot = gpv_add(p->c.tx, &segment, 1, 0, buffer);
        if (slot < 0)
            return slot;
        p->tx_free_count--;
        sent++;
        count(&p->n.tx_packets, 1);
        count(&p->n.tx_bytes, (uint64_t)length - p->c.header);
    }
    if (sent)
        gpv_publish(p->c.tx);
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

/* Frames that the device has had for long: remind it. QEMU 7.2 leaves a stale event position behind when its back end
 * was congested, after which the standard forbids the kick that would make it go on (packed ring, EVENT_IDX). */
static int32_t unstick(struct gpv_pump *p)
{
    int32_t status = reap_transmitted(p);
    if (status == 0 && gpv_outstanding(p->c.tx)) {
        count(&p->n.tx_reminders, 1);
        status = gpv_notify(p->c.tx);
    }
    return status < 0 ? status : 0;
}

/* Sleep until somebody has something to do. Returns 0, or a negative code. */
static int32_t sleep_until_work(struct gpv_pump *p)
{
    int full = p->tx_free_count == 0;
    int32_t ready = gpv_arm(p->c.rx);
    if (ready == 0 && full)
        ready = gpv_arm(p->c.tx);
    if (ready == 0) {
        struct pollfd fds[] = {
            { .fd = p->c.stop_fd, .events = POLLIN },
            { .fd = p->c.rx_fd, .events = POLLIN },
            { .fd = full ? p->c.tx_fd : p->c.tap_fd, .events = POLLIN },
        };
        int woken = poll(fds, 3, gpv_outstanding(p->c.tx) ? STUCK_MS : -1);
        if (woken < 0 && errno != EINTR)
            return GPV_PUMP_ERRNO - errno;
        if (woken == 0)
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
    for (uint32_t i = 0; i < p->c.rx_buffers.count; i++) {
        int32_t status = give_receive_buffer(p, i);
        if (status < 0)
            return status;
    }
    gpv_publish(p->c.rx);
    for (uint32_t round = 0, idle = 0;; round++) {
        /* Under load there is no sleep to be woken from; a look now and then is enough. */
        if (round % BURST == 0 && stop_asked(p))
            return 0;
        int32_t in = receive(p);
        if (in < 0)
            return in;
        int32_t out = transmit(p);
        if (out < 0)
            return out;
        if (in || out) {
            idle = 0;
            continue;
        }
        int spinning = p->c.rx_fd < 0;
        if (spinning && ++idle % STUCK_ROUNDS)
            continue;
        int32_t status = spinning ? unstick(p) : sleep_until_work(p);
        if (status < 0)
            return status;
        if (stop_asked(p))
            return 0;
    }
}
