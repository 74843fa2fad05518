#ifndef GPV_BLK_H
#define GPV_BLK_H
#include <stdint.h>
#include "queue.h"
#include "blk.cdef.h"
#endif
