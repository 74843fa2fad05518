/* The driver half of a virtqueue, split (2.7) or packed (2.8), behind one set of functions. No globals; callable without
 * the GIL; each queue belongs to one thread at a time, which is checked. */

enum gpv_option {
    GPV_PACKED = 1,
    GPV_EVENT_IDX = 2,
    GPV_INDIRECT = 4,
    GPV_IN_ORDER = 8,
    GPV_NOTIFICATION_DATA = 16,
    GPV_ORDER_PLATFORM = 32
};

enum gpv_error {
    GPV_EFULL = -1,   /* not enough free descriptors: reap first */
    GPV_ECHAIN = -2,  /* no element at all, or more than the queue size */
    GPV_ELENGTH = -3, /* an element of length 0, or more than 2^32 bytes in total */
    GPV_EBROKEN = -4, /* the device broke the standard: gpv_violation says how */
    GPV_ETHREAD = -5, /* called from a thread that does not own the queue */
    GPV_EKICK = -6,   /* the kick failed: its eventfd or its call */
    GPV_EINTR = -7,   /* a signal arrived while waiting */
    GPV_ECLOSED = -8  /* no queue: NULL */
};

enum gpv_violation_kind {
    GPV_NO_VIOLATION,
    GPV_BAD_USED_INDEX,   /* used idx says more than was made available: got idx, expected at most `expected` */
    GPV_BAD_ID,           /* used id not below the queue size */
    GPV_ID_NOT_AVAILABLE, /* used id that never was made available */
    GPV_ID_REPEATED,      /* used id that came back before */
    GPV_BAD_LENGTH,       /* used length above the writable bytes of the buffer */
    GPV_BAD_ORDER,        /* IN_ORDER: used id is further on than the device has got */
    GPV_BAD_WRAP,         /* packed: flags are neither as the driver left them nor those of a used descriptor */
    GPV_USED_UNASKED,     /* packed: a used descriptor although nothing is outstanding */
    GPV_BAD_EVENT_FLAGS,  /* suppression flags that the standard does not define */
    GPV_BAD_EVENT_OFFSET  /* packed: event offset not below the queue size */
};

struct gpv_violation {
    int32_t kind;
    uint32_t position; /* where: used ring slot or descriptor ring offset */
    uint32_t id;       /* buffer id, where one is concerned */
    uint64_t got;
    uint64_t expected;
};

struct gpv_segment {
    uint64_t address; /* bus address */
    uint32_t length;
};

struct gpv_queue_config {
    uint32_t size;    /* 1 to 32768; split: a power of two */
    uint32_t options; /* enum gpv_option */
    void *desc;       /* CPU addresses of the three areas, zeroed by the core */
    void *driver;
    void *device;
    struct gpv_kick kick;
    void *tables;           /* GPV_INDIRECT: memory of table_count tables of table_entries descriptors each */
    uint64_t tables_bus;    /* its bus address */
    uint32_t table_entries;
    uint32_t table_count;   /* buffers with an id below this get a table */
};

struct gpv_queue;

/* NULL: out of memory or a size the format does not allow. The calling thread owns the queue. */
struct gpv_queue *gpv_queue_new(const struct gpv_queue_config *config);
void gpv_queue_free(struct gpv_queue *q);
/* Makes the calling thread the owner. The old owner must have stopped using the queue. */
void gpv_queue_own(struct gpv_queue *q);

/* Places a buffer of `readable` and then `writable` elements. Not yet visible to the device: see gpv_publish.
 * Returns its id, a slot number below the queue size that is stable until the buffer is reaped, or a gpv_error. */
int32_t gpv_add(struct gpv_queue *q, const struct gpv_segment *segments, uint32_t readable, uint32_t writable,
                uint64_t cookie);
/* Places `count` buffers of `elements` elements each, those from `writable_from` on device-writable. addresses and
 * lengths are count x elements, rows first. cookies may be NULL. Returns how many found room (their ids in ids, which
 * may be NULL), or a gpv_error when the first one did not for another reason than room. */
int32_t gpv_add_burst(struct gpv_queue *q, const uint64_t *addresses, const uint32_t *lengths, uint32_t count,
                      uint32_t elements, uint32_t writable_from, const uint64_t *cookies, uint32_t *ids);
/* Makes everything added available, then notifies the device if it asks for it: 1 notified, 0 not needed. */
int32_t gpv_publish(struct gpv_queue *q);
/* Notifies the device whatever it asked for. */
int32_t gpv_notify(struct gpv_queue *q);
/* Notifies the device from a thread that need not own the queue: of nothing new, so that it looks again. With
 * NOTIFICATION_DATA nothing is sent, because only the owner knows the position. 0, or GPV_EKICK. */
