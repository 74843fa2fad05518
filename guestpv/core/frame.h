#ifndef GPV_FRAME_H
#define GPV_FRAME_H
#include <stdint.h>
#include "frame.cdef.h"
#endif
