enum { GPV_BLK_HEADER = 16, GPV_BLK_STATUS = 16, GPV_BLK_NO_ID = -1, GPV_BLK_SHORT = 0xFE, GPV_BLK_UNKNOWN = 0xFF };

/* Many block requests of one type and size on one idle queue (5.2.6), as many in flight as `depth`. */
struct gpv_blk_burst {
    struct gpv_queue *queue;
    int32_t fd;                 /* eventfd of the queue's interrupt, -1: nap between looks */
    uint32_t kind;              /* request type */
    uint32_t nbytes;            /* data bytes of each */
    uint32_t writable;          /* the device writes the data */
    uint32_t depth;             /* at most in flight; as many slots are used */
    uint32_t count;             /* requests */
    uint8_t *headers;           /* CPU memory of `depth` headers side by side, zeroed but for their type */
    const uint8_t *done;        /* of `depth` status bytes side by side, which only the device writes */
    const uint64_t *header_bus; /* depth: bus address of each header */
    const uint64_t *done_bus;   /* and of each status byte */
    const uint64_t *sectors;    /* count */
    const uint64_t *data_bus;   /* count, or depth if data_per_slot; each one segment */
    uint32_t data_per_slot;     /* each slot has its data for ever */
    uint8_t *statuses;          /* count, out: the device's, GPV_BLK_SHORT, or GPV_BLK_UNKNOWN while not back */
    uint64_t *latencies;        /* count, out: ns from add to reap; may be NULL */
    int64_t timeout_ns;         /* longest wait for the next completion; negative: none */
    int64_t spin_ns;            /* of which spinning */
    /* State: zero at first, except where it says so. */
    uint32_t *free_slots;       /* depth: 0 to depth - 1 at first */
    int32_t *slot_ids;          /* depth: GPV_BLK_NO_ID at first */
    uint32_t next, flying;
    uint32_t pause;
};

/* 0: all are back. 1: nothing came back within the time limit, `flying` are with the device. GPV_EINTR: a signal came,
 * call again to go on. Any other negative gpv_error: the queue is broken. */
int32_t gpv_blk_burst_run(struct gpv_blk_burst *burst);
