/* The TAP pump: one queue pair of a network device wired to one TAP queue (5.1.9).
 *
 * Frames go from the device's receive buffers to the TAP file descriptor and back without a copy of
 * ours: the system calls work on DMA memory. One thread runs one pump and is the only one to touch its
 * two virtqueues.
 */
#ifndef GPV_PUMP_H
#define GPV_PUMP_H
#include <stdint.h>
#include "queue.h"
#include "pump.cdef.h"
#endif
