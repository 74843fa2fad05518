enum { GPV_NBD_SLOTS = 255 }; /* at most: an answer is one system call of one header and as many buffers */

/* Written by the export's thread only, readable at any time. */
struct gpv_nbd_counters {
    uint64_t reads, writes, flushes, discards, zeroes, errors;
    uint64_t bytes_read, bytes_written;
    uint64_t requests; /* virtio requests */
    uint64_t resubmitted; /* requests of the client that were begun once more, after a restart of the device */
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
    uint32_t keep;              /* requests outlive a queue that the device broke, see gpv_nbd_rebind */
};

enum gpv_nbd_error { GPV_NBD_ERRNO = -1000, GPV_NBD_PROTOCOL = -2000 };
enum { GPV_NBD_PAUSED = 1 };

struct gpv_nbd;

/* NULL when memory is short. The config's arrays must outlive the export. */
struct gpv_nbd *gpv_nbd_new(const struct gpv_nbd_config *config);
void gpv_nbd_free(struct gpv_nbd *export);
/* Serves the socket until the client disconnects or stop_fd is written, and all that it asked for is answered: 0. A
 * queue that the device broke: its negative GPV_E code, after everything in flight was answered with an error, unless
 * `keep` says otherwise. A failed system call: GPV_NBD_ERRNO - errno. A client that does not speak NBD: GPV_NBD_PROTOCOL.
 * After gpv_nbd_pause: GPV_NBD_PAUSED, with everything in flight kept. Owns the queue from then on. */
int32_t gpv_nbd_run(struct gpv_nbd *export);
/* From any thread: let gpv_nbd_run return. */
void gpv_nbd_pause(struct gpv_nbd *export);
/* While nothing runs, and the device was reset: another queue, with the slots, places and limits that go with it. What
 * the client waits for is given to it when gpv_nbd_run is called next: reads, writes, flushes and ranges may be done
 * twice with the same outcome, and nothing of them was acknowledged. Slot count and data stay as they are. */
void gpv_nbd_rebind(struct gpv_nbd *export, const struct gpv_nbd_config *config);
/* While nothing runs: answer everything in flight with an error, so that nobody waits for it for ever. */
void gpv_nbd_give_up(struct gpv_nbd *export);
/* From any thread: the disk has another size. */
void gpv_nbd_resize(struct gpv_nbd *export, uint64_t capacity);
const struct gpv_nbd_counters *gpv_nbd_counters(const struct gpv_nbd *export);
