/* Exhaustive search of the core's orders on small rings: a driver thread runs the core, a device thread is written here from
 * section 2.7 and 2.8. Both may stop at each access, and each load may see any value that the memory model allows.
 *
 *   model [FILE LINE]: search, with the order at FILE:LINE of the core weakened. Exit status 0: nothing wrong was found,
 * 1: a check failed, and its name is printed. */
#define GPV_MODEL
#include "ring.h"

#include <cstdio>
#include <cstdlib>

const char *gpv_weak_file;
int gpv_weak_line;

/* Both formats in one translation unit: their static functions share names. */
#define fill split_fill
#define fill_table split_fill_table
#define add_rows split_add_rows
#define next_batch split_next_batch
#include "split.c"
#undef fill
#undef fill_table
#undef add_rows
#undef next_batch
#include "packed.c"
#undef S
#undef P

namespace {

enum { SIZE = 2, ADDRESS = 0x1000, LENGTH = 40, USED_LENGTH = 17 };

/* relacy would run the failing execution again to print it; the name of the check is all that is needed. */
const char *running;
#define CHECK(what)                                    \
    do {                                               \
        if (!(what)) {                                 \
            std::printf("%s: %s\n", running, #what);   \
            std::fflush(stdout);                       \
            std::_Exit(1);                             \
        }                                              \
    } while (0)

#define READ(p) (p).load(rl::mo_relaxed, RL_INFO)
#define READ_ACQUIRE(p) (p).load(rl::mo_acquire, RL_INFO)
#define WRITE(p, v) (p).store((v), rl::mo_relaxed, RL_INFO)
#define WRITE_RELEASE(p, v) (p).store((v), rl::mo_release, RL_INFO)
#define FENCE() rl::atomic_thread_fence(rl::mo_seq_cst, RL_INFO)

/* The queue with its shadow, as gpv_queue_new makes it. */
struct Shadow {
    gpv_queue q;
    gpv_slot slots[SIZE];
    uint16_t next[SIZE];

    void start(bool packed, bool event_idx)
    {
        std::memset((void *)this, 0, sizeof *this);
        q.size = q.free = SIZE;
        q.packed = packed;
        q.event_idx = event_idx;
        q.armed = 1;
        q.slots = slots;
        q.next = next;
        for (uint32_t i = 0; i < SIZE; i++) {
            slots[i].turn = GPV_NEVER;
            next[i] = (uint16_t)(i + 1 < SIZE ? i + 1 : 0);
        }
    }
};

struct SplitRing {
    gpv_split_desc desc[SIZE];
    rl::atomic<uint16_t> avail_flags, avail_idx, avail_ring[SIZE], used_event;
    rl::atomic<uint16_t> used_flags, used_idx, avail_event;
    gpv_used_elem used_ring[SIZE];
    uint16_t device_avail, device_used; /* the device's own positions */

    void start(Shadow &s, bool event_idx)
    {
        s.start(false, event_idx);
        gpv_split &r = s.q.u.split;
        r.desc = desc;
        r.avail_flags = &avail_flags;
        r.avail_idx = &avail_idx;
        r.avail_ring = avail_ring;
        r.used_event = &used_event;
        r.used_flags = &used_flags;
        r.used_idx = &used_idx;
        r.used_ring = used_ring;
        r.avail_event = &avail_event;
        for (int i = 0; i < SIZE; i++) {
            WRITE(desc[i].addr, 0);
            WRITE(desc[i].len_flags_next, 0);
            WRITE(avail_ring[i], 0);
            WRITE(used_ring[i].id, 0);
            WRITE(used_ring[i].len, 0);
        }
        WRITE(avail_flags, 0);
        WRITE(avail_idx, 0);
        WRITE(used_event, 0);
        WRITE(used_flags, 0);
        WRITE(used_idx, 0);
        WRITE(avail_event, 0);
        device_avail = device_used = 0;
    }

    void add_rows(Shadow &s, gpv_rows rows) { CHECK(gpv_split_add(&s.q, rows, 1, 0, 0) == 1); }
    void add(Shadow &s, uint64_t address)
    {
        const uint32_t length = LENGTH;

        add_rows(s, gpv_rows{&address, &length, 1, 1, 1, 0});
    }
    bool publish(Shadow &s) { return gpv_split_publish(&s.q) > 0; }
    int32_t reap(Shadow &s, uint32_t *id, uint32_t *length) { return gpv_split_reap(&s.q, id, length, 0, 1); }
    void disarm(Shadow &s) { gpv_split_disarm(&s.q); }
    bool arm(Shadow &s)
    {
        gpv_split_arm(&s.q);
        return gpv_split_pending(&s.q);
    }

    /* The device. */
    void stop_kicks(bool event_idx)
    {
        if (event_idx)
            WRITE(avail_event, (uint16_t)(device_avail - 1));
        else
            WRITE(used_flags, 1);
    }
    void want_kick(bool event_idx)
    {
        if (event_idx)
            WRITE(avail_event, device_avail);
        else
            WRITE(used_flags, 0);
        FENCE();
    }
    /* The next buffer: its id, or -1. What it says is what the driver wrote. */
    int take(uint64_t address)
    {
        if (READ_ACQUIRE(avail_idx) == device_avail)
            return -1;
        const int head = READ(avail_ring[device_avail % SIZE]);
        CHECK(head < SIZE);
        CHECK(READ(desc[head].addr) == address);
        CHECK(READ(desc[head].len_flags_next) == gpv_word(LENGTH, GPV_DESC_F_WRITE, 0));
        device_avail++;
        return head;
    }
    void take_chain()
    {
        if (READ_ACQUIRE(avail_idx) == 0)
            return;
        CHECK(READ(avail_ring[0]) == 0);
        CHECK(READ(desc[0].addr) == ADDRESS);
        CHECK(READ(desc[0].len_flags_next) == gpv_word(LENGTH, GPV_DESC_F_NEXT, 1));
        CHECK(READ(desc[1].addr) == ADDRESS + 1);
        CHECK(READ(desc[1].len_flags_next) == gpv_word(LENGTH, GPV_DESC_F_WRITE, 0));
    }
    /* Uses it. Returns whether the driver asked for an interrupt. */
    bool use(int id, uint32_t length, bool event_idx)
    {
        WRITE(used_ring[device_used % SIZE].id, id);
        WRITE(used_ring[device_used % SIZE].len, length);
        device_used++;
        WRITE_RELEASE(used_idx, device_used);
        FENCE();
        return event_idx ? READ(used_event) == (uint16_t)(device_used - 1) : !READ(avail_flags);
    }
};

struct PackedRing {
    gpv_packed_desc desc[SIZE];
    rl::atomic<uint16_t> driver_event, driver_flags, device_event, device_flags;
    gpv_place avail_at, used_at; /* the device's own positions */

    void start(Shadow &s, bool event_idx)
    {
        s.start(true, event_idx);
        gpv_packed &r = s.q.u.ring;
        r.desc = desc;
        r.driver_event = &driver_event;
        r.driver_flags = &driver_flags;
        r.device_event = &device_event;
        r.device_flags = &device_flags;
        r.next_avail.wrap = r.next_used.wrap = 1;
        for (int i = 0; i < SIZE; i++) {
            WRITE(desc[i].addr, 0);
            WRITE(desc[i].len, 0);
            WRITE(desc[i].id, 0);
            WRITE(desc[i].flags, 0);
        }
        WRITE(driver_event, 0);
        WRITE(driver_flags, 0);
        WRITE(device_event, 0);
        WRITE(device_flags, 0);
        avail_at.offset = used_at.offset = 0;
        avail_at.wrap = used_at.wrap = 1;
    }

    void add_rows(Shadow &s, gpv_rows rows) { CHECK(gpv_packed_add(&s.q, rows, 1, 0, 0) == 1); }
    void add(Shadow &s, uint64_t address)
    {
        const uint32_t length = LENGTH;

        add_rows(s, gpv_rows{&address, &length, 1, 1, 1, 0});
    }
    bool publish(Shadow &s) { return gpv_packed_publish(&s.q) > 0; }
    int32_t reap(Shadow &s, uint32_t *id, uint32_t *length)
    {
        return gpv_packed_reap(&s.q, id, length, 0, 1);
    }
    void disarm(Shadow &s) { gpv_packed_disarm(&s.q); }
    bool arm(Shadow &s)
    {
        gpv_packed_arm(&s.q);
        return gpv_packed_pending(&s.q);
    }

    void stop_kicks(bool) { WRITE(device_flags, 1); }
    void want_kick(bool event_idx)
    {
        if (event_idx) {
            WRITE(device_event, gpv_place_pack(avail_at));
            WRITE_RELEASE(device_flags, 2);
        } else {
            WRITE(device_flags, 0);
        }
        FENCE();
    }
    int take(uint64_t address)
    {
        gpv_packed_desc &d = desc[avail_at.offset];
        const uint16_t flags = READ_ACQUIRE(d.flags);

        if (!!(flags & GPV_DESC_F_AVAIL) != (avail_at.wrap == 1) || !!(flags & GPV_DESC_F_USED) == (avail_at.wrap == 1))
            return -1;
        CHECK(READ(d.addr) == address);
        CHECK(READ(d.len) == LENGTH);
        CHECK(flags & GPV_DESC_F_WRITE);
        avail_at = gpv_place_after(avail_at, 1, SIZE);
        return READ(d.id);
    }
    void take_chain()
    {
        if (!(READ_ACQUIRE(desc[0].flags) & GPV_DESC_F_AVAIL))
            return;
        CHECK(READ(desc[0].flags) == (GPV_DESC_F_AVAIL | GPV_DESC_F_NEXT));
        CHECK(READ(desc[0].addr) == ADDRESS);
        CHECK(READ(desc[1].flags) == (GPV_DESC_F_AVAIL | GPV_DESC_F_WRITE));
        CHECK(READ(desc[1].addr) == ADDRESS + 1);
        CHECK(READ(desc[1].len) == LENGTH);
        CHECK(READ(desc[1].id) == 0);
    }
    bool use(int id, uint32_t length, bool event_idx)
    {
        const gpv_place here = used_at;

        WRITE(desc[here.offset].id, id);
        WRITE(desc[here.offset].len, length);
        WRITE_RELEASE(desc[here.offset].flags,
                      GPV_DESC_F_WRITE | (here.wrap ? GPV_DESC_F_AVAIL | GPV_DESC_F_USED : 0));
        used_at = gpv_place_after(here, 1, SIZE);
        FENCE();
        const uint16_t flags = READ_ACQUIRE(driver_flags);
        return flags == 0 || (event_idx && flags == 2 && READ(driver_event) == gpv_place_pack(here));
    }
};

/* What the driver makes available is seen whole, and either the device sees it before it sleeps or it is kicked. Two buffers
 * in two publishes, the first of which was used before, so that positions and suppression words are not those of the start. */
template <typename Ring, bool event_idx> struct Publish : rl::test_suite<Publish<Ring, event_idx>, 2> {
    Ring ring;
    Shadow shadow;
    bool kicked, seen;

    void before()
    {
        ring.start(shadow, event_idx);
        uint32_t id, length;
        ring.add(shadow, ADDRESS);
        ring.publish(shadow);
        ring.use(ring.take(ADDRESS), USED_LENGTH, event_idx);
        ring.reap(shadow, &id, &length);
        ring.stop_kicks(event_idx);
        kicked = seen = false;
    }
    void thread(unsigned index)
    {
        if (index == 0) {
            ring.add(shadow, ADDRESS + 1);
            kicked = ring.publish(shadow);
        } else {
            if (ring.take(ADDRESS + 1) < 0) {
                ring.want_kick(event_idx);
                if (ring.take(ADDRESS + 1) < 0)
                    return;
            }
            seen = true;
        }
    }
    void after() { CHECK(kicked || seen); }
};

/* A burst is seen from its first buffer on: whoever sees that one finds the others behind it, whole. */
template <typename Ring> struct Burst : rl::test_suite<Burst<Ring>, 2> {
    Ring ring;
    Shadow shadow;

    void before() { ring.start(shadow, false); }
    void thread(unsigned index)
    {
        if (index == 0) {
            ring.add(shadow, ADDRESS);
            ring.add(shadow, ADDRESS + 1);
            ring.publish(shadow);
        } else if (ring.take(ADDRESS) >= 0) {
            const int second = ring.take(ADDRESS + 1);

            CHECK(second == 1);
        }
    }
};

/* A chain fills the ring; whoever sees its head finds the second element. */
template <typename Ring> struct Chain : rl::test_suite<Chain<Ring>, 2> {
    Ring ring;
    Shadow shadow;

    void before() { ring.start(shadow, false); }
    void thread(unsigned index)
    {
        if (index == 0) {
            const uint64_t addresses[2] = {ADDRESS, ADDRESS + 1};
            const uint32_t lengths[2] = {LENGTH, LENGTH};
            const gpv_rows rows = {addresses, lengths, 1, 1, 2, 1};

            ring.add_rows(shadow, rows);
            ring.publish(shadow);
        } else {
            ring.take_chain();
        }
    }
};

/* What the device uses is seen whole, with the data in the buffer, and either the driver sees it before it sleeps or it is
 * interrupted. */
template <typename Ring, bool event_idx> struct Use : rl::test_suite<Use<Ring, event_idx>, 2> {
    Ring ring;
    Shadow shadow;
    rl::atomic<int> data;
    bool interrupted, seen;

    void before()
    {
        ring.start(shadow, event_idx);
        ring.disarm(shadow);
        ring.add(shadow, ADDRESS);
        ring.add(shadow, ADDRESS);
        ring.publish(shadow);
        WRITE(data, 0);
        interrupted = seen = false;
    }
    bool look()
    {
        uint32_t id = 99, length = 99;

        if (ring.reap(shadow, &id, &length) != 1) {
            CHECK(!shadow.q.violation.kind);
            return false;
        }
        CHECK(id == 1);
        CHECK(length == USED_LENGTH);
        CHECK(READ(data) == 42);
        return true;
    }
    void thread(unsigned index)
    {
        if (index == 0) {
            seen = look();
            if (!seen && ring.arm(shadow)) {
                seen = look();
                CHECK(seen);
            }
        } else {
            ring.take(ADDRESS); /* taken first, used last: the second buffer comes back before it */
            const int id = ring.take(ADDRESS);
            WRITE(data, 42);
            interrupted = ring.use(id, USED_LENGTH, event_idx);
        }
    }
    void after() { CHECK(interrupted || seen); }
};

/* A driver that reaps with interrupts on, until nothing is left, then sleeps: the second used buffer is not lost. */
template <typename Ring> struct Drain : rl::test_suite<Drain<Ring>, 2> {
    Ring ring;
    Shadow shadow;
    int seen;
    bool interrupted;

    void before()
    {
        ring.start(shadow, true);
        ring.add(shadow, ADDRESS);
        ring.add(shadow, ADDRESS);
        ring.publish(shadow);
        ring.arm(shadow);
        ring.take(ADDRESS);
        ring.take(ADDRESS);
        ring.use(0, USED_LENGTH, true);
        seen = 0;
        interrupted = false;
    }
    void thread(unsigned index)
    {
        uint32_t id, length;

        if (index == 0)
            while (ring.reap(shadow, &id, &length) == 1)
                seen++;
        else
            interrupted = ring.use(1, USED_LENGTH, true);
    }
    void after() { CHECK(seen == 2 || interrupted); }
};

template <typename Test> void search(const char *name)
{
    rl::test_params params;
    std::ostringstream log;

    params.search_type = rl::sched_full;
    params.output_stream = &log;
    params.progress_stream = &log;
    running = name;
    if (!rl::simulate<Test>(params))
        std::_Exit(2);
    std::printf("%s: %llu executions\n", name, (unsigned long long)params.stop_iteration);
}

} // namespace

int main(int argc, char **argv)
{
    if (argc == 3) {
        gpv_weak_file = argv[1];
        gpv_weak_line = std::atoi(argv[2]);
    }
    search<Publish<SplitRing, false>>("split publish");
    search<Publish<SplitRing, true>>("split publish event_idx");
    search<Publish<PackedRing, false>>("packed publish");
    search<Publish<PackedRing, true>>("packed publish event_idx");
    search<Burst<SplitRing>>("split burst");
    search<Burst<PackedRing>>("packed burst");
    search<Chain<SplitRing>>("split chain");
    search<Chain<PackedRing>>("packed chain");
    search<Use<SplitRing, false>>("split use");
    search<Use<SplitRing, true>>("split use event_idx");
    search<Drain<SplitRing>>("split drain");
    search<Use<PackedRing, false>>("packed use");
    search<Drain<PackedRing>>("packed drain");
    search<Use<PackedRing, true>>("packed use event_idx");
    return 0;
}
