/* The client's half of the NBD export: requests in, answers out. */
#include "nbd_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum {
    REQUEST_MAGIC = 0x25609513,
    REPLY_MAGIC = 0x67446698,
    REQUEST_BYTES = 28,
    REPLY_BYTES = 16,
    MOST_PIECES = GPV_NBD_SLOTS + 1,
};

static uint64_t get_be(const uint8_t *from, int bytes)
{
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | *from++;
    return value;
}

static void put_be32(uint8_t *to, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        to[i] = (uint8_t)(value >> (24 - 8 * i));
}

struct gpv_nbd *gpv_nbd_new(const struct gpv_nbd_config *config)
{
    struct gpv_nbd *e = config->slot_count <= GPV_NBD_SLOTS ? calloc(1, sizeof *e) : NULL;
    if (!e)
        return NULL;
    e->c = *config;
    e->ops = calloc(config->slot_count, sizeof *e->ops);
    e->slot_next = calloc(config->slot_count, sizeof *e->slot_next);
    e->slot_op = calloc(config->slot_count, sizeof *e->slot_op);
    if (!e->ops || !e->slot_next || !e->slot_op) {
        gpv_nbd_free(e);
        return NULL;
    }
    for (uint32_t i = 0; i < config->slot_count; i++) {
        e->ops[i].next = e->slot_next[i] = i + 1 < config->slot_count ? i + 1 : NONE;
    }
    e->free_slots = config->slot_count;
    e->finished = e->finished_last = NONE;
    e->spin_ns = config->spin_ns;
    return e;
}

void gpv_nbd_free(struct gpv_nbd *e)
{
    if (e) {
        free(e->ops);
        free(e->slot_next);
        free(e->slot_op);
        free(e);
    }
}

const struct gpv_nbd_counters *gpv_nbd_counters(const struct gpv_nbd *e)
{
    return &e->n;
}

void gpv_nbd_resize(struct gpv_nbd *e, uint64_t capacity)
{
    __atomic_store_n(&e->c.capacity, capacity, __ATOMIC_RELAXED);
}

