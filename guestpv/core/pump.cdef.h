struct gpv_pump_buffers {
    const uint64_t *memory; /* CPU address of each buffer */
    const uint64_t *bus;    /* its bus address */
    uint32_t size;          /* bytes of one buffer */
    uint32_t count;
};

/* Written by the pump's thread only, readable at any time. */
struct gpv_pump_counters {
    uint64_t rx_packets, rx_bytes, rx_dropped, rx_interrupts;
    uint64_t tx_packets, tx_bytes, tx_dropped, tx_interrupts;
    uint64_t tx_reminders, wakeups;
};

struct gpv_pump_config {
    struct gpv_queue *rx, *tx;
    int32_t tap_fd;
    int32_t stop_fd;
    int32_t rx_fd, tx_fd; /* eventfds of the queues' interrupts, -1: spin */
    struct gpv_pump_buffers rx_buffers, tx_buffers;
    uint32_t header;    /* bytes of the virtio header, the TAP's too */
    uint32_t mergeable; /* MRG_RXBUF was negotiated */
};

enum gpv_pump_error { GPV_PUMP_ERRNO = -1000 };

struct gpv_pump;

/* NULL when memory is short. The config's arrays must outlive the pump. */
struct gpv_pump *gpv_pump_new(const struct gpv_pump_config *config);
void gpv_pump_free(struct gpv_pump *pump);

/* Runs until stop_fd is written: 0. A queue that the device broke: its negative GPV_E code.
 * A failed system call: GPV_PUMP_ERRNO - errno. Owns both queues from then on. */
int32_t gpv_pump_run(struct gpv_pump *pump);
const struct gpv_pump_counters *gpv_pump_counters(const struct gpv_pump *pump);
