/* The core without Python: for other architectures, for sanitizers, and for more turns than Python has time for.
 *
 *   ring_test walk SEED BUFFERS    random buffers there and back under random options, each checked
 *   ring_test threads BUFFERS      driver and device in two threads that sleep on eventfds, under each set of options
 *   ring_test fuzz SEED WRITES     a device that writes anything anywhere in its reach, WRITES times
 *
 * Exit status 0: all held. The device half is written from sections 2.7 to 2.9. */
#define _GNU_SOURCE
#include "ring.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define CHECK(what)                                                                     \
    do {                                                                                \
        if (!(what)) {                                                                  \
            fprintf(stderr, "%s:%d: %s [%s]\n", __FILE__, __LINE__, #what, situation);  \
            abort();                                                                    \
        }                                                                               \
    } while (0)

enum {
    MAX_SIZE = 300,
    MAX_ELEMENTS = 9,
    TABLE_ENTRIES = 4,
    TABLES = 16,
    BUS = 0x100000, /* tables are elsewhere on the bus than in memory */
    NEXT = 1,
    WRITE = 2,
    INDIRECT = 4,
    AVAIL = 0x80,
    USED = 0x8000
};

static char situation[200];
static uint64_t state;

static uint32_t rnd(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((state >> 33) % below);
}

struct split_desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct packed_desc { uint64_t addr; uint32_t len; uint16_t id, flags; };

struct chain {
    uint32_t id, count, elements, writable;
    uint64_t first;
};

struct rig {
    uint32_t options, size;
    uint8_t *desc, *driver, *device, *tables; /* of exactly the standard's sizes, so that a sanitizer guards their ends */
    size_t desc_size, driver_size, device_size;
    struct gpv_queue *q;
    int kick_fd, interrupt_fd;
    /* the device's own state */
    uint16_t avail_at, used_at, avail_wrap, used_wrap;
};

static int has(const struct rig *r, uint32_t option)
{
    return !!(r->options & option);
}

static void build(struct rig *r, uint32_t options, uint32_t size, int32_t kick)
{
    struct gpv_queue_config c;

    memset(r, 0, sizeof *r);
    r->options = options;
    r->size = size;
    r->desc_size = 16 * (size_t)size;
    r->driver_size = has(r, GPV_PACKED) ? 4 : 6 + 2 * (size_t)size;
    r->device_size = has(r, GPV_PACKED) ? 4 : 6 + 8 * (size_t)size;
    r->desc = malloc(r->desc_size);
    r->driver = malloc(r->driver_size);
    r->device = malloc(r->device_size);
    r->tables = malloc(TABLES * TABLE_ENTRIES * 16);
    memset(r->desc, 0xa5, r->desc_size);
    memset(r->driver, 0xa5, r->driver_size);
    memset(r->device, 0xa5, r->device_size);
    memset(&c, 0, sizeof c);
    c.size = size;
    c.options = options;
    c.desc = r->desc;
    c.driver = r->driver;
    c.device = r->device;
    c.tables = r->tables;
    c.tables_bus = BUS;
    c.table_entries = size < TABLE_ENTRIES ? size : TABLE_ENTRIES;
    c.table_count = size < TABLES ? size : TABLES;
    c.kick.kind = kick;
    c.kick.fd = r->kick_fd = eventfd(0, EFD_NONBLOCK);
    r->interrupt_fd = eventfd(0, EFD_NONBLOCK);
    r->q = gpv_queue_new(&c);
    CHECK(r->q);
    r->avail_wrap = r->used_wrap = 1;
}

static void tear_down(struct rig *r)
{
    gpv_queue_free(r->q);
    close(r->kick_fd);
    close(r->interrupt_fd);
    free(r->tables);
    free(r->device);
    free(r->driver);
    free(r->desc);
}

/* The honest device. */

static uint16_t word(const uint8_t *area, size_t offset)
{
    return __atomic_load_n((const uint16_t *)(area + offset), __ATOMIC_RELAXED);
}

static void put(uint8_t *area, size_t offset, uint16_t value)
{
    __atomic_store_n((uint16_t *)(area + offset), value, __ATOMIC_RELAXED);
}

static void element(struct chain *c, uint64_t addr, uint32_t len, uint16_t flags)
{
    if (c->elements == 0)
        c->first = addr;
    CHECK(addr == c->first + c->elements);
    c->elements++;
    if (flags & WRITE)
        c->writable += len;
    else
        CHECK(c->writable == 0);
}

static const void *table_at(const struct rig *r, uint64_t addr, uint32_t len)
{
    CHECK(addr >= BUS && addr + len <= BUS + TABLES * TABLE_ENTRIES * 16 && len % 16 == 0);
    return r->tables + (addr - BUS);
}

static int take_split(struct rig *r, struct chain *c)
{
    const struct split_desc *desc = (const void *)r->desc;
    uint32_t i, j;

    if (__atomic_load_n((uint16_t *)(r->driver + 2), __ATOMIC_ACQUIRE) == r->avail_at)
        return 0;
    c->id = i = word(r->driver, 4 + 2 * (r->avail_at % r->size));
    r->avail_at++;
    for (;; i = desc[i].next) {
        CHECK(i < r->size && ++c->count <= r->size);
        if (desc[i].flags & INDIRECT) {
            const struct split_desc *t = table_at(r, desc[i].addr, desc[i].len);

            CHECK(has(r, GPV_INDIRECT) && !(desc[i].flags & NEXT));
            for (j = 0;; j = t[j].next) {
                CHECK(j < desc[i].len / 16);
                element(c, t[j].addr, t[j].len, t[j].flags);
                if (!(t[j].flags & NEXT))
                    return 1;
            }
        }
        element(c, desc[i].addr, desc[i].len, desc[i].flags);
        if (!(desc[i].flags & NEXT))
            return 1;
        CHECK(!has(r, GPV_IN_ORDER) || desc[i].next == (i + 1) % r->size);
    }
}

static int take_packed(struct rig *r, struct chain *c)
{
    const struct packed_desc *desc = (const void *)r->desc, *d;
    uint16_t flags;
    uint32_t j;

    for (;;) {
        d = &desc[r->avail_at];
        flags = __atomic_load_n(&d->flags, __ATOMIC_ACQUIRE);
        if (!!(flags & AVAIL) != r->avail_wrap || !!(flags & USED) == r->avail_wrap) {
            CHECK(c->count == 0);
            return 0;
        }
        CHECK(++c->count <= r->size);
        if (++r->avail_at == r->size) {
            r->avail_at = 0;
            r->avail_wrap ^= 1;
        }
        if (flags & INDIRECT) {
            const struct packed_desc *t = table_at(r, d->addr, d->len);

            CHECK(has(r, GPV_INDIRECT) && !(flags & NEXT) && c->count == 1);
            for (j = 0; j < d->len / 16; j++)
                element(c, t[j].addr, t[j].len, t[j].flags);
        } else {
            element(c, d->addr, d->len, flags);
        }
        if (!(flags & NEXT)) {
            c->id = d->id;
            return 1;
        }
    }
}

static int take(struct rig *r, struct chain *c)
{
    memset(c, 0, sizeof *c);
    return has(r, GPV_PACKED) ? take_packed(r, c) : take_split(r, c);
}

/* Uses `buffers` buffers of `descriptors` descriptors in all with one entry. Returns whether to interrupt. */
static int use(struct rig *r, uint32_t id, uint32_t len, uint32_t buffers, uint32_t descriptors)
{
    struct packed_desc *desc = (void *)r->desc;
    uint32_t at = r->used_at, wrap = r->used_wrap, i;
    uint16_t flags, event;

    if (!has(r, GPV_PACKED)) {
        *(uint32_t *)(r->device + 4 + 8 * (at % r->size)) = id;
        *(uint32_t *)(r->device + 8 + 8 * (at % r->size)) = len;
        r->used_at = (uint16_t)(at + buffers);
        __atomic_store_n((uint16_t *)(r->device + 2), r->used_at, __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (!has(r, GPV_EVENT_IDX))
            return !word(r->driver, 0);
        event = word(r->driver, 4 + 2 * (size_t)r->size);
        return (uint16_t)(r->used_at - event - 1) < buffers;
    }
    desc[at].id = (uint16_t)id;
    desc[at].len = len ? len : UINT32_MAX; /* reserved without WRITE (2.8.5) */
    __atomic_store_n(&desc[at].flags, (uint16_t)((wrap ? AVAIL | USED : 0) | (len ? WRITE : 0)), __ATOMIC_RELEASE);
    r->used_at = (uint16_t)((at + descriptors) % r->size);
    r->used_wrap ^= at + descriptors >= r->size;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    flags = word(r->driver, 2);
    event = word(r->driver, 0);
    if (flags != 2)
        return flags == 0;
    CHECK(has(r, GPV_EVENT_IDX));
    for (i = 0; i < descriptors; i++)
        if ((event & 0x7fff) == (at + i) % r->size && event >> 15 == (at + i < r->size ? wrap : !wrap))
            return 1;
    return 0;
}

static void want_kicks(struct rig *r, int wanted)
{
    if (has(r, GPV_PACKED)) {
        if (wanted && has(r, GPV_EVENT_IDX)) {
            put(r->device, 0, (uint16_t)(r->avail_at | r->avail_wrap << 15));
            __atomic_store_n((uint16_t *)(r->device + 2), 2, __ATOMIC_RELEASE);
        } else {
            put(r->device, 2, (uint16_t)!wanted);
        }
    } else if (has(r, GPV_EVENT_IDX)) {
        put(r->device, 4 + 8 * (size_t)r->size, (uint16_t)(r->avail_at - !wanted));
    } else {
        put(r->device, 0, (uint16_t)!wanted);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* The driver's book: what is out, by id. */
struct book {
    uint8_t out[MAX_SIZE], published[MAX_SIZE];
    uint32_t elements[MAX_SIZE], writable[MAX_SIZE], length[MAX_SIZE];
    uint64_t first[MAX_SIZE], cookie[MAX_SIZE];
};

/* Adds one random buffer; element n lies at first + n. Returns whether it found room. */
static int add_one(struct rig *r, struct book *b, uint64_t serial)
{
    struct gpv_segment segments[MAX_ELEMENTS];
    uint32_t limit = r->size < MAX_ELEMENTS ? r->size : MAX_ELEMENTS, n = 1 + rnd(limit), readable = rnd(n + 1), i;
    uint32_t before = gpv_free_slots(r->q);
    int32_t id;

    for (i = 0; i < n; i++) {
        segments[i].address = (serial << 8) + i;
        segments[i].length = 1 + rnd(100);
    }
    id = gpv_add(r->q, segments, readable, n - readable, serial);
    if (id == GPV_EBROKEN)
        return 0;
    if (id == GPV_EFULL) {
        CHECK(before < n);
        return 0;
    }
    CHECK(id >= 0 && (uint32_t)id < r->size && !b->out[id]);
    b->out[id] = 1;
    b->published[id] = 0;
    b->elements[id] = n;
    b->first[id] = serial << 8;
    b->cookie[id] = serial;
    b->writable[id] = 0;
    for (i = readable; i < n; i++)
        b->writable[id] += segments[i].length;
    return 1;
}

/* Adds up to `wanted` buffers of one element in one call. Returns how many found room. */
static uint32_t add_burst(struct rig *r, struct book *b, uint64_t serial, uint32_t wanted)
{
    uint64_t addresses[MAX_SIZE];
    uint32_t lengths[MAX_SIZE], ids[MAX_SIZE], before = gpv_free_slots(r->q), readable = rnd(2), i;
    int32_t n;

    wanted = wanted < 256 ? wanted : 256;
    for (i = 0; i < wanted; i++) {
        addresses[i] = (serial << 8) + i;
        lengths[i] = 1 + rnd(100);
    }
    n = gpv_add_burst(r->q, addresses, lengths, wanted, 1, readable, NULL, ids);
    CHECK(n >= 0 && (uint32_t)n == (wanted < before ? wanted : before));
    for (i = 0; i < (uint32_t)n; i++) {
        CHECK(ids[i] < r->size && !b->out[ids[i]]);
        b->out[ids[i]] = 1;
        b->published[ids[i]] = 0;
        b->elements[ids[i]] = 1;
        b->first[ids[i]] = addresses[i];
        b->cookie[ids[i]] = 0;
        b->writable[ids[i]] = readable ? 0 : lengths[i];
    }
    return (uint32_t)n;
}

static void check_taken(const struct book *b, const struct chain *c)
{
    CHECK(c->id < MAX_SIZE && b->out[c->id] && b->published[c->id]);
    CHECK(c->elements == b->elements[c->id] && c->first == b->first[c->id] && c->writable == b->writable[c->id]);
}

/* Reaps up to `max`; each has to be out, with the length that the device gave it. Returns how many. */
static uint32_t reap(struct rig *r, struct book *b, uint32_t max)
{
    uint32_t ids[MAX_SIZE], lengths[MAX_SIZE], i;
    uint64_t cookies[MAX_SIZE];
    int32_t n = gpv_reap(r->q, ids, lengths, cookies, max);

    CHECK(n >= 0);
    for (i = 0; i < (uint32_t)n; i++) {
        CHECK(ids[i] < r->size && b->out[ids[i]] && lengths[i] == b->length[ids[i]] && cookies[i] == b->cookie[ids[i]]);
        b->out[ids[i]] = 0;
    }
    return (uint32_t)n;
}

static uint32_t random_size(uint32_t options)
{
    return options & GPV_PACKED ? 1 + rnd(MAX_SIZE) : 1u << rnd(9);
}

static void walk(uint64_t buffers)
{
    static const uint32_t sets = 64;
    uint64_t per_set = buffers / sets;
    uint32_t options, size, i;

    for (options = 0; options < sets; options++) {
        struct chain held[MAX_SIZE];
        struct book b;
        struct rig r;
        uint64_t serial = 1, back = 0, sent = 0;
        uint32_t holding = 0;
        int device_asleep = 0, driver_asleep = 0;
        uint64_t kicks;

        size = random_size(options);
        snprintf(situation, sizeof situation, "walk options %u size %u", options, size);
        memset(&b, 0, sizeof b);
        build(&r, options, size, GPV_KICK_NONE);
        while (back < per_set) {
            uint32_t fresh = 0, n;

            if (rnd(3) == 0)
                fresh = add_burst(&r, &b, serial++, rnd(size + 2));
            for (n = rnd(size + 2); n > 0 && add_one(&r, &b, serial); n--, serial++)
                fresh++;
            if (rnd(3) == 0)
                fresh += add_burst(&r, &b, serial++, rnd(size + 2));
            while (rnd(2) && take(&r, &held[holding]))
                check_taken(&b, &held[holding++]);
            kicks = gpv_kicks(r.q);
            CHECK(gpv_publish(r.q) >= 0);
            memset(b.published, 1, sizeof b.published);
            CHECK(gpv_kicks(r.q) - kicks <= 1 && (fresh || gpv_kicks(r.q) == kicks));
            if (fresh && device_asleep) {
                CHECK(gpv_kicks(r.q) == kicks + 1); /* or the kick was lost */
                device_asleep = 0;
            }
            sent += fresh;
            for (n = rnd(size + 2); n > 0 && take(&r, &held[holding]); n--)
                check_taken(&b, &held[holding++]);
            if (rnd(3) == 0) {
                want_kicks(&r, 1);
                device_asleep = !take(&r, &held[holding]);
                if (!device_asleep)
                    check_taken(&b, &held[holding++]);
            } else if (rnd(3) == 0) {
                want_kicks(&r, 0);
                device_asleep = 0;
            }
            for (n = rnd(holding + 1); n > 0 && holding > 0;) {
                uint32_t which = has(&r, GPV_IN_ORDER) ? 0 : rnd(holding), batch = 1, taken, last;
                int interrupt;

                if (has(&r, GPV_IN_ORDER))
                    batch = 1 + rnd(n);
                for (i = taken = 0; i < batch; i++) {
                    taken += held[which + i].count;
                    b.length[held[which + i].id] = held[which + i].writable;
                }
                last = which + batch - 1;
                b.length[held[last].id] = rnd(held[last].writable + 1);
                interrupt = use(&r, held[last].id, b.length[held[last].id], batch, taken);
                CHECK(!driver_asleep || interrupt); /* or it was lost */
                driver_asleep = 0;
                memmove(&held[which], &held[which + batch], (holding - which - batch) * sizeof *held);
                holding -= batch;
                n -= batch;
            }
            n = reap(&r, &b, rnd(4) ? MAX_SIZE : 1 + rnd(size));
            back += n;
            driver_asleep = driver_asleep && !n;
            if (rnd(3) == 0) {
                driver_asleep = !gpv_arm(r.q);
            } else if (rnd(3) == 0) {
                gpv_disarm(r.q);
                driver_asleep = 0;
            }
            CHECK(gpv_outstanding(r.q) == sent - back);
            CHECK(gpv_free_slots(r.q) <= size - gpv_outstanding(r.q));
        }
        tear_down(&r);
    }
}

/* Two threads. */

struct party {
    struct rig *r;
    uint64_t buffers;
};

static void sleep_on(int fd)
{
    struct pollfd entry = {fd, POLLIN, 0};
    uint64_t count;

    CHECK(poll(&entry, 1, 20000) == 1); /* or the wake-up was lost */
    CHECK(read(fd, &count, sizeof count) == sizeof count);
}

static void *device_thread(void *argument)
{
    static const uint64_t one = 1;
    struct party *p = argument;
    struct rig *r = p->r;
    struct chain c;
    uint64_t done;

    for (done = 0; done < p->buffers; done++) {
        want_kicks(r, 0);
        while (!take(r, &c)) {
            want_kicks(r, 1);
            if (take(r, &c))
                break;
            sleep_on(r->kick_fd);
            want_kicks(r, 0);
        }
        CHECK(c.elements == 2 && c.writable == 50);
        /* The driver put a number into the first address; the used length answers it. */
        if (use(r, c.id, (uint32_t)(c.first >> 8) % 50, 1, c.count))
            CHECK(write(r->interrupt_fd, &one, sizeof one) == sizeof one);
    }
    return NULL;
}

static void threads(uint64_t buffers)
{
    uint32_t options;

    for (options = 0; options < 64; options++) {
        struct rig r;
        struct party p = {&r, buffers};
        uint64_t sent = 0, back = 0;
        pthread_t thread;

        build(&r, options, options & GPV_PACKED ? 7 : 8, GPV_KICK_EVENTFD);
        snprintf(situation, sizeof situation, "threads options %u", options);
        pthread_create(&thread, NULL, device_thread, &p);
        while (back < buffers) {
            uint32_t ids[8], lengths[8];
            uint64_t cookies[8];
            int32_t n, i;

            for (i = 1 + (int32_t)(sent % 3); i > 0 && sent < buffers; i--) {
                struct gpv_segment segments[2] = {{sent << 8, 10}, {(sent << 8) + 1, 50}};

                if (gpv_add(r.q, segments, 1, 1, sent) < 0)
                    break;
                sent++;
            }
            CHECK(gpv_publish(r.q) >= 0);
            n = gpv_reap(r.q, ids, lengths, cookies, 8);
            CHECK(n >= 0);
            for (i = 0; i < n; i++)
                CHECK(lengths[i] == cookies[i] % 50);
            back += (uint64_t)n;
            if (n == 0 && (sent == buffers || gpv_free_slots(r.q) < 2)) {
                do
                    n = gpv_wait(r.q, r.interrupt_fd, 20000000000, options & GPV_EVENT_IDX ? 0 : 1000);
                while (n == GPV_WOKEN);
                CHECK(n == 1); /* or the wake-up was lost */
                gpv_disarm(r.q);
            }
        }
        pthread_join(thread, NULL);
        CHECK(gpv_outstanding(r.q) == 0);
        tear_down(&r);
    }
}

/* A device that lies. */

static void scribble(struct rig *r)
{
    uint8_t *areas[] = {r->desc, r->driver, r->device, r->tables};
    size_t sizes[] = {r->desc_size, r->driver_size, r->device_size, TABLES * TABLE_ENTRIES * 16};
    uint32_t which = rnd(4), i;
    size_t at = rnd((uint32_t)sizes[which]);

    switch (rnd(8)) {
    case 0: /* any byte */
        areas[which][at] = (uint8_t)rnd(256);
        return;
    case 1: /* a run of them */
        for (i = rnd(24); i > 0 && at < sizes[which]; i--)
            areas[which][at++] = (uint8_t)(rnd(2) ? rnd(256) : 0xff);
        return;
    case 2: /* suppression words */
        put(r->device, rnd(2) ? 0 : r->device_size - 2, (uint16_t)(rnd(2) ? rnd(4) : rnd(0x10000)));
        return;
    default: /* nearly honest used entries */
        break;
    }
    if (has(r, GPV_PACKED)) {
        struct packed_desc *d = (void *)(r->desc + 16 * (rnd(4) ? r->q->u.ring.next_used.offset : rnd(r->size)));

        d->id = (uint16_t)rnd(r->size + 1);
        d->len = rnd(rnd(2) ? 4 : 100);
        d->flags = (uint16_t)((rnd(2) ? AVAIL : 0) | (rnd(2) ? USED : 0) | (rnd(2) ? WRITE : 0));
    } else {
        uint32_t slot = (uint32_t)(rnd(4) ? r->q->turn_reaped : rnd(r->size)) % r->size;

        *(uint32_t *)(r->device + 4 + 8 * slot) = rnd(r->size + 1);
        *(uint32_t *)(r->device + 8 + 8 * slot) = rnd(rnd(2) ? 4 : 100);
        put(r->device, 2, (uint16_t)(r->q->turn_reaped + rnd(4)));
    }
}

/* Whether what the device put into its suppression words is something that the standard does not define. */
static int undefined_suppression(const struct rig *r)
{
    const uint16_t flags = word(r->device, has(r, GPV_PACKED) ? 2 : 0);

    if (!has(r, GPV_PACKED))
        return !has(r, GPV_EVENT_IDX) && flags > 1;
    return flags > 2 || (flags == 2 && (!has(r, GPV_EVENT_IDX) || (word(r->device, 0) & 0x7fff) >= r->size));
}

static void fuzz(uint64_t writes)
{
    uint64_t found[GPV_BAD_EVENT_OFFSET + 1] = {0}, serial = 1, reaped = 0, i;
    uint32_t ids[MAX_SIZE], lengths[MAX_SIZE];
    uint64_t cookies[MAX_SIZE];
    struct gpv_violation v;

    while (writes > 0) {
        uint32_t options = rnd(64), size = random_size(options), turns = 500, n;
        struct book b;
        struct rig r;

        build(&r, options, size, GPV_KICK_NONE);
        memset(&b, 0, sizeof b);
        snprintf(situation, sizeof situation, "fuzz options %u size %u writes left %llu", options, size,
                 (unsigned long long)writes);
        for (; turns > 0 && writes > 0; turns--) {
            int32_t got = 0;
            uint32_t k;

            for (n = rnd(3); n > 0; n--)
                if (!gpv_outstanding(r.q) || rnd(2))
                    serial += (uint64_t)add_one(&r, &b, serial);
            if (rnd(4)) {
                const int bad = gpv_unpublished(r.q) && undefined_suppression(&r);

                gpv_violation_get(r.q, &v);
                got = gpv_publish(r.q);
                CHECK(v.kind || (got == GPV_EBROKEN) == bad);
                memset(b.published, 1, sizeof b.published);
            }
            for (n = 1 + rnd(3); n > 0 && writes > 0; n--, writes--)
                scribble(&r);
            gpv_pending(r.q);
            if (got >= 0)
                got = gpv_reap(r.q, ids, lengths, cookies, 1 + rnd(MAX_SIZE - 1));
            CHECK(got <= (int32_t)size);
            for (k = 0; got > 0 && k < (uint32_t)got; k++, reaped++) {
                CHECK(ids[k] < size && b.out[ids[k]] && b.published[ids[k]] && lengths[k] <= b.writable[ids[k]]);
                CHECK(cookies[k] == b.cookie[ids[k]]);
                b.out[ids[k]] = 0;
            }
            if (rnd(4) == 0)
                gpv_arm(r.q);
            if (rnd(4) == 0)
                gpv_disarm(r.q);
            if (got == GPV_EBROKEN || rnd(100) == 0) {
                uint32_t out = 0;

                gpv_violation_get(r.q, &v);
                CHECK(v.kind >= 0 && v.kind <= GPV_BAD_EVENT_OFFSET && (got != GPV_EBROKEN || v.kind));
                found[v.kind]++;
                for (k = 0; k < size; k++)
                    out += b.out[k];
                CHECK(out == gpv_outstanding(r.q));
                CHECK(gpv_drain(r.q, ids, cookies) == out);
                for (k = 0; k < out; k++)
                    CHECK(b.out[ids[k]] && cookies[k] == b.cookie[ids[k]] && (k == 0 || cookies[k] > cookies[k - 1]));
                memset(b.out, 0, sizeof b.out);
                CHECK(gpv_free_slots(r.q) == size && gpv_outstanding(r.q) == 0);
            }
        }
        tear_down(&r);
    }
    for (i = 1; i <= GPV_BAD_EVENT_OFFSET; i++)
        printf("violation %u: %llu\n", (unsigned)i, (unsigned long long)found[i]);
    printf("reaped: %llu\n", (unsigned long long)reaped);
}

int main(int argc, char **argv)
{
    uint64_t count = argc > 2 ? strtoull(argv[argc - 1], NULL, 10) : 0;

    state = argc > 3 ? strtoull(argv[2], NULL, 10) : 1;
    if (argc == 4 && !strcmp(argv[1], "walk"))
        walk(count);
    else if (argc == 3 && !strcmp(argv[1], "threads"))
        threads(count);
    else if (argc == 4 && !strcmp(argv[1], "fuzz"))
        fuzz(count);
    else
        return 2;
    return 0;
}
