/* Replays ring vectors against ring.h, and walks the capabilities of discovery vectors: replay FILE... */
#include "json.h"
#include "ring.h"

enum { DESC, DRIVER, DEVICE, TABLES, AREAS };
static const char *const names[AREAS] = {"desc", "driver", "device", "tables"};

struct world {
    struct ring ring;
    uint8_t *memory[AREAS];
    size_t length[AREAS];
    const char *vector;
    int step;
};

static int wrong(const struct world *w, const char *op, const char *what)
{
    printf("%s: step %d (%s): %s\n", w->vector, w->step, op, what);
    return 1;
}

static uint8_t byte_at(const char *hex, size_t at)
{
    unsigned value = 0;

    sscanf(hex + 2 * at, "%2x", &value);
    return (uint8_t)value;
}

static const char *image(const struct json *step, const char *when, int area)
{
    const struct json *hex = json_get(json_need(step, when), names[area]);

    return hex ? hex->text : "";
}

static int ignored(const struct json *step, int area, size_t at)
{
    const struct json *i;

    for (i = json_need(step, "ignore")->child; i; i = i->next)
        if (!strcmp(json_need(i, "area")->text, names[area]) && at >= json_need(i, "offset")->number &&
            at - json_need(i, "offset")->number < json_need(i, "length")->number)
            return 1;
    return 0;
}

/* Whether our memory is what the vector says, but for what it leaves to us. */
static int compare(const struct world *w, const struct json *step, const char *op)
{
    char text[120];
    int area;
    size_t at;

    for (area = 0; area < AREAS; area++)
        for (at = 0; at < w->length[area]; at++) {
            uint8_t wanted = byte_at(image(step, "after", area), at), got = w->memory[area][at];

            if (got != wanted && !ignored(step, area, at)) {
                snprintf(text, sizeof text, "%s byte %zu is %02x, the vector has %02x", names[area], at, got, wanted);
                return wrong(w, op, text);
            }
        }
    return 0;
}

/* A move of the device: the bytes that it changed. */
static void apply(struct world *w, const struct json *step)
{
    int area;
    size_t at;

    for (area = 0; area < AREAS; area++)
        for (at = 0; at < w->length[area]; at++)
            if (byte_at(image(step, "before", area), at) != byte_at(image(step, "after", area), at))
                w->memory[area][at] = byte_at(image(step, "after", area), at);
}

static uint32_t elements(const struct json *list, struct element *out)
{
    uint32_t n = 0;

    for (list = list->child; list; list = list->next, n++) {
        out[n].address = json_need(list, "address")->number;
        out[n].length = (uint32_t)json_need(list, "length")->number;
    }
    return n;
}

/* Buffers of one element that go round in bursts, used in order and in full by a device made here. */
static void cycle(struct ring *r, const struct json *step)
{
    uint64_t left = json_need(step, "count")->number;
    struct element e = {json_need(step, "address")->number, (uint32_t)json_need(step, "length")->number};
    struct done done[MOST];
    uint32_t n, i, notification;

    for (; left; left -= n) {
        n = left < json_need(step, "burst")->number ? (uint32_t)left : (uint32_t)json_need(step, "burst")->number;
        for (i = 0; i < n; i++)
            ring_add(r, &e, 0, 1);
        ring_publish(r, &notification);
        for (i = 0; i < n; i++) {
            uint32_t slot = (uint16_t)(r->reaped + i) % r->size;

            put(r->device + 4 + 8 * slot, 4, get(r->driver + 4 + 2 * slot, 2));
            put(r->device + 8 + 8 * slot, 4, e.length);
        }
        put(r->device + 2, 2, (uint16_t)(r->reaped + n));
        ring_reap(r, done);
    }
}

static int is_true(const struct json *word)
{
    return !strcmp(word->text, "true");
}

