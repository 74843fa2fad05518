/* The driver's side of a race: loops over the calls of the core, as a program that does nothing else would write them. */

/* Random reads (5.2.6), `depth` in flight, for run_ns. */
struct race_blk {
    struct gpv_queue *queue;
    int32_t fd;         /* eventfd of the queue's interrupt to sleep on; -1: poll */
    uint32_t depth;     /* at most 256 */
    uint32_t nbytes;    /* of each request */
    uint8_t *headers;   /* CPU memory of depth headers of 16 bytes, side by side: a device that takes several finds
                           them in few cache lines */
    uint8_t *statuses;  /* depth bytes; only the device writes them, a used length of nbytes + 1 proves that it did */
    uint64_t headers_bus, statuses_bus;
    uint64_t data_bus;  /* depth x nbytes */
    uint64_t blocks;    /* requests are for one of so many */
    int64_t run_ns;
    /* Out. */
    uint64_t done, failed, reaps, total_ns, worst_ns;
    int64_t spent_ns;
};
/* 0, 1: the device does not answer, or a gpv_error. The queue is idle afterwards. */
int32_t race_blk_run(struct race_blk *race);

/* Frames of one length, for run_ns. */
struct race_net {
    struct gpv_queue *queue;
    uint32_t buffers;   /* at most 1024 */
    uint32_t length;    /* bytes of a frame, without the virtio header */
    uint32_t stride;    /* from one buffer to the next */
    uint8_t *memory;
    uint64_t bus;
    const uint8_t *head; /* what is written at the front of each frame to send */
    uint32_t head_length;
    int64_t run_ns;
    /* Out. */
    uint64_t done, failed, bytes, reaps;
    int64_t spent_ns;
};
/* Sends from static buffers; into each it writes the virtio header and `head`, as DPDK's txonly does. As above. */
int32_t race_net_send(struct race_net *race);
/* Receives into static buffers and looks at each virtio header. Buffers stay with the device afterwards. */
int32_t race_net_receive(struct race_net *race);

/* Nanoseconds that a cache line takes from the CPU `there` to this thread's and back; negative: no thread. How far apart
 * two cores are decides what a driver can win by touching fewer lines. */
double race_distance(int32_t there, uint32_t rounds);
