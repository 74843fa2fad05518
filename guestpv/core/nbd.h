/* The NBD export: one connection of the kernel's network block device wired to one queue of a disk (5.2.6).
 *
 * Data goes between the socket and DMA memory in one system call, without a copy of ours except for what arrived
 * together with a request's header. One thread runs one export and is the only one to touch its virtqueue. A request
 * of the client is cut into as many virtio requests as it needs data buffers, so that device limits on segments are
 * honoured by the size of those buffers alone; it is answered once, when the last of them is back.
 */
#ifndef GPV_NBD_H
#define GPV_NBD_H
#include <stdint.h>
#include "blk.h"
#include "queue.h"
#include "nbd.cdef.h"
#endif
