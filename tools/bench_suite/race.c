#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "again.h"
#include "barrier.h"
#include "queue.h"

#include "race.cdef.h"

enum { MOST = 1024, DEEPEST = 256, BURST = 32, HEADER = 16, NET_HEADER = 12, PATIENCE = 2000000000 };

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* How long to leave a device alone that has much to do: each look at its ring takes a cache line away from it. */
struct moderation {
    uint32_t want;  /* completions that are worth a look */
    uint32_t pause; /* turns of the spin before it */
    uint32_t most;  /* of them: some microseconds for a driver that means to sleep */
};

static void let_work(const struct moderation *m)
{
    uint32_t i;

    for (i = 0; i < m->pause; i++)
        GPV_RELAX();
}

static void learn(struct moderation *m, uint32_t got)
{
    if (got < m->want)
        m->pause += m->pause < m->most ? 1 + m->pause / 8 : 0;
    else if (got > m->want + m->want / 2)
        m->pause -= m->pause ? 1 + m->pause / 8 : 0;
}

/* Returns how many came back, 0: nothing for too long, or a gpv_error. */
static int32_t reap_blk(struct race_blk *r, uint32_t *ids, uint32_t *lengths, uint64_t *cookies)
{
    uint32_t looks = 0;
    int64_t start = 0;

    for (;;) {
        int32_t got = gpv_reap(r->queue, ids, lengths, cookies, DEEPEST);

        if (got)
            return got;
        if (r->fd >= 0) {
            got = gpv_wait(r->queue, r->fd, PATIENCE, 0);
            if (got <= 0)
                return got;
            gpv_disarm(r->queue);
            continue;
        }
        GPV_RELAX();
        if (++looks % 65536 == 0) {
            if (!start)
                start = now_ns();
            else if (now_ns() - start > PATIENCE)
                return 0;
        }
    }
}

int32_t race_blk_run(struct race_blk *r)
{
    struct gpv_segment segments[DEEPEST][3];
    uint32_t ids[DEEPEST], lengths[DEEPEST], idle[DEEPEST], back[DEEPEST], i, n;
    uint64_t cookies[DEEPEST], seed = 88172645463325252u;
    int64_t begin[DEEPEST], start, now;
    struct moderation m = {r->depth >= 16 ? r->depth / 2 : 0, 0, r->fd < 0 ? 1 << 16 : 512};
    int32_t got = 0, fresh = 1;

    for (n = 0; n < r->depth; n++) {
        segments[n][0] = (struct gpv_segment){r->headers_bus + HEADER * n, HEADER};
        segments[n][1] = (struct gpv_segment){r->data_bus + (uint64_t)r->nbytes * n, r->nbytes};
        segments[n][2] = (struct gpv_segment){r->statuses_bus + n, 1};
        memset(r->headers + HEADER * n, 0, HEADER);
        idle[n] = n;
    }
    gpv_disarm(r->queue);
    start = now = now_ns();
    while (now - start < r->run_ns) {
        for (i = 0; i < n; i++) {
            const uint32_t slot = idle[i];
            const uint64_t sector = random_next(&seed) % r->blocks * (r->nbytes / 512);
            int32_t id;

            /* type 0 is a read; little-endian machines only */
            memcpy(r->headers + HEADER * slot + 8, &sector, sizeof sector);
            begin[slot] = now;
            id = fresh ? GPV_ECHAIN : gpv_again(r->queue, back[i], slot);
            if (id == GPV_ECHAIN)
                id = gpv_add(r->queue, segments[slot], 1, 2, slot);
            if (id < 0)
                return id;
        }
        fresh = 0;
        got = gpv_publish(r->queue);
        if (got < 0)
            return got;
        let_work(&m);
        got = reap_blk(r, ids, lengths, cookies);
        if (got <= 0)
            return got ? got : 1;
        n = (uint32_t)got;
        learn(&m, n);
        now = now_ns();
        for (i = 0; i < n; i++) {
            const uint32_t slot = (uint32_t)cookies[i];
            const uint64_t latency = (uint64_t)(now - begin[slot]);

            r->failed += r->statuses[slot] != 0 || lengths[i] != r->nbytes + 1;
            r->total_ns += latency;
            r->worst_ns = latency > r->worst_ns ? latency : r->worst_ns;
            idle[n - 1 - i] = slot; /* the last one back is the first that can go again */
            back[n - 1 - i] = ids[i];
        }
        r->done += n;
        r->reaps++;
    }
    r->spent_ns = now - start;
    while (gpv_outstanding(r->queue)) {
        got = reap_blk(r, ids, lengths, cookies);
        if (got <= 0)
            return got ? got : 1;
    }
    return 0;
}

struct batch {
    uint64_t addresses[BURST], cookies[BURST];
    uint32_t lengths[BURST];
};

