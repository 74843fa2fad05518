/* Written by the pump's thread only, readable at any time. */
struct gpv_pump_counters {
    uint64_t rx_interrupts, tx_interrupts, tx_reminders, wakeups;
    uint64_t capture_lost; /* frames that whoever captures did not take in time */
};

struct gpv_pump_config {
    struct gpv_port *port;
    struct gpv_queue *rx, *tx; /* the port's */
    int32_t tap_fd;
    int32_t stop_fd;
    int32_t rx_fd, tx_fd; /* eventfds of the queues' interrupts, -1: spin */
    uint32_t rx_number;   /* of the receive queue */
    uint32_t header;      /* bytes of the virtio header, the TAP's too */
};

enum gpv_pump_error { GPV_PUMP_ERRNO = -1000 };

struct gpv_pump;

/* NULL when memory is short. */
struct gpv_pump *gpv_pump_new(const struct gpv_pump_config *config);
void gpv_pump_free(struct gpv_pump *pump);

/* Runs until stop_fd is written: 0. A queue that the device broke: its negative GPV_E or GPV_PORT_E code.
 * A failed system call: GPV_PUMP_ERRNO - errno. Owns both queues from then on. */
int32_t gpv_pump_run(struct gpv_pump *pump);
const struct gpv_pump_counters *gpv_pump_counters(const struct gpv_pump *pump);

enum gpv_captured_way { GPV_CAPTURED_RX = 1, GPV_CAPTURED_TX = 2 };
/* What comes before each captured frame; the virtio header and the frame follow it. */
struct gpv_captured {
    uint64_t nanoseconds; /* since the epoch */
    uint32_t way;
    uint32_t header;      /* bytes of the virtio header */
    uint32_t bytes;       /* of header and frame */
    uint32_t pair;
};
/* Has the pump send a copy of every frame, as a message of its own, to this socket, which is the pump's from then on; -1:
 * no more. Callable from any thread. */
void gpv_pump_capture(struct gpv_pump *pump, int32_t fd);
