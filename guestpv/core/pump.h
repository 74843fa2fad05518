/* The TAP pump: a network port wired to one TAP queue.
 *
 * Frames go from the device's receive buffers to the TAP file descriptor and back without a copy of
 * ours: the system calls work on DMA memory. One thread runs one pump and is the only one to touch its
 * two virtqueues.
 */
#ifndef GPV_PUMP_H
#define GPV_PUMP_H
#include <stdint.h>
#include "port.h"
#include "pump.cdef.h"
#endif
