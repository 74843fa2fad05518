struct gpv_buffers {
    const uint64_t *memory; /* CPU address of each buffer */
    const uint64_t *bus;    /* its bus address */
    uint32_t size;          /* bytes of one buffer */
    uint32_t count;
};

/* Written by the port's thread only, readable at any time. */
struct gpv_port_counters {
    uint64_t rx_packets, rx_bytes;
    uint64_t rx_dropped;   /* taken from the device and delivered nowhere */
    uint64_t rx_malformed; /* dropped because the device got the header or the length wrong */
    uint64_t rx_reminders; /* notifications of siblings */
    uint64_t tx_packets, tx_bytes;
    uint64_t tx_dropped;   /* not given to the device: longer than it takes, or no frame at all */
};

struct gpv_port_config {
    struct gpv_queue *rx, *tx;
    struct gpv_buffers rx_buffers, tx_buffers;
    uint32_t header;     /* bytes of the virtio header */
    uint32_t mergeable;  /* MRG_RXBUF was negotiated */
    uint32_t gso;        /* bit n: a received gso_type of n was negotiated */
    uint32_t longest;    /* bytes of the longest frame that the device takes unsegmented */
    uint32_t partial_ms; /* how long the rest of a received frame may be missing */
};

enum gpv_port_error {
    GPV_PORT_EFRAGMENTS = -100, /* num_buffers is impossible; where the next frame begins cannot be known */
    GPV_PORT_EPARTIAL = -101    /* num_buffers that never came */
};

struct gpv_port;

/* NULL when memory is short. The config's arrays must outlive the port. */
struct gpv_port *gpv_port_new(const struct gpv_port_config *config);
void gpv_port_free(struct gpv_port *port);
const struct gpv_port_counters *gpv_port_counters(const struct gpv_port *port);
/* num_buffers of the frame that is coming in, or of the one that broke the port. */
uint32_t gpv_port_fragments(const struct gpv_port *port);

/* Other receive queues that are notified whenever this one is, which is when the device had run out of buffers: QEMU
 * steers by RSS only after it has read a frame from the back end's own queue, and goes on reading that one when the
 * receive queue of the same number is notified, not the one that had no room. The array must outlive the port. */
void gpv_port_siblings(struct gpv_port *port, struct gpv_queue *const *siblings, uint32_t count);

/* Hands every receive buffer to the device. 0, or a gpv_error. */
int32_t gpv_port_start(struct gpv_port *port);

/* Rows of a table of frames. */
struct gpv_frames {
    uint8_t *data;     /* capacity x stride bytes, frames without the virtio header */
    uint64_t stride;
    uint32_t *lengths; /* capacity */
    uint8_t *headers;  /* capacity x the virtio header's bytes, or NULL: not wanted, or all zero */
    uint32_t capacity;
};
/* Takes the frames that have come in, at most capacity of them; one longer than a row is dropped. Gives their buffers
 * back to the device. Returns how many, or a gpv_error, or a gpv_port_error. */
int32_t gpv_port_receive(struct gpv_port *port, struct gpv_frames *frames);
/* Sends the first `count` rows; how many the device was given, fewer when its queue is full, or a gpv_error. */
int32_t gpv_port_send(struct gpv_port *port, const struct gpv_frames *frames, uint32_t count);