static int32_t give(struct gpv_queue *q, const struct batch *b, uint32_t count, uint32_t writable)
{
    int32_t added = gpv_add_burst(q, b->addresses, b->lengths, count, 1, writable ? 0 : 1, b->cookies, 0);

    if (added < 0)
        return added;
    if (added != (int32_t)count)
        return GPV_EFULL;
    return gpv_publish(q);
}

int32_t race_net_send(struct race_net *r)
{
    struct batch b;
    uint64_t cookies[BURST];
    uint32_t idle[MOST], free = 0, i, n, round;
    const int64_t start = now_ns();
    int32_t got;

    for (i = r->buffers; i-- > 0;)
        idle[free++] = i;
    gpv_disarm(r->queue);
    for (round = 0;; round++) {
        if (round % 64 == 0) {
            r->spent_ns = now_ns() - start;
            if (r->spent_ns >= r->run_ns)
                break;
        }
        if (free < BURST) {
            got = gpv_reap(r->queue, 0, 0, cookies, BURST);
            if (got < 0)
                return got;
            for (i = 0; i < (uint32_t)got; i++)
                idle[free++] = (uint32_t)cookies[i];
            r->done += (uint32_t)got;
            r->reaps += got > 0;
            if (free < BURST) {
                GPV_RELAX();
                continue;
            }
        }
        for (n = 0; n < BURST; n++) {
            const uint32_t buffer = idle[--free];
            uint8_t *memory = r->memory + (size_t)r->stride * buffer;

            memset(memory, 0, NET_HEADER);
            memcpy(memory + NET_HEADER, r->head, r->head_length);
            b.addresses[n] = r->bus + (uint64_t)r->stride * buffer;
            b.lengths[n] = NET_HEADER + r->length;
            b.cookies[n] = buffer;
        }
        got = give(r->queue, &b, n, 0);
        if (got < 0)
            return got;
    }
    while (gpv_outstanding(r->queue) && now_ns() - start < r->run_ns + PATIENCE) {
        got = gpv_reap(r->queue, 0, 0, cookies, BURST);
        if (got < 0)
            return got;
        r->done += (uint32_t)got;
    }
    r->bytes = r->done * r->length;
    return gpv_outstanding(r->queue) != 0;
}

int32_t race_net_receive(struct race_net *r)
{
    struct batch b;
    uint64_t cookies[BURST];
    uint32_t lengths[BURST], i, n, round;
    const int64_t start = now_ns();
    int32_t got;

    gpv_disarm(r->queue);
    for (i = 0; i < r->buffers; i += n) {
        for (n = 0; n < BURST && i + n < r->buffers; n++) {
            b.addresses[n] = r->bus + (uint64_t)r->stride * (i + n);
            b.lengths[n] = r->stride;
            b.cookies[n] = i + n;
        }
        got = give(r->queue, &b, n, 1);
        if (got < 0)
            return got;
    }
    for (round = 0;; round++) {
        if (round % 64 == 0) {
            r->spent_ns = now_ns() - start;
            if (r->spent_ns >= r->run_ns)
                return 0;
        }
        got = gpv_reap(r->queue, 0, lengths, cookies, BURST);
        if (got < 0)
            return got;
        if (got == 0) {
            GPV_RELAX();
            continue;
        }
        for (i = 0; i < (uint32_t)got; i++) {
            const uint8_t *memory = r->memory + (size_t)r->stride * cookies[i];
            uint16_t num_buffers;

            memcpy(&num_buffers, memory + 10, sizeof num_buffers);
            r->failed += num_buffers > 1 || lengths[i] != NET_HEADER + r->length;
            r->bytes += lengths[i] - NET_HEADER;
            b.addresses[i] = r->bus + (uint64_t)r->stride * cookies[i];
            b.lengths[i] = r->stride;
            b.cookies[i] = cookies[i];
        }
        r->done += (uint32_t)got;
        r->reaps++;
        got = give(r->queue, &b, (uint32_t)got, 1);
        if (got < 0)
            return got;
    }
}

struct ball {
    uint32_t turn; /* even: here, odd: there */
    uint32_t rounds;
    int32_t cpu;
};

static void pass(struct ball *b, uint32_t side)
{
    uint32_t i;

    for (i = side; i < 2 * b->rounds; i += 2) {
        while (__atomic_load_n(&b->turn, __ATOMIC_ACQUIRE) != i)
            GPV_RELAX();
        __atomic_store_n(&b->turn, i + 1, __ATOMIC_RELEASE);
    }
}

static void *other_side(void *user)
{
    struct ball *b = user;
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET((unsigned)b->cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
    pass(b, 1);
    return NULL;
}

double race_distance(int32_t there, uint32_t rounds)
{
    struct ball b = {0, rounds, there};
    pthread_t thread;
    int64_t start;

    if (pthread_create(&thread, NULL, other_side, &b))
        return -1;
    start = now_ns();
    pass(&b, 0);
    pthread_join(thread, NULL);
    return (double)(now_ns() - start) / rounds;
}
