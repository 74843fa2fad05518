#include "port.h"
#include "clock.h"
#include "count.h"

#include <stdlib.h>
#include <string.h>

enum {
    HDR_F_RSC_INFO = 4,
    GSO_TYPE = 1, /* offsets in struct virtio_net_hdr (5.1.6) */
    GSO_SIZE = 4,
    NUM_BUFFERS = 10,
    GSO_ECN = 0x80,
    ETHERNET_HEADER = 14,
};

struct gpv_port {
    struct gpv_port_config c;
    struct gpv_port_counters n;
    uint32_t *tx_free; /* stack of transmit buffers that the device does not have */
    uint32_t tx_free_count;
    /* A received frame that has not come in whole yet. */
    struct iovec frame[GPV_PORT_FRAGMENTS];
    uint32_t frame_buffers[GPV_PORT_FRAGMENTS];
    uint32_t frame_have, frame_want, frame_bytes;
    int64_t frame_since;
    int32_t broken; /* the gpv_port_error that ended reception, 0 before */
    struct gpv_queue *const *siblings;
    uint32_t sibling_count;
};

static uint8_t *at(const struct gpv_buffers *buffers, uint32_t number)
{
    return (uint8_t *)(uintptr_t)buffers->memory[number];
}

struct gpv_port *gpv_port_new(const struct gpv_port_config *config)
{
    struct gpv_port *p = calloc(1, sizeof *p);
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

void gpv_port_free(struct gpv_port *p)
{
    if (p) {
        free(p->tx_free);
        free(p);
    }
}

const struct gpv_port_counters *gpv_port_counters(const struct gpv_port *p)
{
    return &p->n;
}

uint32_t gpv_port_fragments(const struct gpv_port *p)
{
    return p->frame_want;
}

/* Reception. */

void gpv_port_siblings(struct gpv_port *p, struct gpv_queue *const *siblings, uint32_t count)
{
    p->siblings = siblings;
    p->sibling_count = count;
}

static int32_t publish_buffers(struct gpv_port *p)
{
    int32_t status = gpv_publish(p->c.rx);
    for (uint32_t i = 0; status > 0 && i < p->sibling_count; i++) {
        count(&p->n.rx_reminders, 1);
        if (gpv_remind(p->siblings[i]) < 0)
            status = GPV_EKICK;
    }
    return status < 0 ? status : 0;
}

static int32_t give_receive_buffer(struct gpv_port *p, uint32_t buffer)
{
    struct gpv_segment segment = { p->c.rx_buffers.bus[buffer], p->c.rx_buffers.size };
    int32_t slot = gpv_add(p->c.rx, &segment, 0, 1, buffer);
    return slot < 0 ? slot : 0;
}

int32_t gpv_port_start(struct gpv_port *p)
{
    for (uint32_t i = 0; i < p->c.rx_buffers.count; i++) {
        int32_t status = give_receive_buffer(p, i);
        if (status < 0)
            return status;
    }
    return publish_buffers(p);
}

/* Segmentation that nobody negotiated, or of size 0, means nothing to whoever gets the frame. */
static int gso_makes_sense(const struct gpv_port *p, const uint8_t *header)
{
    uint32_t type = header[GSO_TYPE] & ~(uint32_t)GSO_ECN;
    if (type == 0)
        return 1;
    return type < 32 && p->c.gso >> type & 1 && (header[GSO_SIZE] || header[GSO_SIZE + 1] || header[0] & HDR_F_RSC_INFO);
}

/* The frame is complete: deliver it, then give its buffers back to the device. */
static int32_t finish(struct gpv_port *p, gpv_deliver *deliver, void *user)
{
    enum gpv_fate fate = GPV_MALFORMED;
    if (p->frame_bytes > p->c.header && gso_makes_sense(p, p->frame[0].iov_base))
        fate = deliver(user, p->frame, p->frame_have, p->frame_bytes);
    if (fate == GPV_DELIVERED) {
        count(&p->n.rx_packets, 1);
        count(&p->n.rx_bytes, p->frame_bytes - p->c.header);
    } else {
        count(fate == GPV_MALFORMED ? &p->n.rx_malformed : &p->n.rx_dropped, 1);
    }
    int32_t status = 0;
    for (uint32_t i = 0; i < p->frame_have && status == 0; i++)
        status = give_receive_buffer(p, p->frame_buffers[i]);
    p->frame_have = p->frame_want = p->frame_bytes = 0;
    return status;
}

static uint32_t fragments_of(const struct gpv_port *p, const volatile uint8_t *header)
{
    if (!p->c.mergeable)
        return 1;
    uint32_t low = header[NUM_BUFFERS];
    return low | (uint32_t)header[NUM_BUFFERS + 1] << 8;
}

/* One used buffer. The used length is what the device wrote, so what lies behind it, from an earlier frame, is nobody's. */
static int32_t take(struct gpv_port *p, uint32_t buffer, uint32_t length, gpv_deliver *deliver, void *user)
{
    uint8_t *memory = at(&p->c.rx_buffers, buffer);
    if (p->frame_have == 0) {
        p->frame_want = length < p->c.header ? 0 : fragments_of(p, memory);
        if (p->frame_want > GPV_PORT_FRAGMENTS) {
            p->broken = GPV_PORT_EFRAGMENTS;
            return p->broken;
        }
        if (p->frame_want == 0) {
            count(&p->n.rx_malformed, 1);
            return give_receive_buffer(p, buffer);
        }
    }
    p->frame[p->frame_have].iov_base = memory;
    p->frame[p->frame_have].iov_len = length;
    p->frame_buffers[p->frame_have++] = buffer;
    p->frame_bytes += length;
    return p->frame_have == p->frame_want ? finish(p, deliver, user) : 0;
}

int32_t gpv_port_patience(const struct gpv_port *p)
{
    if (p->frame_have == 0)
        return -1;
    int64_t left = p->frame_since + p->c.partial_ms - now_ms();
    return left < 0 ? 0 : (int32_t)left;
}

int32_t gpv_port_take(struct gpv_port *p, uint32_t max, gpv_deliver *deliver, void *user)
{
    uint32_t ids[GPV_PORT_BURST], lengths[GPV_PORT_BURST];
    uint64_t cookies[GPV_PORT_BURST];
    if (p->broken)
        return p->broken;
    int32_t got = gpv_reap(p->c.rx, ids, lengths, cookies, max);
    if (got == 0 && gpv_port_patience(p) == 0)
        p->broken = GPV_PORT_EPARTIAL;
    if (got <= 0)
        return p->broken ? p->broken : got;
    for (int32_t i = 0; i < got; i++) {
        int32_t status = take(p, (uint32_t)cookies[i], lengths[i], deliver, user);
        if (status < 0)
            return status;
    }
    if (p->frame_have)
        p->frame_since = now_ms();
    int32_t status = publish_buffers(p);
    return status < 0 ? status : got;
}

struct table {
    struct gpv_frames *rows;
    uint32_t header, used;
};

static enum gpv_fate into_table(void *user, struct iovec *frame, uint32_t fragments, uint32_t bytes)
{
    struct table *t = user;
    uint32_t left = bytes - t->header, skip = t->header;
    if (left > t->rows->stride)
        return GPV_DROPPED;
    uint8_t *row = t->rows->data + t->used * t->rows->stride;
    if (t->rows->headers)
        memcpy(t->rows->headers + (uint64_t)t->used * t->header, frame[0].iov_base, t->header);
    for (uint32_t i = 0; i < fragments; i++, skip = 0) {
        memcpy(row, (uint8_t *)frame[i].iov_base + skip, frame[i].iov_len - skip);
        row += frame[i].iov_len - skip;
    }
    t->rows->lengths[t->used++] = left;
    return GPV_DELIVERED;
}

int32_t gpv_port_receive(struct gpv_port *p, struct gpv_frames *frames)
{
    struct table t = { frames, p->c.header, 0 };
    /* A frame takes a buffer at least, so that as many buffers as rows never hold too many frames. */
    while (t.used < frames->capacity) {
        uint32_t room = frames->capacity - t.used;
        int32_t got = gpv_port_take(p, room < GPV_PORT_BURST ? room : GPV_PORT_BURST, into_table, &t);
        /* What came in before the device went wrong is delivered first; a broken port and a broken queue stay so. */
        if (got < 0 && t.used == 0)
            return got;
        if (got <= 0)
            break;
    }
    return (int32_t)t.used;
}

/* Transmission. */

int32_t gpv_port_reclaim(struct gpv_port *p)
{
    uint32_t ids[GPV_PORT_BURST], lengths[GPV_PORT_BURST];
    uint64_t cookies[GPV_PORT_BURST];
    int32_t got;
    do {
        got = gpv_reap(p->c.tx, ids, lengths, cookies, GPV_PORT_BURST);
        if (got < 0)
            return got;
        for (int32_t i = 0; i < got; i++)
            p->tx_free[p->tx_free_count++] = (uint32_t)cookies[i];
    } while (got == GPV_PORT_BURST);
    return 0;
}

uint8_t *gpv_port_buffer(struct gpv_port *p)
{
    return p->tx_free_count ? at(&p->c.tx_buffers, p->tx_free[p->tx_free_count - 1]) : NULL;
}

uint32_t gpv_port_buffer_size(const struct gpv_port *p)
{
    return p->c.tx_buffers.size;
}

int32_t gpv_port_give(struct gpv_port *p, uint32_t bytes)
{
    uint32_t buffer = p->tx_free[p->tx_free_count - 1];
    uint8_t *memory = at(&p->c.tx_buffers, buffer);
    int segmented = bytes > p->c.header && (memory[GSO_TYPE] & ~GSO_ECN) != 0;
    if (bytes < p->c.header + ETHERNET_HEADER || (!segmented && bytes - p->c.header > p->c.longest)) {
        count(&p->n.tx_dropped, 1);
        return 0;
    }
    /* num_buffers and what follows belong to received frames only. */
    memset(memory + NUM_BUFFERS, 0, p->c.header - NUM_BUFFERS);
    struct gpv_segment segment = { p->c.tx_buffers.bus[buffer], bytes };
    int32_t slot = gpv_add(p->c.tx, &segment, 1, 0, buffer);
    if (slot < 0)
        return slot;
    p->tx_free_count--;
    count(&p->n.tx_packets, 1);
    count(&p->n.tx_bytes, bytes - p->c.header);
    return 1;
}

int32_t gpv_port_send(struct gpv_port *p, const struct gpv_frames *frames, uint32_t rows)
{
    int32_t status = gpv_port_reclaim(p);
    uint32_t done = 0, given = 0;
    for (; status >= 0 && done < rows; done++) {
        uint8_t *memory = gpv_port_buffer(p);
        if (!memory || frames->lengths[done] > p->c.tx_buffers.size - p->c.header)
            break;
        if (frames->headers)
            memcpy(memory, frames->headers + (uint64_t)done * p->c.header, p->c.header);
        else
            memset(memory, 0, p->c.header);
        memcpy(memory + p->c.header, frames->data + done * frames->stride, frames->lengths[done]);
        status = gpv_port_give(p, p->c.header + frames->lengths[done]);
        if (status == GPV_EFULL)
            break;
        given += status == 1;
    }
    if (given) {
        int32_t published = gpv_publish(p->c.tx);
        if (published < 0)
            return published;
    }
    return status < 0 && status != GPV_EFULL ? status : (int32_t)done;
}