static int32_t send_all(struct gpv_nbd *e, struct iovec *pieces, size_t number)
{
    struct msghdr message = { .msg_iov = pieces, .msg_iovlen = number };
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(e->c.socket, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return GPV_NBD_ERRNO - errno;
        }
        while (message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

/* Answers everything that is finished, many answers in one system call. */
static int32_t answer(struct gpv_nbd *e)
{
    int32_t answered = 0;
    while (e->finished != NONE) {
        struct iovec pieces[MOST_PIECES];
        uint8_t heads[BATCH][REPLY_BYTES];
        uint32_t ops[BATCH], number = 0, piece = 0;
        while (e->finished != NONE && number < BATCH) {
            struct op *o = &e->ops[e->finished];
            int with_data = o->command == CMD_READ && !o->error;
            uint32_t needed = 1 + (with_data ? slots_for(e, o->length) : 0);
            if (piece && piece + needed > MOST_PIECES)
                break;
            put_be32(heads[number], REPLY_MAGIC);
            put_be32(heads[number] + 4, o->error);
            memcpy(heads[number] + 8, o->handle, sizeof o->handle);
            pieces[piece++] = (struct iovec){ heads[number], REPLY_BYTES };
            if (with_data) {
                uint32_t left = o->length;
                for (uint32_t slot = o->first_slot; left; slot = e->slot_next[slot]) {
                    uint32_t bytes = left < e->c.data_size ? left : e->c.data_size;
                    pieces[piece++] = (struct iovec){ data_of(e, slot), bytes };
                    left -= bytes;
                }
                count(&e->n.bytes_read, o->length);
            }
            ops[number++] = e->finished;
            e->finished = o->next;
        }
        int32_t result = send_all(e, pieces, piece);
        for (uint32_t i = 0; i < number; i++)
            gpv_nbd_release(e, &e->ops[ops[i]]);
        if (result < 0)
            return result;
        answered += (int32_t)number;
    }
    return answered;
}

static int32_t receive_all(struct gpv_nbd *e, uint8_t *to, size_t bytes)
{
    size_t ready = e->have - e->used < bytes ? e->have - e->used : bytes;
    memcpy(to, e->input + e->used, ready);
    e->used += (uint32_t)ready;
    while (ready < bytes) {
        ssize_t got = recv(e->c.socket, to + ready, bytes - ready, MSG_WAITALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return GPV_NBD_ERRNO - errno;
        if (got == 0)
            return GPV_NBD_ERRNO - EPIPE;
        ready += (size_t)got;
    }
    return 0;
}

/* NBD error for a request that is not given to the device, 0 for one that is. */
static uint32_t refuse(const struct gpv_nbd *e, const struct op *o)
{
    uint64_t capacity = __atomic_load_n(&e->c.capacity, __ATOMIC_RELAXED);
    int ranges = o->command == CMD_TRIM || o->command == CMD_WRITE_ZEROES;
    if (o->command == CMD_FLUSH)
        return 0;
    if (o->command > CMD_WRITE_ZEROES || o->command == 5)
        return EINVAL;
    if (o->command != CMD_READ && e->c.read_only)
        return EPERM;
    if ((o->command == CMD_TRIM && !e->c.discard_ranges)
        || (o->command == CMD_WRITE_ZEROES && !e->c.zeroes_ranges))
        return EOPNOTSUPP;
    if (o->offset % e->c.block_size || o->length % e->c.block_size || !o->length
        || (!ranges && slots_for(e, o->length) > e->c.slot_count))
        return EINVAL;
    if (o->offset > capacity || o->length > capacity - o->offset)
        return o->command == CMD_READ ? EINVAL : ENOSPC;
    return 0;
}

static int32_t skip(struct gpv_nbd *e, uint32_t bytes)
{
    uint8_t waste[4096];
    while (bytes) {
        uint32_t part = bytes < sizeof waste ? bytes : sizeof waste;
        int32_t result = receive_all(e, waste, part);
        if (result < 0)
            return result;
        bytes -= part;
    }
    return 0;
}

static int32_t transfer(struct gpv_nbd *e, struct op *o)
{
    uint64_t offset = o->offset;
    uint32_t left = o->length;
    int32_t added = 0;
    for (uint32_t slot = o->first_slot; left; slot = e->slot_next[slot]) {
        uint32_t bytes = left < e->c.data_size ? left : e->c.data_size;
        if (o->command == CMD_WRITE) {
            int32_t result = receive_all(e, data_of(e, slot), bytes);
            if (result < 0)
                return result;
        }
        /* All data comes in, also where the queue is broken: it may be given to another one. */
        if (added == 0)
            added = gpv_nbd_add(e, o, slot, o->command == CMD_WRITE ? T_OUT : T_IN, offset / SECTOR, bytes);
        offset += bytes;
        left -= bytes;
    }
    return added;
}

static int32_t flush(struct gpv_nbd *e, struct op *o)
{
    if (e->c.volatile_cache)
        return gpv_nbd_add(e, o, o->first_slot, T_FLUSH, 0, 0);
    gpv_nbd_finish(e, o);
    return 0;
}

/* Begins the request whose header is next in the input. 1: done; 0: no room, or it was the end; or a negative code. */
static int32_t begin(struct gpv_nbd *e)
{
    const uint8_t *head = e->input + e->used;
    if (get_be(head, 4) != REQUEST_MAGIC)
        return GPV_NBD_PROTOCOL;
    struct op asked = {
        .flags = (uint16_t)get_be(head + 4, 2),
        .command = (uint16_t)get_be(head + 6, 2),
        .offset = get_be(head + 16, 8),
        .length = (uint32_t)get_be(head + 24, 4),
        .first_slot = NONE,
    };
    memcpy(asked.handle, head + 8, sizeof asked.handle);
    if (asked.command == CMD_DISC) {
        e->ending = 1;
        return 0;
    }
    asked.error = refuse(e, &asked);
    int data = asked.command == CMD_READ || asked.command == CMD_WRITE;
    uint32_t slots = asked.error ? 0 : data ? slots_for(e, asked.length) : 1;
    if (e->free_op == NONE || e->free_slots < slots) {
        e->blocked = 1;
        return 0;
    }
    e->used += REQUEST_BYTES;
    uint32_t op = e->free_op;
    struct op *o = &e->ops[op];
    e->free_op = o->next;
    *o = asked;
    if (o->error) {
        int32_t result = o->command == CMD_WRITE ? skip(e, o->length) : 0;
        gpv_nbd_finish(e, o);
        return result < 0 ? result : 1;
    }
    gpv_nbd_take_slots(e, op, slots);
    o->busy = 1;
    e->busy++;
    int32_t result = 0;
    switch (o->command) {
    case CMD_READ:
        count(&e->n.reads, 1);
        result = transfer(e, o);
        break;
    case CMD_WRITE:
        count(&e->n.writes, 1);
        count(&e->n.bytes_written, o->length);
        result = transfer(e, o);
        break;
    case CMD_FLUSH:
        count(&e->n.flushes, 1);
        result = flush(e, o);
        break;
    default:
        count(o->command == CMD_TRIM ? &e->n.discards : &e->n.zeroes, 1);
        o->rest = o->length;
        result = gpv_nbd_add_ranges(e, o);
    }
    return result < 0 ? result : 1;
}

/* Takes in what the client asks for. Returns how many requests, or a negative code. */
static int32_t receive(struct gpv_nbd *e)
{
    int32_t begun = 0;
    while (!e->ending && !e->blocked && begun < BATCH) {
        if (e->have - e->used < REQUEST_BYTES) {
            memmove(e->input, e->input + e->used, e->have - e->used);
            e->have -= e->used;
            e->used = 0;
            ssize_t got = recv(e->c.socket, e->input + e->have, INPUT - e->have, MSG_DONTWAIT);
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0 && errno == EAGAIN)
                break;
            if (got < 0 && errno != ECONNRESET)
                return GPV_NBD_ERRNO - errno;
            if (got <= 0) {
                e->ending = 1;
                break;
            }
            e->have += (uint32_t)got;
            continue;
        }
        int32_t result = begin(e);
        if (result < 0)
            return result;
        begun += result;
    }
    return begun;
}

static int32_t publish(struct gpv_nbd *e)
{
    e->added = 0;
    e->urgent = 0;
    int32_t result = gpv_publish(e->c.queue);
    return result < 0 ? result : 0;
}

static int32_t serve(struct gpv_nbd *e)
{
    for (;;) {
        if (__atomic_load_n(&e->paused, __ATOMIC_ACQUIRE))
            return GPV_NBD_PAUSED;
        int32_t back = gpv_nbd_reap(e);
        if (back < 0)
            return back;
        int32_t begun = receive(e);
        if (begun < 0)
            return begun;
        int more = gpv_nbd_gather(e);
        if (e->added && !more) {
            int32_t result = publish(e);
            if (result < 0)
                return result;
        }
        /* Answers go out while the device already has the next requests. */
        int32_t answered = answer(e);
        if (answered < 0)
            return answered;
        if (e->ending && !e->busy)
            return 0;
        if (back || begun || answered)
            continue;
        int32_t result = gpv_nbd_wait(e, more);
        if (result < 0)
            return result;
    }
}

/* One more time from its beginning. Writes have their data in their slots; which of its parts were done does not matter,
 * as none of it was acknowledged. */
static int32_t again(struct gpv_nbd *e, struct op *o)
{
    const uint64_t offset = o->offset;
    uint32_t left = o->length;
    int32_t result = 0;
    o->outstanding = 0;
    o->error = 0;
    o->flushing = 0;
    switch (o->command) {
    case CMD_READ:
    case CMD_WRITE:
        for (uint32_t slot = o->first_slot, done = 0; left && result == 0; slot = e->slot_next[slot]) {
            uint32_t bytes = left < e->c.data_size ? left : e->c.data_size;
            result = gpv_nbd_add(e, o, slot, o->command == CMD_WRITE ? T_OUT : T_IN, (offset + done) / SECTOR, bytes);
            done += bytes;
            left -= bytes;
        }
        return result;
    case CMD_FLUSH:
        return flush(e, o);
    default:
        o->offset -= o->length - o->rest;
        o->rest = o->length;
        return gpv_nbd_add_ranges(e, o);
    }
}

static int32_t all_again(struct gpv_nbd *e)
{
    int32_t result = 0;
    e->rebound = 0;
    for (uint32_t i = 0; i < e->c.slot_count && result == 0; i++) {
        if (e->ops[i].busy) {
            count(&e->n.resubmitted, 1);
            result = again(e, &e->ops[i]);
        }
    }
    return result == 0 && e->added ? publish(e) : result;
}

void gpv_nbd_pause(struct gpv_nbd *e)
{
    __atomic_store_n(&e->paused, 1, __ATOMIC_RELEASE);
}

void gpv_nbd_rebind(struct gpv_nbd *e, const struct gpv_nbd_config *config)
{
    const struct gpv_nbd_config old = e->c;
    e->c = *config;
    e->c.socket = old.socket;
    e->c.stop_fd = old.stop_fd;
    e->c.slot_count = old.slot_count;
    e->c.data = old.data;
    e->c.data_size = old.data_size;
    e->added = 0;
    e->urgent = 0;
    e->rebound = 1;
    __atomic_store_n(&e->paused, 0, __ATOMIC_RELEASE);
}

void gpv_nbd_give_up(struct gpv_nbd *e)
{
    for (uint32_t i = 0; i < e->c.slot_count; i++) {
        if (e->ops[i].busy) {
            e->ops[i].error = EIO;
            gpv_nbd_finish(e, &e->ops[i]);
        }
    }
    answer(e);
}

int32_t gpv_nbd_run(struct gpv_nbd *e)
{
    gpv_queue_own(e->c.queue);
    gpv_disarm(e->c.queue);
    int32_t result = e->rebound ? all_again(e) : 0;
    if (result == 0)
        result = serve(e);
    if (result == GPV_NBD_PAUSED || (result < 0 && result > GPV_NBD_ERRNO && e->c.keep))
        return result;
    /* Whatever became of it, nobody may wait for it for ever, nor take it for done. */
    if (result < 0)
        gpv_nbd_give_up(e);
    return result;
}
