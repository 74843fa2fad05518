/* A device that uses every buffer the moment it is notified, writing nothing: the least there can be behind a ring. */
#include <stdint.h>

struct device {
    uint32_t size;
    int32_t packed;
    uint8_t *desc, *driver, *device;
    uint16_t index;          /* split: next position, packed: offset */
    uint16_t wrap;
    uint32_t elements;
};

struct packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id, flags;
};

void noop(void)
{
}

static void use_split(struct device *d)
{
    const uint16_t *avail = (const uint16_t *)d->driver;
    uint16_t *used = (uint16_t *)d->device;
    uint16_t end = __atomic_load_n(&avail[1], __ATOMIC_ACQUIRE);
    uint32_t mask = d->size - 1;

    for (; d->index != end; d->index++) {
        uint32_t *entry = (uint32_t *)(d->device + 4) + 2 * (d->index & mask);

        entry[0] = avail[2 + (d->index & mask)];
        entry[1] = 0;
    }
    __atomic_store_n(&used[1], d->index, __ATOMIC_RELEASE);
}

static void use_packed(struct device *d)
{
    struct packed_desc *ring = (struct packed_desc *)d->desc;

    for (;;) {
        struct packed_desc *head = &ring[d->index], *last;
        uint16_t flags = __atomic_load_n(&head->flags, __ATOMIC_ACQUIRE);
        uint32_t end;

        if (((flags >> 7) & 1) != d->wrap || ((flags >> 15) & 1) == d->wrap)
            return;
        end = d->index + d->elements - 1;
        last = &ring[end >= d->size ? end - d->size : end];
        head->id = last->id;
        head->len = 0;
        __atomic_store_n(&head->flags, d->wrap ? 0x8080 : 0, __ATOMIC_RELEASE);
        end++;
        if (end >= d->size) {
            end -= d->size;
            d->wrap ^= 1;
        }
        d->index = (uint16_t)end;
    }
}

int32_t use_all(void *user, uint32_t value)
{
    struct device *d = user;

    (void)value;
    if (d->packed)
        use_packed(d);
    else
        use_split(d);
    return 0;
}

/* The device's own share: uses the same `buffers` `rounds` times. They are available, and are left used. */
void use_again(struct device *d, uint32_t buffers, uint32_t rounds)
{
    uint16_t index = d->index, wrap = d->wrap;
    struct packed_desc *ring = (struct packed_desc *)d->desc;
    uint32_t round, i, position;

    for (round = 0; round < rounds; round++) {
        if (d->packed && round > 0) {
            for (i = 0, position = index; i < buffers; i++, position += d->elements)
                ring[position % d->size].flags = (wrap == 1) == (position < d->size) ? 0x80 : 0x8000;
        }
        d->index = index;
        d->wrap = wrap;
        use_all(d, 0);
    }
}
