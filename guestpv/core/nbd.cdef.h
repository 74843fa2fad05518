enum { GPV_NBD_SLOTS = 255 }; /* at most: an answer is one system call of one header and as many buffers */

/* Written by the export's thread only, readable at any time. */
struct gpv_nbd_counters {
    uint64_t reads, writes, flushes, discards, zeroes, errors;
    uint64_t bytes_read, bytes_written;
    uint64_t requests; /* virtio requests */
    uint64_t interrupts, wakeups;
};

struct gpv_nbd_config {
    struct gpv_queue *queue;
    int32_t socket;
    int32_t stop_fd;
    int32_t queue_fd;           /* eventfd of the queue's interrupt, -1: spin */
    uint32_t slot_count;        /* the queue has room for as many requests of three elements */
    uint8_t *slots;             /* header at 0, status at GPV_BLK_STATUS of each */
    uint32_t stride;
    const uint64_t *header_bus, *status_bus;
    uint8_t *data;              /* slot_count buffers, each contiguous on the bus */
    const uint64_t *data_bus;
    uint32_t data_size;         /* bytes of each, a multiple of the block size and at least 512 */
    uint32_t block_size;
    uint64_t capacity;          /* bytes */
    uint32_t read_only;
    uint32_t volatile_cache;    /* flush requests mean something */
    uint32_t discard_sectors, discard_ranges; /* 0: no such requests */
    uint32_t zeroes_sectors, zeroes_ranges;
    int64_t spin_ns;            /* look for completions and requests at most so long before sleeping */
};

enum gpv_nbd_error { GPV_NBD_ERRNO = -1000, GPV_NBD_PROTOCOL = -2000 };

struct gpv_nbd;

/* NULL when memory is short. The config's arrays must outlive the export. */
struct gpv_nbd *gpv_nbd_new(const struct gpv_nbd_config *config);
void gpv_nbd_free(struct gpv_nbd *export);
/* Serves the socket until the client disconnects or stop_fd is written, and all that it asked for is answered: 0. A
 * queue that the device broke: its negative GPV_E code, after everything in flight was answered with an error. A failed
 * system call: GPV_NBD_ERRNO - errno. A client that does not speak NBD: GPV_NBD_PROTOCOL. Owns the queue from then on. */
int32_t gpv_nbd_run(struct gpv_nbd *export);
/* From any thread: the disk has another size. */
void gpv_nbd_resize(struct gpv_nbd *export, uint64_t capacity);
const struct gpv_nbd_counters *gpv_nbd_counters(const struct gpv_nbd *export);