static int replay_step(struct world *w, const struct json *step)
{
    const char *op = json_need(step, "op")->text;
    struct ring *r = &w->ring;
    struct element e[MOST];
    struct done done[MOST];
    const struct json *d;
    uint32_t readable, n, i, notification;

    if (!strncmp(op, "device-", 7)) {
        apply(w, step);
        return 0;
    }
    if (!strcmp(op, "add")) {
        readable = elements(json_need(step, "readable"), e);
        n = readable + elements(json_need(step, "writable"), e + readable);
        if (ring_add(r, e, readable, n) != json_need(step, "id")->number)
            return wrong(w, op, "another id");
    } else if (!strcmp(op, "publish")) {
        if (ring_publish(r, &notification) != is_true(json_need(step, "notified")))
            return wrong(w, op, "decided otherwise about the notification");
        if (is_true(json_need(step, "notified")) && notification != json_need(step, "notification")->number)
            return wrong(w, op, "another notification value");
    } else if (!strcmp(op, "reap")) {
        n = ring_reap(r, done);
        for (i = 0, d = json_need(step, "returned")->child; d && i < n; d = d->next, i++)
            if (done[i].id != json_need(d, "id")->number || done[i].length != json_need(d, "length")->number)
                return wrong(w, op, "another buffer came back");
        if (d || i < n)
            return wrong(w, op, "another number of buffers came back");
    } else if (!strcmp(op, "disable-interrupts")) {
        ring_arm(r, 0);
    } else if (!strcmp(op, "enable-interrupts")) {
        ring_arm(r, 1);
        if (ring_pending(r) != is_true(json_need(step, "pending")))
            return wrong(w, op, "decided otherwise about pending buffers");
    } else if (!strcmp(op, "cycle") && !has(r, F_RING_PACKED)) {
        cycle(r, step);
    } else {
        return wrong(w, op, "unknown operation");
    }
    return compare(w, step, op);
}

/* 4.1.4: every virtio structure of a known type, in the order of the list. */
static int discover(const struct json *vector)
{
    const struct json *found = json_need(vector, "structures")->child;
    uint8_t space[256];
    unsigned at, count = 0;

    for (at = 0; at < sizeof space; at++)
        space[at] = byte_at(json_need(vector, "config_space")->text, at);
    if (get(space, 2) != 0x1af4 || !(get(space + 6, 2) & 0x10)) {
        printf("%s: no virtio function, or no capabilities\n", json_need(vector, "name")->text);
        return 1;
    }
    for (at = space[0x34] & 0xfc; at >= 0x40 && at <= 0xf0; at = space[at + 1] & 0xfc) {
        const uint8_t *c = space + at;

        if (c[0] != 9 || c[2] < 16 || c[3] < 1 || (c[3] > 5 && c[3] != 8 && c[3] != 9) || c[4] > 5)
            continue;
        if (!found || json_need(found, "position")->number != at || json_need(found, "cfg_type")->number != c[3] ||
            json_need(found, "bar")->number != c[4] || json_need(found, "offset")->number != get(c + 8, 4) ||
            json_need(found, "length")->number != get(c + 12, 4) ||
            (c[3] == 2 && json_need(found, "notify_off_multiplier")->number != get(c + 16, 4))) {
            printf("%s: the structure at 0x%x is another one\n", json_need(vector, "name")->text, at);
            return 1;
        }
        found = found->next;
        count++;
    }
    printf("%s: %u structures%s\n", json_need(vector, "name")->text, count, found ? ", the vector has more" : "");
    return found != NULL;
}

static int replay(const char *path)
{
    const struct json *vector = json_read(path), *queue, *area, *step;
    struct world w = {.vector = json_need(vector, "name")->text};
    int i, bad = 0;

    if (!strcmp(json_need(vector, "kind")->text, "discovery"))
        return discover(vector);
    if (strcmp(json_need(vector, "kind")->text, "ring"))
        return 0;
    queue = json_need(vector, "queue");
    w.ring.features = strtoull(json_need(vector, "feature_bits")->text, NULL, 16);
    w.ring.size = (uint32_t)json_need(queue, "size")->number;
    w.ring.index = (uint32_t)json_need(queue, "index")->number;
    w.ring.table_entries = (uint32_t)json_need(queue, "table_entries")->number;
    for (i = 0; i < AREAS; i++) {
        size_t at;

        area = json_get(json_need(queue, "areas"), names[i]);
        w.length[i] = area ? json_need(area, "length")->number : 0;
        w.memory[i] = calloc(1, w.length[i] + 1);
        for (at = 0; at < w.length[i]; at++)
            w.memory[i][at] = byte_at(image(vector, "start", i), at);
        if (i == TABLES && area) {
            w.ring.tables_bus = json_need(area, "address")->number;
            w.ring.table_count = (uint32_t)(w.length[i] / 16 / w.ring.table_entries);
        }
    }
    w.ring.desc = w.memory[DESC];
    w.ring.driver = w.memory[DRIVER];
    w.ring.device = w.memory[DEVICE];
    w.ring.tables = w.memory[TABLES];
    ring_start(&w.ring);
    for (step = json_need(vector, "steps")->child; step && !bad; step = step->next, w.step++)
        bad = replay_step(&w, step);
    if (!bad)
        printf("%s: %d steps\n", w.vector, w.step);
    return bad;
}

int main(int argc, char **argv)
{
    int i, bad = 0;

    for (i = 1; i < argc; i++)
        bad += replay(argv[i]);
    return bad != 0;
}
