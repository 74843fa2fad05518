/* The NBD export inside: what its parts share. nbd.c speaks with the client, nbd_device.c with the device, and nbd_wait.c
 * says what waits for what. */
#ifndef GPV_NBD_INSIDE_H
#define GPV_NBD_INSIDE_H
#include <stddef.h>
#include "count.h"
#include "nbd.h"

enum {
    CMD_READ = 0,
    CMD_WRITE = 1,
    CMD_DISC = 2,
    CMD_FLUSH = 3,
    CMD_TRIM = 4,
    CMD_WRITE_ZEROES = 6,
    FLAG_FUA = 1,
    FLAG_NO_HOLE = 2,
    T_IN = 0,
    T_OUT = 1,
    T_FLUSH = 4,
    SECTOR = 512,
    BATCH = 64,
    INPUT = 16384,
};
#define NONE UINT32_MAX

/* What one request of the client has come to. */
struct op {
    uint8_t handle[8];
    uint64_t offset;        /* of ranges: where the next virtio request begins */
    uint32_t length;
    uint32_t rest;          /* bytes of ranges that no virtio request covers yet */
    uint16_t command, flags;
    uint32_t error;         /* NBD error for the answer */
    uint32_t outstanding;   /* virtio requests */
    uint32_t first_slot, last_slot;
    uint32_t next;          /* in the list of the finished, or of the free */
    int flushing;
    int busy;
};

struct gpv_nbd {
    struct gpv_nbd_config c;
    struct gpv_nbd_counters n;
    struct op *ops;         /* as many as slots: each has one at least */
    uint32_t free_op, free_slot, free_slots;
    uint32_t *slot_next, *slot_op;
    uint32_t finished, finished_last;
    uint32_t busy;          /* ops with the device */
    uint32_t added;         /* since the last publish */
    int blocked;            /* the next request has to wait for slots */
    int ending;
    int paused;             /* asked for by another thread */
    int rebound;            /* what is busy has to be given to another queue */
    int urgent;             /* among the added is one that nothing may delay */
    uint32_t depth;         /* how many ops the client keeps open at once, as far as we saw lately */
    int64_t spin_ns;        /* how long the next look before sleeping lasts */
    uint32_t have, used;    /* of `input`: filled, and consumed from its start */
    uint8_t input[INPUT];
};

static inline uint8_t *data_of(const struct gpv_nbd *e, uint32_t slot)
{
    return e->c.data + (size_t)slot * e->c.data_size;
}

static inline uint32_t slots_for(const struct gpv_nbd *e, uint32_t length)
{
    return length ? (length - 1) / e->c.data_size + 1 : 1;
}

/* Gives the op its slots, which have to be free. */
void gpv_nbd_take_slots(struct gpv_nbd *e, uint32_t op, uint32_t number);
/* Adds a virtio request that uses this slot: 0, or a negative code. It is published with the others of its turn. */
int32_t gpv_nbd_add(struct gpv_nbd *e, struct op *o, uint32_t slot, uint32_t type, uint64_t sector, uint32_t bytes);
/* The next virtio request of a discard or write zeroes: as many ranges as the device takes. */
int32_t gpv_nbd_add_ranges(struct gpv_nbd *e, struct op *o);
/* Takes what the device is done with, and goes on with the ops whose requests are all back. Returns how many virtio
 * requests came back, or a negative code. */
int32_t gpv_nbd_reap(struct gpv_nbd *e);
/* Whether what was added should wait for more before it becomes available to the device. */
int gpv_nbd_gather(struct gpv_nbd *e);
/* Nothing to do: wait until there is. With something held for more to come, awake and not for long; whatever did not come
 * by then is not waited for any more. Returns 0, or a negative code. */
int32_t gpv_nbd_wait(struct gpv_nbd *e, int held);
/* Puts the op among those to be answered. */
void gpv_nbd_finish(struct gpv_nbd *e, struct op *o);
/* The op was answered: it and its slots are free. */
void gpv_nbd_release(struct gpv_nbd *e, struct op *o);
#endif