int32_t gpv_remind(const struct gpv_queue *q);
/* A full barrier towards devices, for whoever writes to rings by hand. */
void gpv_fence(void);
/* Sends this notification value, on a broken queue too: for rings that somebody wrote by hand. */
int32_t gpv_notify_value(struct gpv_queue *q, uint32_t value);
/* Takes up to max used buffers. Each of the arrays may be NULL. Returns how many; GPV_EBROKEN comes only after every
 * buffer that came back before the violation was delivered. */
int32_t gpv_reap(struct gpv_queue *q, uint32_t *ids, uint32_t *lengths, uint64_t *cookies, uint32_t max);
/* 1: used buffers wait (or a violation does), 0: none. */
int32_t gpv_pending(struct gpv_queue *q);
/* Asks the device for no used buffer notifications; advice, not a promise. */
int32_t gpv_disarm(struct gpv_queue *q);
/* Asks for them again. 1: used buffers are waiting already and no notification may come for them. */
int32_t gpv_arm(struct gpv_queue *q);
/* Spins up to spin_ns, then arms and sleeps on the eventfd (or in short naps if fd is negative) up to timeout_ns in all
 * (negative: for ever). 1: used buffers wait, 0: time is up, GPV_WOKEN: the eventfd fired and was read: look and call
 * again; GPV_EINTR: a signal came. */
int32_t gpv_wait(struct gpv_queue *q, int32_t fd, int64_t timeout_ns, int64_t spin_ns);
enum { GPV_WOKEN = 2 };
/* Reads an interrupt's eventfd without blocking. 1: it had fired. */
int32_t gpv_interrupt_clear(int32_t fd);

/* All 0 for NULL. */
uint32_t gpv_free_slots(const struct gpv_queue *q);  /* free descriptors */
uint32_t gpv_outstanding(const struct gpv_queue *q); /* buffers added and not reaped */
uint32_t gpv_unpublished(const struct gpv_queue *q); /* of these, added and not published */
uint64_t gpv_kicks(const struct gpv_queue *q);
uint64_t gpv_turns(const struct gpv_queue *q);       /* buffers published since the last restart */
/* Packed: where the next used descriptor is awaited, offset in bits 0-14 and wrap counter in bit 15. */
uint32_t gpv_used_position(const struct gpv_queue *q);
void gpv_violation_get(const struct gpv_queue *q, struct gpv_violation *violation);

/* After a device or queue reset only: writes ids and cookies of every buffer that never came back, oldest first, and
 * returns how many; the queue starts over from index 0 with zeroed areas. Arrays of queue size; cookies may be NULL. */
uint32_t gpv_drain(struct gpv_queue *q, uint32_t *ids, uint64_t *cookies);

/* What a call from Python would have to pass lies in structs that are made once and changed rarely: a second argument costs as
 * much as the call. */

/* Buffers one by one, each with a token that never repeats. */
struct gpv_single {
    struct gpv_queue *queue;
    const uint64_t *addresses; /* queue size */
    const uint32_t *lengths;   /* queue size */
    uint32_t elements;
    uint32_t writable_from;
    uint64_t serial;           /* how many were added; the last one's cookie */
};
/* gpv_add of the first `elements` of the arrays. Returns the token, its slot in bits 0-15 and its cookie above, or a
 * gpv_error. */
int64_t gpv_single_add(struct gpv_single *single);

/* Bursts of buffers of one shape. */
struct gpv_burst {
    struct gpv_queue *queue;
    const uint64_t *addresses; /* capacity x elements */
    const uint32_t *lengths;   /* capacity x elements */
    uint32_t elements;
    uint32_t writable_from;
    uint32_t *ids;             /* capacity */
    uint32_t *used_ids;        /* used_max */
    uint32_t *used_lengths;    /* used_max */
    uint32_t capacity;
    uint32_t count;            /* rows to submit; more than capacity: capacity */
    uint32_t used_max;
    int32_t kicked;            /* what the publish of the last submit returned */
};
/* gpv_add_burst of the first `count` rows and gpv_publish. Returns how many found room, or a gpv_error. */
int32_t gpv_burst_submit(struct gpv_burst *burst);
/* gpv_reap into used_ids and used_lengths. */
int32_t gpv_burst_reap(struct gpv_burst *burst);
