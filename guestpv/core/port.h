/* A network port: one queue pair of a network device with its buffers (5.1.9), used by one thread.
 *
 * Received frames are put together from their buffers and checked here, whoever gets them: the TAP pump,
 * which hands them to a system call where they lie, or a table of the library's user.
 */
#ifndef GPV_PORT_H
#define GPV_PORT_H
#include <stdint.h>
#include <sys/uio.h>
#include "queue.h"
#include "port.cdef.h"

enum {
    GPV_PORT_BURST = 64,
    GPV_PORT_FRAGMENTS = 64, /* 64 KiB in the smallest receive buffers that we make, and some */
};

/* Gets a whole frame with its virtio header in the first fragment. Returns what became of it. */
enum gpv_fate { GPV_DELIVERED, GPV_DROPPED, GPV_MALFORMED };
typedef enum gpv_fate gpv_deliver(void *user, struct iovec *frame, uint32_t fragments, uint32_t bytes);

/* Takes at most `max` used receive buffers, which is at most GPV_PORT_BURST, and delivers the frames in them. Returns how
 * many buffers, or a negative code. */
int32_t gpv_port_take(struct gpv_port *port, uint32_t max, gpv_deliver *deliver, void *user);
/* Milliseconds that the rest of a frame may still be missing; negative: no frame is coming in. */
int32_t gpv_port_patience(const struct gpv_port *port);

/* A transmit buffer that the device does not have, NULL when it has all of them. */
uint8_t *gpv_port_buffer(struct gpv_port *port);
uint32_t gpv_port_buffer_size(const struct gpv_port *port);
/* Gives the device the buffer just asked for, with `bytes` of header and frame in it. 1: given (publish later), 0: dropped
 * as no frame that may be sent, or a negative code. */
int32_t gpv_port_give(struct gpv_port *port, uint32_t bytes);
/* Takes back the transmit buffers that the device is done with. 0, or a negative code. */
int32_t gpv_port_reclaim(struct gpv_port *port);
#endif
